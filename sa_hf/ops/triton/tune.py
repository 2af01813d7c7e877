"""Sweep tiles, warps and stages on the GPU at hand and write the table of launch configurations.

Kernels go in order of their share of a training step; what the budget does not reach keeps its shipped configuration.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from sa_hf.ops.layout import build_layout
from sa_hf.ops.parts import Band, BlockPart, OffsetsPart, Part, ScoreOptions
from sa_hf.ops.triton.configs import TUNED, Launch, launch, trial, write
from sa_hf.ops.triton.engine import TritonEngine
from sa_hf.ops.triton.launch import architecture

# Milliseconds of a call on the device, given calls on inputs of their own. The bench has one that does not count the
# host's launches: they take as long as a kernel.
Clock = Callable[[Sequence[Callable[[], object]], torch.device], float]

# rows, columns, warps, stages. A candidate that does not compile or does not fit the machine is passed over. Eight
# warps on 64 rows are not among them: two warp groups then share the columns of a product and exchange its operand
# through shared memory (dK/dV at head_dim 128 in 64 x 32: model_cards/results/kernels_h100.md).
TILES = [(64, 64, 4, 2), (64, 64, 4, 3), (64, 64, 4, 4), (64, 32, 4, 2), (64, 32, 4, 3), (64, 32, 4, 4)]
WIDE_TILES = [
    (64, 64, 4, 2), (64, 64, 4, 3), (64, 128, 4, 2), (64, 128, 4, 3), (128, 64, 8, 2), (128, 64, 8, 3),
    (128, 128, 8, 2), (128, 32, 8, 3),
]  # fmt: skip
ROWS = [(8, 1, 2, 1), (16, 1, 2, 1), (16, 1, 4, 1), (32, 1, 4, 1), (32, 1, 8, 1), (64, 1, 8, 1)]


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
            found.append(Job(f"key{suffix}", head_dim, [*tiles, (64, 16, 4, 3), (64, 32, 4, 3)], True))
            found.append(Job(f"query{suffix}", head_dim, tiles, True))
        found.append(Job("offsets", head_dim, ROWS, False))
        found.append(Job("offsets_query", head_dim, ROWS, True))
        found.append(Job("offsets_key", head_dim, ROWS, True))
    return found


def tune(
    device: torch.device, clock: Clock, *, dry_run: bool = False, budget: float = 240.0, copy: Path | None = None
) -> Path:
    """Measure the candidates for ``budget`` seconds; returns the file written (a temporary one in a dry run).

    Args: copy: written after each kernel, so that a run that is stopped leaves what it found.

    Raises: what the device raised; the table has been written up to there.
    """
    deadline = time.monotonic() + budget
    length, heads, dtype = (64, 1, torch.float32) if dry_run else (16384, 16, torch.bfloat16)
    arch = architecture(device)
    path = Path(tempfile.mkdtemp()) / "tuned.json" if dry_run else TUNED
    table: dict[str, Launch] = {}
    try:
        for job in jobs()[:2] if dry_run else jobs():
            if time.monotonic() > deadline:
                break
            calls = _calls(job, length, heads, dtype, device, 2)
            name, candidates = job.name(8 * dtype.itemsize, arch), job.launches(8 * dtype.itemsize, arch)
            times: dict[Launch, float] = {}
            for candidate in candidates[:2] if dry_run else candidates:
                if time.monotonic() > deadline:
                    break
                with trial({**table, name: candidate}):
                    spent = _milliseconds(calls, device, clock)
                if spent is not None:
                    times[candidate] = spent
            if times:
                table[name] = min(times, key=lambda c: times[c])
                if copy is not None:
                    write(copy, table)
    finally:
        if table:
            write(path, table)
    return path


def candidate_calls(length: int) -> Iterator[Callable[[], None]]:
    """Calls on CPU tensors that reach the kernel of every candidate; for a recorder, which stops before compilation."""
    device = torch.device("cpu")
    bits, arch = 16, architecture(device)
    for job in jobs():

        def with_each(job: Job = job) -> None:
            (call,) = _calls(job, length, 1, torch.bfloat16, device, 1)
            for candidate in job.launches(bits, arch):
                with trial({job.name(bits, arch): candidate}):
                    call()

        yield with_each


def _calls(
    job: Job, length: int, heads: int, dtype: torch.dtype, device: torch.device, sets: int
) -> list[Callable[[], object]]:
    """The kernel of a job on ``sets`` of inputs: where it can be called alone, without the rest of the backward, beside
    which a candidate's gain is small."""
    part, options = _moved(job.part(length), device), job.options()
    generator = torch.Generator(device).manual_seed(0)
    sizes = (1, heads, length, job.head_dim)

    def call() -> Callable[[], object]:
        q, k, v, grad = (torch.randn(sizes, generator=generator, device=device, dtype=dtype) for _ in range(4))
        engine = TritonEngine()
        if not job.backward:
            return lambda: engine.forward(part, q, k, v, options)
        out, lse = engine.forward(part, q, k, v, options)
        if not isinstance(part, BlockPart):
            return lambda: engine.backward(part, q, k, v, out, lse, grad, options)
        # The launchers need triton, which this package is imported without.
        from sa_hf.ops.triton import launch_block
        from sa_hf.ops.triton.lists import layout_lists
        from sa_hf.ops.triton.scores import Scores

        lists, scores = layout_lists(part.layout), Scores.of(options, None, None, q, k)
        operands = launch_block.backward_operands(q, k, v, out, lse, grad, scores)
        if job.kernel.startswith("query"):
            return lambda: launch_block.query_gradient(lists, operands, scores)
        return lambda: launch_block.key_gradient(lists, operands, scores)

    return [call() for _ in range(sets)]


def _moved(part: Part, device: torch.device) -> Part:
    if not isinstance(part, BlockPart):
        return part
    layout = part.layout
    tensors = {name: getattr(layout, name).to(device) for name in ("row_start", "columns", "kind", "masks")}
    return replace(part, layout=replace(layout, **tensors))


def _milliseconds(calls: Sequence[Callable[[], object]], device: torch.device, clock: Clock) -> float | None:
    """Time of a call by the clock; None where the configuration does not compile or fit."""
    try:
        calls[0]()
    except Exception as error:
        if not _does_not_fit(error):
            raise
        return None
    return clock(calls, device)


def _does_not_fit(error: Exception) -> bool:
    """Whether a launch failed for its configuration: the compiler's errors and Triton's own (out of shared memory, of
    registers). An error of the device ends everything that follows, and says nothing about a configuration."""
    from triton.runtime.errors import TritonError

    if isinstance(error, TritonError):
        return True
    of_device = isinstance(error, torch.AcceleratorError | torch.OutOfMemoryError) or "CUDA" in str(error)
    return isinstance(error, RuntimeError) and not of_device
