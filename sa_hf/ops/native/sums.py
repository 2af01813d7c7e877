"""The running result and the running gradients of a plan whose parts the C++ kernels read and write where they lie."""

from __future__ import annotations

import torch
from torch import Tensor

from sa_hf.ops.engine import Engine, Gradients
from sa_hf.ops.native import kernels
from sa_hf.ops.native.engine import simplest
from sa_hf.ops.parts import BlockPart, OffsetsPart, Part, ScoreOptions
from sa_hf.ops.run import Merging, Total


class InPlaceMerging(Merging):
    """Blocks and segments are merged as they are computed; fixed offsets as elsewhere."""

    rows: kernels.Rows | None = None

    def attend(
        self, part: Part, query: Tensor, key: Tensor, value: Tensor, options: ScoreOptions, engine: Engine
    ) -> None:
        part = simplest(part)
        if isinstance(part, OffsetsPart):
            super().attend(part, query, key, value, options, engine)
            return
        self.rows = rows = self.rows or kernels.Rows.of(query, key, value, options)
        slots = part.layout.query_slots if isinstance(part, BlockPart) else part.query_slots
        fresh = self.merged is None and part.query_index is None and slots == query.shape[2]
        if self.merged is None:
            shape = query.shape
            out = rows.query.new_empty(shape) if fresh else rows.query.new_zeros(shape)
            self.merged = out, rows.query.new_full(shape[:3], -torch.inf)
        out, lse = (x.float().contiguous() for x in self.merged)
        self.merged = out, lse
        kernels.forward_into(part, rows, self.merged, fresh=fresh)


class InPlaceTotal(Total):
    """Gradients of blocks and segments add up where they lie; those of fixed offsets as elsewhere."""

    rows: kernels.Rows | None = None
    in_place: kernels.Sums | None = None

    def attend(
        self, part: Part, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor, grad_out: Tensor,
        engine: Engine,
    ) -> None:  # fmt: skip
        part = simplest(part)
        if isinstance(part, OffsetsPart):
            super().attend(part, query, key, value, out, lse, grad_out, engine)
            return
        if self.rows is None or self.in_place is None:
            self.rows = kernels.Rows.of(query, key, value, self.options)
            self.in_place = kernels.Sums.zeros(self.rows)
            self.results = kernels.plain(out), lse.float().contiguous(), kernels.plain(grad_out)
        kernels.backward_into(part, self.rows, *self.results, self.in_place)

    def gradients(self) -> Gradients:
        if self.rows is not None and self.in_place is not None:
            self.add_whole(self.in_place.gradients(self.rows))
            self.rows = self.in_place = None
        return super().gradients()
