"""Our own small tensors are made on the CPU or name their device, whatever ``torch.set_default_device`` says."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import wraps
from typing import ParamSpec, TypeVar

import torch

P = ParamSpec("P")
R = TypeVar("R")


def host_defaults() -> AbstractContextManager[object]:
    """Inside, a tensor made without a device lies on the CPU, as without ``torch.set_default_device``: indices and
    lists are made there, and would meet tensors of another device."""
    if torch.compiler.is_compiling() or torch.get_default_device().type == "cpu":
        return nullcontext()
    return torch.device("cpu")


def with_host_defaults(function: Callable[P, R]) -> Callable[P, R]:
    """Decorator: run under :func:`host_defaults`."""

    @wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        with host_defaults():
            return function(*args, **kwargs)

    return run
