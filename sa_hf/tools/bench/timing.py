"""Clocks and memory: CUDA events on a GPU, the wall clock on a CPU."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Timing:
    """Milliseconds of one call over repeats, and the peak of allocated device memory above the start, in MiB."""

    median_ms: float
    minimum_ms: float
    maximum_ms: float
    repeats: int
    peak_mib: float | None


def measure(
    calls: Sequence[Callable[[], object]], device: torch.device, *, warm_up: int = 3, repeats: int = 20,
    seconds: float = 2.0,
) -> Timing:  # fmt: skip
    """Time calls in turn (each on inputs of its own, so that together they pass the L2 cache).

    Repeats end early after ``seconds`` of measuring, but never below three. On a GPU the calls are queued without
    waiting in between: a call is as long as the device takes, or as the host takes to launch it where that is longer.
    """
    for index in range(warm_up):
        calls[index % len(calls)]()
    on_gpu = device.type == "cuda"
    base = 0
    if on_gpu:
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        base = torch.cuda.memory_allocated(device)
    times = (_on_device if on_gpu else _on_host)(calls, repeats, seconds)
    peak = (torch.cuda.max_memory_allocated(device) - base) / 2**20 if on_gpu else None
    return Timing(statistics.median(times), min(times), max(times), len(times), peak)


def _on_host(calls: Sequence[Callable[[], object]], repeats: int, seconds: float) -> list[float]:
    times: list[float] = []
    start = time.perf_counter()
    for index in range(repeats):
        begin = time.perf_counter()
        calls[index % len(calls)]()
        times.append((time.perf_counter() - begin) * 1e3)
        if len(times) >= 3 and time.perf_counter() - start > seconds:
            break
    return times


def _on_device(calls: Sequence[Callable[[], object]], repeats: int, seconds: float) -> list[float]:
    first = _queued(calls, 1)[0]
    return _queued(calls, max(3, min(repeats, int(seconds * 1e3 / max(first, 1e-3)))))


def _queued(calls: Sequence[Callable[[], object]], repeats: int) -> list[float]:
    pairs = [tuple(torch.cuda.Event(enable_timing=True) for _ in range(2)) for _ in range(repeats)]
    for index, (start, end) in enumerate(pairs):
        start.record()
        calls[index % len(calls)]()
        end.record()
    torch.cuda.synchronize()
    return [float(start.elapsed_time(end)) for start, end in pairs]


def captured(calls: Sequence[Callable[[], object]], times: int) -> Callable[[], object]:
    """The calls in turn, ``times`` over, as one CUDA graph: its replay costs the host nothing. Run them once before."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(times):
            for call in calls:
                call()
    return graph.replay


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
    """Measured bandwidth of a copy that stays inside the L2 cache, in GB/s, bytes read plus bytes written."""
    source = torch.empty(int(mib * 2**20 / 4), dtype=torch.float32, device=device).normal_()
    target = torch.empty_like(source)
    inner = 20

    def copies() -> None:
        for _ in range(inner):
            target.copy_(source)

    timing = measure([copies], device)
    return 2 * source.numel() * 4 * inner / timing.median_ms / 1e6
