"""Captures that fail leave what follows as it was, and a graph holds what fills it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from bench_cases import CPU, Graphed, called_at_once, cannot_capture, sum_of_values, toy_suite
from torch import Tensor

from sa_hf import LongNetAttentionConfig
from sa_hf.tools.bench import suite as suite_module
from sa_hf.tools.bench import timing
from sa_hf.tools.bench.roofline import work
from sa_hf.tools.bench.timing import Timing, attention_calls, graph_figure


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
