"""Cut a part into batches of equal tiles: ``T`` query tiles of ``a`` slots, each with its ``m`` key slots.

Every query slot lies in at most one tile; a key slot may lie in many.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from sa_hf.ops.native.lanes import Lanes
from sa_hf.ops.parts import BAND, Band, BlockLayout, BlockPart, SegmentPart


class TileBatch(Protocol):
    """``T`` tiles of one shape. The tensors read and written are ``[lanes, padded slots, ...]`` on the query side,
    ``[key lanes, padded slots, ...]`` on the key side."""

    @property
    def lanes(self) -> Tensor:
        """int64 ``[T]``"""
        ...

    @property
    def query_slots(self) -> Tensor:
        """int64 ``[T | 1, a]``"""
        ...

    @property
    def key_slots(self) -> Tensor:
        """int64 ``[T | 1, m]``"""
        ...

    def mask(self) -> Tensor | None:
        """The pairs that the part keeps, bool ``[T | 1, a, m]``; None where all."""
        ...

    def queries(self, x: Tensor) -> Tensor:
        """``[T, a, ...]``"""
        ...

    def write_queries(self, target: Tensor, x: Tensor) -> None: ...

    def keys(self, x: Tensor) -> Tensor:
        """``[T, m, ...]``"""
        ...

    def add_keys(self, target: Tensor, x: Tensor) -> None: ...


# -- block lists ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class RowGroup:
    """The list rows with one number of key tiles, ascending; ``masked`` where a row has a partial tile.

    Shapes: rows int64 ``[R]``, columns int64 ``[R, c]``, mask_id int64 ``[R, c]`` (into ``BlockGroups.table``).
    """

    rows: Tensor
    columns: Tensor
    mask_id: Tensor
    masked: bool


@dataclass(frozen=True, eq=False)
class BlockGroups:
    """A layout's rows by shape, and the element masks of its partial tiles, bool ``[P, block_q, block_k]``
    (entry 0 keeps everything)."""

    groups: tuple[RowGroup, ...]
    table: Tensor


_GROUPS: WeakKeyDictionary[BlockLayout, BlockGroups] = WeakKeyDictionary()


def block_groups(layout: BlockLayout) -> BlockGroups:
    """The groups of a layout, computed at its first use."""
    known = _GROUPS.get(layout)
    if known is None:
        known = _GROUPS[layout] = _group_rows(layout)
    return known


def _group_rows(layout: BlockLayout) -> BlockGroups:
    device = layout.columns.device
    counts = layout.row_start.diff()
    rows_of = torch.repeat_interleave(torch.arange(len(counts), device=device), counts)
    mask_id, table = _mask_table(layout, rows_of)
    partial = torch.zeros(len(counts), dtype=torch.int64, device=device)
    partial.scatter_reduce_(0, rows_of, (mask_id > 0).long(), "amax")
    groups = []
    for shape in torch.unique(counts * 2 + partial).tolist():
        count, masked = shape // 2, bool(shape % 2)
        if count == 0:
            continue
        rows = torch.nonzero((counts == count) & (partial == masked)).flatten()
        entries = layout.row_start[rows][:, None] + torch.arange(count, device=device)
        groups.append(RowGroup(rows, layout.columns[entries].long(), mask_id[entries], masked))
    return BlockGroups(tuple(groups), table)


def _mask_table(layout: BlockLayout, rows_of: Tensor) -> tuple[Tensor, Tensor]:
    """Per list entry the number of its element mask (0: full), and the masks; band tiles of one shape share one."""
    device = layout.columns.device
    bq, bk = layout.block_q, layout.block_k
    column = layout.columns.long()
    shift = (rows_of % layout.num_query_blocks) * bq - column * bk
    at_end = (column + 1) * bk > layout.key_slots
    banded = layout.kind == BAND
    code, inverse = torch.unique(shift[banded] * 2 + at_end[banded], return_inverse=True)
    i = (code // 2)[:, None, None] + torch.arange(bq, device=device)[:, None]
    j = torch.arange(bk, device=device)
    bands = layout.band.contains(i, j)
    last = layout.key_slots - (layout.num_key_blocks - 1) * bk
    bands &= (code % 2 == 0)[:, None, None] | (j < last)
    full = torch.ones(1, bq, bk, dtype=torch.bool, device=device)
    table = torch.cat([full, bands, layout.masks])
    mask_id = torch.where(layout.kind >= 0, layout.kind.long() + 1 + len(code), 0)
    whole = bands.flatten(1).all(1)
    mask_id[banded] = torch.where(whole[inverse], 0, inverse + 1)
    return mask_id, table


@dataclass(frozen=True, eq=False)
class BlockTiles:
    """Query tiles of a block layout: ``blocks [T]`` and ``columns [T, c]`` number the tiles of their lanes."""

    layout: BlockLayout
    all_lanes: Lanes
    lanes: Tensor
    blocks: Tensor
    columns: Tensor
    mask_id: Tensor
    table: Tensor | None

    @property
    def query_slots(self) -> Tensor:
        size = self.layout.block_q
        return self.blocks[:, None] * size + torch.arange(size, device=self.blocks.device)

    @property
    def key_slots(self) -> Tensor:
        size = self.layout.block_k
        return (self.columns[:, :, None] * size + torch.arange(size, device=self.blocks.device)).flatten(1)

    def mask(self) -> Tensor | None:
        kept = None
        if self.table is not None:
            # [T, c, bq, bk] -> [T, bq, c * bk]
            kept = self.table[self.mask_id].transpose(1, 2).flatten(2)
        if self.layout.key_range is not None:
            inside = self._in_range(self.layout.key_range)
            kept = inside if kept is None else kept & inside
        return kept

    def _in_range(self, key_range: Tensor) -> Tensor:
        batch, heads, slots, _ = key_range.shape
        lists = list_of(self.all_lanes, self.lanes, batch, heads)
        row = key_range.view(batch * heads, slots, 2)[lists[:, None], self.query_slots.clamp(max=slots - 1)]
        keys = self.key_slots[:, None, :]
        return (keys >= row[..., 0:1]) & (keys < row[..., 1:2])

    def queries(self, x: Tensor) -> Tensor:
        return self._query_tiles(x).index_select(0, self._query_rows)

    def write_queries(self, target: Tensor, x: Tensor) -> None:
        self._query_tiles(target).index_copy_(0, self._query_rows, x)

    def keys(self, x: Tensor) -> Tensor:
        tiles = self._key_tiles(x).index_select(0, self._key_rows)
        return tiles.view(len(self.blocks), -1, *x.shape[2:])

    def add_keys(self, target: Tensor, x: Tensor) -> None:
        tiles = self._key_tiles(target)
        tiles.index_add_(0, self._key_rows, x.reshape(-1, *tiles.shape[1:]))

    @property
    def _query_rows(self) -> Tensor:
        return self.lanes * self.layout.num_query_blocks + self.blocks

    @property
    def _key_rows(self) -> Tensor:
        lanes = self.all_lanes.key_lanes(self.lanes)
        return (lanes[:, None] * self.layout.num_key_blocks + self.columns).flatten()

    def _query_tiles(self, x: Tensor) -> Tensor:
        return x.view(-1, self.layout.block_q, *x.shape[2:])

    def _key_tiles(self, x: Tensor) -> Tensor:
        return x.view(-1, self.layout.block_k, *x.shape[2:])


def list_of(all_lanes: Lanes, lanes: Tensor, batch: int, heads: int) -> Tensor:
    """The list that each lane reads, among ``batch * heads`` lists; 1 is shared by all."""
    lists = torch.zeros_like(lanes)
    if batch > 1:
        lists = all_lanes.batch_of(lanes) * heads
    if heads > 1:
        lists = lists + all_lanes.head_of(lanes)
    return lists


def block_tiles(part: BlockPart, all_lanes: Lanes, budget: int) -> Iterator[BlockTiles]:
    """Batches of at most about ``budget`` scores; the tiles of a lane follow each other."""
    layout = part.layout
    known = block_groups(layout)
    lists = list_of(all_lanes, all_lanes.ids, layout.batch, layout.heads)
    for group in known.groups:
        lanes, rows = _spread(group.rows // layout.num_query_blocks, lists, layout.batch * layout.heads)
        blocks = group.rows % layout.num_query_blocks
        tile = layout.block_q * layout.block_k * group.columns.shape[1]
        step = max(1, budget // tile)
        for begin in range(0, len(lanes), step):
            at = rows[begin : begin + step]
            yield BlockTiles(
                layout, all_lanes, lanes[begin : begin + step], blocks[at], group.columns[at], group.mask_id[at],
                known.table if group.masked else None,
            )  # fmt: skip


def _spread(list_of_row: Tensor, list_of_lane: Tensor, lists: int) -> tuple[Tensor, Tensor]:
    """Every (lane, row) with the row in the lane's list, lane by lane; rows are sorted by list."""
    per_list = torch.bincount(list_of_row, minlength=lists)
    first = per_list.cumsum(0) - per_list
    per_lane = per_list[list_of_lane]
    lanes = torch.repeat_interleave(torch.arange(len(list_of_lane), device=list_of_lane.device), per_lane)
    within = torch.arange(len(lanes), device=lanes.device) - (per_lane.cumsum(0) - per_lane)[lanes]
    return lanes, first[list_of_lane[lanes]] + within


