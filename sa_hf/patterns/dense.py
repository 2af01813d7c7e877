"""Dense attention: every pair. In a patched model it names the layers that stay as they were."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from sa_hf.config import register_pattern
from sa_hf.layer import Geometry
from sa_hf.ops.parts import Part
from sa_hf.ops.reads import Run
from sa_hf.patterns.base import StaticPatternConfig
from sa_hf.patterns.sliding_window import window_part


@register_pattern
@dataclass(frozen=True, kw_only=True)
class DenseAttentionConfig(StaticPatternConfig):
    """All pairs."""

    name: ClassVar[str] = "dense"

    def allowed(self, head: Tensor, i: Tensor, j: Tensor, geometry: Geometry) -> Tensor:
        return torch.ones_like(i - j, dtype=torch.bool)

    def block_plan(self, geometry: Geometry, device: torch.device, candidates: Tensor | None = None) -> list[Part]:
        return [window_part(geometry, device, geometry.key_length, drop_diagonal=self.drop_diagonal)]

    def row_keys(self, head: int, position: int, geometry: Geometry) -> Tensor:
        return torch.arange(geometry.key_length)

    def row_runs(self, head: int, position: int, geometry: Geometry) -> list[Run]:
        return [(0, geometry.key_length, 1)]
