"""What every launcher needs: alignment, strides in units of 8, head_dim as two chunks, the architecture, the launch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton.compiler import CompiledKernel

from sa_hf.ops.triton.common import STATS_TILE
from sa_hf.ops.triton.configs import Launch, launch
from sa_hf.ops.triton.device import capability, interpreting

# Launches of a kernel that are kept prepared, one for each shape of a call, 5 kB each; the oldest go first.
PREPARED = 256


class Shape(NamedTuple):
    """A tensor as far as the numbers of a launch depend on it: its sizes, and its strides in elements."""

    sizes: tuple[int, ...]
    strides: tuple[int, ...]

    @classmethod
    def of(cls, x: Tensor) -> Shape:
        return cls(x.shape, x.stride())


class Prepared:
    """A launch of a kernel with all its arguments but the tensors, which come first.

    ``kernel[grid](...)`` looks at every argument anew, and there are 70. The compiled kernel that it returns takes
    them as they are. Which one that is depends on the device, on the tensors' dtypes and alignment and on which are
    None; all else is fixed here.
    """

    def __init__(
        self, kernel: Any, grid: tuple[int, ...], arguments: Mapping[str, int | float | bool],
        config: Launch | None = None,
    ) -> None:  # fmt: skip
        self.kernel = kernel
        self.grid = (*grid, 1, 1)[:3]
        self.arguments = {**arguments, **build_options(config)}
        self._compiled: dict[tuple[object, ...], Callable[..., None]] = {}
        self._numbers: list[int | float | bool] = []

    def __call__(self, *tensors: Tensor | None) -> None:
        identity = (
            next(x.get_device() for x in tensors if x is not None),
            *[None if x is None else (x.dtype, x.data_ptr() % 16 == 0) for x in tensors],
        )
        compiled = self._compiled.get(identity)
        if compiled is not None:
            compiled(*tensors, *self._numbers)
            return
        made = self.kernel[self.grid](*tensors, **self.arguments)
        # Nothing is compiled where launches are recorded or interpreted; HIP kernels depend on the tensors' sizes too.
        if isinstance(made, CompiledKernel) and torch.version.hip is None:
            self._numbers = [self.arguments[name] for name in self.kernel.arg_names[len(tensors) :]]
            self._compiled[identity] = made[self.grid]


def aligned(x: Tensor) -> Tensor:
    """The tensor itself where 16-byte loads of whole rows work, else a contiguous copy."""
    fine = x.stride(-1) == 1 and x.data_ptr() % 16 == 0 and all(s % 8 == 0 for s in x.stride()[:-1])
    return x if fine else x.clone(memory_format=torch.contiguous_format)


def packed(x: Tensor) -> Tensor:
    """Contiguous from a 16-byte boundary: a pointer's alignment is part of a kernel's identity."""
    return x.contiguous() if x.data_ptr() % 16 == 0 else x.clone(memory_format=torch.contiguous_format)


def padded_rows(rows: int) -> int:
    """Of tensors that tiles read unmasked: whole tiles of the largest size."""
    tile: int = STATS_TILE.value
    return -(-rows // tile) * tile


def strides(name: str, of: tuple[int, ...]) -> dict[str, int]:
    """Strides of an ``aligned`` ``[B, H, N, D]`` in units of 8 elements: ``s{name}b``, ``s{name}h``, ``s{name}n``."""
    return {f"s{name}{axis}": stride // 8 for axis, stride in zip("bhn", of, strict=False)}


def contiguous(sizes: tuple[int, ...]) -> tuple[int, int, int, int]:
    """The strides of a contiguous ``[B, H, N, D]``."""
    _, heads, length, dim = sizes
    return heads * length * dim, length * dim, dim, 1


def empty_like(x: Tensor) -> Tensor:
    """Uninitialised and contiguous, as the operators hand it on; another layout would be copied there."""
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


def stats_empty(like: Tensor, *shape: int) -> Tensor:
    """Uninitialised fp32 for what kernels accumulate, whatever torch's default dtype is."""
    return torch.empty(shape, dtype=torch.float32, device=like.device)


def chunks(head_dim: int) -> dict[str, int]:
    """head_dim as two power-of-two chunks, the tail of the second masked: 80 = 64 + 16, 128 = 128 + 0."""
    first = 1 << (head_dim.bit_length() - 1)
    rest = head_dim - first
    second = 0 if rest == 0 else max(16, 1 << (rest - 1).bit_length())
    return {"D": head_dim, "D0": first, "D1": second}


def configuration(kernel: str, x: Tensor) -> Launch:
    return launch(kernel, x.shape[-1], 8 * x.element_size(), architecture(x.device))


def architecture(device: torch.device) -> int | str:
    """Compute capability times 10, "hip", or 0 on the CPU (interpreter)."""
    if device.type != "cuda":
        return _active_target()
    return "hip" if torch.version.hip else capability(device.index)


def _active_target() -> int | str:
    """The architecture that kernels compile for, where a compile gate has set one; 0 otherwise."""
    if interpreting():
        return 0
    target = triton.runtime.driver.active.get_current_target()
    return target.arch if target.backend == "cuda" else "hip"


def build_options(config: Launch | None = None) -> dict[str, int | bool]:
    """Compiler options of a launch; fused multiply-add is named because Triton's default for it changes with 3.10."""
    warps, stages = (4, 1) if config is None else (config.warps, config.stages)
    return {"num_warps": warps, "num_stages": stages, "enable_fp_fusion": True}
