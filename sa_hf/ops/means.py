"""Attention in slots where a position may stand several times, each slot a softmax of its own: a position gets the mean
over its slots that read a key."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sa_hf.ops.engine import Engine, Gradients
from sa_hf.ops.parts import Part, ScoreOptions
from sa_hf.ops.run import plan_forward
from sa_hf.ops.slots import add_slots, take


@dataclass(frozen=True, eq=False)
class Means:
    """``out [G, H, n, D]``: means over the slots, and where there is none the result of the other parts, with its
    log-sum-exp ``lse [G, H, n]``. Per slot ``[G, H, slots(, D)]`` what the backward needs."""

    out: Tensor
    lse: Tensor
    slot_out: Tensor
    slot_lse: Tensor


def means_forward(
    plan: Sequence[Part], query: Tensor, key: Tensor, value: Tensor, options: ScoreOptions, engine: Engine
) -> Means:
    """Args: plan: the part with the slots, and parts that only attend queries which stand in no slot of it that reads a
    key. Shapes as in ``Engine.forward``, in positions."""
    slotted, index, others = _split(plan)
    stats = torch.promote_types(query.dtype, torch.float32)
    slots = (*query.shape[:2], index.shape[2])
    slot_out, slot_lse = query.new_empty(*slots, query.shape[3]), query.new_empty(slots, dtype=stats)
    total = query.new_zeros(query.shape, dtype=stats)
    for piece in engine.pieces(slotted, query, key):
        q, k, v = engine.gather(piece, query, key, value)
        out, lse = engine.forward(piece.part, q, k, v, piece.options(options, *query.shape[:2]))
        piece.queries(slot_out).copy_(out)
        piece.queries(slot_lse).copy_(lse)
        add_slots(piece.queries(total), out, piece.part.query_index, repeated=True)
    total.div_(_counts(slot_lse, index, query.shape[2]))
    start = total, slot_lse.new_full(query.shape[:3], -torch.inf)
    merged, lse = plan_forward(others, query, key, value, options, engine, start)
    return Means(merged, lse, slot_out, slot_lse)


def means_backward(
    plan: Sequence[Part], query: Tensor, key: Tensor, value: Tensor, means: Means, grad_out: Tensor,
    options: ScoreOptions, engine: Engine,
) -> Gradients:  # fmt: skip
    """Gradients of :func:`means_forward`."""
    slotted, index, others = _split(plan)
    share = 1 / _counts(means.slot_lse, index, query.shape[2])
    total = engine.total(query, key, value, options)
    for piece in engine.pieces(slotted, query, key):
        grad, part_of_mean = (take(piece.queries(x), piece.part.query_index) for x in (grad_out, share))
        out, lse = piece.queries(means.slot_out), piece.queries(means.slot_lse)
        grad = grad * part_of_mean.to(grad.dtype)
        q, k, v = engine.gather(piece, query, key, value)
        own = piece.options(options, *query.shape[:2])
        total.add(engine.backward(piece.part, q, k, v, out, lse, grad, own), piece, repeated=True)
    for part in others:
        total.attend(part, query, key, value, means.out, means.lse, grad_out)
    return total.gradients()


def _split(plan: Sequence[Part]) -> tuple[Part, Tensor, list[Part]]:
    slotted, *others = plan
    if not isinstance(slotted.query_index, Tensor):
        raise TypeError("the slots of means are listed by an index")
    return slotted, slotted.query_index, others


def _counts(slot_lse: Tensor, index: Tensor, length: int) -> Tensor:
    """Of each position the number of slots that read a key, at least 1: ``[G, H, length, 1]``."""
    counts = slot_lse.new_zeros(*slot_lse.shape[:2], length)
    # Whole numbers: their sum has no order.
    counts.scatter_add_(2, index.expand(slot_lse.shape), (~torch.isneginf(slot_lse)).to(counts.dtype))
    return counts.clamp_(min=1).unsqueeze(-1)
