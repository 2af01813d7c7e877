"""Block lists that depend on data: which tiles still live, or a range of key slots per query slot.

On the CPU the lists have their exact length. Elsewhere that would cost a host sync, so they get a fixed capacity from
bounds that the host knows, and the entries past ``row_start[-1]`` belong to no row.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from sa_hf.ops.graphs import hold
from sa_hf.ops.parts import BAND, FULL, Band, BlockLayout, BlockPart, Part
from sa_hf.ops.planned import PlanData, plan_rule

BLOCK = 64
EXPIRING = "expiring"


def exact_lists(device: torch.device) -> bool:
    """Whether reading a length costs nothing, so that lists need no spare capacity."""
    return device.type == "cpu"


@lru_cache(maxsize=64)
def _band_tiles(
    query_slots: int, key_slots: int, left: int, block: int, device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """The tiles of a causal band: query block, key block, kind, each int64 ``[E]``, row by row."""
    offset = key_slots - query_slots
    first_query = torch.arange(0, query_slots, block, device=device) + offset
    last_query = (first_query + block - 1).clamp(max=key_slots - 1)
    first = (first_query - left).clamp(min=0) // block
    count = last_query // block - first + 1
    row = torch.repeat_interleave(torch.arange(len(count), device=device), count)
    column = first[row] + torch.arange(len(row), device=device) - (count.cumsum(0) - count)[row]
    whole = ((column + 1) * block - 1 <= first_query[row]) & (last_query[row] - column * block <= left)
    whole &= (row + 1) * block <= query_slots
    return row, column, torch.where(whole, FULL, BAND)


def expiring_layout(spans: Tensor, query_slots: int, ramp: float, left: int, block: int = BLOCK) -> BlockLayout:
    """The tiles of a causal band that hold a key some query of the tile still sees.

    A key ``j`` is dead for the queries ``i >= e_j + j + ramp``: there its gate and the gate's gradient are 0.

    Args:
        spans: ``[B, S, key_slots]``, the ``e_j``; the queries are the last ``query_slots`` positions.
        left: the largest ``i - j`` that the pattern and the model's window allow.
    """
    batch, heads, key_slots = spans.shape
    row, column, kind = tiles = _band_tiles(query_slots, key_slots, left, block, spans.device)
    hold(spans, tiles)
    position = torch.arange(key_slots, device=spans.device)
    # In fp64: at position 131,072 a sum in fp32 is 0.016 off, and would drop a key that still has a little weight.
    end = torch.nn.functional.pad(spans.double() + position + ramp, (0, -key_slots % block), value=-torch.inf)
    end = end.unflatten(-1, (-1, block)).amax(-1)
    alive = end[..., column] > row * block + (key_slots - query_slots)
    query_blocks = -(-query_slots // block)
    lists = torch.arange(batch * heads, device=spans.device).view(batch, heads, 1) * query_blocks
    counts = torch.zeros(batch * heads * query_blocks, dtype=torch.int64, device=spans.device)
    counts.index_add_(0, (lists + row).flatten(), alive.flatten().long())
    row_start = torch.nn.functional.pad(counts.cumsum(0), (1, 0))
    longest = None
    if exact_lists(spans.device):
        listed = torch.nonzero(alive.flatten()).flatten() % len(row)
        columns, kinds = column[listed], kind[listed]
    else:
        # The tiles that live move to the front, in order; the others go to one slot past the end.
        flat = alive.flatten()
        place = torch.where(flat, flat.cumsum(0) - 1, flat.numel())
        target = torch.zeros(2, flat.numel() + 1, dtype=torch.int64, device=spans.device)
        source = torch.stack([column, kind]).repeat(1, batch * heads)
        columns, kinds = target.scatter_(1, place.expand(2, -1), source)[:, :-1]
        # A tile of one side reads a run of block + left positions, which touches so many tiles of the other.
        longest = (left + 2 * block - 2) // block + 1
    offset = key_slots - query_slots
    return BlockLayout(
        query_slots, key_slots, block, block, batch, heads, row_start, columns.int(), kinds.int(),
        torch.zeros(0, block, block, dtype=torch.bool, device=spans.device), band=Band(left - offset, offset),
        longest=longest,
    )  # fmt: skip


@plan_rule(EXPIRING)
def _expiring_parts(data: PlanData) -> list[Part]:
    """Numbers: left. The spans are those of the options."""
    spans, left = data.options.spans, data.numbers[0]
    if spans is None or left is None:
        raise RuntimeError("the rule needs spans and a bound on the distance")
    return [BlockPart(expiring_layout(spans, data.query_length, data.options.ramp, left))]


def range_layout(low: Tensor, high: Tensor, key_slots: int, width: int, block: int = BLOCK) -> BlockLayout:
    """The tiles of ranges ``low <= slot < high`` of key slots per query slot.

    Args:
        low, high: int64 ``[B, H, query_slots]``, ``low <= high``, both ascending along the slots.
        width: no range is longer (the bound of the capacity).
    """
    batch, heads, query_slots = low.shape
    query_blocks = -(-query_slots // block)
    rows = batch * heads * query_blocks
    pad = query_blocks * block - query_slots

    def blocks(x: Tensor) -> Tensor:
        last = x[..., -1:].expand(-1, -1, pad)
        return torch.cat([x, last], dim=-1).view(rows, block)

    low_rows, high_rows = blocks(low), blocks(high)
    first, end = low_rows[:, 0] // block, (high_rows[:, -1] + block - 1) // block
    counts = torch.where(high_rows[:, -1] > low_rows[:, 0], end - first, 0)
    row_start = torch.nn.functional.pad(counts.cumsum(0), (1, 0))
    longest = None
    if exact_lists(low.device):
        capacity = int(row_start[-1])
    else:
        # Ascending ranges advance over the keys once: their lists hold each key block once, and once more per row
        # the blocks of one range.
        key_blocks = -(-key_slots // block)
        longest = max(key_blocks, query_blocks)
        capacity = batch * heads * (key_blocks + query_blocks * (-(-width // block) + 2))
    entry = torch.arange(capacity, device=low.device)
    row = (torch.searchsorted(row_start, entry, right=True) - 1).clamp(max=rows - 1)
    column = torch.where(entry < row_start[-1], first[row] + entry - row_start[row], 0)
    whole = (low_rows[row, -1] <= column * block) & (high_rows[row, 0] >= (column + 1) * block)
    whole &= (row % query_blocks + 1) * block <= query_slots
    key_range = torch.stack([low, high], dim=-1).int()
    return BlockLayout(
        query_slots, key_slots, block, block, batch, heads, row_start, column.int(),
        torch.where(whole, FULL, BAND).int(), torch.zeros(0, block, block, dtype=torch.bool, device=low.device),
        key_range=key_range, longest=longest,
    )  # fmt: skip
