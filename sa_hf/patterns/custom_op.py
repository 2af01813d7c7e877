"""Static patterns as a registered custom operator, so that ``torch.compile(fullgraph=True)`` sees one opaque call.

An operator's arguments are tensors, numbers and strings: the pattern travels as a key (its JSON and the layer's
place), the sequences as a flat list of integers. Everything else is rebuilt, and cached, on the other side.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from typing import TypeAlias

import torch
from torch import Tensor

from sa_hf.config import SparseAttentionConfig
from sa_hf.errors import NotStaticError
from sa_hf.layer import Geometry
from sa_hf.ops.attend import PlanFor, attend, sequences_backward, sequences_forward
from sa_hf.ops.choice import choose_engine
from sa_hf.ops.graphs import OUTSIDE_COMPILED_GRAPHS, eager, tracing
from sa_hf.ops.host import own_rules
from sa_hf.ops.parts import Band, DistanceTerm, Part, ScoreOptions
from sa_hf.ops.run import empty_output, laid_out
from sa_hf.ops.sequences import PendingSequences, Sequences, Span, WholeRows
from sa_hf.ops.slots import examine_slots
from sa_hf.ops.transforms import (
    OperatorCall,
    differentiable,
    refuse_for_onnx,
    refuse_second_derivative,
    refuse_traced_transforms,
)
from sa_hf.ops.widths import at_one_width
from sa_hf.patterns.base import StaticPatternConfig, finished_plan

# Plans of one model: at most (distinct layers) x (distinct lengths) of a run; the oldest go first.
PLANS_CACHED = 256
_SPAN_FIELDS = 5
AnySequences: TypeAlias = Sequences | WholeRows | PendingSequences
# Leading arguments of the operator that are tensors: query, key, value; bias, sinks, values of the query's and of the
# key's term; their buckets, seed, two gathers, mask, ids.
TENSORS = 14


@lru_cache(maxsize=PLANS_CACHED)
def cached_plan(
    config: StaticPatternConfig, geometry: Geometry, device: torch.device, extra: int | None = None
) -> tuple[Part, ...]:
    """The plan of a geometry, and of the extra tokens in front of it (None: the pattern's own); layers and calls share
    it."""
    with torch.no_grad():
        plan = tuple(finished_plan(config, geometry, device, extra))
        examine_slots(plan)
        return plan


def layer_key(
    config: StaticPatternConfig,
    heads: tuple[int, ...],
    num_heads: int,
    layer_idx: int,
    causal: bool,
    band: Band,
    engine: str,
    chunk: int | None = None,
) -> str:
    """The string that names one layer's pattern in the operator's arguments (plain formatting: it is traced)."""
    place = f"{num_heads} {config.layer_of_plan(layer_idx)} {int(causal)} {band.left} {band.right} {chunk} {engine}"
    return f"{config.key}\n{place}\n{' '.join([str(h) for h in heads])}"


@lru_cache(maxsize=1024)
def _layer(key: str) -> tuple[StaticPatternConfig, Geometry, str]:
    fields, place, heads = key.split("\n")
    num_heads, layer_idx, causal, *numbers, engine = place.split()
    config = SparseAttentionConfig.from_dict(json.loads(fields))
    if not isinstance(config, StaticPatternConfig):
        raise NotStaticError(f"pattern {config.name!r} is not static and has no operator of its own")
    left, right, chunk = (None if number == "None" else int(number) for number in numbers)
    at = tuple(int(h) for h in heads.split())
    band = Band(left, right)
    return config, Geometry(1, 1, at, int(num_heads), int(layer_idx), causal == "1", band, chunk=chunk), engine


def _plan_for(key: str, device: torch.device, extra: int) -> PlanFor:
    config, at, _ = _layer(key)

    def plan_for(query_length: int, key_length: int) -> tuple[Part, ...]:
        chunk = at.chunk if at.chunk is not None and at.chunk < key_length else None
        geometry = Geometry(
            key_length, query_length, at.heads, at.num_heads, at.layer_idx, at.causal, at.band, at.block, chunk
        )  # fmt: skip
        return cached_plan(config, geometry, device, extra)

    return plan_for


def _sequences(
    query: Tensor, key: Tensor, spans: list[int], extra: int, tensors: tuple[Tensor | None, ...]
) -> Sequences:
    query_gather, key_gather, mask, ids = tensors
    batch, n_q, n_k = query.shape[0], query.shape[2], key.shape[2]
    if mask is not None or ids is not None:
        return Sequences.from_mask(batch, n_q - extra, n_k - extra, mask, ids).with_extra_tokens(extra)
    if not spans:  # the common case: whole rows
        return Sequences.full(batch, n_q - extra, n_k - extra).with_extra_tokens(extra)
    rows = (Span(*spans[at : at + _SPAN_FIELDS]) for at in range(0, len(spans), _SPAN_FIELDS))
    return Sequences(batch, n_q, n_k, tuple(rows), query_gather, key_gather, extra)


def _flat(sequences: AnySequences) -> list[int]:
    if isinstance(sequences, PendingSequences) or sequences.is_full:
        return []
    # No sequence at all (a batch of padding) is one empty span: an empty list means whole rows.
    spans = sequences.spans or (Span(0, 0, 0, 0, 0),)
    return [x for s in spans for x in (s.row, s.query_start, s.query_length, s.key_start, s.key_length)]


def _options(
    key: str, scale: float, softcap: float, dropout: float, learned: tuple[Tensor | None, ...],
    buckets: tuple[Tensor | None, Tensor | None], seed: Tensor | None, extra: int,
) -> ScoreOptions:  # fmt: skip
    """Args: learned: bias, sinks, values of the query's and of the key's term."""
    heads, (bias, sinks, *values) = _layer(key)[1].heads, learned
    query_term, key_term = (
        None if x is None or at is None else DistanceTerm(x, at) for x, at in zip(values, buckets, strict=True)
    )
    return ScoreOptions(
        scale, softcap or None, bias, dropout=dropout, seed=seed, extra_tokens=extra, heads=heads, sinks=sinks,
        query_term=query_term, key_term=key_term,
    )  # fmt: skip


def _forward(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, sinks: Tensor | None, of_query: Tensor | None,
    of_key: Tensor | None, query_buckets: Tensor | None, key_buckets: Tensor | None, seed: Tensor | None,
    query_gather: Tensor | None, key_gather: Tensor | None, mask: Tensor | None, ids: Tensor | None, layer: str,
    spans: list[int], extra: int, scale: float, softcap: float, dropout: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    learned, buckets = (bias, sinks, of_query, of_key), (query_buckets, key_buckets)
    options = _options(layer, scale, softcap, dropout, learned, buckets, seed, extra)
    with own_rules(query.device):
        sequences = _sequences(query, key, spans, extra, (query_gather, key_gather, mask, ids))
        engine = choose_engine(_layer(layer)[2], query, options)
        plan_for = _plan_for(layer, query.device, extra)
        out, lse = sequences_forward(query, key, value, sequences, plan_for, options, engine)
        return laid_out(out), lse.contiguous()


_static_attention = torch.library.custom_op(
    "sa_hf::static_attention", _forward, mutates_args=(), tags=OUTSIDE_COMPILED_GRAPHS
)  # fmt: skip


@_static_attention.register_fake
def _(query, key, value, *rest):  # type: ignore[no-untyped-def]  # signature fixed by the operator
    refuse_for_onnx()
    stats = torch.float64 if query.dtype == torch.float64 else torch.float32
    return empty_output(query), query.new_empty(query.shape[:3], dtype=stats)


def _gradients(
    grad: Tensor, out: Tensor, lse: Tensor, query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None,
    sinks: Tensor | None, of_query: Tensor | None, of_key: Tensor | None, query_buckets: Tensor | None,
    key_buckets: Tensor | None, seed: Tensor | None, query_gather: Tensor | None, key_gather: Tensor | None,
    mask: Tensor | None, ids: Tensor | None, layer: str, spans: list[int], extra: int, scale: float, softcap: float,
    dropout: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    learned, buckets = (bias, sinks, of_query, of_key), (query_buckets, key_buckets)
    options = _options(layer, scale, softcap, dropout, learned, buckets, seed, extra)
    with own_rules(query.device):
        sequences = _sequences(query, key, spans, extra, (query_gather, key_gather, mask, ids))
        engine = choose_engine(_layer(layer)[2], query, options)
        grads = sequences_backward(
            query, key, value, out, lse, grad, sequences, _plan_for(layer, query.device, extra), options, engine
        )  # fmt: skip
    found = grads.distance_bias, grads.sinks, grads.query_term, grads.key_term
    of_bias, of_sinks, of_query, of_key = (query.new_empty(0) if x is None else x.contiguous() for x in found)
    main = grads.query.contiguous(), grads.key.contiguous(), grads.value.contiguous()
    return *main, of_bias, of_sinks, of_query, of_key


_static_attention_backward = torch.library.custom_op(
    "sa_hf::static_attention_backward", _gradients, mutates_args=(), tags=OUTSIDE_COMPILED_GRAPHS
)  # fmt: skip


@_static_attention_backward.register_fake
def _(grad, out, lse, query, key, value, *rest):  # type: ignore[no-untyped-def]  # signature fixed by the operator
    present = (query.new_empty(0) if x is None else x.new_empty(x.shape) for x in rest[:4])
    return query.new_empty(query.shape), key.new_empty(key.shape), value.new_empty(value.shape), *present


def _setup(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]  # signature fixed by register_autograd
    ctx.save_for_backward(*output, *inputs[:TENSORS])
    ctx.rest = inputs[TENSORS:]


def _backward(ctx, grad_out, grad_lse):  # type: ignore[no-untyped-def]  # signature fixed by register_autograd
    out, lse, *tensors = ctx.saved_tensors
    grads = _static_attention_backward(grad_out, out, lse, *tensors, *ctx.rest)
    optional = (None if x is None else g for x, g in zip(tensors[3:7], grads[3:], strict=True))
    return *grads[:3], *optional, *(None for _ in [*tensors[7:], *ctx.rest])


_static_attention.register_autograd(_backward, setup_context=_setup)
_static_attention_backward.register_autograd(refuse_second_derivative)


class _StaticCall(OperatorCall):
    differentiable = 7
    outputs = 2
    functions = _forward, _gradients
    operators = _static_attention, _static_attention_backward

    def widened(self, copies: int, batch: int, mapped: Sequence[bool | None]) -> _StaticCall | None:
        # A table, the sinks and buckets are one for the batch, dropout counts its sequences.
        if any(x is not None for x in mapped[3:10]):
            return None
        layer, flat, *rest = self.rest
        wide = [
            x + copy * batch * (at % _SPAN_FIELDS == 0) for copy in range(copies) for at, x in enumerate(flat)
        ]  # the first field is the row
        return _StaticCall((layer, wide, *rest))


def static_attention(
    query: Tensor, key: Tensor, value: Tensor, sequences: AnySequences, layer: str, options: ScoreOptions
) -> Tensor:
    """A static pattern over the sequences of a batch, ``[B, H, Nq, Dv]`` of values of any width Dv; differentiable in
    query, key, value, the distance bias, the sinks and the terms.

    ``layer`` comes from :func:`layer_key`; else shapes as in ``ops.attend.attend``.
    """
    return at_one_width(
        lambda query, key, value: _at_one_width(query, key, value, sequences, layer, options), query, key, value
    )


def _at_one_width(
    query: Tensor, key: Tensor, value: Tensor, sequences: AnySequences, layer: str, options: ScoreOptions
) -> Tensor:  # fmt: skip
    plain = eager(query, key, value, *options.learned) and not torch._C._are_functorch_transforms_active()
    if isinstance(sequences, Sequences) and plain:
        return _direct(query, key, value, sequences, layer, options)
    mask = ids = None
    if isinstance(sequences, PendingSequences):
        mask, ids = sequences.attention_mask, sequences.sequence_ids
    buckets = (None if term is None else term.buckets for term in options.terms)
    bias, _, sinks, *values = options.learned
    tensors = (
        query, key, value, bias, sinks, *values, *buckets, options.seed,
        sequences.query_gather, sequences.key_gather, mask, ids,
    )  # fmt: skip
    rest = (layer, _flat(sequences), sequences.extra_tokens, options.scale, options.softcap or 0.0, options.dropout)
    if not tracing():
        return differentiable(_StaticCall(rest), *tensors)
    refuse_traced_transforms(*tensors)
    out: Tensor = _static_attention(*tensors, *rest)[0]
    return out


def _direct(
    query: Tensor, key: Tensor, value: Tensor, sequences: Sequences, layer: str, options: ScoreOptions
) -> Tensor:  # fmt: skip
    """The same call without the operator."""
    extra = sequences.extra_tokens
    _, at, name = _layer(layer)
    if options.heads != at.heads or options.softcap == 0 or options.spans is not None:
        options = replace(options, softcap=options.softcap or None, spans=None, heads=at.heads)
    engine = choose_engine(name, query, options)
    return attend(query, key, value, sequences, _plan_for(layer, query.device, extra), options, engine)
