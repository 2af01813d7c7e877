"""Attention of one batch of tiles by matrix products, with every score option; and its gradients."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sa_hf.ops.native.lanes import Lanes, Slots
from sa_hf.ops.native.tiles import TileBatch
from sa_hf.ops.parts import Index, ScoreOptions
from sa_hf.ops.random import dropout_keep, dropout_words


@dataclass(frozen=True, eq=False)
class ScoreRules:
    """The options of a call with the positions behind a part's slots."""

    options: ScoreOptions
    lanes: Lanes
    query_at: Slots
    key_at: Slots
    query_filled: Tensor | None
    key_filled: Tensor | None

    @classmethod
    def of(cls, options: ScoreOptions, lanes: Lanes, query_index: Index, key_index: Index) -> ScoreRules:
        query_at = Slots.of(query_index, lanes, options.query_offset)
        key_at = Slots.of(key_index, lanes, 0)
        return cls(options, lanes, query_at, key_at, query_at.filled(), key_at.filled())

    @property
    def positional(self) -> bool:
        o = self.options
        return o.distance_bias is not None or o.spans is not None or o.dropout > 0


@dataclass(eq=False)
class Pairs:
    """What the options say about each pair of a batch of tiles, ``[T, a, m]`` or broadcastable to it; None where they
    say nothing."""

    kept: Tensor | None
    bias_column: Tensor | None = None  # int64, into the flat table; -1 for a pair without bias
    gate: Tensor | None = None
    gate_slope: Tensor | None = None
    span_at: Tensor | None = None  # int64, into the flat spans
    dropout: Tensor | None = None  # 0 or 1 / (1 - dropout)


def tile_pairs(rules: ScoreRules, tile: TileBatch, dtype: torch.dtype) -> Pairs:
    """Evaluate the options on a batch of tiles."""
    kept = kept_pairs(rules, tile)
    if not rules.positional:
        return Pairs(kept)
    i = rules.query_at.positions(tile.lanes, tile.query_slots)[:, :, None]
    j = rules.key_at.positions(tile.lanes, tile.key_slots)[:, None, :]
    return pairs_at(rules, tile.lanes, i, j, kept, dtype)


def pairs_at(rules: ScoreRules, lanes: Tensor, i: Tensor, j: Tensor, kept: Tensor | None, dtype: torch.dtype) -> Pairs:
    """Evaluate the options at query positions ``i [T | 1, a, 1]`` and key positions ``j [T | 1, 1 | a, m]``."""
    pairs, options = Pairs(kept), rules.options
    heads = rules.lanes.head_of(lanes)
    if options.distance_bias is not None:
        columns = options.distance_bias.shape[1]
        centre = (columns + 1) // 2 - 1
        at = (j - i).clamp(-centre, centre) + centre + (heads * columns)[:, None, None]
        real = (i >= options.extra_tokens) & (j >= options.extra_tokens)
        pairs.bias_column = torch.where(real, at, -1)
    if options.spans is not None:
        _, span_heads, length = options.spans.shape
        row = rules.lanes.batch_of(lanes) * span_heads
        row = row + heads if span_heads > 1 else row
        pairs.span_at = row[:, None, None] * length + j.clamp(0, length - 1)
        ramp = 1 + (options.spans.to(dtype).flatten()[pairs.span_at] - (i - j)) / options.ramp
        own = i == j
        pairs.gate = torch.where(own, 1.0, ramp.clamp(0, 1))
        pairs.gate_slope = ((ramp > 0) & (ramp < 1) & ~own).to(dtype) / options.ramp
        there = pairs.gate > 0
        pairs.kept = there if kept is None else kept & there
    if options.dropout > 0:
        pairs.dropout = _dropout(rules, lanes, heads, i, j, dtype)
    return pairs


def kept_pairs(rules: ScoreRules, tile: TileBatch) -> Tensor | None:
    """The pairs that a batch of tiles keeps, empty key slots left out: bool ``[T | 1, a | 1, m]``; None where all."""
    kept = tile.mask()
    if rules.key_filled is not None:
        table = rules.key_filled
        slots = tile.key_slots
        there = table[tile.lanes[:, None], slots.clamp(max=table.shape[1] - 1)]
        if not bool(there.all()):
            kept = there[:, None, :] if kept is None else kept & there[:, None, :]
    return kept


def _dropout(rules: ScoreRules, lanes: Tensor, heads: Tensor, i: Tensor, j: Tensor, dtype: torch.dtype) -> Tensor:
    options = rules.options
    if options.seed is None:
        raise ValueError("dropout > 0 needs ScoreOptions.seed")
    batch = rules.lanes.batch_of(lanes)
    sequence = batch if options.sequence_ids is None else options.sequence_ids[batch]
    if options.heads is not None:
        heads = torch.tensor(options.heads, device=heads.device)[heads]
    sequence, heads = sequence[:, None, None], heads[:, None, None]
    rows = dropout_words(options.seed, sequence, heads, i, stream=0)
    columns = dropout_words(options.seed, sequence, heads, j, stream=1)
    return dropout_keep(rows, columns, options.dropout).to(dtype) / (1 - options.dropout)


