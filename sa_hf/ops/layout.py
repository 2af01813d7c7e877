"""From a predicate to block lists: which tiles are full, which are partial, and the element masks of those."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from sa_hf.ops.parts import BAND, FULL, Band, BlockLayout

# (head [.., 1, 1], query position [.., q, 1], key position [.., 1, k]) -> bool, broadcast
Predicate = Callable[[Tensor, Tensor, Tensor], Tensor]

# Tiles whose predicate is evaluated at once: 2048 tiles of 64 x 64 are 8 MB of bool and 64 MB per int64 temporary.
TILES_AT_ONCE = 2048


def build_layout(
    predicate: Predicate,
    query_slots: int,
    key_slots: int,
    *,
    heads: int,
    block: int = 64,
    band: Band = Band(),
    candidates: Tensor | None = None,
    full_tiles: Tensor | None = None,
    query_positions: Tensor | None = None,
    key_positions: Tensor | None = None,
    query_offset: int = 0,
    device: torch.device | str = "cpu",
) -> BlockLayout:
    """Classify the tiles of one part.

    Args:
        predicate: the pairs to keep, on positions; the band need not be in it.
        heads: H_l, the number of distinct lists (1 where all heads share them).
        band: in positions; tiles outside are left out, tiles inside need no test.
        candidates: int64 ``[E, 3]`` (head, query block, key block), a superset of the tiles with a kept pair, in any
            order, repeats allowed; None tries every tile of the band (with ``full_tiles``: no other tile).
        full_tiles: int64 ``[F, 3]``, further tiles in which the predicate is known to hold for every pair: not
            evaluated. A tile in both lists is. Natural positions only.
        query_positions, key_positions: int64 ``[slots]``, the position of each slot; None is
            ``slot + query_offset`` and ``slot``. Given ones must ascend; the band is then tested by the element masks.
    """
    nq, nk = -(-query_slots // block), -(-key_slots // block)
    natural = query_positions is None and key_positions is None
    q_pos = _positions(query_positions, query_slots, query_offset, block, device)
    k_pos = _positions(key_positions, key_slots, 0, block, device)
    keys, evaluated = _tile_keys(candidates, full_tiles, heads, nq, nk, device)
    head, qb, kb = keys // (nq * nk), keys // nk % nq, keys % nk
    inside, touched = _band_test(band, q_pos, k_pos, qb, kb)
    head, qb, kb, inside, evaluated = (x[touched] for x in (head, qb, kb, inside, evaluated))
    whole = inside & ((qb + 1) * block <= query_slots) & ((kb + 1) * block <= key_slots)
    kind = torch.where(whole, FULL, BAND).to(torch.int32)
    at = torch.nonzero(evaluated).flatten()
    found, masks, kept = _evaluate(predicate, band, q_pos, k_pos, head[at], qb[at], kb[at], kind[at], natural)
    kind[at] = found
    keep = torch.ones_like(evaluated)
    keep[at] = kept
    head, qb, kb, kind = head[keep], qb[keep], kb[keep], kind[keep]
    rows = torch.bincount(head * nq + qb, minlength=heads * nq)
    row_start = torch.zeros(heads * nq + 1, dtype=torch.int64, device=device)
    torch.cumsum(rows, 0, out=row_start[1:])
    return BlockLayout(
        query_slots, key_slots, block, block, 1, heads, row_start, kb.to(torch.int32), kind, masks,
        band=band.moved(query_offset) if natural else Band(),
    )  # fmt: skip


def on_heads(layout: BlockLayout, heads: Sequence[int], num_heads: int) -> BlockLayout:
    """A layout of one list as one of ``num_heads`` lists: that list on the given heads, no tile on the others."""
    rows = torch.zeros(num_heads, layout.num_query_blocks, dtype=torch.int64, device=layout.row_start.device)
    rows[list(heads)] = layout.row_start.diff()
    row_start = torch.nn.functional.pad(rows.flatten().cumsum(0), (1, 0))
    columns, kind = layout.columns.repeat(len(heads)), layout.kind.repeat(len(heads))
    return replace(layout, heads=num_heads, row_start=row_start, columns=columns, kind=kind)


def _tile_keys(
    candidates: Tensor | None, full_tiles: Tensor | None, heads: int, nq: int, nk: int, device: torch.device | str
) -> tuple[Tensor, Tensor]:
    """The distinct tiles as ascending numbers, and whether each is to be evaluated."""

    def number(tiles: Tensor) -> Tensor:
        tiles = tiles.to(device)
        keys: Tensor = torch.unique(tiles[:, 0] * (nq * nk) + tiles[:, 1] * nk + tiles[:, 2])
        return keys

    if full_tiles is None:
        keys = torch.arange(heads * nq * nk, device=device) if candidates is None else number(candidates)
        return keys, torch.ones_like(keys, dtype=torch.bool)
    known = number(full_tiles)
    if candidates is None:
        return known, torch.zeros_like(known, dtype=torch.bool)
    tried = number(candidates)
    keys = torch.unique(torch.cat([known, tried]))
    return keys, torch.isin(keys, tried)


def _positions(given: Tensor | None, slots: int, offset: int, block: int, device: torch.device | str) -> Tensor:
    """Positions per block, int64 ``[blocks, block]``; slots past the end have -1."""
    blocks = -(-slots // block)
    flat = torch.full((blocks * block,), -1, dtype=torch.int64, device=device)
    flat[:slots] = torch.arange(offset, offset + slots, device=device) if given is None else given.to(device)
    return flat.view(blocks, block)


def _band_test(band: Band, q_pos: Tensor, k_pos: Tensor, qb: Tensor, kb: Tensor) -> tuple[Tensor, Tensor]:
    """Per tile: every real pair lies in the band; some pair may."""
    big = torch.iinfo(torch.int64).max // 4
    q_low, q_high = q_pos.masked_fill(q_pos < 0, big).amin(1)[qb], q_pos.amax(1)[qb]
    k_low, k_high = k_pos.masked_fill(k_pos < 0, big).amin(1)[kb], k_pos.amax(1)[kb]
    inside = torch.ones_like(qb, dtype=torch.bool)
    touched = torch.ones_like(inside)
    if band.left is not None:
        inside &= q_high - k_low <= band.left
        touched &= q_low - k_high <= band.left
    if band.right is not None:
        inside &= k_high - q_low <= band.right
        touched &= k_low - q_high <= band.right
    return inside, touched


def _evaluate(
    predicate: Predicate, band: Band, q_pos: Tensor, k_pos: Tensor, head: Tensor, qb: Tensor, kb: Tensor, kind: Tensor,
    natural: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Evaluate the predicate tile by tile: final kinds, the distinct element masks, and which tiles are not empty."""
    block = q_pos.shape[1]
    kind = kind.clone()
    keep = torch.ones_like(kind, dtype=torch.bool)
    # Equal masks share one entry: a 64-bit random projection identifies a mask (2**-64 per pair to collide).
    generator = torch.Generator().manual_seed(0x5A_4F)
    weights = torch.randint(-(2**62), 2**62, (block * block,), generator=generator).to(q_pos.device)
    hashes: list[Tensor] = []
    stored: list[Tensor] = []
    partial_at: list[Tensor] = []
    for begin in range(0, len(kind), TILES_AT_ONCE):
        part = slice(begin, begin + TILES_AT_ONCE)
        i, j = q_pos[qb[part]][:, :, None], k_pos[kb[part]][:, None, :]
        valid = (i >= 0) & (j >= 0)
        allowed = predicate(head[part][:, None, None], i.clamp(min=0), j.clamp(min=0)).expand(valid.shape) & valid
        in_band = band.contains(i, j) & valid
        kept = (allowed & in_band).flatten(1)
        # Without the band every valid pair is allowed: the cheap per-element band test is enough.
        plain = (allowed == valid).flatten(1).all(1) if natural else torch.zeros_like(keep[part])
        full = kept.all(1)
        partial = ~plain & ~full & kept.any(1)
        keep[part] = kept.any(1)
        kind[part] = torch.where(full, FULL, torch.where(plain, BAND, kind[part])).to(torch.int32)
        index = torch.nonzero(partial).flatten()
        if len(index):
            chosen = kept[index]
            hashed, inverse = torch.unique((chosen.long() * weights).sum(1), return_inverse=True)
            first = torch.full_like(hashed, len(index)).scatter_reduce_(
                0, inverse, torch.arange(len(index), device=hashed.device), "amin"
            )
            hashes.append(hashed)
            stored.append(chosen[first])
            partial_at.append(torch.stack([index + begin, hashed[inverse]]))
    if not stored:
        return kind, torch.zeros(0, block, block, dtype=torch.bool, device=q_pos.device), keep
    all_hashes = torch.cat(hashes)
    unique, inverse = torch.unique(all_hashes, return_inverse=True)
    first = torch.full_like(unique, len(all_hashes)).scatter_reduce_(
        0, inverse, torch.arange(len(all_hashes), device=unique.device), "amin"
    )
    masks = torch.cat(stored)[first].view(-1, block, block)
    where = torch.cat(partial_at, dim=1)
    kind[where[0]] = torch.searchsorted(unique, where[1]).to(torch.int32)
    return kind, masks, keep
