"""Parts: what an engine can run. A pattern's plan is a list of parts whose multiset union is the pattern.

Every part attends a rectangle of query slots x key slots, in natural or in gathered order, and gives an output and
a log-sum-exp per query slot. The parts of a plan are merged by log-sum-exp; a key in two parts counts twice.

Slots and positions: ``query_index`` / ``key_index`` map the slots of a part to positions of the sequence: ``None``
is the identity, a ``slice`` a contiguous run, an int64 tensor ``[B | 1, H | 1, slots]`` any order, where -1 is an
empty slot. H counts query heads for both indices: under grouped-query attention the heads of a group may read
different keys.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

Index: TypeAlias = "slice | Tensor | None"

FULL = -1  # every pair of the tile is kept
BAND = -2  # the tile crosses the band, the key range or the end of the slots: test those per element


class Band(NamedTuple):
    """The pairs with ``query - key <= left`` and ``key - query <= right`` in positions; None is unbounded.

    Causal attention is ``right=0``; a causal window of w (own position counted) is ``Band(w - 1, 0)``.
    A named tuple, since torch.compile traces those and not frozen dataclasses built as defaults.
    """

    left: int | None = None
    right: int | None = None

    def contains(self, query: Tensor, key: Tensor) -> Tensor:
        """Bool tensor of the broadcast shape of two integer position tensors."""
        distance = query - key
        kept = torch.ones_like(distance, dtype=torch.bool)
        if self.left is not None:
            kept = kept & (distance <= self.left)
        if self.right is not None:
            kept = kept & (distance >= -self.right)
        return kept

    def intersect(self, other: Band) -> Band:
        return Band(_tighter(self.left, other.left), _tighter(self.right, other.right))

    def causal_if(self, causal: bool) -> Band:
        """The same, without later keys where causal."""
        return self.intersect(Band(None, 0)) if causal else self

    def moved(self, by: int) -> Band:
        """The same by the numbers of queries that begin at position ``by``; keys keep theirs."""
        left, right = self
        return Band(None if left is None else left - by, None if right is None else right + by)

    @property
    def unbounded(self) -> bool:
        return self.left is None and self.right is None


UNBOUNDED = Band()


def _tighter(a: int | None, b: int | None) -> int | None:
    return b if a is None else a if b is None else min(a, b)


@dataclass(frozen=True, eq=False)
class BlockLayout:
    """Lists of key tiles per query tile, for ``query_slots x key_slots`` cut into ``block_q x block_k`` tiles.

    Row ``r = (batch * H_l + head) * num_query_blocks + query_block`` reads the tiles ``columns[row_start[r] :
    row_start[r + 1]]`` in ascending order. ``kind`` of an entry: ``FULL``, ``BAND``, or the number ``p >= 0`` of its
    element mask ``masks[p]``; an element mask already holds the band and all else, the key range excepted.

    Shapes: row_start int64 ``[B_l * H_l * num_query_blocks + 1]``, columns and kind int32 ``[entries]``, masks bool
    ``[P, block_q, block_k]``, key_range int32 ``[B_l, H_l, query_slots, 2]`` (the key slots ``lo <= slot < hi`` of
    each query slot) or None. ``B_l`` and ``H_l`` are 1 where the lists are shared. The band is in slots.

    ``longest`` is given where the device alone knows how long the lists are, so that nothing waits for it: no row and
    no column of tiles has more entries, and ``columns`` and ``kind`` may have room behind the last entry.
    """

    query_slots: int
    key_slots: int
    block_q: int
    block_k: int
    batch: int
    heads: int
    row_start: Tensor
    columns: Tensor
    kind: Tensor
    masks: Tensor
    band: Band = UNBOUNDED
    key_range: Tensor | None = None
    longest: int | None = None

    @property
    def num_query_blocks(self) -> int:
        return -(-self.query_slots // self.block_q)

    @property
    def num_key_blocks(self) -> int:
        return -(-self.key_slots // self.block_k)

    @cached_property
    def row_count(self) -> Tensor:
        """Number of listed tiles per row, int64 ``[B_l, H_l, num_query_blocks]``."""
        return (self.row_start[1:] - self.row_start[:-1]).view(self.batch, self.heads, self.num_query_blocks)


@dataclass(frozen=True, eq=False)
class BlockPart:
    """Block-sparse attention over the tiles of a layout."""

    layout: BlockLayout
    query_index: Index = None
    key_index: Index = None


@dataclass(frozen=True, eq=False)
class SegmentPart:
    """Dense attention inside aligned segments: query slots ``[s * query_segment, (s + 1) * query_segment)`` attend
    key slots ``[s * key_segment, (s + 1) * key_segment)``.

    ``band`` is in slots relative to the segment starts (its queries and keys both count from 0);
    ``skip_diagonal`` drops the pair of equal slots. The last segment may be short.
    """

    query_slots: int
    key_slots: int
    query_segment: int
    key_segment: int
    band: Band = UNBOUNDED
    skip_diagonal: bool = False
    query_index: Index = None
    key_index: Index = None


@dataclass(frozen=True, eq=False)
class OffsetsPart:
    """Each query ``i`` attends ``i - d`` for the offsets ``d`` of its head, where ``begin <= i - d < end``.

    ``offsets``: one tuple for all heads, or one per query head; negative offsets look ahead. Queries outside
    ``[begin, end)`` attend nothing.
    """

    length: int
    offsets: tuple[tuple[int, ...], ...]
    begin: int = 0
    end: int | None = None
    query_index: Index = None
    key_index: Index = None

    @property
    def stop(self) -> int:
        return self.length if self.end is None else self.end


Part: TypeAlias = BlockPart | SegmentPart | OffsetsPart


@dataclass(frozen=True, eq=False)
class DistanceTerm:
    """What one side of a pair adds to its score by the distance to the other: ``values[b, h, p, buckets[j - i]]``, of
    its position p (that of the query i, or that of the key j).

    Args:
        values: ``[B, H, N, R]``, a row for each query or key and query head.
        buckets: int64 ``[2 * L - 1]``, below R: that of distance ``j - i`` in column ``j - i + L - 1``; distances
            beyond the ends have those of the ends.
    """

    values: Tensor
    buckets: Tensor

    def bucket(self, distance: Tensor) -> Tensor:
        """The buckets of distances ``j - i``, int64."""
        centre = self.buckets.shape[0] // 2
        return self.buckets[distance.clamp(-centre, centre) + centre]

    def of_pairs(self, own: Tensor, distance: Tensor) -> Tensor:
        """The term ``[B, H, Nq, Nk]`` of all pairs: for references and for layers that stay dense.

        Args: own: the row of values of each pair, ``distance`` its ``j - i``: int64, broadcastable to ``[Nq, Nk]``.
        """
        return self.values[:, :, own.expand(distance.shape), self.bucket(distance)]

    def of_rows(self, change: Callable[[Tensor], Tensor]) -> DistanceTerm:
        """The same of other rows (some heads, some sequences)."""
        return replace(self, values=change(self.values))

    @staticmethod
    def of_heads(term: DistanceTerm | None, heads: list[int] | slice) -> DistanceTerm | None:
        """A term, where there is one, for some of the query heads."""
        return None if term is None else term.of_rows(lambda x: x[:, heads])


@dataclass(frozen=True, eq=False)
class ScoreOptions:
    """What happens to a score between the product and the softmax, the same for every part of a plan.

    Args:
        scale: factor of the query-key product.
        softcap: ``s -> softcap * tanh(s / softcap)``, or None.
        distance_bias: ``[H, 2 * N - 1]``, added to the score of ``(i, j)`` at column ``j - i + N - 1`` (T5); or None.
        spans: ``[B, H | 1, Nk]`` fp32, the expire-span ``e_j`` of each key position; the probability of ``(i, j)`` is
            multiplied by ``clamp(1 + (e_j - (i - j)) / ramp, 0, 1)`` before it is normalised (1 for the own position).
        ramp: length of the soft ramp in tokens.
        dropout: probability of dropping an attention probability (after normalisation).
        seed: int64 tensor ``[]``; the mask is a function of (seed, sequence, head, i, j) alone (``ops.random``).
        sequence_ids: int64 ``[B]``, the number of each row's sequence in the call, a word of the dropout counter.
        extra_tokens: pairs with a position below it have no distance bias (learned tokens stand there); the bias of
            the others is that of the positions without them.
        heads: the model's head index of each query head here, a word of the dropout counter; None is 0, 1, 2, ...
        query_offset: the position of the first query, key length minus query length.
        sinks: ``[H]``, a logit of each query head in the softmax's denominator, or None. Engines do not read it: it
            joins where all parts are merged (``ops.run``, ``ops.sinks``).
        query_term, key_term: what each query, and what each key, adds to the scores of its pairs by their distance
            (DeBERTa's content-to-position and position-to-content, relative keys); their rows are all queries and all
            keys of the call. They join where the distance bias does, and pairs with an extra token have none.
    """

    scale: float
    softcap: float | None = None
    distance_bias: Tensor | None = None
    spans: Tensor | None = None
    ramp: float = 1.0
    dropout: float = 0.0
    seed: Tensor | None = None
    sequence_ids: Tensor | None = None
    extra_tokens: int = 0
    heads: tuple[int, ...] | None = None
    query_offset: int = 0
    sinks: Tensor | None = None
    query_term: DistanceTerm | None = None
    key_term: DistanceTerm | None = None

    @property
    def terms(self) -> tuple[DistanceTerm | None, DistanceTerm | None]:
        """Of the query and of the key."""
        return self.query_term, self.key_term

    @property
    def learned(self) -> tuple[Tensor | None, ...]:
        """The tensors that have gradients: distance bias, spans, sinks, values of the query's and of the key's term."""
        query, key = self.query_term, self.key_term  # plain: every call asks for them several times
        return (
            self.distance_bias, self.spans, self.sinks, None if query is None else query.values,
            None if key is None else key.values,
        )  # fmt: skip

    def with_learned(self, tensors: Sequence[Tensor | None]) -> ScoreOptions:
        """The options with these in the places of :attr:`learned`."""
        bias, spans, sinks, *values = tensors
        if [id(x) for x in self.learned] == [id(x) for x in tensors]:
            return self
        query_term, key_term = (
            None if term is None or x is None else replace(term, values=x)
            for term, x in zip(self.terms, values, strict=True)
        )
        return replace(
            self, distance_bias=bias, spans=spans, sinks=sinks, query_term=query_term, key_term=key_term
        )  # fmt: skip

    def with_tensors(self, **tensors: Any) -> ScoreOptions:
        return replace(self, **tensors)


def shift(part: Part, by: int, *, query_length: int, key_length: int) -> Part:
    """The same part over positions ``by`` further on (``by`` extra tokens stand in front)."""
    if by == 0:
        return part

    def moved(index: Index, slots: int) -> Index:
        if index is None:
            return slice(by, by + slots)
        if isinstance(index, slice):
            return slice(index.start + by, index.stop + by)
        return torch.where(index >= 0, index + by, index)

    return replace(part, query_index=moved(part.query_index, query_length), key_index=moved(part.key_index, key_length))
