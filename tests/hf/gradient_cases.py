"""A model's output with the gradients of all its parameters, and how close two of them must be."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sa_hf.tools.families.compare import gradient_error, relative_error

OUTPUT = "output"


def with_gradients(model: Any, output: Tensor) -> dict[str, Tensor]:
    """The output, and the gradient of every parameter that it hangs on, for one drawn gradient of the output."""
    names, leaves = zip(*model.named_parameters(), strict=True)
    upstream = torch.randn(output.shape, generator=torch.Generator().manual_seed(3))
    found = torch.autograd.grad(output, leaves, upstream, allow_unused=True)
    return {OUTPUT: output, **{name: g for name, g in zip(names, found, strict=True) if g is not None}}


def assert_close(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert found.keys() == wanted.keys()
    assert relative_error(found[OUTPUT], wanted[OUTPUT]) < 1e-5
    figure, where = gradient_error(*({name: x for name, x in one.items() if name != OUTPUT} for one in (found, wanted)))
    assert figure < 1e-4, where
