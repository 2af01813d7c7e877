"""Attention of one batch of tiles by matrix products, with every score option; and its gradients."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sa_hf.ops.native.lanes import Lanes, Slots
from sa_hf.ops.native.masks import additive, drop_, words
from sa_hf.ops.native.tiles import TileBatch
from sa_hf.ops.parts import Index, ScoreOptions
from sa_hf.ops.random import counter_words, dropout_bits, dropout_words

# Keys of a row from which torch's softmax serves: it takes less time than an exponential alone, but for rows as short
# as those of LogSparse (15 keys at 16,384 tokens).
SOFTMAX_FROM = 64


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

    @property
    def seed(self) -> Tensor:
        if self.options.seed is None:
            raise ValueError("dropout > 0 needs ScoreOptions.seed")
        return self.options.seed

    def dropout_counters(self, lanes: Tensor) -> tuple[Tensor, Tensor]:
        """The sequence and the head of lanes ``[T]`` in the dropout counter, int64 ``[T]`` each."""
        batch, heads = self.lanes.batch_of(lanes), self.lanes.head_of(lanes)
        sequence = batch if self.options.sequence_ids is None else self.options.sequence_ids[batch]
        if self.options.heads is not None:
            heads = counter_words(tuple(self.options.heads), heads.device)[heads]
        return sequence, heads

    def span_rows(self, lanes: Tensor) -> Tensor:
        """Where the spans of lanes ``[T]`` begin in the flat spans, ``[T, 1]``."""
        if self.options.spans is None:
            raise RuntimeError("no spans")
        _, heads, length = self.options.spans.shape
        row = self.lanes.batch_of(lanes) * heads
        return ((row + self.lanes.head_of(lanes) if heads > 1 else row) * length)[:, None]


@dataclass(eq=False)
class Pairs:
    """What the options say about each pair of a batch of tiles, ``[T, a, m]`` or broadcastable to it; None where they
    say nothing."""

    mask: Tensor | None  # words
    added: Tensor | None = None  # to the scores, in their dtype, in place of the mask: -inf leaves a pair out
    bias_column: Tensor | None = None  # int64, into the flat table; -1 for a pair without bias
    gate: Tensor | None = None
    gate_slope: Tensor | None = None
    span_at: Tensor | None = None  # int64, into the flat spans
    dropped: Tensor | None = None  # words: -1 where dropout drops the probability


def tile_pairs(rules: ScoreRules, tile: TileBatch, dtype: torch.dtype) -> Pairs:
    """Evaluate the options on a batch of tiles."""
    mask = masked_pairs(rules, tile)
    if not rules.positional:
        return Pairs(mask)
    i = rules.query_at.positions(tile.lanes, tile.query_slots)[:, :, None]
    j = rules.key_at.positions(tile.lanes, tile.key_slots)[:, None, :]
    return pairs_at(rules, tile.lanes, i, j, mask, dtype)


def pairs_at(rules: ScoreRules, lanes: Tensor, i: Tensor, j: Tensor, mask: Tensor | None, dtype: torch.dtype) -> Pairs:
    """Evaluate the options at query positions ``i [T | 1, a, 1]`` and key positions ``j [T | 1, 1 | a, m]``."""
    pairs, options = Pairs(mask), rules.options
    heads = rules.lanes.head_of(lanes)
    if options.distance_bias is not None:
        columns = options.distance_bias.shape[1]
        centre = (columns + 1) // 2 - 1
        at = (j - i).clamp(-centre, centre) + centre + (heads * columns)[:, None, None]
        if options.extra_tokens:
            real = (i >= options.extra_tokens) & (j >= options.extra_tokens)
            at = torch.where(real, at, -1)
        pairs.bias_column = at
    if options.spans is not None:
        pairs.span_at = rules.span_rows(lanes)[:, :, None] + j.clamp(0, options.spans.shape[2] - 1)
        ramp = 1 + (options.spans.to(dtype).flatten()[pairs.span_at] - (i - j)) / options.ramp
        own = i == j
        pairs.gate = torch.maximum(ramp.clamp(0, 1), own.to(dtype))
        pairs.gate_slope = ((ramp > 0) & (ramp < 1) & ~own).to(dtype) / options.ramp
        shut = words(pairs.gate > 0)
        pairs.mask = shut if mask is None else mask | shut
    if options.dropout > 0:
        pairs.dropped = _dropped(rules, lanes, i, j)
    return pairs


def masked_pairs(rules: ScoreRules, tile: TileBatch) -> Tensor | None:
    """The pairs that a batch of tiles keeps, empty key slots left out: words ``[T | 1, a | 1, m]``; None where all."""
    mask = tile.mask()
    if rules.key_filled is not None:
        table = rules.key_filled
        slots = tile.key_slots
        there = table[tile.lanes[:, None], slots.clamp(max=table.shape[1] - 1)]
        if not bool(there.all()):
            empty = words(there[:, None, :])
            mask = empty if mask is None else mask | empty
    return mask


def _dropped(rules: ScoreRules, lanes: Tensor, i: Tensor, j: Tensor) -> Tensor:
    sequence, heads = (x[:, None, None] for x in rules.dropout_counters(lanes))
    rows = dropout_words(rules.seed, sequence, heads, i, stream=0)
    columns = dropout_words(rules.seed, sequence, heads, j, stream=1)
    return dropout_bits(rows, columns, rules.options.dropout)


def shape_scores(options: ScoreOptions, pairs: Pairs, product: Tensor) -> tuple[Tensor, Tensor | None]:
    """From scaled query-key products ``[T, a, m]``, in place, the masked scores, and with a softcap the tanh (for the
    gradient)."""
    scores, bend = _bend_and_bias(options, pairs, product)
    added = _added(pairs, scores.dtype)
    return scores if added is None else scores.add_(added), bend


def tile_scores(options: ScoreOptions, pairs: Pairs, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor | None]:
    """:func:`shape_scores` of a batch of tiles ``q [T, a, d]``, ``k [T, m, d]``."""
    added = _added(pairs, q.dtype)
    if added is not None and options.softcap is None:  # the product starts from the mask: no pass of its own
        own = added.shape == (len(q), q.shape[1], k.shape[1])  # made for this batch, so used up
        product = torch.baddbmm(added, q, k.transpose(1, 2), alpha=options.scale, out=added if own else None)
        return _bend_and_bias(options, pairs, product)
    scores, bend = _bend_and_bias(options, pairs, scaled_product(q, k.transpose(1, 2), options.scale))
    return scores if added is None else scores.add_(added), bend


def scaled_product(x: Tensor, y: Tensor, scale: float) -> Tensor:
    """``scale * x @ y`` of batches of matrices, in one pass."""
    return torch.baddbmm(x.new_empty(1, 1, 1), x, y, beta=0, alpha=scale)


def _added(pairs: Pairs, dtype: torch.dtype) -> Tensor | None:
    return pairs.added if pairs.mask is None else additive(pairs.mask, dtype)


def _bend_and_bias(options: ScoreOptions, pairs: Pairs, scores: Tensor) -> tuple[Tensor, Tensor | None]:
    bend = None
    if options.softcap is not None:
        bend = scores.div_(options.softcap).tanh_()
        scores = bend * options.softcap
    if pairs.bias_column is not None and options.distance_bias is not None:
        scores += _bias(options, options.distance_bias.to(scores.dtype), pairs.bias_column)
    return scores, bend


def _bias(options: ScoreOptions, table: Tensor, column: Tensor) -> Tensor:
    if not options.extra_tokens:
        return table.flatten()[column]
    return table.flatten()[column.clamp(min=0)] * (column >= 0).to(table.dtype)


def softmax_weights(options: ScoreOptions, pairs: Pairs, scores: Tensor) -> tuple[Tensor, Tensor | float, Tensor]:
    """From scores (used up) the weights ``[T, a, m]`` (gate and dropout applied), the factor ``[T, a, 1]`` or number
    that makes them probabilities, and the log-sum-exp ``[T, a]``."""
    peak = scores.amax(-1, keepdim=True)
    if pairs.gate is not None or scores.shape[-1] < SOFTMAX_FROM:
        return _weights_by_hand(options, pairs, scores, peak)
    weight = torch.softmax(scores, -1)
    # The largest probability is at least 1 / m: its logarithm loses nothing.
    lse = peak - weight.amax(-1, keepdim=True).log_()
    empty = torch.nonzero(torch.isneginf(peak.squeeze(-1)), as_tuple=True)
    if len(empty[0]):  # a few rows: filling by a mask would read and write all weights
        weight[empty], lse[empty] = 0, -torch.inf
    if pairs.dropped is not None:
        drop_(weight, pairs.dropped)
    return weight, 1 / (1 - options.dropout), lse.squeeze(-1)


def _weights_by_hand(
    options: ScoreOptions, pairs: Pairs, scores: Tensor, peak: Tensor
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    peak = torch.where(torch.isfinite(peak), peak, 0.0)
    weight = scores.sub_(peak).exp_()
    if pairs.gate is not None:
        weight *= pairs.gate
    total = weight.sum(-1, keepdim=True)
    if pairs.dropped is not None:
        drop_(weight, pairs.dropped)
    factor = 1 / (torch.where(total > 0, total, 1.0) * (1 - options.dropout))
    return weight, factor, (torch.log(total) + peak).squeeze(-1)


def tile_forward(options: ScoreOptions, pairs: Pairs, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """``q [T, a, d]``, ``k, v [T, m, d]`` -> output ``[T, a, d]``, log-sum-exp ``[T, a]``."""
    scores, _ = tile_scores(options, pairs, q, k)
    weight, factor, lse = softmax_weights(options, pairs, scores)
    if isinstance(factor, float):
        return scaled_product(weight, v, factor), lse
    return torch.bmm(weight, v).mul_(factor), lse


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
    options: ScoreOptions, pairs: Pairs, shaped: tuple[Tensor, Tensor | None], upstream: Tensor, lse: Tensor,
    delta: Tensor, gathered: OptionGradients,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """From shaped scores and ``grad_out @ value`` (both ``[T, a, m]``, used up) the gradient of the scaled products,
    and the probabilities as the values saw them; ``lse`` and ``delta [T, a]`` are the whole plan's."""
    scores, bend = shaped
    # A row without keys has lse -inf: shifted by +inf instead, all of its probabilities are 0.
    shift = torch.where(torch.isneginf(lse), torch.inf, lse).unsqueeze(-1)
    ungated = scores.sub_(shift).exp_()
    probability = ungated if pairs.gate is None else ungated * pairs.gate
    seen = probability
    if pairs.dropped is not None:
        scale = 1 / (1 - options.dropout)
        seen = drop_(probability * scale, pairs.dropped)
        drop_(upstream.mul_(scale), pairs.dropped)
    upstream -= delta.unsqueeze(-1)
    if gathered.spans is not None and pairs.gate_slope is not None and pairs.span_at is not None:
        per_key = (ungated * upstream * pairs.gate_slope).sum_to_size(pairs.span_at.shape)
        gathered.spans.scatter_add_(0, pairs.span_at.flatten(), per_key.flatten())
    grad = upstream.mul_(probability)
    if gathered.distance_bias is not None and pairs.bias_column is not None:
        column, real = pairs.bias_column, grad
        if options.extra_tokens:
            column, real = column.clamp(min=0), grad * (column >= 0).to(grad.dtype)
        gathered.distance_bias.scatter_add_(0, column.expand(real.shape).flatten(), real.flatten())
    if bend is not None:
        grad *= bend.square_().neg_().add_(1)
    return grad, seen


def tile_backward(
    options: ScoreOptions, pairs: Pairs, q: Tensor, k: Tensor, v: Tensor, lse: Tensor, delta: Tensor, grad: Tensor,
    gathered: OptionGradients,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of queries, keys and values of a batch of tiles."""
    shaped, upstream = tile_scores(options, pairs, q, k), torch.bmm(grad, v.transpose(1, 2))
    grad_score, seen = score_gradient(options, pairs, shaped, upstream, lse, delta, gathered)
    return (
        scaled_product(grad_score, k, options.scale),
        scaled_product(grad_score.transpose(1, 2), q, options.scale),
        torch.bmm(seen.transpose(1, 2), grad),
    )
