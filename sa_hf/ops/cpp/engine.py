"""The engine: parts read and written where they lie, merged as they are computed."""

from __future__ import annotations

import torch
from torch import Tensor

from sa_hf.ops.cpp.kernels import backward, backward_all, forward, forward_all, why_not
from sa_hf.ops.cpp.rows import ELEMENTS, Rows
from sa_hf.ops.cpp.steps import decode_listed
from sa_hf.ops.engine import Engine, Gradients, Merging, Total
from sa_hf.ops.graphs import eager
from sa_hf.ops.memory import keep_freed_memory
from sa_hf.ops.parts import OffsetsPart, Part, ScoreOptions, SegmentPart


class CppEngine(Engine):
    """Kernels in C++ for the CPU, compiled at first use: fp32, bf16 and fp16, under all options.

    ``forward`` and ``backward`` take rows in slots, for the means of ``ops.means``; plans are run in place.
    """

    name = "native"

    def unsupported(self, query: Tensor, options: ScoreOptions) -> str | None:
        if query.device.type != "cpu":
            return f"the C++ kernels run on the CPU, not on {query.device.type}"
        if query.dtype == torch.float64:
            return "the C++ kernels compute in float32, and the query is float64"
        return why_not()

    def cannot_decode(self, query: Tensor, key: Tensor, value: Tensor, options: ScoreOptions) -> str | None:
        if not eager(query, key, value, *options.learned):
            return "its decode kernel is no registered operator, as a graph or a mode needs it"
        if query.dtype not in ELEMENTS or not query.dtype == key.dtype == value.dtype:
            given = query.dtype, key.dtype, value.dtype
            return f"its decode kernel takes query, key and value in one of {list(ELEMENTS)}, not in {given}"
        if options.extra_tokens:
            return "its decode kernel knows no extra tokens"
        return super().cannot_decode(query, key, value, options)

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

    def decode(self, query: Tensor, key: Tensor, value: Tensor, index: Tensor, options: ScoreOptions) -> Tensor:
        return decode_listed(query, key, value, index, options)

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
    """Parts are merged as they are computed, when all of them are known: a single one writes the query's own dtype."""

    def __init__(self, engine: Engine, query: Tensor, start: tuple[Tensor, Tensor] | None) -> None:
        super().__init__(engine, query, start)
        self.parts: list[Part] = []

    def attend(self, part: Part, query: Tensor, key: Tensor, value: Tensor, options: ScoreOptions) -> None:
        self.parts.append(simplest(part))
        self.inputs = query, key, value, options

    def result(self) -> tuple[Tensor, Tensor]:
        if self.parts:
            keep_freed_memory()
            self.merged = forward_all(self.parts, Rows.of(*self.inputs), self.merged)
            self.parts = []
        return super().result()


class InPlaceTotal(Total):
    """Gradients add up where they lie, when all parts are known."""

    def __init__(self, engine: Engine, query: Tensor, key: Tensor, value: Tensor, options: ScoreOptions) -> None:
        super().__init__(engine, query, key, value, options)
        self.parts: list[Part] = []

    def attend(
        self, part: Part, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor, grad_out: Tensor
    ) -> None:
        self.parts.append(simplest(part))
        self.inputs = query, key, value, self.options
        self.results = out, lse, grad_out

    def gradients(self) -> Gradients:
        if self.parts:
            self.add_whole(backward_all(self.parts, Rows.of(*self.inputs), *self.results))
            self.parts = []
        return super().gradients()
