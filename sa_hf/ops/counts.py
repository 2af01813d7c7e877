"""How many keys each query reads, from a plan alone: lonely rows, density and the papers' cost formulas."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sa_hf.ops.parts import FULL, Band, BlockLayout, BlockPart, Index, OffsetsPart, Part, SegmentPart

# Partial tiles counted at once: bounds the memory of a long plan (64 rows each).
TILES_COUNTED_AT_ONCE = 1 << 16


def row_counts(parts: Sequence[Part], query_length: int, num_heads: int, device: torch.device | str = "cpu") -> Tensor:
    """Keys per query position, repeats counted, int64 ``[num_heads, query_length]``.

    For the plans of static patterns: no batch dimension, and empty key slots (-1) in segment parts alone.
    """
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
            ordered = torch.tensor(sorted(offsets), dtype=torch.int64, device=device)
            reached = torch.searchsorted(ordered, i - part.begin, right=True)
            rows.append((reached - torch.searchsorted(ordered, i - part.stop, right=True)) * inside)
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
    whole = layout.kind == FULL
    sizes = (layout.key_slots - layout.columns[whole].long() * layout.block_k).clamp(0, layout.block_k)
    full = torch.zeros(len(layout.row_start) - 1, dtype=torch.int64, device=device).index_add_(0, rows[whole], sizes)
    total = full[:, None].repeat(1, layout.block_q)
    mask_counts = layout.masks.sum(-1)
    for at in torch.split(torch.nonzero(~whole).flatten(), TILES_COUNTED_AT_ONCE):
        total.index_add_(0, rows[at], _partial_counts(layout, at, rows[at], mask_counts))
    return total.view(layout.batch, layout.heads, -1)[0, :, : layout.query_slots]


def _partial_counts(layout: BlockLayout, at: Tensor, rows: Tensor, mask_counts: Tensor) -> Tensor:
    """Keys per query slot of the partial tiles ``at``, int64 ``[tiles, block_q]``."""
    slot = (rows % layout.num_query_blocks)[:, None] * layout.block_q + torch.arange(layout.block_q, device=at.device)
    first = layout.columns[at].long()[:, None] * layout.block_k
    size = (layout.key_slots - first).clamp(0, layout.block_k)
    counts = _band_counts(layout.band, slot, first.expand_as(slot), size.expand_as(slot))
    masked = layout.kind[at] >= 0
    counts[masked] = mask_counts[layout.kind[at][masked].long()]
    return counts


def kept_pairs(parts: Sequence[Part], query_length: int, num_heads: int) -> int:
    """Query-key pairs that a plan computes over all its heads, repeats counted."""
    return int(row_counts(parts, query_length, num_heads).sum())


__all__ = ["Index", "kept_pairs", "row_counts"]
