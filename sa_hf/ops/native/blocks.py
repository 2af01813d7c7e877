"""Block lists as batches of tiles: rows with equally many key tiles together, gathered by tile number."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from sa_hf.ops.native.lanes import Lanes
from sa_hf.ops.native.masks import outside, words
from sa_hf.ops.native.tiles import Budget
from sa_hf.ops.parts import BAND, BlockLayout
from sa_hf.ops.slots import share_of


@dataclass(frozen=True, eq=False)
class BlockTiles:
    """Query tiles ``blocks [T]`` of their lanes, with their key tiles ``columns [T, c]``.

    ``masks``: the element masks of the layout's partial tiles, bool ``[P, block_q, block_k]``, chosen by ``mask_id
    [T | 1, c]``; None where every tile is full. ``key_range``: as in ``BlockLayout``.
    ``query_run`` is the first of the query tiles where they follow each other, ``key_run`` the first key tile and the
    step from one row's to the next where each row's key tiles do: then slices serve instead of gathers.
    ``continues``: other key tiles of the same query tiles have been attended before.
    """

    all_lanes: Lanes
    block_q: int
    block_k: int
    lanes: Tensor
    blocks: Tensor
    columns: Tensor
    mask_id: Tensor
    masks: Tensor | None
    key_range: Tensor | None
    query_tiles: Tensor
    key_tiles: Tensor
    query_run: int | None
    key_run: tuple[int, int] | None
    continues: bool

    triangular = False

    @property
    def query_slots(self) -> Tensor:
        return self.blocks[:, None] * self.block_q + torch.arange(self.block_q, device=self.blocks.device)

    @property
    def key_slots(self) -> Tensor:
        inner = torch.arange(self.block_k, device=self.blocks.device)
        return (self.columns[:, :, None] * self.block_k + inner).flatten(1)

    def mask(self) -> Tensor | None:
        mask = self._tile_mask
        if self.key_range is not None:
            beyond = self._out_of_range(self.key_range)
            mask = beyond if mask is None else mask | beyond
        return mask

    @property
    def _tile_mask(self) -> Tensor | None:
        if self.masks is None:
            return None
        if len(self.mask_id) == 1:
            return self._shared_mask
        return _joined(self.masks, self.mask_id)

    @cached_property
    def _shared_mask(self) -> Tensor | None:
        """Kept with the tiles: masks of their own would hold 4 bytes per pair of the whole pattern."""
        return None if self.masks is None else _joined(self.masks, self.mask_id)

    def _out_of_range(self, key_range: Tensor) -> Tensor:
        batch, heads, slots, _ = key_range.shape
        first = list_of(self.all_lanes, self.lanes, batch, heads) * slots
        at = first[:, None] + self.query_slots.clamp_(max=slots - 1)
        row = key_range.reshape(-1, 2).index_select(0, at.flatten()).view(*at.shape, 2)
        return outside(self.key_slots[:, None, :].to(row.dtype), row[..., 0:1], row[..., 1:2])

    def queries(self, x: Tensor) -> Tensor:
        tiles = x.view(-1, self.block_q, *x.shape[2:])
        if self.query_run is not None:
            return tiles[self.query_run : self.query_run + len(self.blocks)]
        return tiles.index_select(0, self.query_tiles)

    def write_result(self, out: Tensor, lse: Tensor, tile_out: Tensor, tile_lse: Tensor) -> None:
        if self.continues:
            before = self.queries(lse)
            share = share_of(before, tile_lse).unsqueeze(-1)
            tile_out, tile_lse = torch.lerp(self.queries(out), tile_out, share), torch.logaddexp(before, tile_lse)
        self._write(out, tile_out)
        self._write(lse, tile_lse)

    def write_gradient(self, target: Tensor, x: Tensor) -> None:
        self._write(target, self.queries(target) + x if self.continues else x)

    def _write(self, target: Tensor, x: Tensor) -> None:
        tiles = target.view(-1, self.block_q, *target.shape[2:])
        if self.query_run is not None:
            tiles[self.query_run : self.query_run + len(self.blocks)] = x
        else:
            tiles.index_copy_(0, self.query_tiles, x)

    def keys(self, x: Tensor) -> Tensor:
        count, width = self.columns.shape
        if self.key_run is not None:
            first, step = self.key_run
            tile = self.block_k * x.stride(1)
            shape = (count, width * self.block_k, *x.shape[2:])
            return x.as_strided(shape, (step * tile, *x.stride()[1:]), x.storage_offset() + first * tile)
        tiles = x.view(-1, self.block_k, *x.shape[2:]).index_select(0, self.key_tiles)
        return tiles.view(count, -1, *x.shape[2:])

    def add_keys(self, target: Tensor, x: Tensor) -> None:
        tiles = target.view(-1, self.block_k, *target.shape[2:])
        tiles.index_add_(0, self.key_tiles, x.reshape(-1, *tiles.shape[1:]))


def _joined(masks: Tensor, mask_id: Tensor) -> Tensor:
    """Words ``[T, block_q, c * block_k]``."""
    return words(masks[mask_id].transpose(1, 2).flatten(2))


def list_of(all_lanes: Lanes, lanes: Tensor, batch: int, heads: int) -> Tensor:
    """The list that each lane reads, among ``batch * heads`` lists; 1 is shared by all."""
    lists = torch.zeros_like(lanes)
    if batch > 1:
        lists = all_lanes.batch_of(lanes) * heads
    if heads > 1:
        lists = lists + all_lanes.head_of(lanes)
    return lists


# -- from a layout to batches of tiles -----------------------------------------------------------------------------

# A layout serves the layers of one model, so calls of one or two shapes; each costs 8 bytes per listed tile and lane.
SHAPES_CACHED = 4

# A longer row is attended in runs of so many keys: its K and V stay in the cache, and rows of many lengths (those of
# global and summary keys) fall into few batches.
RUN_KEYS = 1024

_Shape = tuple[int, int, int, Budget]
_KNOWN: WeakKeyDictionary[BlockLayout, dict[_Shape, list[BlockTiles]]] = WeakKeyDictionary()


def block_tiles(layout: BlockLayout, all_lanes: Lanes, budget: Budget) -> list[BlockTiles]:
    """The batches of a layout for a call's lanes, lane after lane; kept while the layout lives."""
    known = _KNOWN.setdefault(layout, {})
    shape = (all_lanes.batch, all_lanes.heads, all_lanes.kv_heads, budget)
    if shape not in known:
        while len(known) >= SHAPES_CACHED:
            known.pop(next(iter(known)))
        known[shape] = _batches(layout, all_lanes, budget)
    return known[shape]