# -- segments ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class SegmentTiles:
    """Query slots ``rows`` and key slots ``columns`` (of each segment) of the segments ``first .. first + count`` of
    the lanes ``lane_begin .. lane_end``."""

    part: SegmentPart
    all_lanes: Lanes
    lane_begin: int
    lane_end: int
    first: int
    count: int
    rows: range
    columns: range

    @property
    def lanes(self) -> Tensor:
        return self.all_lanes.ids[self.lane_begin : self.lane_end].repeat_interleave(self.count)

    @property
    def query_slots(self) -> Tensor:
        return self._slots(self.part.query_segment, self.rows)

    @property
    def key_slots(self) -> Tensor:
        return self._slots(self.part.key_segment, self.columns)

    def _slots(self, segment: int, run: range) -> Tensor:
        device = self.all_lanes.device
        starts = torch.arange(self.first, self.first + self.count, device=device) * segment
        slots = starts[:, None] + torch.arange(run.start, run.stop, device=device)
        return slots.repeat(self.lane_end - self.lane_begin, 1)

    def mask(self) -> Tensor | None:
        rows, columns, band = self.rows, self.columns, self.part.band
        past_left = band.left is not None and rows.stop - 1 - columns.start > band.left
        past_right = band.right is not None and columns.stop - 1 - rows.start > band.right
        diagonal = self.part.skip_diagonal and rows.start < columns.stop and columns.start < rows.stop
        if not (past_left or past_right or diagonal):
            return None
        device = self.all_lanes.device
        i = torch.arange(rows.start, rows.stop, device=device)[:, None]
        j = torch.arange(columns.start, columns.stop, device=device)
        kept = band.contains(i, j)
        return (kept & (i != j) if self.part.skip_diagonal else kept)[None]

    def queries(self, x: Tensor) -> Tensor:
        return self._view(x, self.part.query_segment, self.rows, self.lane_begin, self.lane_end).flatten(0, 1)

    def write_queries(self, target: Tensor, x: Tensor) -> None:
        view = self._view(target, self.part.query_segment, self.rows, self.lane_begin, self.lane_end)
        view.copy_(x.view(view.shape))

    def keys(self, x: Tensor) -> Tensor:
        if self.all_lanes.group == 1:
            return self._view(x, self.part.key_segment, self.columns, self.lane_begin, self.lane_end).flatten(0, 1)
        view = self._view(x, self.part.key_segment, self.columns, 0, x.shape[0])
        return view[self._key_lanes].flatten(0, 1)

    def add_keys(self, target: Tensor, x: Tensor) -> None:
        if self.all_lanes.group == 1:
            view = self._view(target, self.part.key_segment, self.columns, self.lane_begin, self.lane_end)
            view += x.view(view.shape)
            return
        view = self._view(target, self.part.key_segment, self.columns, 0, target.shape[0])
        view.index_add_(0, self._key_lanes, x.view(-1, *view.shape[1:]))

    @property
    def _key_lanes(self) -> Tensor:
        return self.all_lanes.key_lanes(self.all_lanes.ids[self.lane_begin : self.lane_end])

    def _view(self, x: Tensor, segment: int, run: range, lane_begin: int, lane_end: int) -> Tensor:
        """``[lanes, count, len(run), ...]``"""
        lanes = x[lane_begin:lane_end]
        begin = self.first * segment
        if self.count == 1:
            return lanes[:, None, begin + run.start : begin + run.stop]
        whole = lanes[:, begin : begin + self.count * segment]
        whole = whole.view(len(whole), self.count, segment, *x.shape[2:])
        return whole[:, :, run.start : run.stop]


