"""What a pattern offers: a predicate, the plan that runs it, what a decode step reads, and its module in a layer."""

from __future__ import annotations

import math
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor

from sa_hf.config import SparseAttention, SparseAttentionConfig
from sa_hf.errors import SparseAttentionError
from sa_hf.layer import Geometry, LayerSpec
from sa_hf.ops.counts import row_counts
from sa_hf.ops.host import with_host_defaults
from sa_hf.ops.layout import Predicate, build_layout
from sa_hf.ops.parts import BlockPart, Part, SegmentPart, shift
from sa_hf.ops.reads import Run, runs_of


class StaticPatternConfig(SparseAttentionConfig):
    """A pattern that is a pure predicate of (head, query position, key position)."""

    runs_in: ClassVar[type[SparseAttention]]  # set by ``patterns.static``, which stands above this file

    def allowed(self, head: Tensor, i: Tensor, j: Tensor, geometry: Geometry) -> Tensor:
        """Whether head ``head``'s query at position ``i`` may read position ``j``: bool, broadcast.

        Causality, the model's own window and ``drop_diagonal`` are applied outside. ``head`` is the model's own
        query-head index.
        """
        raise NotImplementedError

    def branches(self, geometry: Geometry) -> list[Predicate]:
        """Predicates whose multiset sum is the pattern; one, but for LongNet."""
        return [partial(self._allowed_at, geometry)]

    def named_parts(self, geometry: Geometry) -> dict[str, Predicate]:
        """What pictures tell apart, by label; a kept pair belongs to the first part that holds it, to the last where
        none does. Empty: one piece."""
        return {}

    def _allowed_at(self, geometry: Geometry, head: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return self.allowed(head, i, j, geometry)

    def same_for_all_heads(self, geometry: Geometry) -> bool:
        """Whether the predicate ignores the head, so that the heads share their lists."""
        return True

    def length_dependent(self, causal: bool) -> bool:
        """Whether what a position attends depends on the sequence's length; never where causal."""
        return False

    def layer_of_plan(self, layer_idx: int) -> int:
        """The lowest layer with the same pattern as this one: equal layers share their plans. The default says that
        the predicate ignores ``geometry.layer_idx``."""
        return 0

    def candidates(self, geometry: Geometry) -> Tensor | None:
        """Superset of the tiles with a kept pair, int64 ``[E, 3]`` (list, query block, key block); None: try all."""
        return None

    def plan(self, geometry: Geometry, device: torch.device) -> list[Part]:
        """The parts that run this pattern; the default is one block part per branch, from the predicate alone.

        With ``drop_diagonal`` the parts leave out every diagonal pair; ``finished_plan`` gives lonely rows theirs back.
        """
        return self.block_plan(geometry, device, self.candidates(geometry))

    def block_plan(self, geometry: Geometry, device: torch.device, candidates: Tensor | None = None) -> list[Part]:
        """Block parts straight from the predicates; right for every pattern and for ``query_length < key_length``."""
        shared = self.same_for_all_heads(geometry)
        heads = torch.tensor(geometry.heads[:1] if shared else geometry.heads, device=device)

        def on_lists(branch: Predicate) -> Predicate:
            def predicate(index: Tensor, i: Tensor, j: Tensor) -> Tensor:
                kept = branch(heads[index], i, j)
                kept = kept if geometry.chunk is None else kept & geometry.same_chunk(i, j)
                return kept & (i != j) if self.drop_diagonal else kept

            return predicate

        parts: list[Part] = []
        for branch in self.branches(geometry):
            layout = build_layout(
                on_lists(branch),
                geometry.query_length,
                geometry.key_length,
                heads=len(heads),
                block=geometry.block,
                band=geometry.full_band,
                candidates=candidates,
                query_offset=geometry.query_offset,
                device=device,
            )
            parts.append(BlockPart(layout))
        return parts

    def row_keys(self, head: int, position: int, geometry: Geometry) -> Tensor:
        """Keys of one query as ascending int64 positions ``[keys]``, before causality, the model's window and
        ``drop_diagonal``; keys of several branches repeat. The default tries every key."""
        j = torch.arange(position + 1 if geometry.causal else geometry.key_length)
        index, i = torch.full_like(j, head), torch.full_like(j, position)
        return torch.cat([j[branch(index, i, j)] for branch in self.branches(geometry)]).sort().values

    def row_runs(self, head: int, position: int, geometry: Geometry) -> list[Run]:
        """The same keys as runs ``(first, end, step)`` of positions, in any order; what lies outside of causality and
        the model's window may stay in them. A step of decoding reads these: closed forms in plain numbers are quick."""
        return runs_of(self.row_keys(head, position, geometry))

    def runs_serve(self, position: int) -> int:
        """The last position with the same :meth:`row_runs` as this one where causal, but for what is behind each: so
        long a step reads the list of the step before."""
        return position

    def decode_keys(self, position: int, geometry: Geometry) -> list[Tensor]:
        """Positions that the query at ``position`` reads, one ascending int64 tensor per head of ``geometry.heads``
        (repeats count, LongNet); causal patterns read ``j <= position`` only."""
        rows = []
        for head in geometry.heads[:1] if self.same_for_all_heads(geometry) else geometry.heads:
            keys = self.row_keys(head, position, geometry)
            keys = keys[geometry.reached(torch.full_like(keys, position), keys) & (keys < geometry.key_length)]
            if self.drop_diagonal and (self.extra_tokens or bool((keys != position).any())):
                keys = keys[keys != position]
            rows.append(keys)
        return rows if len(rows) > 1 else rows * len(geometry.heads)

    def keep(self, position: int, geometry: Geometry) -> Tensor:
        """Which cached positions ``j < position`` some query at ``position`` or later can still read, bool
        ``[position]`` (causal patterns); the default keeps all that the model's own window reaches."""
        return geometry.readable(position)

    # -- the mask --------------------------------------------------------------------------------------------------

    @with_host_defaults
    def multiplicity(self, length: int, num_heads: int = 1, layer_idx: int = 0, causal: bool = False) -> Tensor:
        """How often each pair is read, int64 ``[num_heads, length, length]``; above 1 for LongNet alone."""
        return dense_multiplicity(self, whole_geometry(length, num_heads, layer_idx, causal))

    def mask(self, length: int, num_heads: int = 1, layer_idx: int = 0, causal: bool = False) -> Tensor:
        return self.multiplicity(length, num_heads, layer_idx, causal) > 0

    @with_host_defaults
    def row_sizes(self, geometry: Geometry) -> Tensor:
        """Distinct keys of each query, int64 ``[len(heads), query_length]``, without an n x n tensor."""
        parts = pattern_parts(self, geometry, torch.device("cpu"))
        return row_counts(parts, geometry.query_length, len(geometry.heads))

    def density(self, length: int, num_heads: int = 1, layer_idx: int = 0, causal: bool = False) -> float:
        geometry = whole_geometry(length, num_heads, layer_idx, causal)
        dense = length * (length + 1) // 2 if causal else length * length
        return int(self.row_sizes(geometry).sum()) / (dense * num_heads)

    def build(self, spec: LayerSpec) -> SparseAttention:
        return self.runs_in(self, spec)


def whole_geometry(length: int, num_heads: int, layer_idx: int, causal: bool) -> Geometry:
    """A layer of all its heads over a whole sequence; raises ``SparseAttentionError`` for numbers out of range."""
    for label, value, minimum in (("length", length, 1), ("num_heads", num_heads, 1), ("layer_idx", layer_idx, 0)):
        if not isinstance(value, int) or isinstance(value, bool) or value < minimum:
            raise SparseAttentionError(f"{label}={value!r} must be an integer >= {minimum}; nearest: {minimum}")
    return Geometry(length, length, tuple(range(num_heads)), num_heads, layer_idx, causal)


def dense_multiplicity(config: StaticPatternConfig, geometry: Geometry) -> Tensor:
    """The whole pattern over positions, int64 ``[len(heads), query_length, key_length]``: the oracle's mask.

    Extra tokens have no column: with ``drop_diagonal``, a row that reads nothing but them is empty.
    """
    head = torch.tensor(geometry.heads)[:, None, None]
    i = torch.arange(geometry.query_offset, geometry.key_length)[None, :, None]
    j = torch.arange(geometry.key_length)[None, None, :]
    band = geometry.reached(i, j)
    total = torch.zeros(len(geometry.heads), geometry.query_length, geometry.key_length, dtype=torch.int64)
    for branch in config.branches(geometry):
        total += (branch(head, i, j) & band).long()
    if config.drop_diagonal:
        diagonal = (i == j).expand_as(total)
        others = (total * ~diagonal).sum(-1, keepdim=True) + config.extra_tokens
        total = torch.where(diagonal & (others > 0), 0, total)
    return total


def finished_plan(
    config: StaticPatternConfig, geometry: Geometry, device: torch.device, extra: int | None = None
) -> list[Part]:
    """The pattern's parts for a geometry, lonely rows and extra tokens included.

    ``extra`` tokens are those of the stack, which another layer may have asked for; None: the pattern's own.
    """
    extra = config.extra_tokens if extra is None else extra
    return with_extra_tokens(pattern_parts(config, geometry, device, extra), extra, geometry)


def pattern_parts(
    config: StaticPatternConfig, geometry: Geometry, device: torch.device, extra: int | None = None
) -> list[Part]:
    """The pattern's parts over the sequence alone, lonely rows included: none where every row reads ``extra`` tokens
    (None: the pattern's own)."""
    if geometry.chunk is not None:  # closed forms know nothing of chunks
        parts = StaticPatternConfig.block_plan(config, geometry, device, config.candidates(geometry))
    elif geometry.query_offset == 0:
        parts = config.plan(geometry, device)
    else:
        parts = config.block_plan(geometry, device, config.candidates(geometry))
    if config.drop_diagonal and not (config.extra_tokens if extra is None else extra):
        position = torch.arange(geometry.query_offset, geometry.key_length, device=device)
        counts = row_counts(parts, geometry.query_length, len(geometry.heads), device)
        heads = torch.tensor(geometry.heads, device=device)[:, None]
        own = torch.zeros(len(geometry.heads), len(position), dtype=torch.long, device=device)
        for branch in config.branches(geometry):
            own += branch(heads, position[None], position[None]).long()
        parts = [*parts, *own_key_parts(own.where(counts == 0, 0), geometry.query_offset)]
    return parts


def own_key_parts(times: Tensor, query_offset: int) -> list[Part]:
    """Segments of one slot: rows that read themselves alone, ``times`` int64 ``[H, Nq]`` times."""
    parts: list[Part] = []
    for count in range(1, int(times.max()) + 1 if times.numel() else 1):
        chosen = times >= count
        width = int(chosen.sum(1).max())
        order = torch.sort((~chosen).to(torch.uint8), dim=1, stable=True).indices[:, :width]
        rows = torch.where(chosen.gather(1, order), order, -1)[None]
        keys = torch.where(rows >= 0, rows + query_offset, -1)
        parts.append(SegmentPart(width, width, 1, 1, query_index=rows, key_index=keys))
    return parts


def with_extra_tokens(parts: list[Part], extra: int, geometry: Geometry) -> list[Part]:
    """The plan over ``extra`` global tokens in front of the sequence: they attend and are attended by everything."""
    if extra == 0:
        return parts
    n = geometry.key_length
    if geometry.query_offset:
        raise SparseAttentionError("extra tokens serve encoders only: query_length must equal key_length")
    moved = [shift(p, extra, query_length=n, key_length=n) for p in parts]
    tokens, sequence, everything = slice(0, extra), slice(extra, extra + n), slice(0, extra + n)
    return [
        *moved,
        SegmentPart(extra, extra + n, extra, extra + n, query_index=tokens, key_index=everything),
        SegmentPart(n, extra, n, extra, query_index=sequence, key_index=tokens),
    ]


def default_scale(head_dim: int) -> float:
    return 1.0 / math.sqrt(head_dim)
