"""Compile the suite's kernels on all cores before it starts: one after another they would take the budget.

The launchers run on CPU tensors up to the compilation (``ops.triton.record``); what is compiled lands in Triton's cache
on disk, where the suite's own process finds it.
"""

from __future__ import annotations

import os
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, wait
from contextlib import suppress
from dataclasses import replace
from functools import partial
from math import inf
from multiprocessing import active_children, get_context
from typing import Any
from unittest.mock import patch

import torch

from sa_hf.layer import Geometry
from sa_hf.ops import planned, slots
from sa_hf.ops.parts import ScoreOptions
from sa_hf.ops.run import plan_backward, plan_forward
from sa_hf.ops.triton import TritonEngine
from sa_hf.patterns.base import StaticPatternConfig
from sa_hf.patterns.custom_op import cached_plan
from sa_hf.tools.bench import learned
from sa_hf.tools.bench.cases import parity_configs, timing_cases
from sa_hf.tools.bench.parity import PARITY_DTYPES, PARITY_SHAPES, Shape, option_case

# Kernels do not depend on the length, but a few parts do: segments of whole tiles of 128 slots get others than those
# that are not. Between these lengths a pattern has all its kinds of parts (tested against the lengths of the suite).
TIMING_LENGTHS = (2048, 4096, 16384)
TUNING_LENGTH = 4096
GRACE_SECONDS = 15.0  # for the kernels that were begun in time


def precompile(arch: int, *, tune: bool, until: float = inf) -> dict[str, Any]:
    """Compile on every core for compute capability ``arch / 10``; returns the row of the report.

    Args: until: by ``time.monotonic``: no kernel is begun later. What is missing compiles where it is first used.
    """
    workers = os.cpu_count() or 1
    begin = time.perf_counter()
    before = active_children()
    # The parent may hold a CUDA context, which a forked child could not use.
    pool = ProcessPoolExecutor(workers, mp_context=get_context("spawn"))
    share = partial(_share, workers=workers, arch=arch, tune=tune, until=until)
    futures = [pool.submit(share, index) for index in range(workers)]
    seconds = max(0.0, until + GRACE_SECONDS - time.monotonic())
    late = wait(futures, None if seconds == inf else seconds).not_done
    pool.shutdown(wait=not late, cancel_futures=True)
    for child in set(active_children()) - set(before) if late else ():
        child.kill()  # a kernel that takes for ever would hold up the suite
    done = [future.result() for future in futures if future not in late]
    failed = [name for _, names, _ in done for name in names]
    left = sum(count for _, _, count in done)
    row: dict[str, Any] = {"kernels": sum(count for count, _, _ in done), "seconds": time.perf_counter() - begin}
    if left or time.monotonic() > until:
        row["stopped in time"] = f"{left} kernels not begun, {len(late)} of {workers} processes ended"
    return row | ({"not compiled": ", ".join(failed)} if failed else {})


def _share(index: int, workers: int, arch: int, tune: bool, until: float = inf) -> tuple[int, list[str], int]:
    """One worker's part; returns what :func:`compile_until` does."""
    from triton.backends.compiler import GPUTarget

    from sa_hf.ops.triton.record import record_launches

    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    with record_launches(GPUTarget("cuda", arch, 32)) as recorded:
        for call in [*suite_calls(), *(_tuning_calls() if tune else [])]:
            if time.monotonic() > until:
                break
            call()
    return compile_until(recorded[index::workers], until)


def compile_until(kernels: Sequence[Any], until: float) -> tuple[int, list[str], int]:
    """Compile in turn, beginning none later: the number compiled, the names of those that failed, those not begun."""
    failed: list[str] = []
    for done, kernel in enumerate(kernels):
        if time.monotonic() > until:
            return done - len(failed), failed, len(kernels) - done
        try:
            compiled = kernel.compile()
        except Exception:  # whatever the compiler says, the suite meets it again where it counts
            failed.append(kernel.name)
            continue
        with suppress(Exception):  # without a driver's library there is nothing to link with, and nothing to launch
            build_launcher(compiled)
    return len(kernels) - len(failed), failed, 0


