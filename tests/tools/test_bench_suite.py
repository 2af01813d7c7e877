"""The GPU suite's parts without a GPU: what is compared with what, when a row starts, what a failure costs."""

from __future__ import annotations

import argparse
import contextlib
import multiprocessing
import os
import runpy
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from sa_hf import LongNetAttentionConfig
from sa_hf.tools.bench import compare, precompile, restart, rows_speed, timing
from sa_hf.tools.bench import suite as suite_module
from sa_hf.tools.bench.baselines import Dense, dense_runs, fresh_compiler
from sa_hf.tools.bench.cases import Case, timing_cases
from sa_hf.tools.bench.parity import parity_held
from sa_hf.tools.bench.report import Report
from sa_hf.tools.bench.restart import DeviceLost
from sa_hf.tools.bench.roofline import H200_DATASHEET, work
from sa_hf.tools.bench.suite import Suite
from sa_hf.tools.bench.timing import Timing, attention_calls, graph_figure

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")


class Graphed(Suite):
    """As on a device with graphs, whatever the device."""

    @property
    def graphs(self) -> bool:
        return True

    @property
    def engine(self) -> str:
        return "native"


def toy_suite(folder: Path, deadline: float = float("inf"), kind: type[Suite] = Suite) -> Suite:
    return kind(CPU, True, deadline, Report(folder / "r.json", {}), H200_DATASHEET)


# -- graphs --------------------------------------------------------------------------------------------------------


def called_at_once(calls: list[Callable[[], object]], times: int) -> Callable[[], object]:
    return lambda: [call() for _ in range(times) for call in calls]


def cannot_capture(calls: list[Callable[[], object]], times: int) -> Callable[[], object]:
    try:
        raise ValueError("a copy from the host")
    finally:
        raise RuntimeError("capture ended badly")


