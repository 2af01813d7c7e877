"""Run the parts of a plan over equal sequences: gather each part's slots, call the engine, merge; and back. An engine
that works in place does all of that itself."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from sa_hf.ops.engine import Engine, Gradients
from sa_hf.ops.parts import Index, OffsetsPart, Part, ScoreOptions
from sa_hf.ops.pieces import Piece, pieces
from sa_hf.ops.slots import add_slots, merge_into, take


def plan_forward(
    plan: Sequence[Part], query: Tensor, key: Tensor, value: Tensor, options: ScoreOptions, engine: Engine,
    merged: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """All parts of a plan over equal sequences, merged. Shapes as in ``Engine.forward``, in positions.

    Args: merged: what came before the plan, contiguous, in fp32 or wider; written to.
    """
    merging_of, _ = sums_by(engine, query)
    merging = merging_of(query, merged)
    for part in plan:
        merging.attend(part, query, key, value, options, engine)
    return merging.result()


def plan_backward(
    plan: Sequence[Part], query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor, grad_out: Tensor,
    options: ScoreOptions, engine: Engine,
) -> Gradients:  # fmt: skip
    """Gradients of :func:`plan_forward` for all of a plan's parts, summed."""
    _, total_of = sums_by(engine, query)
    total = total_of(query, key, value, options)
    for part in plan:
        total.attend(part, query, key, value, out, lse, grad_out, engine)
    return total.gradients()


def piece_forward(
    piece: Piece, query: Tensor, key: Tensor, value: Tensor, options: ScoreOptions, engine: Engine
) -> tuple[Tensor, Tensor]:
    """A piece's output and log-sum-exp in its slots; the tensors are those of the whole call."""
    q, k, v = in_slots(piece, engine, query, key, value)
    return engine.forward(piece.part, q, k, v, piece.options(options, *query.shape[:2]))


def piece_backward(
    piece: Piece, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor, grad_out: Tensor,
    options: ScoreOptions, engine: Engine,
) -> Gradients:  # fmt: skip
    """A piece's gradients in its slots; ``out``, ``lse`` and ``grad_out`` stand in them already."""
    q, k, v = in_slots(piece, engine, query, key, value)
    return engine.backward(piece.part, q, k, v, out, lse, grad_out, piece.options(options, *query.shape[:2]))


def in_slots(
    piece: Piece, engine: Engine, query: Tensor, key: Tensor, value: Tensor, *rows: Tensor
) -> tuple[Tensor, ...]:
    """The arguments in a piece's slots: query, key, value and then ``rows``, which are nothing, or output, its gradient
    and log-sum-exp of the queries."""
    index = piece.part.query_index
    if engine.own_rows:
        from sa_hf.ops.triton.launch_rows import gather

        return gather(piece.part, query, key, value, *rows)
    k, v = (take(piece.keys(x), piece.part.key_index) for x in (key, value))
    q = take(piece.queries(query), index)
    if not rows:
        return q, k, v
    *vectors, lse = (piece.queries(x) for x in rows)
    return q, k, v, *(take(x, index) for x in vectors), take(lse.unsqueeze(-1), index).squeeze(-1)


def sums_by(engine: Engine, query: Tensor) -> tuple[type[Merging], type[Total]]:
    """How the results and the gradients of an engine's parts come together."""
    if engine.own_rows:
        from sa_hf.ops.triton.sums import KernelMerging, KernelTotal

        return KernelMerging, KernelTotal
    if engine.in_place(query):
        from sa_hf.ops.native.sums import InPlaceMerging, InPlaceTotal

        return InPlaceMerging, InPlaceTotal
    return Merging, Total


def engine_pieces(part: Part, query: Tensor, key: Tensor, engine: Engine) -> Iterator[Piece]:
    """The pieces that an engine runs one by one: its own row kernels take a part at once."""
    return iter([Piece.of_all(part)]) if engine.own_rows else pieces(part, query, key)


