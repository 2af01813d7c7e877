"""Tensors that grow by a token at a time in memory that is there already."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

# A tensor that must move gets room for so many entries more, or for a quarter of what it holds: each is copied four
# times in all, however many come.
LEAST_ROOM, ROOM_PART = 16, 4


@dataclass(eq=False)
class Room:
    """The memory of a growing tensor. What it gives out is a view of it, which stays right until entries are dropped.

    A tensor that it did not give out last (reordered, cropped, new) is copied into new memory when it grows next.
    """

    dim: int
    whole: Tensor | None = None
    held: Tensor | None = None

    def joined(self, held: Tensor, new: Tensor) -> Tensor:
        """``held`` and then ``new``, along the dimension."""
        differentiated = torch.is_grad_enabled() and (held.requires_grad or new.requires_grad)
        if differentiated or torch.compiler.is_compiling():
            return torch.cat([held, new], dim=self.dim)
        begin, count = held.shape[self.dim], new.shape[self.dim]
        whole = self.whole
        if whole is None or held is not self.held or not _may_write(whole) or begin + count > whole.shape[self.dim]:
            whole = self._moved(held, begin + count)
        whole.narrow(self.dim, begin, count).copy_(new)
        self.whole, self.held = whole, whole.narrow(self.dim, 0, begin + count)
        return self.held

    def chosen(self, held: Tensor, index: Tensor) -> Tensor:
        """The entries ``index`` (ascending) of ``held`` alone; memory that is far too large is given back."""
        kept = held.index_select(self.dim, index.to(held.device))
        count, whole = kept.shape[self.dim], self.whole
        if whole is None or held is not self.held or not _may_write(whole):
            return kept
        if whole.shape[self.dim] > 2 * (count + LEAST_ROOM):
            self.whole = self.held = None
            return kept
        self.held = whole.narrow(self.dim, 0, count)
        return self.held.copy_(kept)

    def _moved(self, held: Tensor, needed: int) -> Tensor:
        shape = list(held.shape)
        shape[self.dim] = needed + max(LEAST_ROOM, needed // ROOM_PART)
        whole = held.new_empty(shape)
        whole.narrow(self.dim, 0, held.shape[self.dim]).copy_(held)
        return whole


def _may_write(x: Tensor) -> bool:
    """Memory made in inference mode cannot be written to outside of it."""
    return not x.is_inference() or torch.is_inference_mode_enabled()