def build_launcher(compiled: Any) -> None:
    """Up to Triton 3.6 each signature has a C launcher, compiled at its first launch by the C compiler, one after
    another. Newer versions launch without (``CudaLauncher`` in 3.7)."""
    from triton.backends.nvidia import driver

    if hasattr(driver, "make_launcher"):
        driver.CudaLauncher(compiled.src, compiled.metadata)


def suite_calls() -> Iterator[Callable[[], None]]:
    """Calls that reach the kernels of all sections, of the timings before those of the parity."""
    yield from timing_calls()
    first = PARITY_SHAPES[0]
    padded = replace(first, length=first.length - first.length // 4)  # of the first shape's padded row, see ``parity``
    for dtype in PARITY_DTYPES:
        for shape in (*PARITY_SHAPES, padded):
            for _, config in parity_configs():
                for causal in (True, False):
                    yield partial(_run, config, shape, dtype, causal, ScoreOptions(1.0))
        for option in ("softcap", "bias", "spans", "dropout"):
            config, options = option_case(option, PARITY_SHAPES[0], torch.device("cpu"))
            yield partial(_run, config, PARITY_SHAPES[0], dtype, True, options)
        for case in learned.CASES:
            yield partial(_run_by_data, case, PARITY_SHAPES[0], dtype)


def timing_calls() -> Iterator[Callable[[], None]]:
    """Calls that reach the kernels of the timing sections."""
    for case in timing_cases():
        for length in TIMING_LENGTHS:
            for head_dim in (128, 64):
                shape = Shape(1, 1, 1, length, head_dim)
                yield partial(_run, case.config, shape, torch.bfloat16, case.causal, ScoreOptions(1.0))
        if (case.label, case.causal) == ("sliding_window", True):
            shape = Shape(1, 1, 1, TIMING_LENGTHS[0], 64)
            for options in (
                ScoreOptions(1.0, dropout=0.1, seed=torch.tensor(0)),
                ScoreOptions(1.0, spans=torch.zeros(1, 1, shape.length)),
            ):
                yield partial(_run, case.config, shape, torch.bfloat16, True, options)
    yield _decode


def _decode() -> None:
    """A step over lists that are long enough to be split and merged, and one that is not."""
    from sa_hf.ops.triton.launch_decode import decode

    key = torch.zeros(1, 1, 1, 128, dtype=torch.bfloat16)
    for most in (4096, 1):
        decode(key, key, key, torch.zeros(1, 1, 1, most, dtype=torch.int64), ScoreOptions(1.0))


def _run_by_data(case: learned.DataCase, shape: Shape, dtype: torch.dtype) -> None:
    """The operator asks for an engine that serves its tensors, and these lie on the CPU: here the kernels do."""
    vectors, data = learned.case_inputs(case, shape, 0)
    with (
        patch.object(planned, "choose_engine", lambda *_: TritonEngine()),
        patch.object(slots, "on_host", lambda index: False),
    ):
        learned.run_case(partial(case.attend, engine="triton"), [x.to(dtype) for x in vectors], data)


def _run(config: StaticPatternConfig, shape: Shape, dtype: torch.dtype, causal: bool, options: ScoreOptions) -> None:
    heads, n = shape.num_heads, shape.length
    geometry = Geometry(n, n, tuple(range(heads)), heads, 0, causal)
    plan = cached_plan(config, geometry, torch.device("cpu"))
    query = torch.zeros(shape.batch, heads, n, shape.head_dim, dtype=dtype)
    key = torch.zeros(shape.batch, shape.num_key_value_heads, n, shape.head_dim, dtype=dtype)
    options = replace(options, heads=geometry.heads)
    engine = TritonEngine()
    out, lse = plan_forward(plan, query, key, key, options, engine)
    plan_backward(plan, query, key, key, out, lse, query, options, engine)


def _tuning_calls() -> Iterator[Callable[[], None]]:
    from sa_hf.ops.triton.tune import candidate_calls

    yield from candidate_calls(TUNING_LENGTH)
