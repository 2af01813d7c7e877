"""What a caller sets for torch as a whole, and operators of ours do not follow: its default device, its autocast."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, nullcontext
from functools import wraps
from typing import ParamSpec, TypeVar

import torch

P = ParamSpec("P")
R = TypeVar("R")


def host_defaults() -> AbstractContextManager[object]:
    """Inside, a tensor made without a device lies on the CPU, as without ``torch.set_default_device``: indices and
    lists are made there, and would meet tensors of another device."""
    # A default device is one of the modes on this stack; asking for it by its public name, each time, costs more.
    if torch.compiler.is_compiling() or not torch._C._len_torch_function_stack():
        return nullcontext()
    if torch.get_default_device().type == "cpu":
        return nullcontext()
    return torch.device("cpu")


def own_rules(device: torch.device) -> AbstractContextManager[object]:
    """For the inside of an operator: :func:`host_defaults`, and products in the precision that it chose. Autocast would
    make them in bfloat16, also in a backward that is called under it."""
    if not torch.is_autocast_enabled(device.type):
        return host_defaults()
    rules = ExitStack()
    rules.enter_context(host_defaults())
    rules.enter_context(torch.autocast(device.type, enabled=False))
    return rules


def with_host_defaults(function: Callable[P, R]) -> Callable[P, R]:
    """Decorator: run under :func:`host_defaults`."""

    @wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        if torch.compiler.is_compiling() or not torch._C._len_torch_function_stack():
            return function(*args, **kwargs)
        with host_defaults():
            return function(*args, **kwargs)

    return run
