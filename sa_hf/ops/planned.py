"""Attention whose plan depends on data, as a registered operator that ``torch.compile`` sees as one opaque call.

An operator's arguments are tensors, numbers and strings: the plan travels as the name of a rule, its numbers and at
most two tensors, and is made again in the backward. A rule has no host sync off the CPU.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sa_hf.errors import SparseAttentionError
from sa_hf.ops.choice import choose_engine
from sa_hf.ops.engine import Engine
from sa_hf.ops.graphs import OUTSIDE_COMPILED_GRAPHS, tracing
from sa_hf.ops.host import own_rules
from sa_hf.ops.means import Means, means_backward, means_forward
from sa_hf.ops.parts import Part, ScoreOptions
from sa_hf.ops.run import empty_output, laid_out, plan_backward, plan_forward
from sa_hf.ops.transforms import (
    OperatorCall,
    differentiable,
    refuse_for_onnx,
    refuse_second_derivative,
    refuse_traced_transforms,
)
from sa_hf.ops.widths import at_one_width

NO_LIMIT = -1  # stands for None among the numbers of a rule


@dataclass(frozen=True, eq=False)
class PlanData:
    """What a rule makes its parts from: the shapes of the call, the rule's tensors and numbers, the call's options."""

    query_length: int
    key_length: int
    tensors: tuple[Tensor, ...]
    numbers: tuple[int | None, ...]
    options: ScoreOptions


Rule = Callable[[PlanData], Sequence[Part]]
_RULES: dict[str, Rule] = {}


def plan_rule(name: str) -> Callable[[Rule], Rule]:
    """Decorator: register a rule under the name that the operator's arguments carry."""

    def register(rule: Rule) -> Rule:
        _RULES[name] = rule
        return rule

    return register


def _call(
    query: Tensor, key: Tensor, bias: Tensor | None, spans: Tensor | None, sinks: Tensor | None,
    tensors: tuple[Tensor | None, Tensor | None], seed: Tensor | None, sequence_ids: Tensor | None, rule: str,
    numbers: list[int], heads: list[int], engine: str, scalars: list[float],
) -> tuple[Sequence[Part], ScoreOptions, Engine]:  # fmt: skip
    scale, softcap, dropout, ramp = scalars
    n_q, n_k = query.shape[2], key.shape[2]
    options = ScoreOptions(
        scale, softcap or None, bias, spans, ramp, dropout, seed, sequence_ids, heads=tuple(heads) or None,
        query_offset=n_k - n_q, sinks=sinks,
    )  # fmt: skip
    given = tuple(x for x in tensors if x is not None)
    data = PlanData(n_q, n_k, given, tuple(None if x == NO_LIMIT else x for x in numbers), options)
    return _RULES[rule](data), options, choose_engine(engine, query, options)


