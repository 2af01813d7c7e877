"""LogSparse attention of the convolutional Transformer for forecasting (Li et al., NeurIPS 2019, arXiv 1907.00235).

A query reads itself and the positions ``2^k`` before it, so that any earlier position is reachable through
``floor(log2 n) + 1`` layers at O(n log n) keys. ``local_window`` reads the nearest positions densely first;
``restart_length`` repeats the set at every multiple of it, counted back from the query. Every row has the same set of
offsets, so the pattern runs as shifted slices of K and V, and a wide local window as block tiles.
``conv_kernel_size > 1`` also makes queries and keys from a causal convolution over the layer's input (the convolution
lives in the patched projection, not here).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar

import torch
from torch import Tensor

from sa_hf.config import check_choice, check_integer, register_pattern
from sa_hf.errors import SparseAttentionError
from sa_hf.layer import Geometry
from sa_hf.ops.parts import OffsetsPart, Part
from sa_hf.ops.reads import Run, positions_of
from sa_hf.patterns.base import StaticPatternConfig
from sa_hf.patterns.sliding_window import window_part
from sa_hf.patterns.tiles import query_tiles, tiles_of

# So many nearest positions are read as a window, in matrix products, and not offset by offset.
DENSE_RUN = 32


@register_pattern
@dataclass(frozen=True, kw_only=True)
class LogSparseAttentionConfig(StaticPatternConfig):
    """LogSparse.

    Args:
        local_window: the nearest positions read densely, own included; None is ``ceil(log2 restart_length)``.
        restart_length: distance after which the steps start again, or None; to grow with the input, as a row has about
            ``(n / restart_length) * (local_window + log2 restart_length)`` keys.
        conv_kernel_size: width of the causal convolution that makes queries and keys; 1, 2, 3, 6 or 9.
    """

    name: ClassVar[str] = "logsparse"

    local_window: int | None = 1
    restart_length: int | None = None
    conv_kernel_size: int = 1

    def validate(self) -> None:
        check_integer(self, "local_window", minimum=1, optional=True)
        check_integer(self, "restart_length", minimum=1, optional=True)
        check_choice(self, "conv_kernel_size", (1, 2, 3, 6, 9))
        if self.local_window is None and self.restart_length is None:
            raise SparseAttentionError(
                "logsparse.local_window=None means ceil(log2 restart_length), but restart_length is None too; "
                "nearest: local_window=1, or give a restart_length"
            )

    def allowed(self, head: Tensor, i: Tensor, j: Tensor, geometry: Geometry) -> Tensor:
        distance = (i - j).abs()
        table = torch.zeros(geometry.key_length, dtype=torch.bool)
        table[list(offsets_below(self, geometry.key_length))] = True
        return table.to(distance.device)[distance]

    def plan(self, geometry: Geometry, device: torch.device) -> list[Part]:
        offsets, parts = self._offsets(geometry), list[Part]()
        distances = offsets_below(self, geometry.key_length)
        dense = next((d for d, known in enumerate(distances) if d != known), len(distances))
        if dense >= DENSE_RUN:
            parts.append(window_part(geometry, device, dense, drop_diagonal=self.drop_diagonal))
            offsets = tuple(d for d in offsets if abs(d) >= dense)
        if offsets:
            parts.append(OffsetsPart(geometry.key_length, (offsets,)))
        return parts

    def candidates(self, geometry: Geometry) -> Tensor:
        low, high = query_tiles(geometry)
        offsets = torch.tensor(self._offsets(geometry), dtype=torch.int64)[:, None]
        shape = len(offsets), len(low)
        low, high = low.expand(shape), high.expand(shape)
        return tiles_of(geometry, 0, low, high, low - offsets, high - offsets)

    def _offsets(self, geometry: Geometry) -> tuple[int, ...]:
        """``i - j`` of the kept pairs inside the model's window, ascending."""
        n, band = geometry.key_length, geometry.full_band
        distances = offsets_below(self, n)
        before = n if band.left is None else band.left
        after = n if band.right is None else band.right
        behind = [d for d in distances if d <= before and not (d == 0 and self.drop_diagonal)]
        ahead = [-d for d in reversed(distances) if 0 < d <= after]
        return (*ahead, *behind)

    def row_keys(self, head: int, position: int, geometry: Geometry) -> Tensor:
        return positions_of(self.row_runs(head, position, geometry))

    def row_runs(self, head: int, position: int, geometry: Geometry) -> list[Run]:
        distances = offsets_below(self, geometry.key_length)
        back = [position - d for d in reversed(distances) if d <= position]
        ahead = [] if geometry.causal else [position + d for d in distances if 0 < d < geometry.key_length - position]
        return [(at, at + 1, 1) for at in back + ahead]

    def keep(self, position: int, geometry: Geometry) -> Tensor:
        if geometry.band.left is None:  # a later query is some power of two away from every key
            return geometry.readable(position)
        return torch.arange(position) >= position - offsets_below(self, geometry.band.left + 1)[-1]


@lru_cache(maxsize=64)
def offsets_below(config: LogSparseAttentionConfig, length: int) -> tuple[int, ...]:
    """The distances ``0 <= d < length`` that a query reads backwards, ascending."""
    restart = length if config.restart_length is None else config.restart_length
    window = config.local_window
    if window is None:
        window = max(1, (restart - 1).bit_length())
    steps = set(range(min(window, length)))
    power = 1
    while window - 1 + power < length:
        steps.add(window - 1 + power)
        power *= 2
    # The step at exactly the restart length is the next anchor itself.
    steps = {d for d in steps if d <= restart}
    found = {anchor + d for anchor in range(0, length, restart) for d in steps}
    return tuple(sorted(d for d in found if d < length))
