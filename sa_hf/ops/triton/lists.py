"""Work lists of the kernels: a layout's tiles by query row, by key column and by tile diagonal, cut into items.

Built on the layout's device by one kernel (``list_kernel``), once per layout object. A list is cut into items of at
most T tiles; an item of a list that was cut has a slot, writes an fp32 partial there, and the slots are reduced in a
fixed order. Pieces of long lists go first; where the host may read lengths, items are sorted by theirs. Within an item
the full tiles stand before those that need a predicate.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from sa_hf.errors import SparseAttentionError
from sa_hf.ops.graphs import capturing, settled
from sa_hf.ops.parts import BAND, FULL, BlockLayout, SegmentPart
from sa_hf.ops.triton.device import interpreting

UNBOUNDED = 1 << 30
TILES = (16, 32, 64, 128)
# A list is cut at T = max(16, min(2 * mean length, all / 32)) tiles: regular lists stay whole (no partials), a global
# row or column becomes many items, and a layout of one long row still fills the machine (32 items per head). Where the
# host does not know the lengths, partials are allotted for the worst case: longer items keep those few.
SMALLEST_CUT = 16
ITEMS_WANTED = 32
LISTS_PER_PROGRAM, TILES_PER_STEP = 16, 128  # of the kernel that builds them
MEANS_PER_ITEM, MEANS_PER_ITEM_UNREAD = 2, 8


class WorkSizes(NamedTuple):
    """A :class:`WorkList` in numbers: its items, the lists that were cut, and the partials per repetition."""

    items: int
    splits: int
    slots: int


@dataclass(frozen=True, eq=False)
class WorkList:
    """Args:
    items: int32 ``[n, 5]``: row, begin, middle, end, slot. Tiles ``begin .. middle`` of ``entries`` are full, those
        up to ``end`` are not; slot is -1 for a whole list. Row -1 is an unused item.
    entries: int64, the lower half what stands on the other side of a tile, the upper its ``BlockLayout.kind``.
    splits: int32 ``[m, 3]``: row, first slot, number of slots of each list that was cut; row -1 is unused.
    slots: partials in all, per repetition of the list over heads and batch.
    """

    items: Tensor
    entries: Tensor
    splits: Tensor
    slots: int

    @cached_property
    def sizes(self) -> WorkSizes:
        return WorkSizes(len(self.items), len(self.splits), self.slots)


class Tiling(NamedTuple):
    """:class:`TileLists` in numbers: all that a launch depends on but the lists themselves."""

    query_slots: int
    key_slots: int
    tile_q: int
    tile_k: int
    batch: int
    heads: int
    ranges: tuple[int, ...] | None
    range_on_full: bool
    left: int
    right: int

    @property
    def query_tiles(self) -> int:
        return -(-self.query_slots // self.tile_q)

    @property
    def key_tiles(self) -> int:
        return -(-self.key_slots // self.tile_k)


@dataclass(eq=False)
class TileLists:
    """What the block kernels need of a layout; shapes as in :class:`BlockLayout`, and ``row`` int64 ``[entries]``.

    ``words`` are the element masks packed along the keys, int32 ``[P * tile_q, ceil(tile_k / 32)]`` or None;
    ``ranges`` int32 ``[B_l, H_l, query_slots, 2 | 3]`` (low, high and, where given, one key slot to skip).
    """

    query_slots: int
    key_slots: int
    tile_q: int
    tile_k: int
    batch: int
    heads: int
    row_start: Tensor
    row: Tensor
    columns: Tensor
    kind: Tensor
    words: Tensor | None
    ranges: Tensor | None
    range_on_full: bool
    left: int = UNBOUNDED
    right: int = UNBOUNDED
    longest: int | None = None
    _cache: dict[tuple[str, int], WorkList] = field(default_factory=dict)

    @cached_property
    def tiling(self) -> Tiling:
        return Tiling(
            self.query_slots, self.key_slots, self.tile_q, self.tile_k, self.batch, self.heads,
            None if self.ranges is None else tuple(self.ranges.shape), self.range_on_full, self.left, self.right,
        )  # fmt: skip

    @property
    def query_tiles(self) -> int:
        return self.tiling.query_tiles

    @property
    def key_tiles(self) -> int:
        return self.tiling.key_tiles

    def by_query(self) -> WorkList:
        """Row ``(batch * H_l + head) * query_tiles + query tile``; an entry is a key tile."""
        return self._cached("query", 1)

    def by_key(self, flat: int, group: int) -> WorkList:
        """Row ``(batch * L + list) * key_tiles + key tile``; an entry is ``head * query_tiles + query tile``, where
        head counts inside the ``flat`` query heads of the list. L is 1 where heads share the layout."""
        if flat not in (1, group):
            raise ValueError(f"flat={flat} must be 1 or the group size {group}")
        return self._cached("key", flat)

    def by_diagonal(self) -> WorkList:
        """Row ``(batch * H_l + head) * diagonals + query tile - key tile + key_tiles - 1``; entries are query tiles."""
        return self._cached("diagonal", 1)

    def _cached(self, name: str, flat: int) -> WorkList:
        known = self._cache.get((name, flat))
        if known is None:
            build = {"query": self._by_query, "key": self._by_key, "diagonal": self._by_diagonal}[name]
            known = build(flat)
            if not capturing(self.columns):
                if self.longest is None:  # lists made from data serve one call, and nothing may wait for them
                    settled(known.items)
                self._cache[name, flat] = known
        return known

    def _by_query(self, flat: int) -> WorkList:
        return self._work_list("BY_QUERY", self.batch * self.heads, 1, self.query_tiles, self.longest)

    def _by_key(self, flat: int) -> WorkList:
        longest = None if self.longest is None else self.longest * flat
        shared = self.heads == 1
        groups = self.batch * (1 if shared else self.heads // flat)
        return self._work_list("BY_KEY", groups, 1 if shared else flat, self.key_tiles, longest, flat if shared else 1)

    def _by_diagonal(self, flat: int) -> WorkList:
        longest = None if self.longest is None else min(self.query_tiles, self.key_tiles)
        diagonals = self.query_tiles + self.key_tiles - 1
        return self._work_list("BY_DIAGONAL", self.batch * self.heads, 1, diagonals, longest)

    def _work_list(
        self, mode: str, groups: int, sources: int, rows: int, longest: int | None, repeats: int = 1
    ) -> WorkList:
        """Make ``rows`` lists of each run of ``sources`` lists of the layout, each tile ``repeats`` times.

        Args: longest: given where no number may be read from the device; no list has more tiles.
        """
        from sa_hf.ops.triton.launch import build_options
        from sa_hf.ops.triton.list_kernel import MODES, list_kernel

        device, total = self.columns.device, self.columns.numel() * repeats
        reads = longest is None and not (capturing(self.columns) or recording(self.columns))
        means = MEANS_PER_ITEM if longest is None else MEANS_PER_ITEM_UNREAD
        cut = max(SMALLEST_CUT, min(means * -(-total // max(groups * rows, 1)), total // ITEMS_WANTED))
        # A list of c tiles makes at most c // cut + 1 pieces, and is cut only if c > cut.
        most = 0 if longest is not None and longest <= cut else total // cut
        # One buffer, filled once: items, splits, counters, each from a 16-byte boundary.
        places = [0]
        for size in (5 * (2 * most + groups * rows), 3 * most, 2):
            places.append(places[-1] + -(-size // 4) * 4)
        buffer = torch.full((places[-1],), -1, dtype=torch.int32, device=device)
        items = buffer[: 5 * (2 * most + groups * rows)].view(-1, 5)
        splits = buffer[places[1] :][: 3 * most].view(-1, 3)
        counters = buffer[places[2] :][:2]
        entries = torch.empty(max(total, 1), dtype=torch.int64, device=device)
        chunks = -(-rows // LISTS_PER_PROGRAM)
        list_kernel[(groups * chunks,)](
            self.row_start, self.row, self.columns, self.kind, entries, items, splits, counters, sources, repeats,
            chunks, rows, self.query_tiles, self.key_tiles, self.query_slots, self.key_slots, self.tile_q, self.tile_k,
            cut, 2 * most, MODE=MODES[mode], ROWS=LISTS_PER_PROGRAM, TILES=TILES_PER_STEP,
            **build_options(),
        )  # fmt: skip
        if not reads:
            return WorkList(items, entries, splits, 2 * most)
        slots, cut_lists = (counters + 1).tolist()
        items = items[2 * most - slots :]
        length = torch.where(items[:, 0] >= 0, items[:, 3] - items[:, 1], -1)
        order = torch.sort(length, descending=True, stable=True).indices[: len(items) - cut_lists]
        return WorkList(items[order], entries, splits[:cut_lists].clone(), slots)


def recording(x: Tensor) -> bool:
    """Whether launches are recorded without being run (``record``): what the kernels make is not there to be read."""
    return not x.is_cuda and not interpreting()


_LISTS: weakref.WeakKeyDictionary[BlockLayout, TileLists] = weakref.WeakKeyDictionary()


def layout_lists(layout: BlockLayout) -> TileLists:
    """The lists of a layout; kept as long as the layout lives."""
    lists = _LISTS.get(layout)
    if lists is None:
        for name, tile in (("block_q", layout.block_q), ("block_k", layout.block_k)):
            if tile not in TILES:
                nearest = min(TILES, key=lambda t: abs(t - tile))
                raise SparseAttentionError(f"{name}={tile} must be one of {TILES} for the kernels; nearest: {nearest}")
        index = torch.arange(layout.columns.numel(), device=layout.columns.device)
        lists = TileLists(
            layout.query_slots, layout.key_slots, layout.block_q, layout.block_k, layout.batch, layout.heads,
            layout.row_start, torch.searchsorted(layout.row_start, index, right=True) - 1, layout.columns.int(),
            layout.kind.int(),
            pack_masks(layout.masks) if len(layout.masks) else None,
            None if layout.key_range is None else layout.key_range.int().clone(), True,
            UNBOUNDED if layout.band.left is None else layout.band.left,
            UNBOUNDED if layout.band.right is None else layout.band.right, layout.longest,
        )  # fmt: skip
        if not capturing(lists.columns):
            if lists.longest is None:
                settled(lists.columns)
            _LISTS[layout] = lists
    return lists


def pack_masks(masks: Tensor) -> Tensor:
    """Bool ``[P, tile_q, tile_k]`` to bits along the keys, int32 ``[P * tile_q, ceil(tile_k / 32)]``."""
    words = -(-masks.shape[2] // 32)
    bits = torch.nn.functional.pad(masks, (0, words * 32 - masks.shape[2])).view(-1, words, 32).long()
    packed = (bits << torch.arange(32, device=masks.device)).sum(-1)
    return (packed - ((packed >> 31) << 32)).int().contiguous()


def segment_lists(part: SegmentPart, device: torch.device) -> TileLists:
    """The lists of a segment part: block-diagonal tiles and a key range per query slot."""
    return _segment_lists(
        part.query_slots, part.key_slots, part.query_segment, part.key_segment, part.band.left, part.band.right,
        part.skip_diagonal, device,
    )  # fmt: skip


# A model has a few segment shapes per length (branches, strides); an entry is some bytes per slot.
@lru_cache(maxsize=256)
def _segment_lists(
    n_q: int, n_k: int, q_segment: int, k_segment: int, left: int | None, right: int | None, skip: bool,
    device: torch.device,
) -> TileLists:  # fmt: skip
    # 128-row tiles read K and V half as often; they fit where segments are whole multiples of them, or alone.
    alone = q_segment >= n_q and k_segment >= n_k
    fits = q_segment % 128 == 0 and k_segment % 128 == 0
    tile = 128 if fits or (alone and min(n_q, n_k) >= 256) else 64
    slot = torch.arange(n_q)
    segment, place = slot // q_segment, slot % q_segment
    base = segment * k_segment
    size = (n_k - base).clamp(0, k_segment)
    low = torch.zeros_like(place) if left is None else (place - left).clamp(min=0)
    high = size if right is None else torch.minimum(size, (place + right + 1).clamp(min=0))
    empty = high <= low
    low, high = (torch.where(empty, 0, base + x) for x in (low, high))
    own = torch.where(place < size, base + place, -1) if skip else torch.full_like(slot, -1)
    tiles = -(-n_q // tile)
    pad = tiles * tile - n_q

    def per_tile(x: Tensor, fill: int) -> Tensor:
        return torch.nn.functional.pad(x, (0, pad), value=fill).view(tiles, tile)

    first = per_tile(low.masked_fill(empty, n_k), n_k).amin(1) // tile
    last = -(-per_tile(high, 0).amax(1) // tile)
    count = (last - first).clamp(min=0)
    row = torch.repeat_interleave(torch.arange(tiles), count)
    column = first[row] + torch.arange(len(row)) - (count.cumsum(0) - count)[row]
    whole = (per_tile(low, n_k).amax(1)[row] <= column * tile) & (per_tile(high, 0).amin(1)[row] >= (column + 1) * tile)
    if skip:
        spot = per_tile(own, -1)
        whole &= ~((spot[row] // tile) == column[:, None]).any(1)
    kind = torch.where(whole, FULL, BAND).int()
    row_start = torch.nn.functional.pad(count.cumsum(0), (1, 0))
    ranges = torch.stack([low, high, own], 1).int()[None, None].contiguous()
    moved = [x.to(device) for x in (row_start, row, column.int(), kind, ranges)]
    settled(moved[-1])
    # Equal segments of whole tiles: no tile crosses a segment, and the band says all that the key range would.
    banded = (alone or (q_segment == k_segment and q_segment % tile == 0)) and not skip
    return TileLists(
        n_q, n_k, tile, tile, 1, 1, moved[0], moved[1], moved[2], moved[3], None, None if banded else moved[4], False,
        left if banded and left is not None else UNBOUNDED, right if banded and right is not None else UNBOUNDED,
    )  # fmt: skip
