"""Where the sequences lie in a padded or packed batch: one form for padding, packing and decoding."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from sa_hf.errors import SparseAttentionError
from sa_hf.ops.transforms import MAPPED, is_mapped, transformed


class Span(NamedTuple):
    """One sequence: the batch row it lies in, and its runs of queries and of keys in that row.

    The queries are the last ``query_length`` positions of the sequence; ``key_length`` is its whole length.
    """

    row: int
    query_start: int
    query_length: int
    key_start: int
    key_length: int


@dataclass(frozen=True, eq=False)
class Sequences:
    """The sequences of a batch ``query [B, H, Nq, D]``, ``key/value [B, Hkv, Nk, D]``.

    ``spans`` are host integers: layouts depend on them, and the one device read that they cost is shared by the
    layers of a forward. ``key_gather`` / ``query_gather`` (``[B, N]`` int64 or None) say how to bring the real
    tokens of each row together first, where a mask has zeros between real tokens. ``extra_tokens`` learned tokens
    stand in the first slots of every row and belong to its one sequence; spans and lengths do not count them.
    """

    batch_size: int
    query_length: int
    key_length: int
    spans: tuple[Span, ...]
    query_gather: Tensor | None = None
    key_gather: Tensor | None = None
    extra_tokens: int = 0

    @classmethod
    def full(cls, batch_size: int, query_length: int, key_length: int) -> Sequences:
        """Every row is one sequence without padding."""
        if query_length > key_length:
            raise SparseAttentionError(
                f"query_length={query_length} is above key_length={key_length}; "
                "the queries are the last positions of the keys"
            )
        spans = tuple(Span(b, 0, query_length, 0, key_length) for b in range(batch_size))
        return cls(batch_size, query_length, key_length, spans)

    @classmethod
    def from_mask(
        cls, batch_size: int, query_length: int, key_length: int, attention_mask: Tensor | None = None,
        sequence_ids: Tensor | None = None,
    ) -> Sequences:  # fmt: skip
        """Read ``attention_mask [B, key_length]`` (1 real, 0 padding) and ``sequence_ids [B, key_length]``.

        Padding may stand on either side or inside: padded tokens are as if cut out. Equal neighbouring ids (after
        the cut) are one sequence. Queries are the last ``query_length`` slots of each row.

        Raises:
            SparseAttentionError: a mask of another shape, values other than 0 and 1, or what vmap maps.
        """
        whole = cls.full(batch_size, query_length, key_length)
        if attention_mask is None and sequence_ids is None:
            return whole
        for label, tensor in (("attention_mask", attention_mask), ("sequence_ids", sequence_ids)):
            if tensor is not None and transformed() and is_mapped(tensor):
                raise SparseAttentionError(f"{label} {MAPPED}")
            if tensor is not None and tuple(tensor.shape) != (batch_size, key_length):
                raise SparseAttentionError(
                    f"{label} has shape {tuple(tensor.shape)}; it must be [batch, key_length] = "
                    f"[{batch_size}, {key_length}]"
                )
        keep = torch.ones(batch_size, key_length, dtype=torch.bool)
        if attention_mask is not None:
            host = attention_mask.detach().cpu()
            if not bool(((host == 0) | (host == 1)).all()):
                raise SparseAttentionError(
                    "attention_mask must hold 1 (real) and 0 (padding) only; an additive or soft mask has no place here"
                )
            keep = host.bool()
        ids = None if sequence_ids is None else sequence_ids.detach().cpu()
        if ids is None and bool(keep.all()):
            return whole
        return _from_host(whole, keep, ids, (attention_mask if attention_mask is not None else sequence_ids).device)  # type: ignore[union-attr]

    @property
    def is_full(self) -> bool:
        """Whether every row is one whole sequence, so that tensors need no slicing."""
        start = self.extra_tokens
        return (
            self.query_gather is None
            and len(self.spans) == self.batch_size
            and all(
                s == Span(b, start, self.query_length - start, start, self.key_length - start)
                for b, s in enumerate(self.spans)
            )
        )

    @property
    def groups(self) -> tuple[tuple[tuple[int, int], tuple[int, ...]], ...]:
        """Sequences of equal shape together: ``(((query_length, key_length), indices into spans), ...)``."""
        # Python 3.11 locks a cached property, and torch.compile cannot trace a lock.
        return self._grouped() if torch.compiler.is_compiling() else self._known_groups

    @cached_property
    def _known_groups(self) -> tuple[tuple[tuple[int, int], tuple[int, ...]], ...]:
        return self._grouped()

    def _grouped(self) -> tuple[tuple[tuple[int, int], tuple[int, ...]], ...]:
        found: dict[tuple[int, int], list[int]] = {}
        for index, span in enumerate(self.spans):
            if span.query_length > 0:
                found.setdefault((span.query_length, span.key_length), []).append(index)
        return tuple((shape, tuple(indices)) for shape, indices in sorted(found.items()))

    @property
    def first(self) -> Span:
        """Of a full batch, the sequence that all others are like."""
        return self.spans[0]

    @property
    def shapes(self) -> tuple[tuple[int, int, int], ...]:
        """``(sequences, query_length, key_length)`` of each group of equal ones."""
        return tuple((len(indices), *shape) for shape, indices in self.groups)

    def with_extra_tokens(self, extra: int) -> Sequences:
        """The same sequences with ``extra`` learned tokens in front of every row.

        Raises:
            SparseAttentionError: a row holds several packed sequences, which could not share the tokens.
        """
        if extra == 0:
            return self
        rows = [s.row for s in self.spans]
        if len(set(rows)) != len(rows):
            raise SparseAttentionError(
                f"a pattern with {extra} extra tokens takes one sequence per row, not packed ones; "
                "pad the batch instead"
            )
        spans = tuple(
            Span(s.row, s.query_start + extra, s.query_length, s.key_start + extra, s.key_length) for s in self.spans
        )

        def moved(gather: Tensor | None) -> Tensor | None:
            if gather is None:
                return None
            front = torch.arange(extra, device=gather.device).expand(gather.shape[0], -1)
            return torch.cat([front, gather + extra], dim=1)

        return Sequences(
            self.batch_size, self.query_length + extra, self.key_length + extra, spans,
            moved(self.query_gather), moved(self.key_gather), extra,
        )  # fmt: skip


@dataclass(frozen=True, eq=False)
class PendingSequences:
    """Sequences whose masks cannot be read yet: torch.compile traces with them, the operator reads them when it runs.

    ``attention_mask`` and ``sequence_ids`` are those of :meth:`Sequences.from_mask`, over the real tokens.
    """

    batch_size: int
    query_length: int
    key_length: int
    attention_mask: Tensor | None
    sequence_ids: Tensor | None
    extra_tokens: int = 0
    query_gather: None = None
    key_gather: None = None
    is_full: bool = False

    @property
    def spans(self) -> tuple[Span, ...]:
        raise SparseAttentionError(
            "a pattern with learned state or convolutions does not trace with an attention_mask or packed sequences: "
            "compile or export it on whole rows, leave this model uncompiled, or export the dense model inside "
            "`with sa_hf.dense(model)`"
        )

    groups = shapes = spans


LENGTH_OPEN = (
    "torch.export leaves the length (or batch) open, and what this pattern does for one cannot be traced for all; "
    "nearest: export one shape (no dynamic_shapes), a static pattern or a mask frozen by sa_hf.freeze_masks(model), or "
    "the dense model inside `with sa_hf.dense(model)`"
)


@dataclass(frozen=True, eq=False)
class WholeRows:
    """Every row as one sequence, of a batch and lengths that torch.export may leave open: the operator reads them from
    its tensors when it runs. Sizes count the ``extra_tokens``."""

    batch_size: int
    query_length: int
    key_length: int
    extra_tokens: int = 0
    query_gather: None = None
    key_gather: None = None
    is_full: bool = True

    @property
    def first(self) -> Span:
        start = self.extra_tokens
        return Span(0, start, self.query_length - start, start, self.key_length - start)

    @property
    def is_open(self) -> bool:
        return any(isinstance(size, torch.SymInt) for size in (self.batch_size, self.query_length, self.key_length))

    @property
    def shapes(self) -> tuple[tuple[int, int, int], ...]:
        return ((self.batch_size, *self.first[2::2]),)

    @property
    def spans(self) -> tuple[Span, ...]:
        return self._closed().spans

    @property
    def groups(self) -> tuple[tuple[tuple[int, int], tuple[int, ...]], ...]:
        return self._closed().groups

    def _closed(self) -> Sequences:
        if self.is_open:
            raise SparseAttentionError(LENGTH_OPEN)
        extra = self.extra_tokens
        rows = Sequences.full(self.batch_size, self.query_length - extra, self.key_length - extra)
        return rows.with_extra_tokens(extra)


def refuse_open_length(sequences: Sequences | WholeRows) -> None:
    """Raise where the length is open."""
    if isinstance(sequences.key_length, torch.SymInt):
        raise SparseAttentionError(LENGTH_OPEN)


def whole_rows(batch_size: int, query_length: int, key_length: int, extra_tokens: int = 0) -> Sequences | WholeRows:
    """Every row as one sequence, ``extra_tokens`` in front of it."""
    if torch.compiler.is_exporting():
        return WholeRows(batch_size, query_length + extra_tokens, key_length + extra_tokens, extra_tokens)
    return Sequences.full(batch_size, query_length, key_length).with_extra_tokens(extra_tokens)


def _from_host(whole: Sequences, keep: Tensor, ids: Tensor | None, device: torch.device) -> Sequences:
    """Spans (and gather indices where real tokens are not contiguous) from host masks."""
    batch_size, key_length = keep.shape
    query_offset = key_length - whole.query_length
    kept_queries = keep[:, query_offset:]
    counts, query_counts = keep.sum(1), kept_queries.sum(1)
    first = keep.int().argmax(1)
    positions = torch.arange(key_length)
    contiguous = ((positions >= first[:, None]) & (positions < (first + counts)[:, None])) == keep
    gather_needed = not bool(contiguous.all())
    key_gather = query_gather = None
    if gather_needed:
        # A stable sort brings the kept slots to the front of each row, in order.
        key_gather = torch.sort((~keep).to(torch.uint8), dim=1, stable=True).indices.to(device)
        query_gather = torch.sort((~kept_queries).to(torch.uint8), dim=1, stable=True).indices.to(device)
    spans: list[Span] = []
    for row in range(batch_size):
        count, query_count = int(counts[row]), int(query_counts[row])
        if count == 0:
            continue
        key_start = 0 if gather_needed else int(first[row])
        query_start = 0 if gather_needed else max(key_start - query_offset, 0)
        cuts = [0, count]
        if ids is not None:
            row_ids = ids[row][keep[row]]
            cuts = [0, *(torch.nonzero(row_ids[1:] != row_ids[:-1]).flatten() + 1).tolist(), count]
        first_query = count - query_count  # index, among the row's real tokens, of its first query
        for begin, end in itertools.pairwise(cuts):
            queries = max(0, end - max(begin, first_query))
            offset = max(begin, first_query) - first_query
            spans.append(Span(row, query_start + offset, queries, key_start + begin, end - begin))
    return Sequences(batch_size, whole.query_length, key_length, tuple(spans), query_gather, key_gather)
