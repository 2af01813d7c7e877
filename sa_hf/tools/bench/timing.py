"""Clocks and memory: CUDA events on a GPU, the wall clock on a CPU; and CUDA graphs, where the host's launches do not
count."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor

Call = Callable[[], object]
T = TypeVar("T")

# Calls in a graph: at most this many of each, and no more than fill so many milliseconds, which is long against the
# launch of the graph (some 10 us). Longer calls than the last pass the L2 cache on their own: one of them will do.
GRAPH_TIMES, GRAPH_MS, LONG_MS = 10, 20.0, 100.0


@dataclass(frozen=True)
class Timing:
    """Milliseconds of one call over repeats, and the peak of allocated device memory above the start, in MiB."""

    median_ms: float
    minimum_ms: float
    maximum_ms: float
    repeats: int
    peak_mib: float | None


def measure(
    calls: Sequence[Call], device: torch.device, *, warm_up: int = 3, repeats: int = 20,
    seconds: float = 2.0,
) -> Timing:  # fmt: skip
    """Time calls in turn (each on inputs of its own, so that together they pass the L2 cache).

    Repeats end early after ``seconds`` of measuring, but never below three. On a GPU the calls are queued without
    waiting in between: a call is as long as the device takes, or as the host takes to launch it where that is longer.
    """
    on_gpu = device.type == "cuda"
    begin = time.perf_counter()
    for index in range(warm_up):
        calls[index % len(calls)]()
        if on_gpu:
            torch.cuda.synchronize(device)
        if time.perf_counter() - begin > seconds / 4:  # a call of a second needs no third warm-up
            break
    base = 0
    if on_gpu:
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        base = torch.cuda.memory_allocated(device)
    times = (_on_device if on_gpu else _on_host)(calls, repeats, seconds)
    peak = (torch.cuda.max_memory_allocated(device) - base) / 2**20 if on_gpu else None
    return Timing(statistics.median(times), min(times), max(times), len(times), peak)


def _on_host(calls: Sequence[Call], repeats: int, seconds: float) -> list[float]:
    times: list[float] = []
    start = time.perf_counter()
    for index in range(repeats):
        begin = time.perf_counter()
        calls[index % len(calls)]()
        times.append((time.perf_counter() - begin) * 1e3)
        if len(times) >= 3 and time.perf_counter() - start > seconds:
            break
    return times


def _on_device(calls: Sequence[Call], repeats: int, seconds: float) -> list[float]:
    first = _queued(calls, 1)[0]
    return _queued(calls, max(3, min(repeats, int(seconds * 1e3 / max(first, 1e-3)))))


def _queued(calls: Sequence[Call], repeats: int) -> list[float]:
    pairs = [tuple(torch.cuda.Event(enable_timing=True) for _ in range(2)) for _ in range(repeats)]
    for index, (start, end) in enumerate(pairs):
        start.record()
        calls[index % len(calls)]()
        end.record()
    torch.cuda.synchronize()
    return [float(start.elapsed_time(end)) for start, end in pairs]


def capture(run: Callable[[], T]) -> tuple[Call, T]:
    """What a call launches as one CUDA graph: its replay, and the call's result, which each replay fills anew.

    The call runs once before, on a side stream. A capture that fails raises, and leaves the current stream, the
    allocator and the random generator fit for what follows.
    """
    stream, side = torch.cuda.current_stream(), torch.cuda.Stream()
    side.wait_stream(stream)
    with torch.cuda.stream(side):
        run()
    stream.wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    pool = torch.cuda.graph_pool_handle()  # named, so that it can be given up where the capture fails
    try:
        with torch.cuda.graph(graph, pool=pool):
            result = run()
    except Exception:
        _leave_failed_capture(stream, pool)
        raise
    return graph.replay, result


def _leave_failed_capture(stream: torch.cuda.Stream, pool: Any) -> None:
    """After a capture that failed torch stays on its stream, its allocator goes on recording into the capture's pool
    (``empty_cache`` and the next capture may raise), and it takes the generator for one that is being captured, so that
    the next random number would raise. The first two are undone here, the third by a capture that succeeds."""
    torch.cuda.set_stream(stream)
    torch.cuda.synchronize()  # raises where the device itself failed
    # One block: where the first raises, the capture had come so far as to end the recording itself, and its graph
    # releases the pool; a second release would end the process when the graph is freed.
    with suppress(RuntimeError, AttributeError):
        torch._C._cuda_endAllocateToPool(torch.cuda.current_device(), pool)
        torch._C._cuda_releasePool(torch.cuda.current_device(), pool)
    with suppress(RuntimeError), torch.cuda.graph(torch.cuda.CUDAGraph()):
        torch.zeros(1, device="cuda")
    torch.cuda.set_stream(stream)


def captured(calls: Sequence[Call], times: int) -> Call:
    """The calls in turn, ``times`` over, as one CUDA graph: its replay."""

    def run() -> None:
        for _ in range(times):
            for call in calls:
                call()

    return capture(run)[0]


def graph_figure(calls: Sequence[Call], device: torch.device, called_ms: float) -> dict[str, Any]:
    """``ms in a graph``: a call's milliseconds on the device, all calls in turn replayed as one graph; or ``no graph``:
    why they cannot be captured.

    Args: called_ms: what a call takes when it is launched by the host.
    """
    calls = calls[:1] if called_ms > LONG_MS else calls
    times = max(1, min(GRAPH_TIMES, int(GRAPH_MS / max(called_ms, 1e-3) / len(calls))))
    try:
        replay = captured(calls, times)
        timing = measure([replay], device, warm_up=1, repeats=10, seconds=1.0)
    except Exception as error:  # whatever it was, the time of the calls themselves stands
        first: BaseException = error
        while first.__context__ is not None:  # the end of a capture fails too, after the call that broke it
            first = first.__context__
        return {"no graph": f"{type(first).__name__}: {first}".splitlines()[0][:200]}
    return {"ms in a graph": timing.median_ms / (times * len(calls))}


def device_ms(calls: Sequence[Call], device: torch.device) -> float:
    """A call's milliseconds on the device, in a graph where it can be captured; on a CPU one call by the wall clock."""
    if device.type != "cuda":
        return measure(calls, device, warm_up=0, repeats=1).median_ms
    called = measure(calls, device, warm_up=1, repeats=5, seconds=0.5).median_ms
    return float(graph_figure(calls, device, called).get("ms in a graph", called))


