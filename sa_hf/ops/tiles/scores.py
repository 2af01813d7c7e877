"""Attention of one batch of tiles by matrix products, with every score option; and its gradients.

Shapes: T tiles, a queries, m keys, d = head_dim. Everything is in the accumulation dtype: fp32, or fp64 for fp64.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sa_hf.ops.lanes import Places
from sa_hf.ops.parts import ScoreOptions
from sa_hf.ops.random import dropout_keep
from sa_hf.ops.tiles.batches import Tiles


@dataclass(frozen=True, eq=False)
class Pairs:
    """What the options say about each pair of a batch of tiles, ``[T, a, m]`` or broadcastable to it; None where they
    say nothing."""

    kept: Tensor | None  # bool
    bias_at: Tensor | None = None  # int64, into the flat table; -1 for a pair without bias
    gate: Tensor | None = None
    slope: Tensor | None = None  # of the gate by the span
    span_at: Tensor | None = None  # int64 [T, 1, m], into the flat spans
    undropped: Tensor | None = None  # bool
    terms_at: tuple[Tensor | None, ...] = (None, None)  # int64, into the flat values of each; -1 for a pair without

    @classmethod
    def of(cls, places: Places, tiles: Tiles, dtype: torch.dtype) -> Pairs:
        """The options at the positions behind a batch of tiles."""
        options, lanes, kept = places.options, tiles.lanes, tiles.kept
        at, to = places.query_at.positions(lanes, tiles.query_slots), places.key_at.positions(lanes, tiles.key_slots)
        i, j = at[:, :, None], to[:, None]
        if places.key_at.table is not None:
            kept = j >= 0 if kept is None else kept & (j >= 0)
        bias_at = gate = slope = span_at = undropped = None
        if options.distance_bias is not None:
            columns = options.distance_bias.shape[1]
            centre = (columns + 1) // 2 - 1
            heads = (lanes % places.lanes.heads)[:, None, None]
            bias_at = (j - i).clamp(-centre, centre) + centre + heads * columns
            if options.extra_tokens:
                bias_at = torch.where((i >= options.extra_tokens) & (j >= options.extra_tokens), bias_at, -1)
        if options.spans is not None:
            span_at = places.span_at(lanes, to)[:, None]
            ramp = 1 + (options.spans.to(dtype).flatten()[span_at] - (i - j)) / options.ramp
            own = i == j
            gate = torch.where(own, 1, ramp.clamp(0, 1))
            slope = ((ramp > 0) & (ramp < 1) & ~own).to(dtype) / options.ramp
            kept = gate > 0 if kept is None else kept & (gate > 0)
        if options.dropout > 0:
            rows, columns_ = places.dropout_words(lanes, at, 0), places.dropout_words(lanes, to, 1)
            undropped = dropout_keep(rows[:, :, None], columns_[:, None], options.dropout)
        terms_at = tuple(None if term is None else places.term_at(term, lanes, i, j) for term in options.terms)
        return cls(kept, bias_at, gate, slope, span_at, undropped, terms_at)


def _scores(options: ScoreOptions, pairs: Pairs, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor | None]:
    """The masked scores ``[T, a, m]``, and with a softcap the tanh (for the gradient)."""
    scores, bend = torch.bmm(q, k.transpose(1, 2)) * options.scale, None
    if options.softcap is not None:
        bend = torch.tanh(scores / options.softcap)
        scores = bend * options.softcap
    if pairs.bias_at is not None and options.distance_bias is not None:
        table = options.distance_bias.to(scores.dtype).flatten()
        scores = scores + torch.where(pairs.bias_at >= 0, table[pairs.bias_at.clamp(min=0)], 0)
    for term, at in zip(options.terms, pairs.terms_at, strict=True):
        if term is not None and at is not None:
            scores = scores + torch.where(at >= 0, term.values.flatten()[at.clamp(min=0)], 0)
    return scores if pairs.kept is None else scores.masked_fill(~pairs.kept, -torch.inf), bend


def _dropped(options: ScoreOptions, pairs: Pairs, x: Tensor) -> Tensor:
    return x if pairs.undropped is None else x * pairs.undropped / (1 - options.dropout)


def tile_forward(options: ScoreOptions, pairs: Pairs, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """``q [T, a, d]``, ``k, v [T, m, d]`` -> output ``[T, a, d]``, log-sum-exp ``[T, a]``; a row without keys is 0 and
    -inf."""
    scores, _ = _scores(options, pairs, q, k)
    peak = scores.amax(-1, keepdim=True)
    peak = torch.where(torch.isneginf(peak), 0, peak)
    weight = torch.exp(scores - peak)
    if pairs.gate is not None:
        weight = weight * pairs.gate
    total = weight.sum(-1, keepdim=True)
    out = torch.bmm(_dropped(options, pairs, weight), v) / torch.where(total == 0, 1, total)
    return out, (total.log() + peak).squeeze(-1)


@dataclass(frozen=True, eq=False)
class OptionGradients:
    """Where the gradients of the options gather, flat; None where absent."""

    distance_bias: Tensor | None
    spans: Tensor | None
    terms: tuple[Tensor | None, ...]

    @classmethod
    def zeros(cls, options: ScoreOptions, dtype: torch.dtype) -> OptionGradients:
        bias, spans, _, *terms = (
            None if x is None else torch.zeros(x.numel(), dtype=dtype, device=x.device) for x in options.learned
        )
        return cls(bias, spans, tuple(terms))


def tile_backward(
    options: ScoreOptions, pairs: Pairs, q: Tensor, k: Tensor, v: Tensor, lse: Tensor, delta: Tensor, grad: Tensor,
    gathered: OptionGradients,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of queries, keys and values of a batch of tiles; ``lse`` and ``delta [T, a]`` are the whole plan's."""
    scores, bend = _scores(options, pairs, q, k)
    # A row without keys has lse -inf: shifted by +inf instead, all of its probabilities are 0.
    ungated = torch.exp(scores - torch.where(torch.isneginf(lse), torch.inf, lse).unsqueeze(-1))
    probability = ungated if pairs.gate is None else ungated * pairs.gate
    upstream = _dropped(options, pairs, torch.bmm(grad, v.transpose(1, 2))) - delta.unsqueeze(-1)
    if gathered.spans is not None and pairs.slope is not None and pairs.span_at is not None:
        per_key = (ungated * upstream * pairs.slope).sum(1, keepdim=True)
        add_rows(gathered.spans, pairs.span_at.flatten(), per_key.flatten())
    by_score = upstream * probability
    if gathered.distance_bias is not None and pairs.bias_at is not None:
        real = torch.where(pairs.bias_at >= 0, by_score, 0)
        add_rows(gathered.distance_bias, pairs.bias_at.clamp(min=0).expand(real.shape).flatten(), real.flatten())
    for total, at in zip(gathered.terms, pairs.terms_at, strict=True):
        if total is not None and at is not None:
            add_rows(total, at.clamp(min=0).flatten(), torch.where(at >= 0, by_score, 0).flatten())
    if bend is not None:
        by_score = by_score * (1 - bend.square())
    by_score = by_score * options.scale
    seen = _dropped(options, pairs, probability)
    return torch.bmm(by_score, k), torch.bmm(by_score.transpose(1, 2), q), torch.bmm(seen.transpose(1, 2), grad)


def add_rows(target: Tensor, at: Tensor, x: Tensor) -> None:
    """Add ``x [n, ...]`` to the rows ``at [n]`` of ``target``, some of them several times, in one order."""
    if target.device.type == "cpu":
        target.index_add_(0, at, x)
    else:  # sorts the rows first, where index_add_ would add in any order
        target.index_put_((at,), x, accumulate=True)
