"""The lanes of a call, ``batch * heads``, and the positions behind its slots: what its options are evaluated at."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from sa_hf.ops.parts import DistanceTerm, Index, ScoreOptions
from sa_hf.ops.random import counter_words, dropout_words


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

    def lists(self, lanes: Tensor, batch: int, heads: int) -> Tensor:
        """What lanes ``[T]`` read among ``batch * heads`` lists; a size of 1 is shared by all."""
        row = lanes // self.heads if batch > 1 else torch.zeros_like(lanes)
        return row * heads + lanes % self.heads if heads > 1 else row


@dataclass(frozen=True, eq=False)
class Slots:
    """The positions of one side's slots; -1 for an empty one."""

    start: int
    table: Tensor | None

    @classmethod
    def of(cls, index: Index, lanes: Lanes, offset: int) -> Slots:
        if isinstance(index, Tensor):
            table = index.expand(lanes.batch, lanes.heads, -1).reshape(lanes.count, -1)
            return cls(0, torch.where(table >= 0, table + offset, -1))
        return cls(offset + (0 if index is None else index.start), None)

    def positions(self, lanes: Tensor, slots: Tensor) -> Tensor:
        """Positions int64 ``[T | 1, s]`` of slots ``[T | 1, s]`` in lanes ``[T]``; slots past the end give -1."""
        if self.table is None:
            return slots + self.start
        past = slots >= self.table.shape[1]
        found = self.table[lanes[:, None], slots.clamp(max=self.table.shape[1] - 1)]
        return torch.where(past, -1, found)


@dataclass(frozen=True, eq=False)
class Places:
    """The options of a call with the positions behind a part's slots."""

    options: ScoreOptions
    lanes: Lanes
    query_at: Slots
    key_at: Slots

    @classmethod
    def of(cls, options: ScoreOptions, lanes: Lanes, query_index: Index, key_index: Index) -> Places:
        query_at = Slots.of(query_index, lanes, options.query_offset)
        return cls(options, lanes, query_at, Slots.of(key_index, lanes, 0))

    def dropout_words(self, lanes: Tensor, positions: Tensor, stream: int) -> Tensor:
        """The words of the dropout counter (``ops.random``) at ``positions [T | 1, s]`` in lanes ``[T]``, int32
        ``[T, s]``: of query rows (stream 0) or key columns (stream 1)."""
        options = self.options
        if options.seed is None:
            raise ValueError("dropout > 0 needs ScoreOptions.seed")
        batch, heads = lanes // self.lanes.heads, lanes % self.lanes.heads
        sequence = batch if options.sequence_ids is None else options.sequence_ids[batch]
        if options.heads is not None:
            heads = counter_words(tuple(options.heads), heads.device)[heads]
        return dropout_words(options.seed, sequence[:, None], heads[:, None], positions, stream=stream)

    def span_at(self, lanes: Tensor, positions: Tensor) -> Tensor:
        """Where the spans of key ``positions [T | 1, s]`` in lanes ``[T]`` lie in the flat spans, int64 ``[T, s]``."""
        if self.options.spans is None:
            raise RuntimeError("no spans")
        _, heads, length = self.options.spans.shape
        row = lanes // self.lanes.heads * heads
        row = row + lanes % self.lanes.heads if heads > 1 else row
        return row[:, None] * length + positions.clamp(0, length - 1)

    def term_at(self, term: DistanceTerm, lanes: Tensor, i: Tensor, j: Tensor) -> Tensor:
        """Where the values of a term lie for pairs of positions ``i [T | 1, a, 1]``, ``j [T | 1, 1, m]`` in lanes
        ``[T]``, int64 ``[T, a, m]`` into its flat values; -1 for pairs without it."""
        options, (length, width) = self.options, term.values.shape[2:]
        own = i - options.query_offset if term is options.query_term else j
        at = (lanes[:, None, None] * length + own.clamp(0, length - 1)) * width + term.bucket(j - i)
        real = (i >= options.extra_tokens) & (j >= options.extra_tokens) & (own < length)
        return torch.where(real, at, -1)
