"""Sweep tiles, warps and stages on the GPU at hand and write the table of launch configurations.

Kernels go in order of their share of a training step; what the budget does not reach keeps its shipped configuration.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median

import torch

from sa_hf.ops.layout import build_layout
from sa_hf.ops.parts import Band, BlockPart, OffsetsPart, Part, ScoreOptions
from sa_hf.ops.triton.configs import TUNED, Launch, launch, trial, write
from sa_hf.ops.triton.engine import TritonEngine
from sa_hf.ops.triton.launch import architecture

# rows, columns, warps, stages. A candidate that does not compile or does not fit the machine is passed over.
TILES = [(64, 64, 4, 2), (64, 64, 4, 3), (64, 32, 4, 2), (64, 32, 4, 3), (64, 32, 8, 2), (64, 64, 8, 2)]
WIDE_TILES = [(128, 64, 8, 2), (128, 64, 8, 3), (128, 128, 8, 2), (128, 32, 8, 2), (128, 32, 4, 2), (64, 64, 4, 2)]
ROWS = [(64, 1, 4, 1), (32, 1, 4, 1), (16, 1, 4, 1), (32, 1, 8, 1), (64, 1, 8, 1)]


@dataclass(frozen=True)
class Job:
    """A kernel variant, what runs it, and its candidates."""

    kernel: str
    head_dim: int
    candidates: list[tuple[int, int, int, int]]
    backward: bool

    def name(self, bits: int, arch: int | str) -> str:
        """The key in the table of configurations."""
        return f"{self.kernel}|{self.head_dim}|{bits}|{arch}"

    def launches(self, bits: int, arch: int | str) -> list[Launch]:
        """What there is now, and the candidates."""
        now = launch(self.kernel, self.head_dim, bits, arch)
        return list(dict.fromkeys([now, *(Launch(*c) for c in self.candidates)]))

    def part(self, length: int) -> Part:
        if self.kernel.startswith("offsets"):
            return OffsetsPart(
                length, (tuple(d for d in (0, 1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024) if d < length),)
            )
        block = 128 if self.kernel.endswith("@128") else 64
        width = max(1, min(8, length // block // 4))
        tiles = torch.arange(-(-length // block))
        columns = torch.cat([tiles - back for back in range(width)])
        near = torch.stack([torch.zeros_like(columns), tiles.repeat(width), columns], 1)
        return BlockPart(
            build_layout(
                lambda h, i, j: i >= j, length, length, heads=1, block=block, band=Band(None, 0),
                full_tiles=near[near[:, 2] >= 0],
            )
        )  # fmt: skip

    def options(self) -> ScoreOptions:
        options = ScoreOptions(scale=self.head_dim**-0.5)
        return replace(options, softcap=30.0) if self.kernel.endswith("+") else options


def jobs() -> list[Job]:
    found = []
    for head_dim in (128, 64):
        for suffix, tiles in (("", TILES), ("@128", WIDE_TILES), ("+", TILES)):
            found.append(Job(f"forward{suffix}", head_dim, tiles, False))
            found.append(Job(f"key{suffix}", head_dim, [*tiles, (64, 16, 8, 2)], True))
            found.append(Job(f"query{suffix}", head_dim, tiles, True))
        found.append(Job("offsets", head_dim, ROWS, False))
        found.append(Job("offsets_key", head_dim, ROWS, True))
    return found


def tune(device: torch.device, *, dry_run: bool = False, budget: float = 240.0) -> Path:
    """Measure the candidates for ``budget`` seconds; returns the file written (a temporary one in a dry run)."""
    deadline = time.monotonic() + budget
    length, heads, dtype = (64, 1, torch.float32) if dry_run else (16384, 16, torch.bfloat16)
    bits, arch = 8 * dtype.itemsize, architecture(device)
    table: dict[str, Launch] = {}
    for job in jobs()[:2] if dry_run else jobs():
        name = job.name(bits, arch)
        call = _call(job, length, heads, dtype, device)
        times: dict[Launch, float] = {}
        candidates = job.launches(bits, arch)
        for candidate in candidates[:2] if dry_run else candidates:
            if time.monotonic() > deadline:
                break
            with trial({**table, name: candidate}):
                spent = _milliseconds(call, device, 1 if dry_run else 20)
            if spent is not None:
                times[candidate] = spent
        if times:
            table[name] = min(times, key=lambda c: times[c])
    path = Path(tempfile.mkdtemp()) / "tuned.json" if dry_run else TUNED
    write(path, table)
    return path


def candidate_calls(length: int) -> Iterator[Callable[[], None]]:
    """Calls on CPU tensors that reach the kernel of every candidate; for a recorder, which stops before compilation."""
    device = torch.device("cpu")
    bits, arch = 16, architecture(device)
    for job in jobs():

        def with_each(job: Job = job) -> None:
            call = _call(job, length, 1, torch.bfloat16, device)
            for candidate in job.launches(bits, arch):
                with trial({job.name(bits, arch): candidate}):
                    call()

        yield with_each


def _call(job: Job, length: int, heads: int, dtype: torch.dtype, device: torch.device) -> Callable[[], object]:
    g = torch.Generator(device).manual_seed(0)
    sizes = (1, heads, length, job.head_dim)
    q, k, v, grad = (torch.randn(sizes, generator=g, device=device, dtype=dtype) for _ in range(4))
    engine, part, options = TritonEngine(), _moved(job.part(length), device), job.options()
    if not job.backward:
        return lambda: engine.forward(part, q, k, v, options)
    out, lse = engine.forward(part, q, k, v, options)
    return lambda: engine.backward(part, q, k, v, out, lse, grad, options)


def _moved(part: Part, device: torch.device) -> Part:
    if not isinstance(part, BlockPart):
        return part
    layout = part.layout
    tensors = {name: getattr(layout, name).to(device) for name in ("row_start", "columns", "kind", "masks")}
    return replace(part, layout=replace(layout, **tensors))


def _milliseconds(call: Callable[[], object], device: torch.device, repeats: int) -> float | None:
    """Median time of a call; None where the configuration does not compile or fit."""
    import triton
    from triton.runtime.errors import TritonError

    try:
        call()
    except (triton.CompilationError, TritonError, RuntimeError):
        return None
    spent = []
    for _ in range(repeats):
        if device.type != "cuda":
            begin = time.perf_counter()
            call()
            spent.append(1e3 * (time.perf_counter() - begin))
            continue
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        call()
        end.record()
        end.synchronize()
        spent.append(start.elapsed_time(end))
    return median(spent)
