"""What the GPU suite compiles ahead, and until when."""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from bench_cases import ROOT

from sa_hf.ops.triton.device import why_not
from sa_hf.tools.bench import precompile

# The suite's own functions as on a GPU, up to each kernel's compilation: what they would launch, and precompile has not
# compiled. Data is on the CPU, so everything that asks for the device is answered for a GPU.
NOT_AHEAD = """
import contextlib, io, sys, warnings
from pathlib import Path
from unittest.mock import patch

import torch
from triton.backends.compiler import GPUTarget

import sa_hf.ops.triton.engine as engine
from sa_hf.ops import data_layout, slots
from sa_hf.ops.triton.record import record_launches
from sa_hf.patterns import clusters
from sa_hf.tools.bench import precompile, rows_parity, rows_speed, suite as suite_module
from sa_hf.tools.bench.parity import PARITY_SHAPES
from sa_hf.tools.bench.report import Report
from sa_hf.tools.bench.roofline import H200_DATASHEET
from sa_hf.tools.bench.timing import Timing

warnings.simplefilter("ignore")
torch.set_num_threads(1)
with record_launches(GPUTarget("cuda", 90, 32)) as ahead:
    for call in precompile.suite_calls():
        call()


def inputs(suite, length, head_dim, sets=2):
    sizes = (1, 2, length, head_dim)
    return [tuple(torch.empty(sizes, dtype=torch.bfloat16, requires_grad=True) for _ in range(3)) for _ in range(sets)]


def measure(calls, *_, **__):
    calls[0]()
    return Timing(1.0, 1.0, 1.0, 1, None)


suite = suite_module.Suite(torch.device("cpu"), False, float("inf"), Report(Path(sys.argv[1]), {}), H200_DATASHEET)
answers = [
    (engine, "_machine_reason", lambda device: None), (data_layout, "exact_lists", lambda device: False),
    (clusters, "exact_lists", lambda device: False), (slots, "on_host", lambda index: False),
    (rows_speed, "inputs", inputs),
    (rows_speed, "measure", measure), (suite_module, "measure", measure),
    (rows_parity, "PARITY_SHAPES", PARITY_SHAPES[::2]),
]
with contextlib.ExitStack() as stack, record_launches(GPUTarget("cuda", 90, 32)) as launched:
    for answer in answers:
        stack.enter_context(patch.object(*answer))
    stack.enter_context(contextlib.redirect_stdout(io.StringIO()))
    with patch.object(rows_parity, "PARITY_DTYPES", (torch.bfloat16,)):
        rows_parity.parity_section(suite)
    for first in (True, False):
        rows_parity.option_parity_section(suite, first)
        rows_parity.data_parity_section(suite, first)
    rows_speed.decode_section(suite, [65536])
    rows_speed.option_section(suite, 4096)
    rows_speed.speed_section(suite, [2048, 16384, 32768], [64])
    rows_speed.speed_section(suite, [4096], [128])
errors = [row for rows in suite.report.data["sections"].values() for row in rows.values() if "error" in row]
assert not errors, errors[:3]
assert len(launched) > 150, len(launched)
missing = [k.name for k in launched if k.key not in {k.key for k in ahead}]
assert not missing, missing
"""


class FakeKernel:
    def __init__(self, name: str, now: list[float], seconds: float) -> None:
        self.name, self.now, self.seconds = name, now, seconds

    def compile(self) -> None:
        self.now[0] += self.seconds
        if self.name == "bad":
            raise ValueError("no such instruction")


def test_no_kernel_is_compiled_after_the_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(precompile.time, "monotonic", lambda: now[0])
    kernels = [FakeKernel(name, now, 4.0) for name in ("good", "bad", "slow", "late", "later")]
    assert precompile.compile_until(kernels, 10.0) == (2, ["bad"], 2)
    assert precompile.compile_until(kernels, 100.0) == (4, ["bad"], 0)


def test_a_compiler_that_does_not_end_is_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    before = set(multiprocessing.active_children())
    monkeypatch.setattr(precompile.os, "cpu_count", lambda: 1)
    monkeypatch.setattr(precompile, "GRACE_SECONDS", 0.0)  # its process is still importing torch
    row = precompile.precompile(90, tune=False, until=time.monotonic())
    assert row["kernels"] == 0
    assert row["stopped in time"] == "0 kernels not begun, 1 of 1 processes ended"
    # The pool's own thread takes leave of it too: who waits for the process itself may find it gone and not yet noted.
    end = time.monotonic() + 60.0
    while set(multiprocessing.active_children()) - before and time.monotonic() < end:
        time.sleep(0.05)
    assert not set(multiprocessing.active_children()) - before


@pytest.mark.skipif(why_not() is not None, reason=str(why_not()))
def test_what_the_suite_runs_was_compiled_ahead(tmp_path: Path) -> None:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"OMP_NUM_THREADS": "1"}
    run = subprocess.run(
        [sys.executable, "-c", NOT_AHEAD, str(tmp_path / "r.json")], cwd=ROOT, env=environment, capture_output=True,
        text=True, timeout=500, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-3000:]
