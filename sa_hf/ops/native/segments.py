"""Segments as batches of tiles: runs of a segment's queries with the keys that its band can reach, as slices."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from sa_hf.ops.native.lanes import Lanes
from sa_hf.ops.native.masks import words
from sa_hf.ops.native.tiles import Budget
from sa_hf.ops.parts import SegmentPart

# Query slots of a tile where a band bounds its keys: more rows compute more pairs outside the band, fewer rows use
# the matrix product worse (see tall.py; a triangle of 512 slots: 192 rows 5 to 8 % faster than 64).
BAND_ROWS = 192
NARROW_BAND, NARROW_ROWS = 512, 64
LEAST_ROWS = 16
# The flash op's own causal form computes whole blocks of 256 x 512 pairs: cutting a triangle up to this size into
# runs of 64 queries computes less (512 slots: 8.5 against 14.0 ms for 16 tiles on one core).
LARGEST_CUT_TRIANGLE = 4096


@dataclass(frozen=True, eq=False)
class SegmentTiles:
    """Query slots ``rows`` and key slots ``columns`` (of each segment) of the segments ``first .. first + count`` of
    the lanes ``lane_begin .. lane_end``; ``left_out`` the mask words ``[1, rows, columns]`` where the part leaves some
    out, None too where the tiles are ``triangular``."""

    part: SegmentPart
    all_lanes: Lanes
    lane_begin: int
    lane_end: int
    first: int
    count: int
    rows: range
    columns: range
    left_out: Tensor | None
    triangular: bool

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
        return self.left_out

    def queries(self, x: Tensor) -> Tensor:
        return self._view(x, self.part.query_segment, self.rows, self.lane_begin, self.lane_end).flatten(0, 1)

    def write_result(self, out: Tensor, lse: Tensor, tile_out: Tensor, tile_lse: Tensor) -> None:
        self.write_gradient(out, tile_out)
        self.write_gradient(lse, tile_lse)

    def write_gradient(self, target: Tensor, x: Tensor) -> None:
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


def segment_tiles(
    part: SegmentPart, all_lanes: Lanes, budget: Budget, *, whole_segments: bool
) -> Iterator[SegmentTiles]:
    """The batches of a part; ``whole_segments`` leaves a segment with all or a large triangle of its pairs uncut."""
    qs, ks = part.query_segment, part.key_segment
    whole = min(part.query_slots // qs, part.key_slots // ks)
    shapes = [(0, whole, qs, ks)]
    last_q, last_k = min(qs, part.query_slots - whole * qs), min(ks, part.key_slots - whole * ks)
    if last_q > 0 and last_k > 0:
        shapes.append((whole, 1, last_q, last_k))
    for first, count, rows, columns in shapes:
        if count == 0:
            continue
        for a, b in _rectangles(part, rows, columns, budget, whole_segments):
            triangular = whole_segments and _triangle(part, rows, columns)
            left_out = None if triangular else _left_out(part, a, b, all_lanes.device)
            tiles = budget.tiles(len(a), len(b))
            segments = min(count, tiles)
            # Whole lanes, or several segments of one lane, are a view; more would be a copy.
            lanes = max(1, tiles // count)
            for lane in range(0, all_lanes.count, lanes):
                lane_end = min(lane + lanes, all_lanes.count)
                for s in range(first, first + count, segments):
                    run = min(segments, first + count - s)
                    yield SegmentTiles(part, all_lanes, lane, lane_end, s, run, a, b, left_out, triangular)


def _rectangles(
    part: SegmentPart, rows: int, columns: int, budget: Budget, whole_segments: bool
) -> Iterator[tuple[range, range]]:
    """Query runs of a segment, each with the keys that its band can reach."""
    band = part.band
    everything = band.unbounded and not part.skip_diagonal
    if whole_segments and (everything or _triangle(part, rows, columns)):
        yield range(rows), range(columns)
        return
    step = min(rows, max(LEAST_ROWS, budget.scores // columns))
    if not band.unbounded or part.skip_diagonal:
        narrow = band.left is not None and band.left < NARROW_BAND
        step = min(step, NARROW_ROWS if narrow else BAND_ROWS)
    for begin in range(0, rows, step):
        end = min(begin + step, rows)
        low = 0 if band.left is None else max(0, begin - band.left)
        high = columns if band.right is None else min(columns, end + band.right)
        if low < high:
            yield range(begin, end), range(low, high)


def _triangle(part: SegmentPart, rows: int, columns: int) -> bool:
    """Whether a segment is a causal triangle so large that the flash op's own causal form serves it best."""
    band = part.band
    causal = band.right == 0 and (band.left is None or band.left >= rows - 1) and not part.skip_diagonal
    return causal and rows == columns > LARGEST_CUT_TRIANGLE


def _left_out(part: SegmentPart, rows: range, columns: range, device: torch.device) -> Tensor | None:
    """The pairs of a rectangle that the part keeps, words ``[1, rows, columns]``; None where all."""
    band = part.band
    past_left = band.left is not None and rows.stop - 1 - columns.start > band.left
    past_right = band.right is not None and columns.stop - 1 - rows.start > band.right
    diagonal = part.skip_diagonal and rows.start < columns.stop and columns.start < rows.stop
    if not (past_left or past_right or diagonal):
        return None
    i = torch.arange(rows.start, rows.stop, device=device)[:, None]
    j = torch.arange(columns.start, columns.stop, device=device)
    kept = band.contains(i, j)
    return words(kept & (i != j) if part.skip_diagonal else kept)[None]
