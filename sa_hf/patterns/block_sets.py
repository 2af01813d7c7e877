"""Blocks chosen by content as sets and parts: who may choose what, the choice by scores, and the plan that reads it."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from sa_hf.ops.data_layout import exact_lists, range_layout
from sa_hf.ops.parts import BAND, FULL, Band, BlockLayout, BlockPart, Part, SegmentPart
from sa_hf.ops.planned import PlanData, plan_rule
from sa_hf.patterns.selection import ranked

BLOCK_TOPK = "block_topk"  # rule of plans
TILES = (64, 32, 16)  # of the kernels: the largest that divides a block
WIDENED_AT_ONCE = 2**18  # 2 MB in fp64, which stay in the cache
SCORES_AT_ONCE = 2**22  # 32 MB in fp64: rows of scores are ranked in pieces of about so many


class BlockSets(NamedTuple):
    """Which blocks of ``block`` positions a query block always reads, and among which it chooses.

    Causal: the window is ``I - window + 1 .. I``, and the choice among ``J <= I - window``, which are complete. Else
    ``window`` is odd and lies around ``I``, and the choice is among all others. Sinks are the first ``sinks`` blocks.
    """

    block: int
    window: int
    sinks: int
    causal: bool

    def count(self, length: int) -> int:
        """Blocks of a sequence, the last one perhaps short."""
        return -(-length // self.block)

    def reach(self, own: Tensor) -> tuple[Tensor, Tensor]:
        """First and last block of the windows of the blocks ``own``, not cut to the sequence."""
        behind = self.window - 1 if self.causal else self.window // 2
        return own - behind, own if self.causal else own + behind

    def eligible(self, low: Tensor, high: Tensor, other: Tensor, band: Band) -> Tensor:
        """Whether the positions ``low .. high`` of one block, which choose together, may choose block ``other``: bool,
        broadcast. It must lie whole in the model's own window ``band`` of each: a cache may have dropped what does not.
        """
        first, last = self.reach(low // self.block)
        outside = other < first if self.causal else (other < first) | (other > last)
        chosen = outside & (other >= self.sinks)
        if band.left is not None:
            chosen = chosen & (high - other * self.block <= band.left)
        if band.right is not None and not self.causal:
            chosen = chosen & ((other + 1) * self.block - 1 - low <= band.right)
        return chosen

    def eligible_run(self, position: int, left: int | None) -> tuple[int, int]:
        """The first of the blocks that a causal row at ``position`` may choose, and the one behind the last."""
        first = self.sinks if left is None else max(self.sinks, -(-(position - left) // self.block))
        return first, max(first, position // self.block - self.window + 1)

    def always(self, own: Tensor, blocks: int) -> Tensor:
        """The sinks and the window of the blocks ``own [R]``, int64 ``[R, sinks + window]``: each block once, -1 where
        there is none. ``blocks`` is their number in the sequence."""
        first, last = (x[:, None] for x in self.reach(own))
        sinks = torch.arange(min(self.sinks, blocks), device=own.device).expand(len(own), -1)
        hidden = (sinks >= first) if self.causal else (sinks >= first) & (sinks <= last)
        window = first.clamp(min=0) + torch.arange(min(self.window, blocks), device=own.device)
        beyond = window > last.clamp(max=blocks - 1)
        return torch.cat([sinks.masked_fill(hidden, -1), window.masked_fill(beyond, -1)], dim=1)


# -- the choice ------------------------------------------------------------------------------------------------------


def block_means(x: Tensor, block: int) -> Tensor:
    """The mean over each block of ``x [G, C, m * block, D]``, fp64 ``[G, C, m, D]``: summed in fp64, so that it does
    not depend on how many blocks stand beside it."""
    blocks = x.unflatten(2, (-1, block))
    at_once = blocks.shape[2]
    if x.device.type == "cpu":  # torch copies the whole to fp64 first
        at_once = WIDENED_AT_ONCE * at_once // max(1, x.numel())
    pieces = [piece.mean(3, dtype=torch.float64) for piece in blocks.split(max(1, at_once), dim=2)]
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=2)


def pooled_keys(key: Tensor, block: int, pooling: str) -> Tensor:
    """The mean or elementwise maximum of the keys of each block, ``[G, Hkv, blocks, D]`` fp32 (fp64 of fp64 keys), the
    last block over its real keys."""
    stats = torch.promote_types(key.dtype, torch.float32)
    whole = key.shape[2] // block * block

    def pool(x: Tensor, size: int) -> Tensor:
        return x.unflatten(2, (-1, size)).amax(3) if pooling == "max" else block_means(x, size)

    made = [pool(key[:, :, :whole], block)] if whole else []
    if whole < key.shape[2]:
        made.append(pool(key[:, :, whole:], key.shape[2] - whole))
    if not made:
        return key.new_zeros(*key.shape[:2], 0, key.shape[3], dtype=stats)
    return torch.cat([x.to(stats) for x in made], dim=2)


def block_queries(query: Tensor, start: int, first: int, count: int, block: int) -> Tensor:
    """The mean query of each of the ``count`` blocks from ``first`` on, fp64 ``[G, C, count, D]``; 0 of a block
    before the sequence.

    Args:
        query: ``[G, C, m, D]``, the queries at positions ``start .. start + m - 1``; those before count as 0.
    """
    end = min((first + count) * block, start + query.shape[2])
    lead = 1 if first < 0 else 0
    low = (first + lead) * block
    inside = query[:, :, max(0, low - start) : max(low, end) - start]
    if start > low:
        inside = torch.nn.functional.pad(inside, (0, 0, start - low, 0))
    whole = inside.shape[2] // block * block
    made = [torch.zeros(*query.shape[:2], lead, query.shape[3], dtype=torch.float64, device=query.device)]
    if whole:
        made.append(block_means(inside[:, :, :whole], block))
    if whole < inside.shape[2]:
        made.append(block_means(inside[:, :, whole:], inside.shape[2] - whole))
    return torch.cat(made, dim=2)


def choose_blocks(
    vectors: Tensor, pooled: Tensor, rows: tuple[Tensor, Tensor], sets: BlockSets, band: Band, top_k: int
) -> Tensor:
    """The ``top_k`` eligible blocks with the highest scores: ascending int64 ``[G, C, R, k]``, ``k = min(top_k,
    blocks)``, -1 behind them where there are fewer. Equal scores go to the lower index.

    Products are summed in fp64 and rounded to the precision of the pooled keys: equal keys get equal scores wherever
    they stand, and a step of decoding the scores of the whole forward.

    Args:
        vectors: ``[G, C, R, D]``; pooled: ``[G, C, blocks, D]``.
        rows: int64 ``[R]``, the first and the last position that each vector chooses for; band: the model's own window.
    """
    blocks = pooled.shape[2]
    index = torch.arange(blocks, device=vectors.device)
    k, at_once = min(top_k, blocks), max(1, SCORES_AT_ONCE // max(1, blocks * vectors.shape[0] * vectors.shape[1]))
    columns = pooled.double().transpose(-1, -2)
    found = []
    for some, low, high in zip(vectors.split(at_once, dim=2), *(x.split(at_once) for x in rows), strict=True):
        allowed = sets.eligible(low[:, None], high[:, None], index, band)
        scores = (some.double() @ columns).to(pooled.dtype)
        scores = scores.clamp(min=torch.finfo(scores.dtype).min).masked_fill(~allowed, -torch.inf)
        if scores.dtype == torch.float64:
            best = torch.sort(scores, dim=-1, descending=True, stable=True).indices[..., :k]
        else:
            best = torch.topk(ranked(scores), k, dim=-1).indices
        taken = allowed.expand(scores.shape).gather(-1, best)
        best = torch.where(taken, best, blocks).sort(dim=-1).values
        found.append(torch.where(best < blocks, best, -1))
    return torch.cat(found, dim=2)


# -- the plan --------------------------------------------------------------------------------------------------------


@plan_rule(BLOCK_TOPK)
def plan_parts(data: PlanData) -> list[Part]:
    """Tensors: the chosen blocks, int64 ``[G, H, R, k]``, -1 for none; R are the query blocks, or the queries.
    Numbers: block, window, sinks, causal, whether rows choose one by one, drop_diagonal, the model's window."""
    block, window, sinks, causal, by_row, drop_diagonal = (int(x or 0) for x in data.numbers[:6])
    # Config files come from anywhere: what lies beyond the sequence is no part of a layout's size.
    block = min(block, -(-data.key_length // TILES[0]) * TILES[0])
    blocks = -(-data.key_length // block)
    sets = BlockSets(block, min(window, 2 * blocks + 1), min(sinks, blocks), bool(causal))
    band = Band(*data.numbers[6:])
    (chosen,) = data.tensors
    band = band.causal_if(bool(causal))
    if causal and data.query_length == 1:
        return last_row_plan(chosen[:, :, 0], sets, data.key_length, band.left, bool(drop_diagonal))
    if not by_row and not drop_diagonal and block % TILES[-1] == 0:
        return list_plan(chosen, sets, data.query_length, data.key_length, band)
    if not by_row:
        position = torch.arange(data.key_length - data.query_length, data.key_length, device=chosen.device)
        own = position // block
        chosen = chosen[:, :, own - (data.key_length - data.query_length) // block]
    return range_plan(chosen, sets, data.key_length, band, bool(drop_diagonal))


def last_row_plan(chosen: Tensor, sets: BlockSets, length: int, left: int | None, drop_diagonal: bool) -> list[Part]:
    """What the last position of ``length`` reads, key by key; chosen int64 ``[G, H, k]``. Nothing else is touched."""
    last, block = length - 1, min(sets.block, length)
    own = torch.full((1,), last // sets.block, device=chosen.device)
    always = sets.always(own, sets.count(length))[0].expand(*chosen.shape[:2], -1)
    listed = torch.cat([always, chosen], dim=-1)[..., None]
    keys = listed * sets.block + torch.arange(block, device=chosen.device)
    kept = (listed >= 0) & (keys <= last)
    if left is not None:
        kept = kept & (last - keys <= left)
    if drop_diagonal:
        others = kept & (keys < last)
        kept = others | (kept & ~others.any(dim=(-2, -1), keepdim=True))
    index = torch.where(kept, keys, -1).flatten(2)
    slots = index.shape[-1]
    return [SegmentPart(1, slots, 1, slots, key_index=index)]


def list_plan(chosen: Tensor, sets: BlockSets, query_length: int, key_length: int, band: Band) -> list[Part]:
    """Lists of tiles per query block: sinks, window and chosen blocks together. Blocks are whole numbers of tiles.

    Query slots begin at the start of the first query's block, so that blocks are rows of tiles in a cache, too.
    """
    offset = key_length - query_length
    first = offset // sets.block
    empty = offset - first * sets.block
    query_index = None
    if empty:
        slot = torch.arange(query_length + empty, device=chosen.device)
        query_index = (slot - empty).clamp(min=-1)[None, None]
    layout = block_lists(chosen, sets, query_length + empty, key_length, band, first)
    return [BlockPart(layout, query_index=query_index)]


def block_lists(
    chosen: Tensor, sets: BlockSets, query_slots: int, key_slots: int, band: Band, first: int
) -> BlockLayout:
    """The layout of :func:`list_plan`: query slot 0 is the first position of block ``first``."""
    batch, heads, rows, _ = chosen.shape
    device, block = chosen.device, sets.block
    tile = next(t for t in TILES if block % t == 0)
    per_block, start = block // tile, first * block
    own = torch.arange(first, first + rows, device=device)
    always = sets.always(own, sets.count(key_slots)).expand(batch, heads, -1, -1)
    listed = torch.cat([always, chosen], dim=-1)
    listed = torch.where(listed < 0, key_slots, listed).sort(dim=-1).values  # no block has that number: tiles are >= 1
    within = torch.arange(per_block, device=device)
    column = (listed[..., None] * per_block + within).flatten(3)[:, :, :, None]  # [G, H, R, 1, entries]
    row = (torch.arange(rows, device=device)[:, None] * per_block + within)[:, :, None]  # [R, tiles of a block, 1]
    query_tiles = -(-query_slots // tile)
    low, high = row * tile + start, ((row + 1) * tile - 1 + start).clamp(max=start + query_slots - 1)
    kept = (column * tile < key_slots) & (row < query_tiles)
    whole = (column + 1) * tile <= key_slots
    whole = whole & ((row + 1) * tile <= query_slots)
    if band.right is not None:
        kept = kept & (column * tile <= high + band.right)
        whole = whole & ((column + 1) * tile - 1 <= low + band.right)
    if band.left is not None:
        kept = kept & ((column + 1) * tile - 1 >= low - band.left)
        whole = whole & (column * tile >= high - band.left)
    shape = (batch, heads, rows * per_block, column.shape[-1])
    kept, whole, column = (x.expand(*shape[:2], rows, per_block, -1).reshape(shape) for x in (kept, whole, column))
    kept, whole, column = (x[:, :, :query_tiles].flatten() for x in (kept, whole, column))
    counts = kept.view(-1, shape[-1]).sum(-1)
    row_start = torch.nn.functional.pad(counts.cumsum(0), (1, 0))
    kind, longest = torch.where(whole, FULL, BAND), None
    if exact_lists(device):
        column, kind = column[kept], kind[kept]
    else:
        # The tiles that are read move to the front, in order; the others go to one slot past the end.
        place = torch.where(kept, kept.cumsum(0) - 1, kept.numel())
        target = torch.zeros(2, kept.numel() + 1, dtype=torch.int64, device=device)
        column, kind = target.scatter_(1, place.expand(2, -1), torch.stack([column, kind]))[:, :-1]
        longest = max(shape[-1], query_tiles)
    return BlockLayout(
        query_slots, key_slots, tile, tile, batch, heads, row_start, column.int(), kind.int(),
        torch.zeros(0, tile, tile, dtype=torch.bool, device=device), band=band.moved(start), longest=longest,
    )  # fmt: skip


def range_plan(chosen: Tensor, sets: BlockSets, length: int, band: Band, drop_diagonal: bool) -> list[Part]:
    """Ranges of keys per query, for any block size: window and sinks as they stand, and for each place of the choice
    the queries sorted by the block that they chose, so that the rows of a tile read the same keys.

    Args: chosen: int64 ``[G, H, nq, k]``, the choice of each of the last nq positions.
    """
    n_q = chosen.shape[2]
    position = torch.arange(length - n_q, length, device=chosen.device)
    fixed = [
        (*_clipped(low, high, position, band), min(width, length))
        for low, high, width in _fixed_ranges(sets, position, length, drop_diagonal)
    ]
    parts: list[Part] = [
        BlockPart(range_layout(low[None, None], high[None, None], length, width)) for low, high, width in fixed
    ]
    blocks = sets.count(length)
    others = sum((high - low for low, high, _ in fixed), torch.zeros_like(position)).expand(chosen.shape[:3])
    for place in range(chosen.shape[3]):
        of_rows = torch.where(chosen[..., place] < 0, blocks, chosen[..., place])
        of_sorted, order = torch.sort(of_rows, dim=-1, stable=True)
        low, high = _block_range(of_sorted, sets.block, length)
        low, high = _clipped(low, high, position[order], band)
        parts.append(BlockPart(range_layout(low, high, length, min(sets.block, length)), query_index=order))
        if drop_diagonal:
            low, high = _clipped(*_block_range(of_rows, sets.block, length), position, band)
            others = others + (high - low)
    if drop_diagonal:  # rows without another key keep their own
        alone = torch.where(others == 0, position, -1)
        parts.append(SegmentPart(n_q, n_q, 1, 1, key_index=alone))
    return parts


def _fixed_ranges(
    sets: BlockSets, position: Tensor, length: int, drop_diagonal: bool
) -> list[tuple[Tensor, Tensor, int]]:
    """The keys ``low <= j < high`` that each position always reads, as ascending ranges, and how long one can be."""
    first, last = sets.reach(position // sets.block)
    low = (first * sets.block).clamp(min=0)
    high = position + 1 if sets.causal else ((last + 1) * sets.block).clamp(max=length)
    width = sets.window * sets.block
    window = [(low, position, width), (position + 1, high, width)] if drop_diagonal else [(low, high, width)]
    if sets.sinks == 0:
        return window
    sunk = min(sets.sinks * sets.block, length)
    sinks = [(torch.zeros_like(low), low.clamp(max=sunk), sunk)]
    if not sets.causal:
        sinks.append((high.clamp(max=sunk), torch.full_like(high, sunk), sunk))
    return [*window, *sinks]


def _block_range(blocks: Tensor, block: int, length: int) -> tuple[Tensor, Tensor]:
    return (blocks * block).clamp(max=length), ((blocks + 1) * block).clamp(max=length)


def _clipped(low: Tensor, high: Tensor, position: Tensor, band: Band) -> tuple[Tensor, Tensor]:
    """The part of the ranges in the model's own window; an empty one stays at its place, so that they ascend."""
    start = low
    if band.right is not None:
        high = torch.maximum(torch.minimum(high, position + band.right + 1), start)
    if band.left is not None:
        low = torch.minimum(torch.maximum(low, position - band.left), high)
    return low, high


# -- dense, for oracles and pictures ---------------------------------------------------------------------------------


def kept_pairs(
    chosen: Tensor, sets: BlockSets, by_row: bool, query_length: int, key_length: int, band: Band, drop_diagonal: bool,
    positions: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Which pairs are read, bool ``[G, H, query_length, key_length]``, straight from the definition.

    Args: as :func:`plan_parts` reads them; the queries are the last ``query_length`` positions, or those of whole
        sequences at ``positions``, int64 ``[r]``.
    """
    start = key_length - query_length
    i = torch.arange(start, key_length, device=chosen.device) if positions is None else positions
    j, blocks = torch.arange(key_length, device=chosen.device), sets.count(key_length)
    own = i // sets.block
    rows = chosen[:, :, i - start] if by_row else chosen[:, :, own - start // sets.block]
    listed = torch.cat([sets.always(own, blocks).expand(*chosen.shape[:2], -1, -1), rows], dim=-1)
    read = torch.zeros(*listed.shape[:3], blocks + 1, dtype=torch.bool, device=chosen.device)
    read.scatter_(-1, torch.where(listed < 0, blocks, listed), True)
    band = band.causal_if(sets.causal)
    kept = read[..., j // sets.block] & band.contains(i[:, None], j)
    if drop_diagonal:
        others = kept & (i[:, None] != j)
        kept = others | (kept & ~others.any(-1, keepdim=True))
    return kept