def attention_calls(run: Callable[..., Tensor], sets: Sequence[tuple[Tensor, ...]], backward: bool) -> list[Call]:
    """A call per set of query, key and value: forward alone, or forward and backward together."""

    def forward(qkv: tuple[Tensor, ...]) -> None:
        with torch.no_grad():
            run(*qkv)

    def both(qkv: tuple[Tensor, ...], grad: Tensor) -> None:
        torch.autograd.grad(run(*qkv), qkv, grad)

    if not backward:
        return [partial(forward, s) for s in sets]
    return [partial(both, s, torch.randn_like(s[0])) for s in sets]


def matmul_rate(device: torch.device, dtype: torch.dtype, size: int = 8192) -> float:
    """Measured rate of a square matrix product on random data, in TFLOP/s."""
    pairs = [tuple(torch.randn(size, size, device=device, dtype=dtype) for _ in range(2)) for _ in range(2)]
    timing = measure([lambda p=p: p[0] @ p[1] for p in pairs], device)  # type: ignore[misc]  # mypy: default lambda
    return 2 * size**3 / timing.median_ms / 1e9


def copy_bandwidth(device: torch.device, gib: float = 2.0) -> float:
    """Measured bandwidth of a device-to-device copy, in GB/s, bytes read plus bytes written."""
    source = torch.empty(int(gib * 2**30 / 4), dtype=torch.float32, device=device).normal_()
    target = torch.empty_like(source)
    timing = measure([lambda: target.copy_(source)], device)
    return 2 * source.numel() * 4 / timing.median_ms / 1e6


def l2_bandwidth(device: torch.device, mib: float = 16.0) -> float:
    """Measured bandwidth of a copy that stays inside the L2 cache, in GB/s, bytes read plus bytes written; in a graph,
    since a copy is as short as its launch."""
    source = torch.empty(int(mib * 2**20 / 4), dtype=torch.float32, device=device).normal_()
    target = torch.empty_like(source)
    inner = 20

    def copies() -> None:
        for _ in range(inner):
            target.copy_(source)

    return 2 * source.numel() * 4 * inner / device_ms([copies], device) / 1e6
