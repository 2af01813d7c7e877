"""Star-Transformer as a pattern for pretrained models (Guo et al., NAACL 2019, arXiv 1902.09113).

Satellites attend their neighbours ``i - 1, i, i + 1`` on a ring and the relay; the relay attends everything. The
relay is the first token (``relay="token"``; the ring joins the satellites behind it), or a learned extra token in
front of the sequence (``relay="virtual"``; every token is a satellite). Causal models take the token relay, which is
then an attention sink, and the ring is cut: its last link would read the future.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from sa_hf.config import check_bool, check_choice, register_pattern
from sa_hf.errors import SparseAttentionError
from sa_hf.layer import Geometry, LayerSpec
from sa_hf.ops.layout import Predicate
from sa_hf.ops.parts import Band, OffsetsPart, Part, SegmentPart
from sa_hf.ops.reads import Run, positions_of
from sa_hf.patterns.base import StaticPatternConfig
from sa_hf.patterns.tiles import band_tiles, tiles_of


@register_pattern
@dataclass(frozen=True, kw_only=True)
class StarAttentionConfig(StaticPatternConfig):
    """Star-Transformer.

    Args:
        relay: "token" (the first one) or "virtual" (a learned extra token, encoders only).
        ring: whether the last satellite and the first are neighbours (never where causal).
    """

    name: ClassVar[str] = "star"

    relay: str = "token"
    ring: bool = True

    def validate(self) -> None:
        check_choice(self, "relay", ("token", "virtual"))
        check_bool(self, "ring")

    @property
    def extra_tokens(self) -> int:
        return 1 if self.relay == "virtual" else 0

    def check_layer(self, spec: LayerSpec) -> None:
        if self.relay == "virtual" and spec.causal:
            raise SparseAttentionError(
                f"star.relay='virtual' in causal layer {spec.layer_idx}: the virtual relay attends everything and "
                "serves encoders only; nearest: relay='token'"
            )

    def allowed(self, head: Tensor, i: Tensor, j: Tensor, geometry: Geometry) -> Tensor:
        first, last = self._satellites(geometry)
        kept = ((i - j).abs() <= 1) | (i < first) | (j < first)
        if self._closed(geometry):
            kept = kept | ((i == first) & (j == last)) | ((i == last) & (j == first))
        return kept

    def named_parts(self, geometry: Geometry) -> dict[str, Predicate]:
        first, _ = self._satellites(geometry)
        return {"relay": lambda head, i, j: (i < first) | (j < first), "ring": lambda head, i, j: i == i}

    def length_dependent(self, causal: bool) -> bool:
        return self.ring and not causal

    def plan(self, geometry: Geometry, device: torch.device) -> list[Part]:
        n, band = geometry.key_length, geometry.full_band
        first, last = self._satellites(geometry)
        before = n if band.left is None else band.left
        after = n if band.right is None else band.right
        near = tuple(d for d in (-1, 0, 1) if -after <= d <= before and not (d == 0 and self.drop_diagonal))
        parts: list[Part] = []
        if first < n and near:
            parts.append(OffsetsPart(n, (near,), begin=first))
        if first:
            row, column = min(n, after + 1), min(n - 1, before)
            parts.append(_rectangle(0, 1, 0, row, self.drop_diagonal))
            if column:
                parts.append(_rectangle(1, column, 0, 1))
        if self._closed(geometry):
            distance = last - first
            if distance <= after:
                parts.append(_rectangle(first, 1, last, 1))
            if distance <= before:
                parts.append(_rectangle(last, 1, first, 1))
        return parts

    def candidates(self, geometry: Geometry) -> Tensor:
        first, last = self._satellites(geometry)
        rectangles = [(0, first, 0, geometry.key_length), (0, geometry.key_length, 0, first)]
        if self._closed(geometry):
            rectangles += [(first, first + 1, last, last + 1), (last, last + 1, first, first + 1)]
        return torch.cat([band_tiles(geometry, Band(1, 1)), tiles_of(geometry, 0, *torch.tensor(rectangles).unbind(1))])

    def row_keys(self, head: int, position: int, geometry: Geometry) -> Tensor:
        return positions_of(self.row_runs(head, position, geometry))

    def row_runs(self, head: int, position: int, geometry: Geometry) -> list[Run]:
        first, last = self._satellites(geometry)
        if position < first:
            return [(0, geometry.key_length, 1)]
        keys = {*range(first), *range(max(position - 1, 0), position + 2)}
        if self._closed(geometry) and position in (first, last):
            keys |= {first, last}
        return [(at, at + 1, 1) for at in sorted(keys)]

    def keep(self, position: int, geometry: Geometry) -> Tensor:
        first, _ = self._satellites(geometry)
        j = torch.arange(position)
        return ((j < first) | (j == position - 1)) & geometry.readable(position)

    def _satellites(self, geometry: Geometry) -> tuple[int, int]:
        """First and last satellite; the token relay stands before the first."""
        return (1 if self.relay == "token" else 0), geometry.key_length - 1

    def _closed(self, geometry: Geometry) -> bool:
        """Whether the ring has a last link: on fewer than three satellites its ends are neighbours already."""
        first, last = self._satellites(geometry)
        return self.ring and not geometry.causal and last - first >= 2


def _rectangle(row: int, rows: int, column: int, columns: int, skip_diagonal: bool = False) -> SegmentPart:
    """All pairs of a run of queries and a run of keys."""
    return SegmentPart(
        rows, columns, rows, columns, skip_diagonal=skip_diagonal,
        query_index=slice(row, row + rows), key_index=slice(column, column + columns),
    )  # fmt: skip