# Query slots of a tile where a band bounds its keys: more rows compute more pairs outside the band, fewer rows use
# the matrix product worse.
BAND_ROWS = 128
LEAST_ROWS = 16


def segment_tiles(part: SegmentPart, all_lanes: Lanes, budget: int) -> Iterator[SegmentTiles]:
    """Batches of at most about ``budget`` scores."""
    qs, ks = part.query_segment, part.key_segment
    whole = min(part.query_slots // qs, part.key_slots // ks)
    shapes = [(0, whole, qs, ks)]
    last_q, last_k = min(qs, part.query_slots - whole * qs), min(ks, part.key_slots - whole * ks)
    if last_q > 0 and last_k > 0:
        shapes.append((whole, 1, last_q, last_k))
    for first, count, rows, columns in shapes:
        for a, b in _segment_rectangles(part.band, rows, columns, budget):
            tile = len(a) * len(b)
            segments = max(1, min(count, budget // tile))
            lanes = max(1, budget // (tile * segments))
            for lane in range(0, all_lanes.count, lanes):
                lane_end = min(lane + lanes, all_lanes.count)
                for s in range(first, first + count, segments):
                    yield SegmentTiles(part, all_lanes, lane, lane_end, s, min(segments, first + count - s), a, b)


def _segment_rectangles(band: Band, rows: int, columns: int, budget: int) -> Iterator[tuple[range, range]]:
    """Query runs of a segment with the keys that their band can reach."""
    step = min(rows, max(LEAST_ROWS, budget // columns))
    if not band.unbounded:
        step = min(step, BAND_ROWS)
    for begin in range(0, rows, step):
        end = min(begin + step, rows)
        low = 0 if band.left is None else max(0, begin - band.left)
        high = columns if band.right is None else min(columns, end + band.right)
        if low < high:
            yield range(begin, end), range(low, high)
