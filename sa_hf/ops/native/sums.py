"""The running result and the running gradients of a plan whose parts the C++ kernels read and write where they lie."""

from __future__ import annotations

import torch
from torch import Tensor

from sa_hf.ops.engine import Engine, Gradients
from sa_hf.ops.native import kernels
from sa_hf.ops.native.engine import simplest
from sa_hf.ops.parts import Part, ScoreOptions
from sa_hf.ops.run import Merging, Total


class InPlaceMerging(Merging):
    """Parts are merged as they are computed."""

    rows: kernels.Rows | None = None

    def attend(
        self, part: Part, query: Tensor, key: Tensor, value: Tensor, options: ScoreOptions, engine: Engine
    ) -> None:
        part = simplest(part)
        self.rows = rows = self.rows or kernels.Rows.of(query, key, value, options)
        fresh = self.merged is None and kernels.has_every_query(part, query.shape[2])
        if self.merged is None:
            shape = query.shape
            out = rows.query.new_empty(shape) if fresh else rows.query.new_zeros(shape)
            self.merged = out, rows.query.new_full(shape[:3], -torch.inf)
        out, lse = (x.float().contiguous() for x in self.merged)
        self.merged = out, lse
        kernels.forward_into(part, rows, self.merged, fresh=fresh)


class InPlaceTotal(Total):
    """Gradients add up where they lie."""

    rows: kernels.Rows | None = None
    in_place: kernels.Sums | None = None

    def attend(
        self, part: Part, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor, grad_out: Tensor,
        engine: Engine,
    ) -> None:  # fmt: skip
        if self.rows is None or self.in_place is None:
            self.rows = kernels.Rows.of(query, key, value, self.options)
            self.in_place = kernels.Sums.zeros(self.rows)
            self.results = kernels.plain(out), lse.float().contiguous(), kernels.plain(grad_out)
        kernels.backward_into(simplest(part), self.rows, *self.results, self.in_place)

    def gradients(self) -> Gradients:
        if self.rows is not None and self.in_place is not None:
            self.add_whole(self.in_place.gradients(self.rows))
            self.rows = self.in_place = None
        return super().gradients()
