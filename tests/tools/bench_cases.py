"""What the tests of the GPU suite share: suites at toy size, and captures without a GPU."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from sa_hf.tools.bench.report import Report
from sa_hf.tools.bench.roofline import H200_DATASHEET
from sa_hf.tools.bench.suite import Suite

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


def called_at_once(calls: list[Callable[[], object]], times: int) -> Callable[[], object]:
    return lambda: [call() for _ in range(times) for call in calls]


def cannot_capture(calls: list[Callable[[], object]], times: int) -> Callable[[], object]:
    try:
        raise ValueError("a copy from the host")
    finally:
        raise RuntimeError("capture ended badly")


def sum_of_values(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return q + k.mean(2, keepdim=True) + v.mean(2, keepdim=True)
