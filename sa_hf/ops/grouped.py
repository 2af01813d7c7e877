"""Plans that depend on data: the sequences of a batch group by group, differentiable from outside.

``ops.attend`` makes one plan per shape. Where the plan depends on the tokens (spans, clusters) or the attention is not
one softmax (the mean over clusters, a learned gate), a pattern works on each group of equal sequences itself.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sa_hf.errors import SparseAttentionError
from sa_hf.ops.attend import Batch, plan_backward, plan_forward
from sa_hf.ops.engine import Engine
from sa_hf.ops.parts import Part, ScoreOptions
from sa_hf.ops.sequences import Sequences


@dataclass(frozen=True, eq=False)
class Group:
    """Sequences of equal shape, stacked: query ``[G, H, nq, D]``, key and value ``[G, Hkv, nk, D]``, no padding.

    ``options`` are those of the group (its sequence numbers, its spans, the middle of the distance table).
    ``queries`` and ``keys`` bring another per-token tensor ``[B, C, N, E]`` of the batch to the group.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    options: ScoreOptions
    queries: Callable[[Tensor], Tensor]
    keys: Callable[[Tensor], Tensor]

    @property
    def query_offset(self) -> int:
        return self.key.shape[2] - self.query.shape[2]


def map_groups(
    query: Tensor, key: Tensor, value: Tensor, sequences: Sequences, options: ScoreOptions,
    attend: Callable[[Group], Tensor],
) -> Tensor:  # fmt: skip
    """Run ``attend`` on each group of equal sequences; returns ``[B, H, Nq, D]``, rows of padding 0.

    Raises:
        SparseAttentionError: the batch carries extra tokens, which belong to patterns that say what reads them.
    """
    if sequences.extra_tokens:
        raise SparseAttentionError(
            f"the model carries {sequences.extra_tokens} extra tokens; a learned pattern does not say who reads them. "
            "Use patterns without extra tokens beside it"
        )
    batch = Batch(sequences, lambda *_: (), options, query.device)
    if sequences.is_full:
        return attend(Group(query, key, value, batch.whole_options, _unchanged, _unchanged))
    compact_query, compact_key, compact_value = batch.compact(query, key, value)
    out = torch.zeros_like(compact_query)
    for _, rows in batch.groups():
        group = Group(
            rows.queries(compact_query),
            rows.keys(compact_key),
            rows.keys(compact_value),
            rows.options,
            lambda x, rows=rows: rows.queries(batch.compact_queries(x)),  # type: ignore[misc]
            lambda x, rows=rows: rows.keys(compact_keys(x, sequences)),  # type: ignore[misc]
        )
        rows.write_queries(out, attend(group))
    return batch.expand_queries(out)


def _unchanged(x: Tensor) -> Tensor:
    return x


def compact_keys(x: Tensor, sequences: Sequences) -> Tensor:
    """``x [B, C, Nk, E]`` with the real tokens of each row first, where a mask has holes."""
    return x if sequences.key_gather is None else Batch._gathered(x, sequences.key_gather)


def real_queries(sequences: Sequences, device: torch.device) -> Tensor:
    """Which query slots hold a token, bool ``[B, Nq]``."""
    real = torch.zeros(sequences.batch_size, sequences.query_length, dtype=torch.bool)
    for s in sequences.spans:
        real[s.row, s.query_start : s.query_start + s.query_length] = True
    if sequences.query_gather is not None:
        real = torch.zeros_like(real).scatter(1, sequences.query_gather.cpu(), real)
    return real.to(device)


def key_places(sequences: Sequences, device: torch.device) -> tuple[Tensor, Tensor]:
    """Of each key slot its position in its sequence (-1: padding) and that sequence's length, int64 ``[B, Nk]``."""
    position = torch.full((sequences.batch_size, sequences.key_length), -1)
    length = torch.zeros_like(position)
    for s in sequences.spans:
        slots = slice(s.key_start, s.key_start + s.key_length)
        position[s.row, slots] = torch.arange(s.key_length)
        length[s.row, slots] = s.key_length
    if sequences.key_gather is not None:
        gather = sequences.key_gather.cpu()
        position, length = (torch.zeros_like(x).scatter(1, gather, x) for x in (position, length))
    return position.to(device), length.to(device)


class _Plan(torch.autograd.Function):
    @staticmethod
    def forward(ctx, query, key, value, bias, spans, plan, options, engine):  # type: ignore[no-untyped-def]
        options = options.with_tensors(distance_bias=bias, spans=spans)
        out, lse = plan_forward(plan, query, key, value, options, engine)
        ctx.save_for_backward(query, key, value, bias, spans, out, lse)
        ctx.call = plan, options.with_tensors(distance_bias=None, spans=None), engine
        return out

    @staticmethod
    def backward(ctx, grad_out):  # type: ignore[no-untyped-def]
        query, key, value, bias, spans, out, lse = ctx.saved_tensors
        plan, options, engine = ctx.call
        options = options.with_tensors(distance_bias=bias, spans=spans)
        grads = plan_backward(plan, query, key, value, out, lse, grad_out, options, engine)
        return grads.query, grads.key, grads.value, grads.distance_bias, grads.spans, None, None, None


def attend_plan(
    query: Tensor, key: Tensor, value: Tensor, plan: Sequence[Part], options: ScoreOptions, engine: Engine
) -> Tensor:
    """One plan over equal sequences (one softmax over its parts); differentiable in query, key, value, the distance
    bias and the spans of ``options``. Shapes as in :class:`Group`."""
    bare = options.with_tensors(distance_bias=None, spans=None)
    result: Tensor = _Plan.apply(query, key, value, options.distance_bias, options.spans, tuple(plan), bare, engine)
    return result


class _Slots(torch.autograd.Function):
    @staticmethod
    def forward(ctx, query, key, value, bias, part, options, engine):  # type: ignore[no-untyped-def]
        options = options.with_tensors(distance_bias=bias)
        out, lse = engine.forward(part, query, key, value, options)
        ctx.save_for_backward(query, key, value, bias, out, lse)
        ctx.call = part, options.with_tensors(distance_bias=None), engine
        return out

    @staticmethod
    def backward(ctx, grad_out):  # type: ignore[no-untyped-def]
        query, key, value, bias, out, lse = ctx.saved_tensors
        part, options, engine = ctx.call
        options = options.with_tensors(distance_bias=bias)
        grads = engine.backward(part, query, key, value, out, lse, grad_out, options)
        return grads.query, grads.key, grads.value, grads.distance_bias, None, None, None


def attend_slots(
    query: Tensor, key: Tensor, value: Tensor, part: Part, options: ScoreOptions, engine: Engine
) -> Tensor:
    """One part over slots that are already gathered: output ``[G, H, query_slots, D]``, a softmax of its own per slot
    (a position may stand in several slots). Differentiable in the slots and the distance bias."""
    bare = options.with_tensors(distance_bias=None)
    result: Tensor = _Slots.apply(query, key, value, options.distance_bias, part, bare, engine)
    return result
