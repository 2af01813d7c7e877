"""The GPU suite's rows without a GPU: when one starts, what a failure costs, what comes first."""

from __future__ import annotations

import argparse
import os
import runpy
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from bench_cases import ROOT, toy_suite

from sa_hf.tools.bench import restart
from sa_hf.tools.bench import suite as suite_module
from sa_hf.tools.bench.report import Report
from sa_hf.tools.bench.restart import DeviceLost
from sa_hf.tools.bench.roofline import H200_DATASHEET
from sa_hf.tools.bench.suite import Suite


def test_no_row_starts_that_could_end_late(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(suite_module.time, "monotonic", lambda: now[0])
    suite = toy_suite(tmp_path, deadline=540.0)
    started: list[str] = []

    def row(section: str, key: str, at: float, seconds: float = 0.0) -> None:
        def measured() -> dict[str, Any]:
            started.append(key)
            now[0] += seconds
            return {"ms": 1.0}

        now[0] = at
        suite.row(section, key, measured)

    row("ours", "early", 0.0)
    row("flex", "long", 440.0)
    row("flex", "too long", 500.0)
    row("ours", "short", 500.0)
    row("ours", "slow", 0.0, seconds=60.0)
    row("ours", "as slow as the last", 500.0)
    row("parity", "late", 537.0)
    assert started == ["early", "long", "short", "slow"]
    assert suite.left_out == 3


def test_an_error_is_a_row_and_the_next_one_runs(tmp_path: Path) -> None:
    suite = toy_suite(tmp_path)

    def fails() -> dict[str, Any]:
        raise ValueError("two\nlines")

    suite.row("ours", "bad", fails)
    suite.row("ours", "good", lambda: {"ms": 1.0})
    assert Report(tmp_path / "r.json", {}).rows("ours") == {"bad": {"error": "ValueError: two"}, "good": {"ms": 1.0}}


@pytest.mark.parametrize("raises", [True, False])
def test_a_row_that_kills_the_device_is_not_tried_again(
    raises: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also one whose call ended well: what it launched has failed after it."""
    suite = Suite(torch.device("cuda"), True, float("inf"), Report(tmp_path / "r.json", {}), H200_DATASHEET)
    seen: list[dict[str, Any]] = []
    broken = RuntimeError("CUDA error: an illegal memory access was encountered")

    def synchronize(device: torch.device) -> None:
        if seen:
            raise broken

    def kills() -> dict[str, Any]:
        seen.append(Report(tmp_path / "r.json", {}).rows("ours")["bad"])  # were the process to end here
        if raises:
            raise ValueError("what was called")
        return {"ms": 1.0}

    monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
    suite.row("ours", "good", lambda: {"ms": 1.0})
    with pytest.raises(DeviceLost, match="ours/bad: RuntimeError: CUDA error"):
        suite.row("ours", "bad", kills)
    assert seen == [{"error": "started, never ended"}]
    resumed = Report(tmp_path / "r.json", {})
    error = "ValueError: what was called" if raises else f"RuntimeError: {broken}"
    assert resumed.rows("ours")["bad"] == {"error": error, "fatal": True}
    assert resumed.done("ours", "bad")
    assert resumed.given_up() == ["ours/bad"]
    assert "they never ended: ours/bad" in (tmp_path / "r.md").read_text()


def test_memory_that_stays_costs_no_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    suite = Suite(torch.device("cuda"), True, float("inf"), Report(tmp_path / "r.json", {}), H200_DATASHEET)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: 1 / 0)
    with pytest.raises(ZeroDivisionError):  # it is asked for
        suite.row("ours", "bad", lambda: {"error": "out of memory"})

    def raises() -> None:
        raise RuntimeError("captures underway")

    monkeypatch.setattr(torch.cuda, "empty_cache", raises)
    suite.row("ours", "worse", lambda: {"error": "out of memory"})
    assert not suite.report.done("ours", "worse")  # the next run tries


RESTARTS = """
import os, sys, time

from sa_hf.tools.bench import restart

before, words = restart.deadline_before(), sys.argv[1:]
if before is None:
    held = os.open(sys.argv[0], os.O_RDONLY)
    os.set_inheritable(held, True)
    sys.argv.append(str(held))
    print("first", flush=True)
    restart.restart(time.monotonic() + 100.0)
assert 50.0 < before - time.monotonic() < 100.0, before
try:
    os.fstat(int(words[-1]))
except OSError:
    print("again", *words[:-1])
"""


def test_a_restart_goes_on_to_the_same_deadline(tmp_path: Path) -> None:
    script = tmp_path / "restarts.py"
    script.write_text(RESTARTS)
    command = [sys.executable, str(script), "--out", "x", "--fresh", "--tune", "--budget", "9"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=300)
    assert run.returncode == 0, run.stderr
    assert run.stdout.split("\n")[:2] == ["first", "again --out x --budget 9"]


def test_the_suite_starts_anew_where_the_device_failed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = runpy.run_path(str(ROOT / "scripts" / "gpu_suite.py"))
    deadlines: list[float] = []

    def fails() -> None:
        raise DeviceLost("ours/bad: it was hot")

    names = script["measure_all"].__globals__
    monkeypatch.setitem(names, "prepare", lambda *_: None)
    monkeypatch.setitem(names, "measured_ceilings", lambda *_: {"TFLOP/s": 1.0, "GB/s": 1.0, "L2 GB/s": 1.0})
    monkeypatch.setitem(names, "sections", lambda suite: {"ours": fails})
    monkeypatch.setattr(restart, "restart", deadlines.append)
    now = time.monotonic()
    for left in (500.0, 30.0):  # with little left it would measure nothing
        script["measure_all"](argparse.Namespace(only="", dry_run=True), toy_suite(tmp_path, now + left))
    assert deadlines == [now + 500.0]


class Noted(Suite):
    """Takes note of the rows that it would measure."""

    def row(self, section: str, key: str, measured: Callable[[], dict[str, Any]]) -> None:
        self.report.rows(section)[key] = {}


def test_the_most_valuable_rows_come_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    suite = Noted(torch.device("cuda"), False, 0.0, Report(tmp_path / "r.json", {}), H200_DATASHEET)
    for run in runpy.run_path(str(ROOT / "scripts" / "gpu_suite.py"))["sections"](suite).values():
        run()
    rows = [(section, key) for section, keys in suite.report.data["sections"].items() for key in keys]
    first = {section: index for index, (section, _) in reversed(list(enumerate(rows)))}
    assert sorted(first, key=first.__getitem__) == [
        "parity", "dense", "ours", "kernels", "options", "decode", "flex", "training", "hf-bigbird",
    ]  # fmt: skip
    for section in ("dense", "ours"):
        lengths = [key.split("/")[3] for name, key in rows if name == section]
        assert lengths[0] == "n16384"
        assert len(set(lengths)) == 7
    flex = list(suite.report.rows("flex"))  # each compiles for 15 to 30 s
    wanted = ["fwd+bwd/block128"] * 3 + ["fwd/block128"] * 3 + ["fwd/block64"] * 3
    assert [key.split("/", 4)[4] for key in flex] == wanted
    dtypes = [key.split("/")[2] for name, key in rows if name == "parity"]
    assert dtypes == sorted(dtypes, key=lambda dtype: dtype != "bfloat16")  # that of the timings first
    assert set(dtypes) == {"bfloat16", "float16", "float32"}
    assert len({key.split("/")[0] for key in flex[:6]}) == 3


def test_a_length_is_measured_whole_before_the_next(tmp_path: Path) -> None:
    suite = Noted(torch.device("cuda"), False, 0.0, Report(tmp_path / "r.json", {}), H200_DATASHEET)
    names = list(runpy.run_path(str(ROOT / "scripts" / "gpu_suite.py"))["sections"](suite))
    at = names.index("dense 4096")
    assert names[at : at + 2] == ["dense 4096", "ours 4096"]
    assert names.index("parity rest") > names.index("training") > at
    at = names.index("dense 65536")
    assert names[at : at + 4] == ["dense 65536", "ours 65536", "dense 2048", "ours 2048"]
    assert names[-1] == "flex other"


def test_the_rows_of_a_tuned_run_are_those_of_its_launches(tmp_path: Path) -> None:
    """The report is there before the tuning, whose table makes other launches of the earlier rows."""
    Report(tmp_path / "r.json", {"launches": "a"}).add("ours", "row", {"ms": 1.0})
    report = Report(tmp_path / "r.json", {"launches": "a"})
    report.add("tuning", "all kernels", {"table": "b"})
    report.head({"launches": "a"}, keep=("tuning",))
    assert set(report.data["sections"]) == {"ours", "tuning"}
    report.head({"launches": "b"}, keep=("tuning",))
    assert report.data == {"header": {"launches": "b"}, "sections": {"tuning": {"all kernels": {"table": "b"}}}}


def test_figures_that_a_run_did_not_reach_say_so(tmp_path: Path) -> None:
    report = Report(tmp_path / "r.json", {})
    report.add("parity", "row", {"pass": True})
    report.add("ours", "row", {"ms": 1.0})
    text = (tmp_path / "r.md").read_text()
    assert "## decode\n\nnot measured" in text
    assert text.count("## ours") == 1
    assert "| row | 1 |" in text
