"""The tuner: which failures are a configuration's, and what is left of a sweep that ends early."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from sa_hf.ops.triton.device import why_not

if why_not() is not None:
    pytest.skip(str(why_not()), allow_module_level=True)

from triton.runtime.errors import OutOfResources

from sa_hf.ops.triton import configs, tune
from sa_hf.ops.triton.configs import Launch

CPU = torch.device("cpu")
Calls = Sequence[Callable[[], object]]


def failing(error: Exception) -> Calls:
    def call() -> object:
        raise error

    return [call]


def one(calls: Calls, device: torch.device) -> float:
    return 1.0


@pytest.mark.parametrize(
    "error", [OutOfResources(300000, 232448, "shared memory"), RuntimeError("PassManager::run failed")]
)
def test_a_configuration_that_does_not_fit_is_passed_over(error: Exception) -> None:
    assert tune._milliseconds(failing(error), CPU, one) is None


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("Triton Error [CUDA]: an illegal memory access was encountered"),
        torch.AcceleratorError("device-side assert triggered"),
        torch.OutOfMemoryError("CUDA out of memory"),
        TypeError("forward() got an unexpected keyword argument"),
    ],
)
def test_an_error_of_the_device_or_of_the_code_is_raised(error: Exception) -> None:
    with pytest.raises(type(error)) as raised:
        tune._milliseconds(failing(error), CPU, one)
    assert raised.value is error


def test_an_error_while_timing_is_raised() -> None:
    """Kernels fail later than their launch: what the clock meets is no matter of compilation."""

    def dies(calls: Calls, device: torch.device) -> float:
        raise RuntimeError("out of luck")

    with pytest.raises(RuntimeError, match="out of luck"):
        tune._milliseconds([lambda: None], CPU, dies)


@pytest.fixture
def swept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A sweep over two kernels, its calls without effect; the file that the launches are read from."""
    jobs = [tune.Job("forward", 128, [(64, 64, 4, 3), (64, 32, 4, 2)], False), tune.Job("key", 128, [], True)]
    monkeypatch.setattr(tune, "jobs", lambda: jobs)
    monkeypatch.setattr(tune, "_calls", lambda job, *_: [lambda: None, lambda: None])
    monkeypatch.setattr(tune, "architecture", lambda device: 90)
    monkeypatch.setattr(tune, "TUNED", tmp_path / "package" / "tuned.json")
    (tmp_path / "package").mkdir()
    return tmp_path / "package" / "tuned.json"


def clock_of(times: dict[Launch, float], dies_at: str = "") -> Any:
    """What each launch of the plain forward takes; the device may die at a kernel."""

    def clock(calls: Calls, device: torch.device) -> float:
        assert len(calls) == 2  # on inputs of their own
        (name,) = configs._trial.keys() - {"forward|128|16|90"} or {"forward|128|16|90"}
        if dies_at and name.startswith(dies_at):
            raise RuntimeError("CUDA error: unspecified launch failure")
        return times.get(configs._trial[name], 9.0)

    return clock


def test_the_fastest_candidate_is_written_and_copied(swept: Path, tmp_path: Path) -> None:
    fastest = Launch(64, 32, 4, 2)
    found = tune.tune(CPU, clock_of({fastest: 1.0}), copy=tmp_path / "out.json")
    assert found == swept
    table = json.loads(swept.read_text())
    assert table["forward|128|16|90"] == {"rows": 64, "columns": 32, "warps": 4, "stages": 2}
    assert "key|128|16|90" in table
    assert (tmp_path / "out.json").read_text() == swept.read_text()


def test_what_was_measured_outlives_the_device(swept: Path, tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="unspecified launch failure"):
        tune.tune(CPU, clock_of({}, dies_at="key"), copy=tmp_path / "out.json")
    for path in (swept, tmp_path / "out.json"):
        assert set(json.loads(path.read_text())) == {"forward|128|16|90"}


OWN_KERNELS = """
import torch
from triton.backends.compiler import GPUTarget

from sa_hf.ops.triton import tune
from sa_hf.ops.triton.record import record_launches

for kernel, own in (("query", "query_kernel"), ("key@128", "key_kernel"), ("forward+", "forward_kernel")):
    job = tune.Job(kernel, 64, [], kernel != "forward+")
    with record_launches(GPUTarget("cuda", 90, 32)):
        calls = tune._calls(job, 512, 1, torch.bfloat16, torch.device("cpu"), 2)
    assert len(calls) == 2
    for call in calls:
        with record_launches(GPUTarget("cuda", 90, 32)) as recorded:
            call()
        names = [k.name for k in recorded if k.name not in ("list_kernel", "combine_kernel")]
        assert names == [own], (kernel, names)
"""


def test_a_backward_job_calls_its_own_kernel_alone() -> None:
    """Beside the rest of the backward a candidate's gain would be small. (In a process where triton compiles.)"""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"OMP_NUM_THREADS": "1"}
    run = subprocess.run(
        [sys.executable, "-c", OWN_KERNELS], cwd=Path(__file__).parents[2], env=environment, capture_output=True,
        text=True, timeout=300, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-3000:]
