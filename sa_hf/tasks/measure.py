"""What a training run cost: time per optimizer step and the process's peak memory."""

from __future__ import annotations

import resource
import statistics
import sys
import time
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments


class StepClock(TrainerCallback):
    """Measures each optimizer step, gradient accumulation included, evaluation and saving left out."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self._started = 0.0

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._started = self._now()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.seconds.append(self._now() - self._started)

    def figures(self) -> dict[str, float]:
        """The first step (which builds layouts and caches) and the median of the others, in seconds."""
        if not self.seconds:
            return {}
        later = self.seconds[1:] or self.seconds
        return {"first_step_seconds": self.seconds[0], "step_seconds": statistics.median(later)}

    @staticmethod
    def _now() -> float:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return time.perf_counter()


def peak_memory_mb() -> float:
    """MiB at the highest so far: of the GPU's allocator where there is a GPU, else of this process (resident)."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 2**10
