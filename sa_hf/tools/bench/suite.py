"""The state of a run of the GPU suite, and how one row of it is measured; each row is saved as it comes."""

from __future__ import annotations

import os
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from sa_hf.tools.bench.baselines import Run
from sa_hf.tools.bench.report import STARTED, Report
from sa_hf.tools.bench.restart import DeviceLost, device_error, first_line
from sa_hf.tools.bench.roofline import Ceilings
from sa_hf.tools.bench.timing import attention_calls, graph_figure, measure

# Seconds that a row may take, compilation included, by section; a row starts only where so many are left.
ROW_SECONDS = {"parity": 5.0, "training": 25.0, "flex": 45.0, "hf-bigbird": 25.0}
USUAL_SECONDS = 10.0


def ending(causal: bool, head_dim: int, length: int, backward: bool) -> str:
    return f"/{'causal' if causal else 'full'}/D{head_dim}/n{length}/{'fwd+bwd' if backward else 'fwd'}"


@dataclass
class Suite:
    """State of one run; ``deadline`` (of ``time.monotonic``) is when the last row has to be there."""

    device: torch.device
    dry: bool
    deadline: float
    report: Report
    ceilings: Ceilings
    longest: dict[str, float] = field(default_factory=dict)
    left_out: int = 0

    def time_for(self, section: str) -> bool:
        """Whether a row of the section ends in time: by our guess, and by the longest of its rows so far."""
        needed = max(ROW_SECONDS.get(section, USUAL_SECONDS), self.longest.get(section, 0.0))
        return time.monotonic() + needed <= self.deadline

    @property
    def engine(self) -> str:
        return "triton"

    @property
    def dtype(self) -> torch.dtype:
        return torch.float32 if self.dry else torch.bfloat16

    @property
    def few(self) -> dict[str, int]:
        return {"warm_up": 0, "repeats": 1} if self.dry else {}

    @property
    def graphs(self) -> bool:
        return self.device.type == "cuda"

    @property
    def cache_bytes(self) -> int:
        """Of the L2 cache of a GPU."""
        if self.device.type != "cuda":
            return 0
        return int(torch.cuda.get_device_properties(self.device).L2_cache_size)

    def sets_past_cache(self, touched: int) -> int:
        """How many inputs have to take turns, ``touched`` bytes of each, for none to be in the cache at its turn."""
        return max(2, -(-2 * self.cache_bytes // touched))

    def row(self, section: str, key: str, measured: Callable[[], dict[str, Any]]) -> None:
        """Measure one row unless it is there or time is short; an error becomes the row.

        Raises: DeviceLost: the device itself failed, and with it all that followed in this process.
        """
        if self.report.done(section, key):
            return
        if not self.time_for(section):
            self.left_out += 1
            return
        begin = time.monotonic()
        # Should it hang or end the process, the next run finds that here and passes over it.
        self.report.add(section, key, {"error": STARTED})
        try:
            result = measured()
        except Exception as error:
            result = {"error": first_line(error)}
            if os.environ.get("SA_HF_TRACE"):
                traceback.print_exc()
        # Also after a row without an error: a graph that cannot be captured is none, whatever the reason.
        lost = device_error(self.device)
        if lost is not None:
            result = {"error": result.get("error", lost), "fatal": True}
        self.report.add(section, key, result)
        self.longest[section] = max(self.longest.get(section, 0.0), time.monotonic() - begin)
        print(f"{section:>10} {key}: {result}", flush=True)
        if lost is not None:
            raise DeviceLost(f"{section}/{key}: {lost}")
        if "error" in result and self.device.type == "cuda":
            with suppress(RuntimeError):  # memory that cannot be given back is no reason to end
                torch.cuda.empty_cache()


def inputs(suite: Suite, length: int, head_dim: int, sets: int | None = None) -> list[tuple[Tensor, ...]]:
    """Query, key and value, ``sets`` times; by default as often as it takes to pass the cache."""
    heads, kv_heads = (2, 1) if suite.dry else (16, 16)
    touched = 2 * (heads + kv_heads) * length * head_dim * suite.dtype.itemsize  # and what comes out

    def draw(h: int) -> Tensor:
        return torch.randn(1, h, length, head_dim, device=suite.device, dtype=suite.dtype, requires_grad=True)

    return [(draw(heads), draw(kv_heads), draw(kv_heads)) for _ in range(sets or suite.sets_past_cache(touched))]


def timed(
    suite: Suite, run: Run, sets: list[tuple[Tensor, ...]], backward: bool, *, graph: bool = True
) -> dict[str, Any]:  # fmt: skip
    """A forward, or forward and backward together: as calls, and in a graph where the device has those."""
    t = measure(attention_calls(run, sets, backward), suite.device, **suite.few)
    row: dict[str, Any] = {"ms": t.median_ms, "min": t.minimum_ms, "max": t.maximum_ms, "peak MiB": t.peak_mib}
    if not (graph and suite.graphs):
        return row
    # Leaves of their own: what autograd keeps for a leaf stays on the stream that first saw it.
    leaves = [tuple(x.detach().requires_grad_() for x in s) for s in sets]
    return row | graph_figure(attention_calls(run, leaves, backward), suite.device, t.median_ms)


def first_call(suite: Suite, call: Callable[[], object]) -> float:
    """Milliseconds of a call up to its end on the device, compilation and plans included."""
    begin = time.perf_counter()
    call()
    if suite.device.type == "cuda":
        torch.cuda.synchronize(suite.device)
    return (time.perf_counter() - begin) * 1e3
