"""Run the parts of a plan over equal sequences, merged; and back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from torch import Tensor

from sa_hf.ops.engine import Engine, Gradients
from sa_hf.ops.parts import Part, ScoreOptions
from sa_hf.ops.sinks import sinks_gradient, with_sinks


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
