"""What the tile code asks of a part: batches of ``T`` equal tiles, each ``a`` query slots with their ``m`` key slots.

Every query slot lies in at most one tile of a batch; a key slot may lie in many.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor


@dataclass(frozen=True)
class Budget:
    """How much a batch of tiles may hold: ``scores`` (T * a * m) and gathered ``keys`` (T * m)."""

    scores: int
    keys: int

    def tiles(self, rows: int, keys: int) -> int:
        """The number of tiles of ``rows x keys`` that fit, at least 1."""
        return max(1, min(self.scores // (rows * keys), self.keys // keys))


class TileBatch(Protocol):
    """``T`` tiles of one shape. The tensors read and written are ``[lanes, padded slots, ...]`` on the query side,
    ``[key lanes, padded slots, ...]`` on the key side."""

    @property
    def lanes(self) -> Tensor:
        """int64 ``[T]``"""
        ...

    @property
    def query_slots(self) -> Tensor:
        """int64 ``[T | 1, a]``"""
        ...

    @property
    def key_slots(self) -> Tensor:
        """int64 ``[T | 1, m]``"""
        ...

    @property
    def triangular(self) -> bool:
        """The tiles are square and keep the pairs ``key slot <= query slot``, without a mask that says so."""
        ...

    def mask(self) -> Tensor | None:
        """The pairs that the part keeps, words ``[T | 1, a, m]``; None where all."""
        ...

    def queries(self, x: Tensor) -> Tensor:
        """``[T, a, ...]``"""
        ...

    def write_result(self, out: Tensor, lse: Tensor, tile_out: Tensor, tile_lse: Tensor) -> None:
        """``tile_out [T, a, d]``, ``tile_lse [T, a]``; merged with what earlier tiles of these queries wrote."""
        ...

    def write_gradient(self, target: Tensor, x: Tensor) -> None: ...

    def keys(self, x: Tensor) -> Tensor:
        """``[T, m, ...]``"""
        ...

    def add_keys(self, target: Tensor, x: Tensor) -> None: ...
