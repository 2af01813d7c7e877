"""What a forward of a model was given, handed over to the masks and layers inside it."""

from __future__ import annotations

from collections.abc import Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


@dataclass(eq=False)
class ForwardInputs:
    """What the model's outer call was given about its sequences, for masks that are built inside it; ``numbers`` counts
    the forwards in training of each learned layer (by id), this one included; ``delivery`` takes their losses.
    ``originals``: inside ``dense(model)``, the implementation of each of its configs, by id."""

    sequence_ids: Tensor | None = None
    position_ids: Tensor | None = None
    cu_seq_lens: Tensor | None = None
    numbers: Mapping[int, int] = field(default_factory=dict)
    delivery: Any = None  # a step.Delivery
    originals: Mapping[int, str] = field(default_factory=dict)


_FORWARD: ContextVar[ForwardInputs | None] = ContextVar("sa_hf_forward", default=None)


def hand_over(inputs: ForwardInputs | None) -> None:
    """Keep what the outer call was given for the masks built inside it (torch.compile has a way of its own)."""
    if not torch.compiler.is_compiling():
        _FORWARD.set(inputs)


def handed_over() -> ForwardInputs | None:
    """What the outer call was given; None outside of one, and under torch.compile."""
    return None if torch.compiler.is_compiling() else _FORWARD.get()
