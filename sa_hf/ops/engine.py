"""What an engine is, and how the results and the gradients of a plan's parts come together. Engines stand above this
module, know no other engine, and are chosen by ``ops.choice``."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from sa_hf.ops.parts import Index, OffsetsPart, Part, ScoreOptions
from sa_hf.ops.pieces import Piece, pieces
from sa_hf.ops.slots import add_slots, merge_into, take
from sa_hf.ops.transforms import needs_derivative

# What each engine's decoding says of ``ScoreOptions.terms``; a call with them is run as a plan (``patterns.steps``).
NO_TERMS = "its decode kernel has no terms of each query or key with the distance"


@dataclass(frozen=True, eq=False)
class Gradients:
    """Gradients of one part, in the shapes of its inputs; None where the input was None. Those of terms are of their
    values."""

    query: Tensor
    key: Tensor
    value: Tensor
    distance_bias: Tensor | None = None
    spans: Tensor | None = None
    sinks: Tensor | None = None
    query_term: Tensor | None = None
    key_term: Tensor | None = None


class Engine(ABC):
    """Runs one part. Inputs are already in the part's slot order: query ``[G, H, query_slots, D]``, key and value
    ``[G, Hkv | H, key_slots, D]``; ``part.query_index`` and ``part.key_index`` are there for positions alone
    (distance bias and terms, spans, dropout), and for the empty slots (-1) of a tensor index: those keys, which must be
    finite, are left out and those rows are 0 with log-sum-exp -inf.
    """

    name: ClassVar[str]

    @abstractmethod
    def unsupported(self, query: Tensor, options: ScoreOptions) -> str | None:
        """Why this engine cannot serve the input, or None. The one predicate: dispatch, the errors, ``sa-hf doctor``
        and the tests' skips ask it."""

    def cannot_decode(self, query: Tensor, key: Tensor, value: Tensor, options: ScoreOptions) -> str | None:
        """Why :meth:`decode` cannot take a step, or None: :meth:`unsupported` with what a kernel for decoding lacks."""
        if options.terms != (None, None):
            return NO_TERMS
        lacking = needs_derivative(query, key, value, *options.learned)
        return self.unsupported(query, options) if lacking is None else f"its decode kernel {lacking}"

    @abstractmethod
    def forward(
        self, part: Part, query: Tensor, key: Tensor, value: Tensor, options: ScoreOptions
    ) -> tuple[Tensor, Tensor]:
        """Returns output ``[G, H, query_slots, D]`` in the query's dtype, log-sum-exp ``[G, H, query_slots]`` fp32
        (fp64 for fp64 inputs); empty rows are 0 and -inf."""

    @abstractmethod
    def backward(
        self, part: Part, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor, grad_out: Tensor,
        options: ScoreOptions,
    ) -> Gradients:  # fmt: skip
        """Gradients through this part of a plan. ``out`` and ``lse`` are those of the whole plan (its parts merged):
        with ``p = exp(s - lse)`` and ``delta = sum(out * grad_out)`` the flash backward of each part is exact and
        the mixing weights between the parts get their gradient."""

    @abstractmethod
    def decode(self, query: Tensor, key: Tensor, value: Tensor, index: Tensor, options: ScoreOptions) -> Tensor:
        """As ``ops.decode.decode_attention``, its arguments checked."""

    # -- between positions and slots: an engine with kernels for these overrides them ------------------------------

    def pieces(self, part: Part, query: Tensor, key: Tensor) -> Iterator[Piece]:
        """The pieces of a part that are run one by one."""
        return pieces(part, query, key)

    def gather(self, piece: Piece, query: Tensor, key: Tensor, value: Tensor, *rows: Tensor) -> tuple[Tensor, ...]:
        """The arguments in a piece's slots: query, key, value and then ``rows``, which are nothing, or output, its
        gradient and log-sum-exp of the queries."""
        index = piece.part.query_index
        k, v = (take(piece.keys(x), piece.part.key_index) for x in (key, value))
        q = take(piece.queries(query), index)
        if not rows:
            return q, k, v
        *vectors, lse = (piece.queries(x) for x in rows)
        return q, k, v, *(take(x, index) for x in vectors), take(lse.unsqueeze(-1), index).squeeze(-1)

    def merging(self, query: Tensor, start: tuple[Tensor, Tensor] | None) -> Merging:
        """What merges the parts' results; ``start`` came before them (contiguous, fp32 or wider; written to)."""
        return Merging(self, query, start)

    def total(self, query: Tensor, key: Tensor, value: Tensor, options: ScoreOptions) -> Total:
        """What adds up the parts' gradients."""
        return Total(self, query, key, value, options)


class Merging:
    """The running result of parts."""

    def __init__(self, engine: Engine, query: Tensor, start: tuple[Tensor, Tensor] | None) -> None:
        self.engine = engine
        self.query = query
        self.merged = start
        # Merged in fp32 whatever the inputs: rounding the running result once per part would add up. A result that is
        # not merged stays as it came: a copy in fp32 and back takes as long as a sparse kernel.
        self.stats = torch.promote_types(query.dtype, torch.float32)

    def attend(self, part: Part, query: Tensor, key: Tensor, value: Tensor, options: ScoreOptions) -> None:
        """Run a part and merge its result. Shapes as in ``Engine.forward``, in positions."""
        for piece in self.engine.pieces(part, query, key):
            q, k, v = self.engine.gather(piece, query, key, value)
            self.add(piece, *self.engine.forward(piece.part, q, k, v, piece.options(options, *query.shape[:2])))

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

    def __init__(self, engine: Engine, query: Tensor, key: Tensor, value: Tensor, options: ScoreOptions) -> None:
        self.engine = engine
        self.like = (query, key, value)
        self.options = options
        self.sums: list[Tensor | None] = [None, None, None]
        self.bias: Tensor | None = None
        self.spans: Tensor | None = None
        self.terms: list[Tensor | None] = [None, None]

    def attend(
        self, part: Part, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor, grad_out: Tensor
    ) -> None:
        """Run a part's backward and add its gradients. Shapes as in ``Engine.backward``, in positions."""
        for piece in self.engine.pieces(part, query, key):
            q, k, v, o, g, row_lse = self.engine.gather(piece, query, key, value, out, grad_out, lse)
            options = piece.options(self.options, *query.shape[:2])
            self.add(self.engine.backward(piece.part, q, k, v, o, row_lse, g, options), piece)

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
        for at, (found, term) in enumerate(zip((grads.query_term, grads.key_term), self.options.terms, strict=True)):
            if found is not None and term is not None:
                total = self.terms[at]
                if total is None:
                    total = self.terms[at] = torch.zeros_like(term.values)
                piece.queries(total).add_(found)

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
        terms = (
            torch.zeros_like(term.values) if known is None and term is not None else known
            for known, term in zip(self.terms, self.options.terms, strict=True)
        )
        return Gradients(query, key, value, bias, spans, None, *terms)