def _batches(layout: BlockLayout, all_lanes: Lanes, budget: Budget) -> list[BlockTiles]:
    runs = _Runs.of(layout)
    mask_id, masks = mask_table(layout, runs.row_of_entry)
    partial = torch.zeros_like(runs.row)
    partial.scatter_reduce_(0, runs.run_of_entry, (mask_id > 0).long(), "amax")
    lists = list_of(all_lanes, all_lanes.ids, layout.batch, layout.heads)
    lengths = max(1, RUN_KEYS // layout.block_k) + 1
    kind = (runs.number * lengths + runs.length) * 2 + partial
    kinds, sizes = torch.unique(kind, return_counts=True)
    of_kind = torch.sort(kind, stable=True).indices.split(sizes.tolist())
    result: list[BlockTiles] = []
    # In ascending order: a row's first run before those that continue it.
    for code, chosen in zip(kinds.tolist(), of_kind, strict=True):
        (number, length), masked = divmod(code // 2, lengths), code % 2
        rows = runs.row[chosen]
        entries = runs.begin[chosen][:, None] + torch.arange(length, device=kind.device)
        lanes, at = _spread(rows // layout.num_query_blocks, lists, layout.batch * layout.heads)
        whole = BlockTiles(
            all_lanes, layout.block_q, layout.block_k, lanes, (rows % layout.num_query_blocks)[at],
            layout.columns[entries].long()[at], mask_id[entries][at], masks if masked else None, layout.key_range,
            lanes, lanes, None, None, number > 0,
        )  # fmt: skip
        result += _cut(whole, layout, budget.tiles(layout.block_q, layout.block_k * length))
    return result


@dataclass(frozen=True, eq=False)
class _Runs:
    """Rows cut into runs of at most ``RUN_KEYS`` keys, int64 ``[runs]`` each: the row, the first list entry, the number
    of entries, and the run's number in its row (0, or 1 for all that are shorter than a whole run: one at most in a
    row, so that a query tile lies once among the runs of one number and length)."""

    row: Tensor
    begin: Tensor
    length: Tensor
    number: Tensor
    row_of_entry: Tensor
    run_of_entry: Tensor

    @classmethod
    def of(cls, layout: BlockLayout) -> _Runs:
        most = max(1, RUN_KEYS // layout.block_k)
        counts = layout.row_start.diff()
        runs = (counts + most - 1) // most
        rows = torch.arange(len(counts), device=counts.device)
        row, row_of_entry = torch.repeat_interleave(rows, runs), torch.repeat_interleave(rows, counts)
        first = runs.cumsum(0) - runs
        number = torch.arange(len(row), device=counts.device) - first[row]
        begin = layout.row_start[row] + number * most
        length = (layout.row_start[row + 1] - begin).clamp(max=most)
        entry = torch.arange(len(row_of_entry), device=counts.device) - layout.row_start[row_of_entry]
        run_of_entry = first[row_of_entry] + entry // most
        return cls(
            row, begin, length, torch.where(length < most, number.clamp(max=1), number), row_of_entry, run_of_entry
        )


def _cut(whole: BlockTiles, layout: BlockLayout, step: int) -> list[BlockTiles]:
    """Batches of at most ``step`` tiles; where a lane has more, a batch keeps to one lane."""
    lanes = whole.all_lanes
    query_tiles = whole.lanes * layout.num_query_blocks + whole.blocks
    key_tiles = lanes.key_lanes(whole.lanes)[:, None] * layout.num_key_blocks + whole.columns
    bounds = _bounds(torch.bincount(whole.lanes, minlength=lanes.count).tolist(), step)
    consecutive = (key_tiles.diff(dim=1) == 1).all(1).tolist()
    first_query, first_key = query_tiles.tolist(), key_tiles[:, 0].tolist()
    same_mask = (whole.mask_id[1:] == whole.mask_id[:-1]).all(1).tolist()
    result = []
    for begin, end in pairwise(bounds):
        part = slice(begin, end)
        query_run = first_query[begin] if first_query[end - 1] - first_query[begin] == end - 1 - begin else None
        mask_id = whole.mask_id[begin : begin + 1] if all(same_mask[begin : end - 1]) else whole.mask_id[part]
        tiles = replace(
            whole, lanes=whole.lanes[part], blocks=whole.blocks[part], columns=whole.columns[part], mask_id=mask_id,
            query_tiles=query_tiles[part], key_tiles=key_tiles[part].flatten(), query_run=query_run,
            key_run=_key_run(first_key[part], consecutive[part]),
        )  # fmt: skip
        result.append(tiles)
    return result


def _bounds(tiles_of_lane: list[int], step: int) -> list[int]:
    """Where the batches begin and end: lanes of few tiles share one, lanes of many have several of their own."""
    bounds, last = [0], 0
    for tiles in tiles_of_lane:
        end = last + tiles
        if end - bounds[-1] > step:
            bounds += [last] if last > bounds[-1] else []
            if tiles > step:
                bounds += [*range(last + step, end, step), end]
        last = end
    return bounds if bounds[-1] == last else [*bounds, last]


def _key_run(first: list[int], consecutive: list[bool]) -> tuple[int, int] | None:
    """The first key tile and the step between rows, where each row's tiles are consecutive and the steps equal."""
    steps = {b - a for a, b in pairwise(first)} or {1}
    if not all(consecutive) or len(steps) > 1 or min(steps) < 0:
        return None
    return first[0], steps.pop()


def _spread(list_of_row: Tensor, list_of_lane: Tensor, lists: int) -> tuple[Tensor, Tensor]:
    """Every (lane, row) with the row in the lane's list, lane by lane; rows are sorted by list."""
    if lists == len(list_of_lane):  # each lane has its own
        return list_of_row, torch.arange(len(list_of_row), device=list_of_row.device)
    per_list = torch.bincount(list_of_row, minlength=lists)
    first = per_list.cumsum(0) - per_list
    per_lane = per_list[list_of_lane]
    lanes = torch.repeat_interleave(torch.arange(len(list_of_lane), device=list_of_lane.device), per_lane)
    within = torch.arange(len(lanes), device=lanes.device) - (per_lane.cumsum(0) - per_lane)[lanes]
    return lanes, first[list_of_lane[lanes]] + within


def mask_table(layout: BlockLayout, rows_of: Tensor) -> tuple[Tensor, Tensor]:
    """Per list entry the number of its element mask (0: full), and the masks bool ``[P, block_q, block_k]``; band
    tiles of one shape share one."""
    device = layout.columns.device
    bq, bk = layout.block_q, layout.block_k
    full = torch.ones(1, bq, bk, dtype=torch.bool, device=device)
    if layout.key_range is not None and layout.band.unbounded and len(layout.masks) == 0:  # the ranges say it all
        return torch.zeros_like(rows_of), full
    # Lists made from data have spare entries at the end, which belong to no row.
    column, kind = layout.columns[: len(rows_of)].long(), layout.kind[: len(rows_of)]
    shift = (rows_of % layout.num_query_blocks) * bq - column * bk
    at_end = (column + 1) * bk > layout.key_slots
    banded = kind == BAND
    code, inverse = torch.unique(shift[banded] * 2 + at_end[banded], return_inverse=True)
    i = (code // 2)[:, None, None] + torch.arange(bq, device=device)[:, None]
    j = torch.arange(bk, device=device)
    bands = layout.band.contains(i, j)
    last = layout.key_slots - (layout.num_key_blocks - 1) * bk
    bands &= (code % 2 == 0)[:, None, None] | (j < last)
    mask_id = torch.where(kind >= 0, kind.long() + 1 + len(code), 0)
    whole = bands.flatten(1).all(1)
    mask_id[banded] = torch.where(whole[inverse], 0, inverse + 1)
    return mask_id, torch.cat([full, bands, layout.masks])
