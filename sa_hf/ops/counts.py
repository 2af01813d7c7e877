"""How many keys each query reads, from a plan alone: lonely rows, density and the papers' cost formulas."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sa_hf.ops.parts import BAND, FULL, Band, BlockPart, Index, OffsetsPart, Part, SegmentPart


def row_counts(parts: Sequence[Part], query_length: int, num_heads: int, device: torch.device | str = "cpu") -> Tensor:
    """Keys per query position, repeats counted, int64 ``[num_heads, query_length]`` (for plans without a batch)."""
    total = torch.zeros(num_heads, query_length, dtype=torch.int64, device=device)
    for part in parts:
        counts = _slot_counts(part, device).expand(num_heads, -1)
        index = part.query_index
        if index is None:
            total += counts
        elif isinstance(index, slice):
            total[:, index] += counts
        else:
            rows = index[0].expand(num_heads, -1)
            total.scatter_add_(1, rows.clamp(min=0), torch.where(rows >= 0, counts, 0))
    return total


def _slot_counts(part: Part, device: torch.device | str) -> Tensor:
    """Keys per query slot, int64 ``[H_l, query_slots]``."""
    if isinstance(part, OffsetsPart):
        i = torch.arange(part.length, device=device)
        inside = (i >= part.begin) & (i < part.stop)
        rows = []
        for offsets in part.offsets:
            j = i[:, None] - torch.tensor(offsets, dtype=torch.int64, device=device)
            rows.append(((j >= part.begin) & (j < part.stop)).sum(1) * inside)
        return torch.stack(rows)
    if isinstance(part, SegmentPart):
        return _segment_counts(part, device)
    return _block_counts(part, device)


def _segment_counts(part: SegmentPart, device: torch.device | str) -> Tensor:
    slot = torch.arange(part.query_slots, device=device)
    segment, a = slot // part.query_segment, slot % part.query_segment
    size = (part.key_slots - segment * part.key_segment).clamp(0, part.key_segment)
    counts = _band_counts(part.band, a, torch.zeros_like(a), size)
    if part.skip_diagonal:
        counts = counts - ((a < size) & part.band.contains(a, a)).long()
    if not isinstance(part.key_index, Tensor):
        return counts[None]
    # Empty key slots (-1) stand anywhere: subtract those that the band would have read.
    empty = part.key_index[0] < 0
    if not bool(empty.any()):
        return counts[None].expand(empty.shape[0], -1)
    padded = torch.nn.functional.pad(empty.long().cumsum(1), (1, 0))
    low, high = _band_range(part.band, a, torch.zeros_like(a), size)
    begin = segment * part.key_segment
    missing = padded[:, (begin + high).clamp(max=part.key_slots)] - padded[:, (begin + low).clamp(max=part.key_slots)]
    if part.skip_diagonal:
        own = (begin + a).clamp(max=part.key_slots - 1)
        missing = missing - (empty[:, own] & (a < size) & (a >= low) & (a < high)).long()
    return counts[None] - missing


def _band_range(band: Band, i: Tensor, first: Tensor, size: Tensor) -> tuple[Tensor, Tensor]:
    """The keys ``low <= j < high`` of ``[first, first + size)`` inside the band of query ``i``."""
    low, high = first, first + size
    if band.left is not None:
        low = torch.maximum(low, i - band.left)
    if band.right is not None:
        high = torch.minimum(high, i + band.right + 1)
    return low, torch.maximum(low, high)


def _band_counts(band: Band, i: Tensor, first: Tensor, size: Tensor) -> Tensor:
    low, high = _band_range(band, i, first, size)
    return high - low


def _block_counts(part: BlockPart, device: torch.device | str) -> Tensor:
    layout = part.layout
    rows = torch.repeat_interleave(torch.arange(len(layout.row_start) - 1, device=device), layout.row_start.diff())
    query_block = rows % layout.num_query_blocks
    slot = query_block[:, None] * layout.block_q + torch.arange(layout.block_q, device=device)
    first = layout.columns.long()[:, None] * layout.block_k
    size = (layout.key_slots - first).clamp(0, layout.block_k)
    counts = torch.where(layout.kind[:, None] == FULL, size.expand_as(slot), 0)
    banded = layout.kind == BAND
    counts[banded] = _band_counts(layout.band, slot[banded], first[banded], size[banded])
    masked = layout.kind >= 0
    if bool(masked.any()):
        counts[masked] = layout.masks.sum(-1)[layout.kind[masked].long()]
    total = torch.zeros(len(layout.row_start) - 1, layout.block_q, dtype=torch.int64, device=device)
    total.index_add_(0, rows, counts)
    return total.view(layout.batch, layout.heads, -1)[0, :, : layout.query_slots]


def kept_pairs(parts: Sequence[Part], query_length: int, num_heads: int) -> int:
    """Query-key pairs that a plan computes over all its heads, repeats counted."""
    return int(row_counts(parts, query_length, num_heads).sum())


__all__ = ["Index", "kept_pairs", "row_counts"]