def sum_of_values(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return q + k.mean(2, keepdim=True) + v.mean(2, keepdim=True)


@pytest.mark.parametrize("backward", [False, True])
def test_a_failed_capture_costs_the_graph_alone(
    backward: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    suite = toy_suite(tmp_path, kind=Graphed)
    sets = suite_module.inputs(suite, 32, 16, 2)
    monkeypatch.setattr(timing, "captured", cannot_capture)
    row = suite_module.timed(suite, sum_of_values, sets, backward)
    assert row["ms"] > 0
    assert row["no graph"] == "ValueError: a copy from the host"
    assert "ms in a graph" not in row
    monkeypatch.setattr(timing, "captured", called_at_once)
    row = suite_module.timed(suite, sum_of_values, sets, backward)
    assert row["ms in a graph"] > 0
    assert "no graph" not in row


def test_a_graph_holds_what_fills_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Short calls several times over and on all inputs, long ones once; the figure is that of one call."""
    seen: list[tuple[int, int]] = []
    calls: list[Callable[[], object]] = [lambda: None, lambda: None]

    def captured(given: list[Callable[[], object]], times: int) -> Callable[[], object]:
        seen.append((len(given), times))
        return lambda: None

    monkeypatch.setattr(timing, "captured", captured)
    monkeypatch.setattr(timing, "measure", lambda *_, **__: Timing(12.0, 12.0, 12.0, 3, None))
    figures = [graph_figure(calls, CPU, ms)["ms in a graph"] for ms in (0.2, 2.0, 50.0, 500.0)]
    assert seen == [(2, 10), (2, 5), (2, 1), (1, 1)]
    assert figures == [12.0 / 20, 12.0 / 10, 12.0 / 2, 12.0]


class FakeCuda:
    """The parts of ``torch.cuda`` that a capture goes through. Like torch, one that fails stays on its stream, and
    where its end fails too, the allocator stays with its pool and takes no other; a pool is released once."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.current, self.generator_captured, self.alive, self.end_fails = "main", False, True, True
        self.recording: int | None = None
        self.pools: dict[int, int] = {}  # uses
        for name in (
            "current_stream", "Stream", "stream", "graph", "CUDAGraph", "set_stream", "synchronize",
            "graph_pool_handle", "current_device",
        ):  # fmt: skip
            monkeypatch.setattr(torch.cuda, name, getattr(self, name))
        for name in ("endAllocateToPool", "releasePool"):
            monkeypatch.setattr(torch._C, f"_cuda_{name}", getattr(self, name), raising=False)
        monkeypatch.setattr(torch, "zeros", lambda *_, **__: None)

    def current_stream(self) -> Any:
        return FakeStream(self.current)

    def current_device(self) -> int:
        return 0

    def Stream(self) -> Any:
        return FakeStream("side")

    def CUDAGraph(self) -> Any:
        return self

    def replay(self) -> None: ...

    def set_stream(self, stream: FakeStream) -> None:
        self.current = stream.name

    def synchronize(self) -> None:
        if not self.alive:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")

    def graph_pool_handle(self) -> int:
        return len(self.pools) + 1

    def endAllocateToPool(self, device: int, pool: int) -> None:
        if self.recording != pool:
            raise RuntimeError("endAllocatePool: not currently recording to mempool_id")
        self.recording = None

    def releasePool(self, device: int, pool: int) -> None:
        self.pools[pool] -= 1
        assert self.pools[pool] >= 0  # torch ends the process

    @contextlib.contextmanager
    def stream(self, stream: FakeStream) -> Iterator[None]:
        before, self.current = self.current, stream.name
        yield
        self.current = before

    @contextlib.contextmanager
    def graph(self, graph: Any, pool: int | None = None) -> Iterator[None]:
        if self.recording is not None:
            raise RuntimeError("captures_underway.empty() INTERNAL ASSERT FAILED")
        before, self.current = self.current, "captured"
        self.generator_captured, self.recording = True, pool or self.graph_pool_handle()
        self.pools[self.recording] = 1
        try:
            yield
        except ValueError:  # of the call that is captured: the stream and the generator stay as they are
            if not self.end_fails:
                self.recording = None
            raise
        self.current, self.generator_captured, self.recording = before, False, None


class FakeStream:
    def __init__(self, name: str) -> None:
        self.name = name

    def wait_stream(self, other: FakeStream) -> None: ...


@pytest.mark.parametrize("end_fails", [True, False])
def test_what_follows_a_failed_capture_runs_as_before(end_fails: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = FakeCuda(monkeypatch)
    cuda.end_fails = end_fails

    def breaks_in_the_capture() -> str:
        if cuda.current == "captured":
            raise ValueError("a copy from the host")
        return "result"

    with pytest.raises(ValueError, match="a copy from the host"):
        timing.capture(breaks_in_the_capture)
    assert cuda.current == "main"
    assert not cuda.generator_captured
    assert cuda.recording is None
    # One that the capture ended itself is its graph's to release.
    assert cuda.pools[1] == (0 if end_fails else 1)
    assert timing.capture(lambda: "result")[1] == "result"
    cuda.alive = False
    with pytest.raises(RuntimeError, match="illegal memory access"):
        timing.capture(breaks_in_the_capture)


def test_calls_compute_what_they_time() -> None:
    sets = [tuple(torch.randn(1, 2, 8, 4, requires_grad=True) for _ in range(3)) for _ in range(2)]
    seen: list[bool] = []

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = sum_of_values(q, k, v)
        seen.append(out.requires_grad)
        return out

    for backward in (False, True):
        for call in attention_calls(run, sets, backward):
            call()
    assert seen == [False, False, True, True]


def test_the_ceiling_of_the_cache_is_taken_without_launches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "device_ms", lambda calls, device: 2.0)  # a graph's figure where there are graphs
    assert timing.l2_bandwidth(CPU, mib=1.0) == pytest.approx(2 * 20 * 2**20 / 2e-3 / 1e9)


def test_segments_are_counted_on_the_tiles_that_they_run_on() -> None:
    config = LongNetAttentionConfig(segment_length=(256,), dilated_ratio=(1,))
    w = work(config, 512, causal=True, batch=3, num_heads=2, num_key_value_heads=2, head_dim=64)
    tiles = 3 * 2 * 2 * 3  # two segments, each of two tiles of 128 on the diagonal and one below
    assert w.executed_pairs == tiles * 128 * 128
    assert w.tile_bytes == tiles * 128 * 2 * 64 * 2  # rows of K and V, bf16


# -- comparisons ---------------------------------------------------------------------------------------------------


def compared(suite: Suite) -> dict[str, Any]:
    case = next(c for c in timing_cases(toy=True) if c.key == "sliding_window/causal")
    return rows_speed.ours(suite, case, 64, 16, False)


def test_graphs_are_compared_with_graphs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    suite = toy_suite(tmp_path, kind=Graphed)
    monkeypatch.setattr(timing, "captured", called_at_once)
    suite.report.add("parity", "sliding_window/causal/float32/D64/n321", {"pass": True})
    tail = "/causal/D16/n64/fwd"
    # Launches make one backend slow to call that is the faster on the device.
    suite.report.add("dense", f"sdpa-flash{tail}", {"ms": 30.0, "ms in a graph": 20.0})
    suite.report.add("dense", f"sdpa-cudnn{tail}", {"ms": 40.0, "ms in a graph": 10.0})
    suite.report.add("dense", f"sdpa-flash{tail}+bwd", {"ms": 1e-9, "ms in a graph": 1e-9})
    row = compared(suite)
    assert (row["over"], row["speed-up"]) == ("sdpa-flash", pytest.approx(30.0 / row["ms"]))
    assert (row["over in a graph"], row["speed-up in a graph"]) == (
        "sdpa-cudnn", pytest.approx(10.0 / row["ms in a graph"]),
    )  # fmt: skip
    # Without graphs of ours, or of the dense ones, there is nothing to compare them with.
    monkeypatch.setattr(timing, "captured", cannot_capture)
    row = compared(suite)
    assert "speed-up" in row
    assert "speed-up in a graph" not in row
    assert row["no graph"].startswith("ValueError")


def test_a_dtype_is_gated_on_its_own_parity(tmp_path: Path) -> None:
    def rows(**passed: Any) -> dict[str, dict[str, Any]]:
        return {f"bigbird-first/causal/{dtype}/D64/n321": {"pass": value} for dtype, value in passed.items()}

    bf16, half = torch.bfloat16, torch.float16
    assert parity_held(rows(bfloat16=True, float16=False, float32=False), "bigbird-128", True, bf16)
    assert not parity_held(rows(bfloat16=False, float16=True), "bigbird", True, bf16)
    assert not parity_held(rows(bfloat16=True), "bigbird", True, half)
    assert not parity_held(rows(bfloat16=True), "bigbird", False, bf16)
    assert not parity_held(rows(bfloat16=True), "longnet", True, bf16)
    assert not parity_held({"bigbird/causal/bfloat16/D64/n321": {"error": "why"}}, "bigbird", True, bf16)
    held = rows(bfloat16=True) | {"bigbird/causal/bfloat16/D128/n1000": {"pass": False}}
    assert not parity_held(held, "bigbird", True, bf16)

    suite = toy_suite(tmp_path)  # times in fp32
    suite.report.add("dense", "sdpa/causal/D16/n64/fwd", {"ms": 8.0})
    for dtype, passed in (("bfloat16", True), ("float32", False)):
        suite.report.add("parity", f"longnet/causal/{dtype}/D16/n40", {"pass": passed})
    row = {"ms": 2.0}
    assert "not shown" in compare.speed_ups(suite, row, "/causal/D16/n64/fwd", "longnet")["speed-up"]
    suite.report.add("parity", "longnet/causal/float32/D16/n40", {"pass": True})
    assert compare.speed_ups(suite, row, "/causal/D16/n64/fwd", "longnet") == {"speed-up": 4.0, "over": "sdpa"}
    # An option's kernels are others.
    options = compare.speed_ups(suite, row, "/causal/D16/n64/fwd", "longnet", "dropout")
    assert "not shown" in options["speed-up"]


def test_a_resumed_run_compares_again(tmp_path: Path) -> None:
    suite = toy_suite(tmp_path)
    before = {"ms": 2.0, "speed-up": "not shown: parity failed or not run", "over in a graph": "of an earlier run"}
    suite.report.add("ours", "longnet/causal/D16/n64/fwd", before)
    suite.report.add("ours", "longnet/causal/D16/n64/fwd+bwd", {"error": "out of memory"})
    suite.report.add("parity", "longnet/causal/float32/D16/n40", {"pass": True})
    suite.report.add("dense", "sdpa/causal/D16/n64/fwd", {"ms": 8.0})
    compare.renew_speed_ups(suite)
    assert suite.report.rows("ours") == {
        "longnet/causal/D16/n64/fwd": {"ms": 2.0, "speed-up": 4.0, "over": "sdpa"},
        "longnet/causal/D16/n64/fwd+bwd": {"error": "out of memory"},
    }


def test_the_break_even_is_the_smallest_length_that_is_as_fast(tmp_path: Path) -> None:
    suite = toy_suite(tmp_path)
    suite.report.add("parity", "longnet/causal/float32/D16/n40", {"pass": True})
    for n, mine in ((8192, 2.0), (2048, 8.0), (4096, 4.0)):  # dense takes 4: equal at 4096
        tail = f"/causal/D64/n{n}/fwd"
        suite.report.add("dense", f"sdpa{tail}", {"ms": 4.0, "ms in a graph": 4.0})
        for label in ("longnet", "bigbird"):  # bigbird has no parity here
            suite.report.add("ours", f"{label}{tail}", {"ms": mine, "ms in a graph": 5.0})
    suite.report.add("ours", "longnet/causal/D64/n64/fwd", {"error": "out of memory"})
    compare.renew_speed_ups(suite)
    row = {"from n": 4096, "from n in a graph": "none", "measured at": "2048, 4096, 8192"}
    assert suite.report.rows("break-even") == {"longnet/causal/D64/fwd": row}
    assert "| longnet/causal/D64/fwd | 4096 | none | 2048, 4096, 8192 |" in suite.report.markdown()


class Entered:
    """A scope that tells how often it was entered."""

    times = 0

    def __enter__(self) -> None:
        Entered.times += 1

    def __exit__(self, *_: object) -> None: ...


def test_the_backend_is_chosen_once_for_all_calls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    suite = toy_suite(tmp_path)
    monkeypatch.setattr(Suite, "few", {"warm_up": 2, "repeats": 3})
    monkeypatch.setattr(rows_speed, "dense_runs", lambda *_: [Dense("sdpa", sum_of_values, Entered)])
    rows_speed.dense_section(suite, [32], [16])
    assert Entered.times == len(suite.report.rows("dense")) == 4
    assert all("ms" in row for row in suite.report.rows("dense").values())
    (flash, cudnn) = list(dense_runs(True, torch.device("cuda")))[:2]
    q = torch.randn(1, 2, 8, 16)
    with cudnn.scope(), pytest.raises(RuntimeError):  # there is no such backend on a CPU
        flash.run(q, q, q)
    assert flash.run(q, q, q).shape == q.shape


def test_a_cold_compiler_finds_nothing() -> None:
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    before = cache_dir()
    with fresh_compiler():
        assert cache_dir() != before
        assert not os.listdir(cache_dir())
    assert cache_dir() == before


class Cached(Suite):
    """With a cache of 64 KiB, like that of a GPU."""

    @property
    def cache_bytes(self) -> int:
        return 2**16


def test_inputs_in_turn_pass_the_cache(tmp_path: Path) -> None:
    suite = toy_suite(tmp_path, kind=Cached)
    sets = suite_module.inputs(suite, 64, 16)  # two heads and one of keys, fp32
    assert len(sets) == -(-2 * 2**16 // (2 * 3 * 64 * 16 * 4))
    assert len(suite_module.inputs(suite, 4096, 16)) == 2
    assert len(suite_module.inputs(suite, 64, 16, 1)) == 1


@pytest.mark.parametrize("case", [c for c in timing_cases(toy=True) if c.causal], ids=lambda c: c.label)
def test_decoding_reads_other_keys_at_each_call(case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    suite = toy_suite(tmp_path, kind=Cached)
    length, seen = 1024, []

    def attend(query: Tensor, key: Tensor, value: Tensor, index: Tensor, *_: Any) -> None:
        assert int(index.max()) < length
        seen.append(index)

    def all_in_turn(calls: list[Callable[[], object]], *_: Any, **__: Any) -> Timing:
        for call in calls:
            call()
        return Timing(1.0, 1.0, 1.0, 1, None)

    monkeypatch.setattr("sa_hf.ops.decode.decode_attention", attend)
    monkeypatch.setattr(rows_speed, "measure", all_in_turn)
    row = rows_speed.decoded(suite, case, length)
    assert all(torch.equal(x >= 0, seen[0] >= 0) for x in seen)  # as many in each
    named = {(head, int(j)) for x in seen for head in range(2) for j in x[0, head, 0] if j >= 0}
    assert row["MiB in rotation"] == len(named) * 2 * 16 * 4 / 2**20
    # Two heads of 1024 keys are four of these caches: each pattern gets past one with the lists that it takes.
    assert row["of memory bandwidth"] > 0


def test_a_rate_of_the_cache_is_none_of_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    suite = toy_suite(tmp_path, kind=Cached)
    monkeypatch.setattr(rows_speed, "MOST_LISTS", 2)
    monkeypatch.setattr(rows_speed, "measure", lambda *_, **__: Timing(1.0, 1.0, 1.0, 1, None))
    case = next(c for c in timing_cases(toy=True) if c.label == "star")
    row = rows_speed.decoded(suite, case, 256)
    assert row["GB/s"] > 0
    assert "of memory bandwidth" not in row


# -- the budget ----------------------------------------------------------------------------------------------------


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
    row("parity", "late", 535.0)
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
        "parity", "dense", "ours", "flex", "decode", "training", "options", "hf-bigbird",
    ]  # fmt: skip
    for section in ("dense", "ours"):
        lengths = [key.split("/")[3] for name, key in rows if name == section]
        assert lengths[0] == "n16384"
        assert len(set(lengths)) == 7
    flex = list(suite.report.rows("flex"))  # each compiles for 15 to 30 s
    assert [key.split("/", 4)[4] for key in flex] == ["fwd/block128", "fwd+bwd/block128"] * 3 + ["fwd/block64"] * 3
    assert len({key.split("/")[0] for key in flex[:6]}) == 3


def test_a_length_is_measured_whole_before_the_next(tmp_path: Path) -> None:
    suite = Noted(torch.device("cuda"), False, 0.0, Report(tmp_path / "r.json", {}), H200_DATASHEET)
    names = list(runpy.run_path(str(ROOT / "scripts" / "gpu_suite.py"))["sections"](suite))
    at = names.index("dense 4096")
    assert names[at : at + 4] == ["dense 4096", "ours 4096", "dense 65536", "ours 65536"]
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


# -- compiled ahead ------------------------------------------------------------------------------------------------

# The suite's own functions as on a GPU, up to each kernel's compilation: what they would launch, and precompile has not
# compiled. Data is on the CPU, so everything that asks for the device is answered for a GPU.
NOT_AHEAD = """
import contextlib, io, sys, warnings
from pathlib import Path
from unittest.mock import patch

import torch
from triton.backends.compiler import GPUTarget

import sa_hf.ops.triton.engine as engine
from sa_hf.ops import data_layout
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
    (clusters, "exact_lists", lambda device: False), (rows_speed, "inputs", inputs),
    (rows_speed, "measure", measure), (suite_module, "measure", measure),
    (rows_parity, "PARITY_SHAPES", PARITY_SHAPES[::2]),
]
with contextlib.ExitStack() as stack, record_launches(GPUTarget("cuda", 90, 32)) as launched:
    for answer in answers:
        stack.enter_context(patch.object(*answer))
    stack.enter_context(contextlib.redirect_stdout(io.StringIO()))
    with patch.object(rows_parity, "PARITY_DTYPES", (torch.bfloat16,)):
        rows_parity.parity_section(suite)
    rows_parity.option_parity_section(suite)
    rows_parity.data_parity_section(suite)
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
    for child in set(multiprocessing.active_children()) - before:
        child.join(60.0)
    assert not set(multiprocessing.active_children()) - before


def test_what_the_suite_runs_was_compiled_ahead(tmp_path: Path) -> None:
    pytest.importorskip("triton")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"OMP_NUM_THREADS": "1"}
    run = subprocess.run(
        [sys.executable, "-c", NOT_AHEAD, str(tmp_path / "r.json")], cwd=ROOT, env=environment, capture_output=True,
        text=True, timeout=500, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-3000:]
