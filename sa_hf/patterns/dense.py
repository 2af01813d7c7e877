"""Dense attention: every pair. In a patched model it names the layers that stay as they were."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from sa_hf.config import register_pattern
from sa_hf.ops.parts import Part, SegmentPart
from sa_hf.patterns.base import Geometry, StaticPatternConfig


@register_pattern
@dataclass(frozen=True, kw_only=True)
class DenseAttentionConfig(StaticPatternConfig):
    """All pairs."""

    name: ClassVar[str] = "dense"

    def allowed(self, head: Tensor, i: Tensor, j: Tensor, geometry: Geometry) -> Tensor:
        return torch.ones_like(i - j, dtype=torch.bool)

    def plan(self, geometry: Geometry, device: torch.device) -> list[Part]:
        n = geometry.key_length
        return [SegmentPart(n, n, n, n, band=geometry.full_band, skip_diagonal=self.drop_diagonal)]
