"""The running result and the running gradients of a plan's parts, each written once when the parts are through."""

from __future__ import annotations

import torch
from torch import Tensor

from sa_hf.ops.engine import Engine, Merging, Total
from sa_hf.ops.parts import Index, ScoreOptions
from sa_hf.ops.pieces import Piece
from sa_hf.ops.triton.launch_rows import Inverses, SlotRows, merge, sum_rows
from sa_hf.ops.triton.rows import MOST_PARTS


class KernelMerging(Merging):
    """Results wait in their slots, in the query's dtype, until one kernel merges them all."""

    def __init__(self, engine: Engine, query: Tensor, start: tuple[Tensor, Tensor] | None) -> None:
        super().__init__(engine, query, None)
        self.start = start
        self.waiting = [] if start is None else [SlotRows(start[0], None, start[1])]

    def add(self, piece: Piece, out: Tensor, lse: Tensor) -> None:
        if len(self.waiting) == MOST_PARTS:
            running, running_lse = merge(self.waiting, self.query, torch.float32)
            self.waiting = [SlotRows(running, None, running_lse)]
        self.waiting.append(SlotRows(out, piece.part.query_index, lse))

    def result(self) -> tuple[Tensor, Tensor]:
        match self.waiting:
            case []:
                return super().result()
            case [SlotRows(out, None, lse)] if lse is not None:
                return out.to(self.query.dtype), lse
        out, lse = merge(self.waiting, self.query, self.query.dtype)
        if self.start is not None:  # what has no mass of its own (the means of ``ops.means``) stays where none comes
            out = torch.where(torch.isneginf(lse).unsqueeze(-1), self.start[0].to(out.dtype), out)
        return out, lse


class KernelTotal(Total):
    """Gradients wait in their slots until one kernel per tensor adds them up; where a position may stand in several
    slots of a part they are added at once, as elsewhere."""

    def __init__(self, engine: Engine, query: Tensor, key: Tensor, value: Tensor, options: ScoreOptions) -> None:
        super().__init__(engine, query, key, value, options)
        self.waiting: tuple[list[SlotRows], ...] = ([], [], [])
        self.inverses: Inverses = {}

    def add_rows(self, at: int, grad: Tensor, index: Index, piece: Piece, *, repeated: bool) -> None:
        if repeated:
            super().add_rows(at, grad, index, piece, repeated=True)
            return
        waiting = self._with_sum(at)
        if len(waiting) == MOST_PARTS:
            self.sums[at] = sum_rows(waiting, self.like[at], torch.float32, self.inverses)
            self.waiting[at].clear()
        self.waiting[at].append(SlotRows(grad, index))

    def sum_of(self, at: int) -> Tensor:
        like, parts = self.like[at], self._with_sum(at)
        match parts:
            case []:
                return super().sum_of(at)
            case [SlotRows(grad, None)]:
                return grad.to(like.dtype)
        return sum_rows(parts, like, like.dtype, self.inverses)

    def _with_sum(self, at: int) -> list[SlotRows]:
        known = self.sums[at]
        return self.waiting[at] if known is None else [SlotRows(known, None), *self.waiting[at]]
