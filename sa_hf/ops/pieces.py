"""Some heads of some rows of a call: on the CPU, parts that gather their slots run a few megabytes at a time. (Those of
compiled kernels gather nothing, but for ``ops.means``.)

Gathered copies of a whole layer leave the cache, and each is new memory that the system hands out page by page, which
takes longer than a copy inside the cache. Pieces reuse what the one before has freed.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from sa_hf.ops.parts import BlockLayout, BlockPart, Index, OffsetsPart, Part, ScoreOptions

ELEMENTS = 2**20  # of a gathered tensor of a piece: 4 MB in fp32

_ALL = slice(None)


@dataclass(frozen=True, eq=False)
class Piece:
    """A part for the rows ``batch`` and the query heads ``heads``, which read the key heads ``key_heads``: all heads of
    some rows, or some heads of one row, so that a piece of a contiguous tensor is contiguous."""

    part: Part
    batch: slice
    heads: slice
    key_heads: slice

    @property
    def whole(self) -> bool:
        return self.batch == self.heads == _ALL

    def queries(self, x: Tensor) -> Tensor:
        """Of ``x [B, H, ...]``."""
        return x if self.whole else x[self.batch, self.heads]

    def keys(self, x: Tensor) -> Tensor:
        """Of ``x [B, Hkv, ...]``."""
        return x if self.whole else x[self.batch, self.key_heads]

    def shared(self, x: Tensor) -> Tensor:
        """Of ``x [B | 1, H | 1, ...]``."""
        return x[self.batch if x.shape[0] > 1 else _ALL, self.heads if x.shape[1] > 1 else _ALL]

    @classmethod
    def of_all(cls, part: Part) -> Piece:
        """A part in one piece."""
        return cls(part, _ALL, _ALL, _ALL)

    @classmethod
    def cut(cls, part: Part, batch: slice, heads: slice, key_heads: slice) -> Piece:
        """The piece of a part for the whole call."""
        piece = cls(part, batch, heads, key_heads)
        if isinstance(part, BlockPart):
            part = replace(part, layout=piece._layout(part.layout))
        elif isinstance(part, OffsetsPart) and len(part.offsets) > 1:
            part = replace(part, offsets=part.offsets[heads])
        query_index, key_index = piece._index(part.query_index), piece._index(part.key_index)
        return replace(piece, part=replace(part, query_index=query_index, key_index=key_index))

    def _index(self, index: Index) -> Index:
        return self.shared(index) if isinstance(index, Tensor) else index

    def _layout(self, layout: BlockLayout) -> BlockLayout:
        if layout.batch == layout.heads == 1:
            return layout
        starts = layout.row_start[:-1].view(layout.batch, layout.heads, layout.num_query_blocks)
        ends = layout.row_start[1:].view(starts.shape)
        mine, last = self.shared(starts), self.shared(ends)
        first, stop = int(mine.flatten()[0]), int(last.flatten()[-1])
        return replace(
            layout,
            batch=mine.shape[0],
            heads=mine.shape[1],
            row_start=torch.cat([mine.flatten(), last.flatten()[-1:]]) - first,
            columns=layout.columns[first:stop],
            kind=layout.kind[first:stop],
            key_range=None if layout.key_range is None else self.shared(layout.key_range),
        )

    def options(self, options: ScoreOptions, batch: int, num_heads: int) -> ScoreOptions:
        """Args: the rows and query heads of the whole call."""
        if self.whole:
            return options
        ids, heads = options.sequence_ids, options.heads or tuple(range(num_heads))
        if ids is None and options.seed is not None:
            ids = torch.arange(batch, device=options.seed.device)
        return replace(
            options,
            sequence_ids=None if ids is None else ids[self.batch],
            heads=heads[self.heads],
            distance_bias=None if options.distance_bias is None else options.distance_bias[self.heads],
            spans=None if options.spans is None else self.shared(options.spans),
            query_term=None if options.query_term is None else options.query_term.of_rows(self.queries),
            key_term=None if options.key_term is None else options.key_term.of_rows(self.queries),
        )


def pieces(part: Part, query: Tensor, key: Tensor) -> Iterator[Piece]:
    """The pieces of a call on query ``[B, H, Nq, D]`` and key ``[B, Hkv, Nk, D]``; one where nothing is gathered."""
    indices = [index for index in (part.query_index, part.key_index) if isinstance(index, Tensor)]
    batch, num_heads, _, head_dim = query.shape
    kv_heads = key.shape[1]
    group = num_heads // kv_heads
    per_head = group * head_dim * max((index.shape[2] for index in indices), default=0)
    if query.device.type != "cpu" or batch * kv_heads * per_head <= ELEMENTS:
        yield Piece.of_all(part)
        return
    at_once = max(1, ELEMENTS // per_head)
    if at_once >= kv_heads:
        rows = at_once // kv_heads
        for row in range(0, batch, rows):
            yield Piece.cut(part, slice(row, min(row + rows, batch)), _ALL, _ALL)
        return
    for row in range(batch):
        for head in range(0, kv_heads, at_once):
            end = min(head + at_once, kv_heads)
            yield Piece.cut(part, slice(row, row + 1), slice(head * group, end * group), slice(head, end))
