"""The tiles of a part, in batches of one shape. Every query slot stands once in a batch at most; a key slot may stand
in many of its tiles.

Shapes: T tiles of a batch, a query slots and m key slots of each; a size of 1 is shared by all tiles.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from sa_hf.ops.lanes import Lanes
from sa_hf.ops.parts import BAND, FULL, BlockLayout, BlockPart, OffsetsPart, Part, SegmentPart

# Of a batch: scores (2 MB in fp32), and elements of its queries or keys (4 MB): temporaries stay near the cache.
SCORES, ELEMENTS = 2**19, 2**20
# Query slots of a segment's tiles, and the most key slots of any tile: longer rows are merged from several.
SEGMENT_ROWS, RUN_KEYS = 64, 1024


@dataclass(frozen=True, eq=False)
class Tiles:
    """``lanes [T]``, ``query_slots [T, a]``, ``key_slots [T, m]``, all int64; ``kept``: the pairs that the part keeps,
    bool ``[T | 1, a | 1, m]``, None where all."""

    lanes: Tensor
    query_slots: Tensor
    key_slots: Tensor
    kept: Tensor | None


def tiles_of(part: Part, lanes: Lanes, key_slots: int, head_dim: int) -> Iterator[Tiles]:
    """All batches of a part; ``key_slots``: those of the key tensor."""
    if isinstance(part, BlockPart):
        return _of_blocks(part.layout, lanes, head_dim)
    if isinstance(part, SegmentPart):
        return _of_segments(part, lanes, head_dim)
    return _of_offsets(part, lanes, key_slots, head_dim)


def _at_once(rows: int, keys: int, head_dim: int) -> int:
    """How many tiles of ``rows x keys`` a batch may have, at least 1."""
    return max(1, min(SCORES // (rows * keys), ELEMENTS // (max(rows, keys) * head_dim)))


def _of_blocks(layout: BlockLayout, lanes: Lanes, head_dim: int) -> Iterator[Tiles]:
    """Rows with equally many key tiles together, long ones in runs of ``RUN_KEYS`` keys."""
    device, blocks = layout.row_start.device, layout.num_query_blocks
    # Of every lane's every query block: its list.
    row = lanes.lists(lanes.ids, layout.batch, layout.heads)[:, None] * blocks + torch.arange(blocks, device=device)
    begin = layout.row_start[row.flatten()]
    count = layout.row_start[row.flatten() + 1] - begin
    most = max(1, RUN_KEYS // layout.block_k)
    longest = int(count.max()) if len(count) else 0
    for first in range(0, longest, most):
        lengths = (count - first).clamp(0, most)
        for length in lengths.unique().tolist():
            if length == 0:
                continue
            chosen = torch.nonzero(lengths == length).flatten()
            for at in chosen.split(_at_once(layout.block_q, length * layout.block_k, head_dim)):
                entries = (begin[at] + first)[:, None] + torch.arange(length, device=device)
                yield _block_tiles(layout, lanes, at // blocks, at % blocks, entries)


def _block_tiles(layout: BlockLayout, all_lanes: Lanes, lanes: Tensor, blocks: Tensor, entries: Tensor) -> Tiles:
    """The tiles of query ``blocks [T]`` with the list ``entries [T, c]``."""
    columns, kind = layout.columns[entries].long(), layout.kind[entries]
    i = blocks[:, None] * layout.block_q + torch.arange(layout.block_q, device=entries.device)
    j = (columns[:, :, None] * layout.block_k + torch.arange(layout.block_k, device=entries.device)).flatten(1)
    kept = None
    if bool((kind != FULL).any()):
        of_key = kind.repeat_interleave(layout.block_k, 1)[:, None]
        kept = (of_key != BAND) | layout.band.contains(i[:, :, None], j[:, None])
        kept &= (j < layout.key_slots)[:, None]
        if bool((kind >= 0).any()):
            masks = layout.masks[kind.clamp(min=0).long()].transpose(1, 2).flatten(2)
            kept &= masks | (of_key < 0)
    if layout.key_range is not None:
        # Of the block's queries; those past the end have what the last one has.
        batch, heads, slots, _ = layout.key_range.shape
        at = all_lanes.lists(lanes, batch, heads)[:, None] * slots + i.clamp(max=slots - 1)
        low, high = layout.key_range.reshape(-1, 2)[at].unbind(-1)
        inside = (j[:, None] >= low[:, :, None]) & (j[:, None] < high[:, :, None])
        kept = inside if kept is None else kept & inside
    return Tiles(lanes, i, j, kept)


def _of_segments(part: SegmentPart, lanes: Lanes, head_dim: int) -> Iterator[Tiles]:
    """The same rectangle of all segments together; the last segment, where it is short, on its own."""
    qs, ks = part.query_segment, part.key_segment
    whole = min(part.query_slots // qs, part.key_slots // ks)
    last_q, last_k = min(qs, part.query_slots - whole * qs), min(ks, part.key_slots - whole * ks)
    for first, count, rows, columns in ((0, whole, qs, ks), (whole, 1, last_q, last_k)):
        if min(count, rows, columns) <= 0:
            continue
        for a, b in _rectangles(part, rows, columns):
            i, j = (torch.arange(x.start, x.stop, device=lanes.device) for x in (a, b))
            kept = part.band.contains(i[:, None], j)
            if part.skip_diagonal:
                kept = kept & (i[:, None] != j)
            everything = bool(kept.all())
            tiles = torch.arange(lanes.count * count, device=lanes.device)
            for at in tiles.split(_at_once(len(a), len(b), head_dim)):
                segment = (first + at % count)[:, None]
                yield Tiles(at // count, segment * qs + i, segment * ks + j, None if everything else kept[None])


def _rectangles(part: SegmentPart, rows: int, columns: int) -> Iterator[tuple[range, range]]:
    """Query runs of a segment, each with runs of the keys that its band can reach."""
    band = part.band
    for begin in range(0, rows, SEGMENT_ROWS):
        end = min(begin + SEGMENT_ROWS, rows)
        low = 0 if band.left is None else max(0, begin - band.left)
        high = columns if band.right is None else min(columns, end + band.right)
        for first in range(low, high, RUN_KEYS):
            yield range(begin, end), range(first, min(first + RUN_KEYS, high))


def _of_offsets(part: OffsetsPart, lanes: Lanes, key_slots: int, head_dim: int) -> Iterator[Tiles]:
    """A tile for each query, with the keys at its offsets."""
    by_head = lanes.ids.view(lanes.batch, lanes.heads)
    sets = [by_head.flatten()] if len(part.offsets) == 1 else list(by_head.unbind(1))
    for chosen, own in zip(sets, part.offsets, strict=True):
        if not own:
            continue
        offsets = torch.tensor(own, dtype=torch.int64, device=lanes.device)
        queries = torch.arange(len(chosen) * part.length, device=lanes.device)
        for at in queries.split(_at_once(1, len(own), head_dim)):
            i = (at % part.length)[:, None]
            j = i - offsets
            kept = (i >= part.begin) & (i < part.stop) & (j >= part.begin) & (j < part.stop) & (j < key_slots)
            yield Tiles(chosen[at // part.length], i, j.clamp(0, key_slots - 1), kept[:, None])