def _forward(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, spans: Tensor | None, sinks: Tensor | None,
    first: Tensor | None, second: Tensor | None, seed: Tensor | None, sequence_ids: Tensor | None, rule: str,
    numbers: list[int], heads: list[int], engine: str, mean_slots: int, scalars: list[float],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    with own_rules(query.device):
        plan, options, runs = _call(
            query, key, bias, spans, sinks, (first, second), seed, sequence_ids, rule, numbers, heads, engine, scalars
        )  # fmt: skip
        if mean_slots:
            means = means_forward(plan, query, key, value, options, runs)
            return laid_out(means.out), means.lse, means.slot_out, means.slot_lse
        out, lse = plan_forward(plan, query, key, value, options, runs)
    return laid_out(out), lse.contiguous(), query.new_empty(0), lse.new_empty(0)


_planned = torch.library.custom_op("sa_hf::planned_attention", _forward, mutates_args=(), tags=OUTSIDE_COMPILED_GRAPHS)


@_planned.register_fake
def _(query, *rest):  # type: ignore[no-untyped-def]  # signature fixed by the operator
    refuse_for_onnx()
    mean_slots = rest[-2]
    stats = torch.promote_types(query.dtype, torch.float32)
    lead, (length, dim) = query.shape[:2], query.shape[2:]
    slots = (*lead, mean_slots) if mean_slots else (0,)
    slot_out = query.new_empty(*slots, dim) if mean_slots else query.new_empty(0)
    return (
        empty_output(query), query.new_empty(*lead, length, dtype=stats), slot_out,
        query.new_empty(slots, dtype=stats),
    )  # fmt: skip


def _gradients(
    grad: Tensor, out: Tensor, lse: Tensor, slot_out: Tensor, slot_lse: Tensor, query: Tensor, key: Tensor,
    value: Tensor, bias: Tensor | None, spans: Tensor | None, sinks: Tensor | None, first: Tensor | None,
    second: Tensor | None, seed: Tensor | None, sequence_ids: Tensor | None, rule: str, numbers: list[int],
    heads: list[int], engine: str, mean_slots: int, scalars: list[float],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    with own_rules(query.device):
        plan, options, runs = _call(
            query, key, bias, spans, sinks, (first, second), seed, sequence_ids, rule, numbers, heads, engine, scalars
        )  # fmt: skip
        if mean_slots:
            means = Means(out, lse, slot_out, slot_lse)
            grads = means_backward(plan, query, key, value, means, grad, options, runs)
        else:
            grads = plan_backward(plan, query, key, value, out, lse, grad, options, runs)
    of_bias, of_spans, of_sinks = (
        query.new_empty(0) if x is None else x.contiguous() for x in (grads.distance_bias, grads.spans, grads.sinks)
    )
    return grads.query.contiguous(), grads.key.contiguous(), grads.value.contiguous(), of_bias, of_spans, of_sinks


_planned_backward = torch.library.custom_op(
    "sa_hf::planned_attention_backward", _gradients, mutates_args=(), tags=OUTSIDE_COMPILED_GRAPHS
)  # fmt: skip


@_planned_backward.register_fake
def _(grad, out, lse, slot_out, slot_lse, query, key, value, bias, spans, sinks, *rest):  # type: ignore[no-untyped-def]  # fixed by the operator
    present = (query.new_empty(0) if x is None else x.new_empty(x.shape) for x in (bias, spans, sinks))
    return query.new_empty(query.shape), key.new_empty(key.shape), value.new_empty(value.shape), *present


TENSORS = 10  # the leading arguments of the operator that are tensors


def _setup(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]  # signature fixed by register_autograd
    ctx.save_for_backward(*output, *inputs[:TENSORS])
    ctx.rest = inputs[TENSORS:]


def _backward(ctx, grad_out, *unused):  # type: ignore[no-untyped-def]  # signature fixed by register_autograd
    out, lse, slot_out, slot_lse, *tensors = ctx.saved_tensors
    query, key, value, *optional = _planned_backward(grad_out, out, lse, slot_out, slot_lse, *tensors, *ctx.rest)
    given = (None if x is None else g for x, g in zip(tensors[3:6], optional, strict=True))
    return query, key, value, *given, *(None for _ in [*tensors[6:], *ctx.rest])


_planned.register_autograd(_backward, setup_context=_setup)
_planned_backward.register_autograd(refuse_second_derivative)


class _PlannedCall(OperatorCall):
    differentiable = 6
    outputs = 4
    functions = _forward, _gradients
    operators = _planned, _planned_backward

    def widened(self, copies: int, batch: int, mapped: Sequence[bool | None]) -> _PlannedCall | None:
        # A table and the sinks are one for the batch, dropout counts its sequences, and only a rule knows whose its
        # tensors are.
        bias, _, sinks, first, second, seed = mapped[3:9]
        apart = any(x is not None for x in (bias, sinks, seed)) or first is False or second is False
        return None if apart else self


def planned_attention(
    query: Tensor, key: Tensor, value: Tensor, rule: str, options: ScoreOptions, engine: str, *,
    tensors: Sequence[Tensor] = (), numbers: Sequence[int | None] = (), mean_slots: int = 0,
) -> Tensor:  # fmt: skip
    """Attention over equal sequences by the parts that a rule makes, one softmax over all (but see ``mean_slots``).

    Args:
        query: ``[G, H, nq, D]``; key: ``[G, Hkv, nk, D]``; value: ``[G, Hkv, nk, Dv]``.
        rule: a name given to :func:`plan_rule`; ``tensors`` (two at most, without gradient) and ``numbers``
            are its own.
        mean_slots: the rule's first part lists so many slots, in which a position may stand several times: its result
            is the mean over them, or that of the other parts where there is none (``ops.means``).

    Returns:
        ``[G, H, nq, Dv]``, differentiable in query, key, value, and the distance bias, spans and sinks of ``options``.

    Raises:
        SparseAttentionError: sinks with ``mean_slots``, where no row is one softmax.
    """
    if mean_slots and options.sinks is not None:
        raise SparseAttentionError(
            f"{rule!r} gives means of several softmaxes, in which attention sinks have no place; use a pattern that "
            "is one softmax a row, for example 'sliding_window' or 'bigbird'"
        )
    first, second = (*tensors, None, None)[:2]
    others = (options.distance_bias, options.spans, options.sinks, first, second, options.seed, options.sequence_ids)
    rest = (
        rule, [NO_LIMIT if x is None else x for x in numbers], list(options.heads or ()), engine, mean_slots,
        [options.scale, options.softcap or 0.0, options.dropout, options.ramp],
    )  # fmt: skip

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        if not tracing():
            return differentiable(_PlannedCall(rest), query, key, value, *others)
        refuse_traced_transforms(query, key, value, *others)
        out: Tensor = _planned(query, key, value, *others, *rest)[0]
        return out

    return at_one_width(attend, query, key, value)
