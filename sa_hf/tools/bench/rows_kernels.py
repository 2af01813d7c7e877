"""Rows of kernels: what each one takes of a forward and backward, by the profiler, and what the host takes to launch
them."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from sa_hf.functional import sparse_attention
from sa_hf.tools.bench.cases import Case, timing_cases
from sa_hf.tools.bench.suite import Suite, inputs
from sa_hf.tools.bench.timing import attention_calls

ROUNDS = 2  # over all inputs


def kernel_section(suite: Suite, lengths: list[int], head_dims: list[int]) -> None:
    for length in lengths:
        for head_dim in head_dims:
            for case in timing_cases():
                suite.row(
                    "kernels", f"{case.key}/D{head_dim}/n{length}", partial(profiled, suite, case, length, head_dim)
                )


def profiled(suite: Suite, case: Case, length: int, head_dim: int) -> dict[str, Any]:
    """Microseconds of a forward and backward together: ``us on the device``, of each kernel, and of the host."""
    sets = inputs(suite, length, head_dim, 2)

    def run(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return sparse_attention(q, k, v, case.config, causal=case.causal, engine=suite.engine)

    calls = attention_calls(run, sets, True)
    for call in calls * 2:  # compilation, lists, launches
        call()
    torch.cuda.synchronize(suite.device)
    host = min(_host_us(suite, call) for call in calls)
    with profile(activities=[ProfilerActivity.CUDA]) as found:
        for call in calls * ROUNDS:
            call()
        torch.cuda.synchronize(suite.device)
    times: Counter[str] = Counter()
    for event in found.events():
        if event.device_type.name == "CUDA":
            # Of torch's own operations there are many, with names of a line.
            times[event.name if event.name.endswith("_kernel") else "torch"] += event.device_time
    number = len(calls) * ROUNDS
    row: dict[str, Any] = {"us on the device": sum(times.values()) / number, "us of the host": host}
    return row | {name: us / number for name, us in times.most_common()}


def _host_us(suite: Suite, call: Callable[[], object]) -> float:
    """Until a call comes back, with nothing queued before it."""
    torch.cuda.synchronize(suite.device)
    begin = time.perf_counter()
    call()
    return (time.perf_counter() - begin) * 1e6
