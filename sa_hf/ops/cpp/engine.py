"""The engine: parts read and written where they lie, merged as they are computed."""

from __future__ import annotations

import torch
from torch import Tensor

from sa_hf.ops.cpp.kernels import (
    Rows,
    Sums,
    backward,
    backward_into,
    forward,
    forward_into,
    has_every_query,
    plain,
    why_not,
)
from sa_hf.ops.engine import Engine, Gradients, Merging, Total
from sa_hf.ops.memory import keep_freed_memory
from sa_hf.ops.parts import OffsetsPart, Part, ScoreOptions, SegmentPart


class CppEngine(Engine):
    """Kernels in C++ for the CPU, compiled at first use: in fp32, under all options.

    ``forward`` and ``backward`` take rows in slots, for the means of ``ops.means``; plans are run in place.
    """

    name = "native"

    def unsupported(self, query: Tensor, options: ScoreOptions) -> str | None:
        if query.device.type != "cpu":
            return f"the C++ kernels run on the CPU, not on {query.device.type}"
        if query.dtype == torch.float64:
            return "the C++ kernels compute in float32, and the query is float64"
        return why_not()

    def forward(
        self, part: Part, query: Tensor, key: Tensor, value: Tensor, options: ScoreOptions
    ) -> tuple[Tensor, Tensor]:
        keep_freed_memory()
        return forward(simplest(part), query, key, value, options)

    def backward(
        self, part: Part, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor, grad_out: Tensor,
        options: ScoreOptions,
    ) -> Gradients:  # fmt: skip
        return backward(simplest(part), query, key, value, out, lse, grad_out, options)

    def merging(self, query: Tensor, start: tuple[Tensor, Tensor] | None) -> Merging:
        return InPlaceMerging(self, query, start)

    def total(self, query: Tensor, key: Tensor, value: Tensor, options: ScoreOptions) -> Total:
        return InPlaceTotal(self, query, key, value, options)


def simplest(part: Part) -> Part:
    """Segments of one slot are the offset 0: elementwise products instead of 1 x 1 matrices."""
    if isinstance(part, SegmentPart) and part.query_segment == part.key_segment == 1:
        length = min(part.query_slots, part.key_slots)
        own = not part.skip_diagonal and all(bound is None or bound >= 0 for bound in (part.band.left, part.band.right))
        offsets: tuple[int, ...] = (0,) if own else ()
        return OffsetsPart(part.query_slots, (offsets,), 0, length, part.query_index, part.key_index)
    return part


class InPlaceMerging(Merging):
    """Parts are merged as they are computed."""

    rows: Rows | None = None

    def attend(self, part: Part, query: Tensor, key: Tensor, value: Tensor, options: ScoreOptions) -> None:
        keep_freed_memory()
        part = simplest(part)
        self.rows = rows = self.rows or Rows.of(query, key, value, options)
        fresh = self.merged is None and has_every_query(part, query.shape[2])
        if self.merged is None:
            shape = query.shape
            out = rows.query.new_empty(shape) if fresh else rows.query.new_zeros(shape)
            self.merged = out, rows.query.new_full(shape[:3], -torch.inf)
        out, lse = (x.float().contiguous() for x in self.merged)
        self.merged = out, lse
        forward_into(part, rows, self.merged, fresh=fresh)


class InPlaceTotal(Total):
    """Gradients add up where they lie."""

    rows: Rows | None = None
    in_place: Sums | None = None

    def attend(
        self, part: Part, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor, grad_out: Tensor
    ) -> None:
        if self.rows is None or self.in_place is None:
            self.rows = Rows.of(query, key, value, self.options)
            self.in_place = Sums.zeros(self.rows)
            self.results = plain(out), lse.float().contiguous(), plain(grad_out)
        backward_into(simplest(part), self.rows, *self.results, self.in_place)

    def gradients(self) -> Gradients:
        if self.rows is not None and self.in_place is not None:
            self.add_whole(self.in_place.gradients(self.rows))
            self.rows = self.in_place = None
        return super().gradients()
