"""Sparse attention over the sequences of a batch: equal ones grouped and run by their plan; and back."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from sa_hf.ops.engine import Engine, Gradients
from sa_hf.ops.host import own_rules
from sa_hf.ops.parts import Part, ScoreOptions
from sa_hf.ops.random import counter_words
from sa_hf.ops.run import empty_output, laid_out, plan_backward, plan_forward
from sa_hf.ops.sequences import Sequences
from sa_hf.ops.transforms import differentiable, given

# (query_length, key_length) of a sequence -> its parts
PlanFor = Callable[[int, int], Sequence[Part]]


# -- over the sequences of a batch ---------------------------------------------------------------------------------


def sequences_forward(
    query: Tensor, key: Tensor, value: Tensor, sequences: Sequences, plan_for: PlanFor, options: ScoreOptions,
    engine: Engine,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Attention over the sequences of a batch: ``[B, H, Nq, D]`` and log-sum-exp ``[B, H, Nq]`` (padding: 0, -inf)."""
    batch = Batch(sequences, plan_for, options, query.device)
    if sequences.is_full:
        return plan_forward(batch.whole_plan, query, key, value, batch.whole_options, engine)
    query, key, value = batch.compact(query, key, value)
    stats = torch.float64 if query.dtype == torch.float64 else torch.float32
    out = empty_output(query).zero_()
    lse = torch.full(query.shape[:3], -torch.inf, dtype=stats, device=query.device)
    for plan, group in batch.groups():
        q, k, v = group.queries(query), group.keys(key), group.keys(value)
        group_out, group_lse = plan_forward(plan, q, k, v, group.options, engine)
        group.write_queries(out, group_out)
        group.write_queries(lse.unsqueeze(-1), group_lse.unsqueeze(-1))
    return batch.expand_queries(out), batch.expand_queries(lse.unsqueeze(-1), fill=-torch.inf).squeeze(-1)


def sequences_backward(
    query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor, grad_out: Tensor, sequences: Sequences,
    plan_for: PlanFor, options: ScoreOptions, engine: Engine,
) -> Gradients:  # fmt: skip
    """Gradients of :func:`sequences_forward`."""
    batch = Batch(sequences, plan_for, options, query.device)
    if sequences.is_full:
        whole = plan_backward(batch.whole_plan, query, key, value, out, lse, grad_out, batch.whole_options, engine)
        return replace(whole, distance_bias=uncentred(whole.distance_bias, options.distance_bias))
    lse4 = lse.unsqueeze(-1)
    query, key, value = batch.compact(query, key, value)
    out, grad_out, lse4 = (batch.compact_queries(x) for x in (out, grad_out, lse4))
    grads = [torch.zeros_like(x) for x in (query, key, value)]
    bias = None if options.distance_bias is None else torch.zeros_like(options.distance_bias)
    spans = None if options.spans is None else torch.zeros_like(options.spans)
    sinks = None if options.sinks is None else torch.zeros_like(options.sinks)
    terms = [None if term is None else torch.zeros_like(term.values) for term in options.terms]
    for plan, group in batch.groups():
        q, k, v = group.queries(query), group.keys(key), group.keys(value)
        group_lse = group.queries(lse4).squeeze(-1)
        part = plan_backward(
            plan, q, k, v, group.queries(out), group_lse, group.queries(grad_out), group.options, engine
        )
        group.write_queries(grads[0], part.query)
        group.write_keys(grads[1], part.key)
        group.write_keys(grads[2], part.value)
        if bias is not None:
            whole_bias = uncentred(part.distance_bias, bias)
            bias = bias if whole_bias is None else bias + whole_bias
        if spans is not None and part.spans is not None:
            group.write_keys(spans.unsqueeze(-1), part.spans.unsqueeze(-1))
        if sinks is not None and part.sinks is not None:
            sinks = sinks + part.sinks
        for total, found, write in zip(
            terms, (part.query_term, part.key_term), (group.write_queries, group.write_keys), strict=True
        ):
            if total is not None and found is not None:
                write(total, found)
    if spans is not None and sequences.key_gather is not None:
        spans = batch.expand_keys(spans.unsqueeze(-1)).squeeze(-1)
    query_grad, key_grad, value_grad = batch.expand_queries(grads[0]), *(batch.expand_keys(g) for g in grads[1:])
    of_terms = (
        None if x is None else expand(x)
        for x, expand in zip(terms, (batch.expand_queries, batch.expand_keys), strict=True)
    )
    return Gradients(query_grad, key_grad, value_grad, bias, spans, sinks, *of_terms)


