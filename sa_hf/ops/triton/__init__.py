"""The Triton engine: kernels for GPUs. Importing it needs neither triton nor a GPU."""

from __future__ import annotations

from torch import Tensor

from sa_hf.ops.parts import ScoreOptions


class TritonEngine:
    name = "triton"

    def unsupported(self, query: Tensor, options: ScoreOptions) -> str | None:
        return "not yet built"
