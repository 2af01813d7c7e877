"""The dense oracle in fp64: what every engine is measured against. It is the only place that builds n x n tensors."""

from __future__ import annotations

import torch
from torch import Tensor

from sa_hf.ops.parts import BAND, FULL, BlockPart, Index, OffsetsPart, Part, ScoreOptions, SegmentPart
from sa_hf.ops.random import dropout_factor


def dense_attention(
    query: Tensor, key: Tensor, value: Tensor, multiplicity: Tensor, options: ScoreOptions
) -> tuple[Tensor, Tensor]:
    """Softmax attention over a multiset of keys, in fp64, differentiable.

    Args:
        query: ``[B, H, Nq, D]``; key, value: ``[B, Hkv, Nk, D]``; the queries are the last Nq positions.
        multiplicity: how often query ``i`` reads key ``j``, integer or bool, broadcastable to ``[B, H, Nq, Nk]``.

    Returns:
        ``(output [B, H, Nq, D] in the query's dtype, log-sum-exp [B, H, Nq] fp64)``; an empty row is 0 and -inf.
    """
    batch, heads, n_q, _ = query.shape
    n_k = key.shape[2]
    group = heads // key.shape[1]
    q = query.double()
    k, v = (x.double().repeat_interleave(group, dim=1) for x in (key, value))
    scores = q @ k.transpose(-1, -2) * options.scale
    if options.softcap is not None:
        scores = options.softcap * torch.tanh(scores / options.softcap)
    i = torch.arange(n_k - n_q, n_k, device=query.device)[:, None]
    j = torch.arange(n_k, device=query.device)[None, :]
    if options.distance_bias is not None:
        table = options.distance_bias.double()
        centre = (table.shape[1] + 1) // 2 - 1
        real = (i >= options.extra_tokens) & (j >= options.extra_tokens)
        scores = scores + torch.where(real, table[:, (j - i).clamp(-centre, centre) + centre], 0.0)
    for term, own in zip(options.terms, (i - (n_k - n_q), j), strict=True):
        if term is not None:
            real = (i >= options.extra_tokens) & (j >= options.extra_tokens)
            wide = term.of_rows(Tensor.double)
            scores = scores + torch.where(real, wide.of_pairs(own, j - i), 0.0)
    weight = multiplicity.to(torch.float64).expand(batch, heads, n_q, n_k)
    if options.spans is not None:
        gate = torch.clamp(1 + (options.spans.double()[:, :, None, :] - (i - j)) / options.ramp, 0, 1)
        weight = weight * torch.where(i == j, 1.0, gate)
    kept = weight > 0
    # The maximum is a constant shift: the gradient flows through the weights and the scores alone.
    peak = scores.detach().masked_fill(~kept, -torch.inf).amax(-1, keepdim=True)
    sinks = None if options.sinks is None else options.sinks.double()[:, None, None]
    if sinks is not None:
        peak = torch.maximum(peak, sinks.detach()).where(kept.any(-1, keepdim=True), peak)
    peak = torch.where(torch.isfinite(peak), peak, 0.0)
    numerator = weight * torch.exp(torch.where(kept, scores - peak, 0.0))
    total = numerator.sum(-1, keepdim=True)
    if sinks is not None:
        total = torch.where(total > 0, total + torch.exp(sinks - peak), total)
    probability = numerator / torch.where(total > 0, total, 1.0)
    if options.dropout > 0:
        probability = probability * dropout_factor(options, batch, heads, i, j)
    lse = torch.where(total > 0, torch.log(torch.where(total > 0, total, 1.0)) + peak, -torch.inf).squeeze(-1)
    return (probability @ v).to(query.dtype), lse


def part_multiplicity(part: Part, query_length: int, key_length: int) -> Tensor:
    """How often a part reads each pair, int64 ``[B_l, H_l, query_length, key_length]`` over positions."""
    slots = _slot_mask(part)
    if part.query_index is None and part.key_index is None:
        return slots.long()
    query = _index_tensor(part.query_index, slots.shape[2])
    key = _index_tensor(part.key_index, slots.shape[3])
    batch = max(slots.shape[0], query.shape[0], key.shape[0])
    heads = max(slots.shape[1], query.shape[1], key.shape[1])
    slots = slots.expand(batch, heads, -1, -1)
    query, key = (x.expand(batch, heads, -1) for x in (query, key))
    slots = slots & (query >= 0)[..., :, None] & (key >= 0)[..., None, :]
    result = torch.zeros(batch, heads, query_length, key_length, dtype=torch.int64)
    flat = query.clamp(min=0)[..., :, None] * key_length + key.clamp(min=0)[..., None, :]
    result.flatten(2).scatter_add_(2, flat.flatten(2), slots.long().flatten(2))
    return result


def _index_tensor(index: Index, slots: int) -> Tensor:
    if isinstance(index, Tensor):
        return index
    start = 0 if index is None else index.start
    return torch.arange(start, start + slots)[None, None]


def _slot_mask(part: Part) -> Tensor:
    """The kept pairs in slots, bool ``[B_l, H_l, query_slots, key_slots]``."""
    if isinstance(part, OffsetsPart):
        i = torch.arange(part.length)[:, None]
        j = torch.arange(part.length)[None, :]
        inside = (i >= part.begin) & (i < part.stop) & (j >= part.begin) & (j < part.stop)
        rows = [torch.isin(i - j, torch.tensor(offsets, dtype=torch.int64)) & inside for offsets in part.offsets]
        return torch.stack(rows)[None]
    if isinstance(part, SegmentPart):
        i = torch.arange(part.query_slots)[:, None]
        j = torch.arange(part.key_slots)[None, :]
        same = i // part.query_segment == j // part.key_segment
        a, b = i % part.query_segment, j % part.key_segment
        kept = same & part.band.contains(a, b)
        if part.skip_diagonal:
            kept = kept & (a != b)
        return kept[None, None]
    return _layout_mask(part)


def _layout_mask(part: BlockPart) -> Tensor:
    layout = part.layout
    nq, nk, bq, bk = layout.num_query_blocks, layout.num_key_blocks, layout.block_q, layout.block_k
    i = torch.arange(nq * bq)[:, None]
    j = torch.arange(nk * bk)[None, :]
    band = layout.band.contains(i, j)
    mask = torch.zeros(layout.batch * layout.heads, nq * bq, nk * bk, dtype=torch.bool)
    starts = layout.row_start.tolist()
    for row in range(layout.batch * layout.heads * nq):
        at = slice(row % nq * bq, (row % nq + 1) * bq)
        for entry in range(starts[row], starts[row + 1]):
            column, kind = int(layout.columns[entry]), int(layout.kind[entry])
            to = slice(column * bk, (column + 1) * bk)
            if kind == FULL:
                mask[row // nq, at, to] = True
            else:
                mask[row // nq, at, to] = band[at, to] if kind == BAND else layout.masks[kind]
    mask = mask.view(layout.batch, layout.heads, nq * bq, nk * bk)[:, :, : layout.query_slots, : layout.key_slots]
    if layout.key_range is not None:
        slots = torch.arange(layout.key_slots)
        low, high = layout.key_range[..., 0:1], layout.key_range[..., 1:2]
        mask = mask & (slots >= low) & (slots < high)
    return mask