class Batch:
    """The sequences of a batch as groups of equal shape, each with its plan."""

    def __init__(self, sequences: Sequences, plan_for: PlanFor, options: ScoreOptions, device: torch.device) -> None:
        self.sequences = sequences
        self.plan_for = plan_for
        self.device = device
        if options.spans is not None and sequences.key_gather is not None:
            options = options.with_tensors(spans=self.compact_keys(options.spans.unsqueeze(-1)).squeeze(-1))
        self.options = _with_rows(options, self.compact_queries, self.compact_keys)

    @property
    def whole_plan(self) -> Sequence[Part]:
        first = self.sequences.first
        return self.plan_for(first.query_length, first.key_length)

    @property
    def whole_options(self) -> ScoreOptions:
        first, options = self.sequences.first, self.options
        offset = first.key_length - first.query_length
        if options.seed is None and options.distance_bias is None and options.query_offset == offset:
            return options
        return replace(
            options,
            sequence_ids=None if options.seed is None else torch.arange(self.sequences.batch_size, device=self.device),
            distance_bias=centred(options.distance_bias, first.key_length),
            query_offset=offset,
        )

    def groups(self) -> list[tuple[Sequence[Part], BatchGroup]]:
        return [(self.plan_for(*shape), BatchGroup(self, shape, indices)) for shape, indices in self.sequences.groups]

    def compact(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self.compact_queries(query), self.compact_keys(key), self.compact_keys(value)

    def compact_queries(self, x: Tensor) -> Tensor:
        """``x [B, C, N, E]`` with the real tokens of each row first, where a mask has holes."""
        return self._gathered(x, self.sequences.query_gather)

    def compact_keys(self, x: Tensor) -> Tensor:
        return self._gathered(x, self.sequences.key_gather)

    @staticmethod
    def _gathered(x: Tensor, gather: Tensor | None) -> Tensor:
        if gather is None:
            return x
        return torch.gather(x, 2, gather[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[3]))

    def expand_queries(self, x: Tensor, fill: float = 0.0) -> Tensor:
        return self._expanded(x, self.sequences.query_gather, fill)

    def expand_keys(self, x: Tensor) -> Tensor:
        return self._expanded(x, self.sequences.key_gather, 0.0)

    @staticmethod
    def _expanded(x: Tensor, gather: Tensor | None, fill: float) -> Tensor:
        if gather is None:
            return x
        index = gather[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[3])
        return torch.full_like(x, fill).scatter_(2, index, x)


class BatchGroup:
    """Sequences of equal shape, stacked along the batch."""

    def __init__(self, batch: Batch, shape: tuple[int, int], indices: tuple[int, ...]) -> None:
        self.spans = [batch.sequences.spans[i] for i in indices]
        self.key_length = shape[1]
        self.extra = batch.sequences.extra_tokens
        options = _with_rows(batch.options, self.queries, self.keys)
        self.options = replace(
            options,
            sequence_ids=counter_words(indices, batch.device),
            distance_bias=centred(options.distance_bias, self.key_length),
            query_offset=shape[1] - shape[0],
            spans=None if options.spans is None else self.keys(options.spans.unsqueeze(-1)).squeeze(-1),
        )

    def queries(self, x: Tensor) -> Tensor:
        return self._stacked(x, [(s.query_start, s.query_length) for s in self.spans])

    def keys(self, x: Tensor) -> Tensor:
        return self._stacked(x, [(s.key_start, s.key_length) for s in self.spans])

    def write_queries(self, target: Tensor, x: Tensor) -> None:
        self._write(target, x, [(s.query_start, s.query_length) for s in self.spans])

    def write_keys(self, target: Tensor, x: Tensor) -> None:
        self._write(target, x, [(s.key_start, s.key_length) for s in self.spans])

    def _stacked(self, x: Tensor, runs: list[tuple[int, int]]) -> Tensor:
        rows = [x[s.row, :, start : start + length] for s, (start, length) in zip(self.spans, runs, strict=True)]
        if self.extra:
            rows = [torch.cat([x[s.row, :, : self.extra], r], dim=1) for s, r in zip(self.spans, rows, strict=True)]
        return torch.stack(rows)

    def _write(self, target: Tensor, x: Tensor, runs: list[tuple[int, int]]) -> None:
        for index, (s, (start, length)) in enumerate(zip(self.spans, runs, strict=True)):
            target[s.row, :, : self.extra] = x[index, :, : self.extra]
            target[s.row, :, start : start + length] = x[index, :, self.extra :]


def _with_rows(
    options: ScoreOptions, queries: Callable[[Tensor], Tensor], keys: Callable[[Tensor], Tensor]
) -> ScoreOptions:
    """The options with the terms of other rows ``[B, H, N, R]``."""
    if options.query_term is not None:
        options = replace(options, query_term=options.query_term.of_rows(queries))
    if options.key_term is not None:
        options = replace(options, key_term=options.key_term.of_rows(keys))
    return options


def centred(table: Tensor | None, key_length: int) -> Tensor | None:
    """The middle ``2 * key_length - 1`` columns of a distance table."""
    if table is None:
        return None
    drop = (table.shape[1] + 1) // 2 - key_length
    return table[:, drop : table.shape[1] - drop] if drop else table


def uncentred(grad: Tensor | None, table: Tensor | None) -> Tensor | None:
    """The adjoint of :func:`centred`: a gradient padded with zeros to the whole table."""
    if grad is None or table is None:
        return grad
    drop = (table.shape[1] - grad.shape[1]) // 2
    return torch.nn.functional.pad(grad, (drop, drop)) if drop else grad


# -- autograd ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _Attend:
    """The call of :func:`attend`; its tensors are query, key, value and what the options have learned."""

    differentiable: ClassVar[int] = 8
    outputs: ClassVar[int] = 2

    sequences: Sequences
    plan_for: PlanFor
    options: ScoreOptions
    engine: Engine

    def run(self, *tensors: Tensor | None) -> tuple[Tensor, ...]:
        query, key, value = given(tensors[:3])
        options = self.options.with_learned(tensors[3:])
        with own_rules(query.device):
            out, lse = sequences_forward(query, key, value, self.sequences, self.plan_for, options, self.engine)
            return laid_out(out), lse

    def gradients(
        self, grad: Tensor, outputs: Sequence[Tensor], tensors: Sequence[Tensor | None]
    ) -> tuple[Tensor, ...]:
        out, lse = outputs
        query, key, value = given(tensors[:3])
        options = self.options.with_learned(tensors[3:])
        with own_rules(query.device):
            grads = sequences_backward(
                query, key, value, out, lse, grad, self.sequences, self.plan_for, options, self.engine
            )
        found = grads.distance_bias, grads.spans, grads.sinks, grads.query_term, grads.key_term
        optional = zip(tensors[3:], found, strict=True)
        return grads.query, grads.key, grads.value, *(g for x, g in optional if x is not None and g is not None)

    def widened(self, copies: int, batch: int, mapped: object) -> None:
        """The plan and the sequences are of one batch."""


def attend(
    query: Tensor, key: Tensor, value: Tensor, sequences: Sequences, plan_for: PlanFor, options: ScoreOptions,
    engine: Engine,
) -> Tensor:  # fmt: skip
    """Sparse attention over the sequences of a batch, differentiable in query, key, value, distance bias, spans,
    sinks and terms.

    Args:
        query: ``[B, H, Nq, D]``; key, value: ``[B, Hkv, Nk, D]``, H a multiple of Hkv.
        plan_for: ``(query_length, key_length) -> parts``; called again in the backward, so it must be pure.

    Returns:
        ``[B, H, Nq, D]`` in the query's dtype; rows of padding and rows without a key are 0.
    """
    # Autograd wants what has a gradient among a function's arguments.
    values = (None if term is None else term.values.detach() for term in options.terms)
    rest = options.with_learned([None, None, None, *values])
    return differentiable(_Attend(sequences, plan_for, rest, engine), query, key, value, *options.learned)
