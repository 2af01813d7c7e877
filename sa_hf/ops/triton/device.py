"""The device that kernels run on, and whether Triton only interprets them. Needs neither triton nor a GPU."""

from __future__ import annotations

import os
import sys
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache
from importlib.util import find_spec

import torch


def why_not() -> str | None:
    """Why this process has no kernels to compile or interpret, or None."""
    if find_spec("triton") is None:
        return "triton is not installed (pip install triton; Linux on x86_64)"
    return None


def interpreting() -> bool:
    """Whether the kernels are (or would be) made by Triton's interpreter."""
    made = sys.modules.get("sa_hf.ops.triton.common")
    if made is None:
        return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes")
    return type(made.load_item).__name__ == "InterpretedFunction"


def on_device(device: torch.device) -> AbstractContextManager[object]:
    """Kernels are launched on the current device: make it the tensor's."""
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        return nullcontext()
    return torch.cuda.device(device)


@lru_cache(maxsize=16)
def capability(index: int | None) -> int:
    """Compute capability of a CUDA device times 10."""
    major, minor = torch.cuda.get_device_capability(index)
    return major * 10 + minor
