"""Record what the launchers would compile and run, for any GPU and without one.

Inside :func:`record_launches` a stand-in driver is active: a kernel call binds and specialises its arguments as on the
real device, and stops before it compiles. The compile gate compiles the recorded kernels ahead of time; a test counts
them to prove that a new length is not a new kernel.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource


@dataclass(frozen=True, eq=False)
class Recorded:
    """One kernel as it would be compiled; ``key`` is equal for equal kernels."""

    name: str
    key: str
    function: Any
    signature: dict[str, str]
    constants: dict[Any, Any]
    attributes: dict[Any, Any]
    options: dict[str, Any]
    target: GPUTarget

    def compile(self) -> Any:
        """The compiled kernel (``asm``, ``metadata``), from Triton's cache where it has it."""
        source = ASTSource(self.function, self.signature, self.constants, self.attributes)
        return triton.compile(source, target=self.target, options=self.options)


class _Driver:
    """Says that a GPU of a kind is there; nothing is ever launched."""

    def __init__(self, target: GPUTarget) -> None:
        self.target = target

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> GPUTarget:
        # Triton keeps its kernels by device: those of a target must not mix with a real device's.
        return self.target

    def get_current_stream(self, device: GPUTarget) -> int:
        return 0


@contextmanager
def record_launches(target: GPUTarget) -> Iterator[list[Recorded]]:
    """Collect the kernels that are called inside, each distinct one once; their outputs stay uninitialised.

    Tensors may lie on the CPU. Not for a process in which the kernels are interpreted.
    """
    found: dict[str, Recorded] = {}

    def hook(*, key: Any, fn: Any, compile: dict[str, Any], **_: Any) -> bool:
        options = {name: compile[name] for name in ("num_warps", "num_stages", "enable_fp_fusion")}
        identity = json.dumps([fn.name, str(key)])
        if identity not in found:
            found[identity] = Recorded(
                fn.name.rsplit(".", 1)[-1], identity, fn.jit_function, compile["signature"], compile["constants"],
                compile["configs"][0], options, target,
            )  # fmt: skip
        return True

    before, driver = triton.knobs.runtime.jit_cache_hook, triton.runtime.driver
    real = driver._active  # None where no GPU was asked for yet; the public reader would raise
    result: list[Recorded] = []
    triton.knobs.runtime.jit_cache_hook = hook
    driver.set_active(_Driver(target))
    try:
        yield result
    finally:
        triton.knobs.runtime.jit_cache_hook = before
        driver._active = real
        result.extend(found.values())
