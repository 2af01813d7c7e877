"""Run the parts of a plan over equal sequences, merged; and back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from torch import Tensor

from sa_hf.ops.engine import Engine, Gradients
from sa_hf.ops.parts import Part, ScoreOptions
from sa_hf.ops.sinks import sinks_gradient, with_sinks


def laid_out(out: Tensor) -> Tensor:
    """An output ``[B, H, N, D]`` as it is handed on. On the CPU it lies in memory as ``[B, N, H, D]``, as that of
    torch's own attention does: a model's projection then reads the tensor that the backward keeps, and no copy."""
    if out.device.type != "cpu":
        return out.contiguous()
    return out.transpose(1, 2).contiguous().transpose(1, 2)


def empty_output(like: Tensor) -> Tensor:
    """Uninitialised and :func:`laid_out`, in the shape ``[B, H, N, D]`` of ``like``."""
    if like.device.type != "cpu":
        return like.new_empty(like.shape)
    batch, heads, length, dim = like.shape
    return like.new_empty(batch, length, heads, dim).transpose(1, 2)


def plan_forward(
    plan: Sequence[Part], query: Tensor, key: Tensor, value: Tensor, options: ScoreOptions, engine: Engine,
    merged: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """All parts of a plan over equal sequences, merged. Shapes as in ``Engine.forward``, in positions.

    Args: merged: what came before the plan, contiguous, in fp32 or wider; written to.
    """
    merging = engine.merging(query, merged)
    for part in plan:
        merging.attend(part, query, key, value, options)
    return with_sinks(*merging.result(), options.sinks)


def plan_backward(
    plan: Sequence[Part], query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor, grad_out: Tensor,
    options: ScoreOptions, engine: Engine,
) -> Gradients:  # fmt: skip
    """Gradients of :func:`plan_forward` for all of a plan's parts, summed."""
    total = engine.total(query, key, value, options)
    for part in plan:
        total.attend(part, query, key, value, out, lse, grad_out)
    return replace(total.gradients(), sinks=sinks_gradient(out, lse, grad_out, options.sinks))