class Merging:
    """The running result of parts."""

    def __init__(self, query: Tensor, start: tuple[Tensor, Tensor] | None) -> None:
        self.query = query
        self.merged = start
        # Merged in fp32 whatever the inputs: rounding the running result once per part would add up. A result that is
        # not merged stays as it came: a copy in fp32 and back takes as long as a sparse kernel.
        self.stats = torch.promote_types(query.dtype, torch.float32)

    def attend(
        self, part: Part, query: Tensor, key: Tensor, value: Tensor, options: ScoreOptions, engine: Engine
    ) -> None:
        """Run a part and merge its result. Shapes as in ``Engine.forward``, in positions."""
        for piece in engine_pieces(part, query, key, engine):
            self.add(piece, *piece_forward(piece, query, key, value, options, engine))

    def add(self, piece: Piece, out: Tensor, lse: Tensor) -> None:
        """Merge a piece's result in its slots."""
        query, stats, merged, index = self.query, self.stats, self.merged, piece.part.query_index
        if merged is None and piece.whole and index is None:
            self.merged = out, lse
            return
        if merged is None:
            merged = query.new_zeros(query.shape, dtype=stats), lse.new_full(query.shape[:3], -torch.inf)
        merged = self.merged = merged[0].to(stats).contiguous(), merged[1].contiguous()
        running_out, running_lse = (piece.queries(x) for x in merged)
        merge_into(running_out, running_lse, out.to(stats), lse, index)

    def result(self) -> tuple[Tensor, Tensor]:
        if self.merged is None:
            query = self.query
            lse = torch.full(query.shape[:3], -torch.inf, dtype=self.stats, device=query.device)
            return torch.zeros_like(query), lse
        return self.merged[0].to(self.query.dtype), self.merged[1]


class Total:
    """The running sum of the gradients of parts, in fp32 where there are several."""

    def __init__(self, query: Tensor, key: Tensor, value: Tensor, options: ScoreOptions) -> None:
        self.like = (query, key, value)
        self.options = options
        self.sums: list[Tensor | None] = [None, None, None]
        self.bias: Tensor | None = None
        self.spans: Tensor | None = None

    def attend(
        self, part: Part, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor, grad_out: Tensor,
        engine: Engine,
    ) -> None:  # fmt: skip
        """Run a part's backward and add its gradients. Shapes as in ``Engine.backward``, in positions."""
        for piece in engine_pieces(part, query, key, engine):
            q, k, v, o, g, row_lse = in_slots(piece, engine, query, key, value, out, grad_out, lse)
            options = piece.options(self.options, *query.shape[:2])
            self.add(engine.backward(piece.part, q, k, v, o, row_lse, g, options), piece)

    def add_whole(self, grads: Gradients) -> None:
        """Add gradients of all rows and heads, in positions."""
        self.add(grads, Piece.of_all(OffsetsPart(0, ((),))))

    def add(self, grads: Gradients, piece: Piece, *, repeated: bool = False) -> None:
        """Add a piece's gradients; ``repeated``: a position may stand in several of its slots."""
        indices = (piece.part.query_index, piece.part.key_index, piece.part.key_index)
        for at, (grad, index) in enumerate(zip((grads.query, grads.key, grads.value), indices, strict=True)):
            self.add_rows(at, grad, index, piece, repeated=repeated)
        if grads.distance_bias is not None and self.options.distance_bias is not None:
            self.bias = torch.zeros_like(self.options.distance_bias) if self.bias is None else self.bias
            self.bias[piece.heads] += grads.distance_bias
        if grads.spans is not None and self.options.spans is not None:
            self.spans = torch.zeros_like(self.options.spans) if self.spans is None else self.spans
            piece.shared(self.spans).add_(grads.spans)

    def add_rows(self, at: int, grad: Tensor, index: Index, piece: Piece, *, repeated: bool) -> None:
        """Add to the gradient of the query (at 0), the key or the value."""
        like, known = self.like[at], self.sums[at]
        stats = torch.promote_types(like.dtype, torch.float32)
        if known is None and index is None and grad.shape == like.shape:
            self.sums[at] = grad
            return
        if known is None:
            known = torch.zeros(like.shape, dtype=stats, device=like.device)
        known = self.sums[at] = known.to(stats).contiguous()
        add_slots(piece.queries(known) if at == 0 else piece.keys(known), grad, index, repeated=repeated)

    def sum_of(self, at: int) -> Tensor:
        like, known = self.like[at], self.sums[at]
        return torch.zeros_like(like) if known is None else known.to(like.dtype)

    def gradients(self) -> Gradients:
        query, key, value = (self.sum_of(at) for at in range(3))
        bias, spans = (
            torch.zeros_like(source) if known is None and source is not None else known
            for known, source in ((self.bias, self.options.distance_bias), (self.spans, self.options.spans))
        )
        return Gradients(query, key, value, bias, spans)
