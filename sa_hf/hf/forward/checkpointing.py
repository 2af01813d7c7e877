"""Gradient checkpointing: a layer that is recomputed knows which forward it belongs to."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import nn

from sa_hf.hf.state.inputs import ForwardInputs, hand_over, handed_over

# Where Transformers keeps the checkpoint function of a layer.
CHECKPOINT_FUNCTION = "_gradient_checkpointing_func"


@dataclass(eq=False)
class CarryingCheckpoint:
    """A layer's checkpoint function that hands a recomputation what its forward was given.

    A mask carries that by itself (``MaskRequest.given``), but some models build none (CLIP's vision tower).
    """

    function: Callable[..., Any]

    def __call__(self, run: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        return self.function(partial(_run_as, handed_over(), run), *args, **kwargs)


def _run_as(given: ForwardInputs | None, run: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    before = handed_over()
    hand_over(given)
    try:
        return run(*args, **kwargs)
    finally:
        hand_over(before)


def checkpointed(model: nn.Module) -> Iterator[nn.Module]:
    """The layers of a model that Transformers checkpoints."""
    return (module for module in model.modules() if getattr(module, "gradient_checkpointing", False))


def carry_inputs(model: nn.Module) -> None:
    """Let checkpointed layers carry what a forward is given; called in each forward, as enabling sets them anew."""
    for module in checkpointed(model):
        function = getattr(module, CHECKPOINT_FUNCTION, None)
        if function is not None and not isinstance(function, CarryingCheckpoint):
            setattr(module, CHECKPOINT_FUNCTION, CarryingCheckpoint(function))


@dataclass(eq=False)
class CarryHandle:
    """Undoes :func:`carry_inputs`, as a hook's handle undoes the hook."""

    model: nn.Module

    def remove(self) -> None:
        for module in self.model.modules():
            function = getattr(module, CHECKPOINT_FUNCTION, None)
            if isinstance(function, CarryingCheckpoint):
                setattr(module, CHECKPOINT_FUNCTION, function.function)