def shape_scores(options: ScoreOptions, pairs: Pairs, product: Tensor) -> tuple[Tensor, Tensor | None]:
    """From query-key products ``[T, a, m]``, in place, the masked scores, and with a softcap the tanh (for the
    gradient)."""
    scores = product.mul_(options.scale)
    bend = None
    if options.softcap is not None:
        bend = scores.div_(options.softcap).tanh_()
        scores = bend * options.softcap
    if pairs.bias_column is not None and options.distance_bias is not None:
        table = options.distance_bias.to(scores.dtype).flatten()
        bias = table[pairs.bias_column.clamp(min=0)]
        scores += bias.masked_fill_(pairs.bias_column < 0, 0)
    if pairs.kept is not None:
        scores.masked_fill_(~pairs.kept, -torch.inf)
    return scores, bend


def softmax_weights(pairs: Pairs, scores: Tensor) -> tuple[Tensor, Tensor]:
    """Probabilities ``[T, a, m]`` (gate and dropout applied) and log-sum-exp ``[T, a]`` of scores, in place."""
    peak = scores.amax(-1, keepdim=True)
    peak = torch.where(torch.isfinite(peak), peak, 0.0)
    weight = scores.sub_(peak).exp_()
    if pairs.gate is not None:
        weight *= pairs.gate
    total = weight.sum(-1, keepdim=True)
    weight /= torch.where(total > 0, total, 1.0)
    if pairs.dropout is not None:
        weight *= pairs.dropout
    return weight, (torch.log(total) + peak).squeeze(-1)


def tile_forward(options: ScoreOptions, pairs: Pairs, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """``q [T, a, d]``, ``k, v [T, m, d]`` -> output ``[T, a, d]``, log-sum-exp ``[T, a]``."""
    scores, _ = shape_scores(options, pairs, torch.bmm(q, k.transpose(1, 2)))
    weight, lse = softmax_weights(pairs, scores)
    return torch.bmm(weight, v), lse


@dataclass(eq=False)
class OptionGradients:
    """Where the gradients of the options gather, flat and in the accumulation dtype; None where absent."""

    distance_bias: Tensor | None = None
    spans: Tensor | None = None

    @classmethod
    def zeros(cls, options: ScoreOptions, dtype: torch.dtype) -> OptionGradients:
        def flat(x: Tensor | None) -> Tensor | None:
            return None if x is None else torch.zeros(x.numel(), dtype=dtype, device=x.device)

        return cls(flat(options.distance_bias), flat(options.spans))


def score_gradient(
    options: ScoreOptions, pairs: Pairs, product: Tensor, upstream: Tensor, lse: Tensor, delta: Tensor,
    gathered: OptionGradients,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """From query-key products and ``grad_out @ value`` (both ``[T, a, m]``, used up) the gradient of the products and
    the probabilities as the values saw them; ``lse`` and ``delta [T, a]`` are the whole plan's."""
    scores, bend = shape_scores(options, pairs, product)
    # A row without keys has lse -inf: shifted by +inf instead, all of its probabilities are 0.
    shift = torch.where(torch.isneginf(lse), torch.inf, lse).unsqueeze(-1)
    ungated = scores.sub_(shift).exp_()
    probability = ungated if pairs.gate is None else ungated * pairs.gate
    seen = probability if pairs.dropout is None else probability * pairs.dropout
    if pairs.dropout is not None:
        upstream *= pairs.dropout
    upstream -= delta.unsqueeze(-1)
    if gathered.spans is not None and pairs.gate_slope is not None and pairs.span_at is not None:
        per_key = (ungated * upstream * pairs.gate_slope).sum_to_size(pairs.span_at.shape)
        gathered.spans.scatter_add_(0, pairs.span_at.flatten(), per_key.flatten())
    grad = upstream.mul_(probability)
    if gathered.distance_bias is not None and pairs.bias_column is not None:
        real = grad.masked_fill(pairs.bias_column < 0, 0)
        gathered.distance_bias.scatter_add_(0, pairs.bias_column.clamp(min=0).flatten(), real.flatten())
    if bend is not None:
        grad *= 1 - bend * bend
    return grad.mul_(options.scale), seen


def tile_backward(
    options: ScoreOptions, pairs: Pairs, q: Tensor, k: Tensor, v: Tensor, lse: Tensor, delta: Tensor, grad: Tensor,
    gathered: OptionGradients,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of queries, keys and values of a batch of tiles."""
    product, upstream = torch.bmm(q, k.transpose(1, 2)), torch.bmm(grad, v.transpose(1, 2))
    grad_score, seen = score_gradient(options, pairs, product, upstream, lse, delta, gathered)
    return (
        torch.bmm(grad_score, k),
        torch.bmm(grad_score.transpose(1, 2), q),
        torch.bmm(seen.transpose(1, 2), grad),
    )
