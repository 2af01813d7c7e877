"""Sliding window attention with attention sinks (Longformer, arXiv 2004.05150; StreamingLLM, arXiv 2309.17453).

A query attends the ``window`` nearest positions, its own included (causal: ``0 <= i - j < window``; bidirectional:
``|i - j| < window``), and the first ``num_sink_tokens`` positions.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from sa_hf.config import check_integer, register_pattern
from sa_hf.ops.layout import build_layout
from sa_hf.ops.parts import Band, BlockPart, Part, SegmentPart
from sa_hf.patterns.base import Geometry, StaticPatternConfig


@register_pattern
@dataclass(frozen=True, kw_only=True)
class SlidingWindowAttentionConfig(StaticPatternConfig):
    """Args: window: nearest positions attended, own included, >= 1. num_sink_tokens: leading positions that every
    query attends, >= 0."""

    name: ClassVar[str] = "sliding_window"

    window: int = 512
    num_sink_tokens: int = 0

    def validate(self) -> None:
        check_integer(self, "window", minimum=1)
        check_integer(self, "num_sink_tokens", minimum=0)

    @classmethod
    def presets(cls) -> dict[str, dict[str, Any]]:
        return {"mistral": {"window": 4096}, "streaming_llm": {"window": 1024, "num_sink_tokens": 4}}

    def allowed(self, head: Tensor, i: Tensor, j: Tensor, geometry: Geometry) -> Tensor:
        return ((i - j).abs() < self.window) | (j < self.num_sink_tokens)
