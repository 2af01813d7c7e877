"""Sliding window attention with attention sinks (Longformer, arXiv 2004.05150; StreamingLLM, arXiv 2309.17453).

A query attends the ``window`` nearest positions, its own included (causal: ``0 <= i - j < window``; bidirectional:
``|i - j| < window``), and the first ``num_sink_tokens`` positions.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from sa_hf.config import check_integer, register_pattern
from sa_hf.layer import Geometry
from sa_hf.ops.layout import Predicate, build_layout
from sa_hf.ops.parts import Band, BlockPart, Part, SegmentPart
from sa_hf.ops.reads import Run, positions_of
from sa_hf.patterns.base import StaticPatternConfig
from sa_hf.patterns.tiles import band_tiles, query_tiles, tiles_of, within_band


@register_pattern
@dataclass(frozen=True, kw_only=True)
class SlidingWindowAttentionConfig(StaticPatternConfig):
    """A sliding window.

    Args:
        window: nearest positions attended, own included, >= 1.
        num_sink_tokens: leading positions that every query attends, >= 0.
    """

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

    def named_parts(self, geometry: Geometry) -> dict[str, Predicate]:
        if not self.num_sink_tokens:
            return {}
        return {
            "window": lambda head, i, j: (i - j).abs() < self.window,
            "sinks": lambda head, i, j: j < self.num_sink_tokens,
        }

    def block_plan(self, geometry: Geometry, device: torch.device, candidates: Tensor | None = None) -> list[Part]:
        return [window_part(geometry, device, self.window, self.num_sink_tokens, self.drop_diagonal)]

    def row_keys(self, head: int, position: int, geometry: Geometry) -> Tensor:
        return positions_of(self.row_runs(head, position, geometry))

    def row_runs(self, head: int, position: int, geometry: Geometry) -> list[Run]:
        first = max(0, position - self.window + 1)
        last = min(geometry.key_length, position + self.window)
        sinks = min(self.num_sink_tokens, geometry.key_length)
        return [(0, min(sinks, first), 1), (first, last, 1), (last, sinks, 1)]

    def keep(self, position: int, geometry: Geometry) -> Tensor:
        j = torch.arange(position)
        kept = (j > position - self.window) | (j < self.num_sink_tokens)
        return kept & geometry.readable(position)


def window_part(
    geometry: Geometry, device: torch.device, window: int, sinks: int = 0, drop_diagonal: bool = False
) -> Part:
    """One part for the ``window`` nearest positions and the first ``sinks`` ones; each key counts once."""
    n = geometry.key_length
    if window >= n and geometry.query_length == n and geometry.band.left is None:
        return SegmentPart(n, n, n, n, band=geometry.full_band, skip_diagonal=drop_diagonal)
    reach = Band(window - 1, window - 1)

    def predicate(_: Tensor, i: Tensor, j: Tensor) -> Tensor:
        kept = reach.contains(i, j) | (j < sinks)
        return kept & (i != j) if drop_diagonal else kept

    near = band_tiles(geometry, reach)
    diagonal = band_tiles(geometry, Band(0, 0)) if drop_diagonal else None
    if sinks == 0:
        tried, full, band = diagonal, near, geometry.full_band.intersect(reach)
    else:
        low, high = query_tiles(geometry)
        column = tiles_of(geometry, 0, low, high, torch.zeros_like(low), torch.full_like(high, sinks))
        inner = within_band(geometry, near, reach)
        # An element mask of the sinks alone is the same in every row: the layout stores it once.
        edges = [column, near[~inner], *([] if diagonal is None else [diagonal])]
        tried, full, band = torch.cat(edges), near[inner], geometry.full_band
    layout = build_layout(
        predicate,
        geometry.query_length,
        n,
        heads=1,
        block=geometry.block,
        band=band,
        candidates=tried,
        full_tiles=full,
        query_offset=geometry.query_offset,
        device=device,
    )
    return BlockPart(layout)
