"""How tensors are laid out for the tiles: batch and heads flattened to lanes, and the positions behind the slots."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from sa_hf.ops.parts import Index


@dataclass(frozen=True, eq=False)
class Lanes:
    """The ``batch * heads`` lanes of a call; lane ``g * heads + h`` reads key lane ``g * kv_heads + h // group``."""

    batch: int
    heads: int
    kv_heads: int
    device: torch.device

    @classmethod
    def of(cls, query: Tensor, key: Tensor) -> Lanes:
        return cls(query.shape[0], query.shape[1], key.shape[1], query.device)

    @property
    def count(self) -> int:
        return self.batch * self.heads

    @property
    def group(self) -> int:
        return self.heads // self.kv_heads

    @cached_property
    def ids(self) -> Tensor:
        return torch.arange(self.count, device=self.device)

    def key_lanes(self, lanes: Tensor) -> Tensor:
        return lanes if self.group == 1 else lanes // self.group

    def batch_of(self, lanes: Tensor) -> Tensor:
        return lanes // self.heads

    def head_of(self, lanes: Tensor) -> Tensor:
        return lanes % self.heads

    def flat_index(self, index: Tensor) -> Tensor:
        """A slot index ``[B | 1, H | 1, slots]`` as ``[lanes, slots]``."""
        return index.expand(self.batch, self.heads, -1).reshape(self.count, -1)


@dataclass(frozen=True, eq=False)
class Slots:
    """The positions of one side's slots; -1 for an empty one."""

    start: int
    table: Tensor | None

    @classmethod
    def of(cls, index: Index, lanes: Lanes, offset: int) -> Slots:
        if isinstance(index, Tensor):
            table = lanes.flat_index(index)
            return cls(0, torch.where(table >= 0, table + offset, -1))
        return cls(offset + (0 if index is None else index.start), None)

    def positions(self, lanes: Tensor, slots: Tensor) -> Tensor:
        """Positions int64 ``[T | 1, s]`` of slots ``[T | 1, s]`` in lanes ``[T]``; slots past the end give -1."""
        if self.table is None:
            return slots + self.start
        past = slots >= self.table.shape[1]
        found = self.table[lanes[:, None], slots.clamp(max=self.table.shape[1] - 1)]
        return torch.where(past, -1, found)

    def filled(self) -> Tensor | None:
        """Bool ``[lanes, slots]`` of the slots that are not empty; None where none is."""
        if self.table is None or bool((self.table >= 0).all()):
            return None
        return self.table >= 0
