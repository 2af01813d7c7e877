"""What a pattern offers: a predicate, the plan that runs it, what a decode step reads, and its module in a layer."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor, nn

from sa_hf.config import SparseAttentionConfig
from sa_hf.errors import SparseAttentionError
from sa_hf.ops.counts import row_counts
from sa_hf.ops.host import with_host_defaults
from sa_hf.ops.layout import Predicate, build_layout
from sa_hf.ops.parts import Band, BlockPart, Part, SegmentPart, shift
from sa_hf.ops.sequences import Sequences

DEFAULT_BLOCK = 64


@dataclass(frozen=True)
class Geometry:
    """The shape that a plan is made for: one sequence of ``key_length`` positions, its last ``query_length`` queries.

    Args:
        heads: the model's own query-head indices that this plan serves, in order.
        num_heads: query heads of the whole layer.
        layer_idx: the layer's place in its stack.
        band: the model's own window, intersected with the pattern; ``right=0`` where causal.
        block: tile size of the block lists.
    """

    key_length: int
    query_length: int
    heads: tuple[int, ...] = (0,)
    num_heads: int = 1
    layer_idx: int = 0
    causal: bool = False
    band: Band = Band()
    block: int = DEFAULT_BLOCK

    @property
    def query_offset(self) -> int:
        return self.key_length - self.query_length

    @property
    def full_band(self) -> Band:
        """The model's window and causality together."""
        return self.band.intersect(Band(None, 0)) if self.causal else self.band

    def readable(self, position: int) -> Tensor:
        """Which positions ``j < position`` the model's own window still lets a query at ``position`` read, bool."""
        j = torch.arange(position)
        return torch.ones_like(j, dtype=torch.bool) if self.band.left is None else position - j <= self.band.left


@dataclass(frozen=True)
class LayerSpec:
    """One attention layer of a model, as far as a pattern needs to know it.

    ``max_length`` is the longest input the model takes, None where unbounded; ``band`` its own sliding window.
    ``heads`` are the query heads that a part of a mixture serves, None is all; ``num_heads`` is the whole layer's, and
    ``num_key_value_heads`` counts the key heads that the part is given.
    """

    layer_idx: int
    num_layers: int
    num_heads: int
    num_key_value_heads: int
    head_dim: int
    hidden_size: int
    causal: bool
    max_length: int | None = None
    band: Band = Band()
    device: torch.device = torch.device("cpu")
    dtype: torch.dtype = torch.float32
    heads: tuple[int, ...] | None = None


@dataclass(eq=False)
class AttentionInputs:
    """One call of an attention layer.

    Shapes: query ``[B, H, Nq, D]``, key and value ``[B, Hkv, Nk, D]`` (after rotary embedding, cache included),
    ``hidden_states [B, Nq, hidden]`` the layer's input, ``distance_bias [H, 2 * N - 1]`` as in ``ScoreOptions``,
    ``before_rotary(query, key)`` gives queries and keys of the new tokens as they were before the rotary embedding,
    None where there is none. ``remember(name, tensor, dim)`` joins a per-token tensor of the new positions to the
    cached ones along ``dim`` and returns that of all key positions; it is None without a cache (then ``Nq == Nk``).
    ``key_slots [Nk]`` are the slots of the keys, ascending, where a cache has dropped others and the pattern
    ``reads_listed_keys``; None: key ``j`` stands at slot ``j``.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    sequences: Sequences
    causal: bool
    scale: float
    band: Band = Band()
    softcap: float | None = None
    distance_bias: Tensor | None = None
    dropout: float = 0.0
    engine: str = "auto"
    hidden_states: Tensor | None = None
    before_rotary: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] | None = None
    remember: Callable[..., Tensor] | None = None
    key_slots: Tensor | None = None


class StaticPatternConfig(SparseAttentionConfig):
    """A pattern that is a pure predicate of (head, query position, key position)."""

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

    def decode_keys(self, position: int, geometry: Geometry) -> list[Tensor]:
        """Positions that the query at ``position`` reads, one ascending int64 tensor per head of ``geometry.heads``
        (repeats count, LongNet); causal patterns read ``j <= position`` only."""
        rows = []
        for head in geometry.heads[:1] if self.same_for_all_heads(geometry) else geometry.heads:
            keys = self.row_keys(head, position, geometry)
            keys = keys[
                geometry.full_band.contains(torch.full_like(keys, position), keys) & (keys < geometry.key_length)
            ]
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
        from sa_hf.patterns.static import StaticSparseAttention

        return StaticSparseAttention(self, spec)


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
    band = geometry.full_band.contains(i, j)
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
    if geometry.query_offset == 0:
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


class SparseAttention(nn.Module):
    """The ``sparse`` child of a patched attention module: runs one layer's pattern and holds its learned state.

    Learned state is bare Parameters and buffers, never ``nn.Linear`` (LoRA's "all-linear" would wrap it).
    """

    # Whether a causal layer keeps tensors of its own for every token so far (``AttentionInputs.remember``).
    remembers: ClassVar[bool] = False
    # What ``figures`` gives after a forward, and cannot give before one.
    figure_names: ClassVar[tuple[str, ...]] = ()
    # How many training forwards ago the running call began: above 0 where a checkpointed layer is recomputed after a
    # later forward, and has to draw the noise of its own.
    steps_back: int = 0

    def __init__(self, config: SparseAttentionConfig, spec: LayerSpec, heads: Sequence[int] | None = None) -> None:
        super().__init__()
        self.config = config
        self.spec = spec
        served = spec.heads if heads is None else heads
        self.heads = tuple(range(spec.num_heads)) if served is None else tuple(served)

    def forward(self, inputs: AttentionInputs) -> Tensor:
        """Attend; returns ``[B, H, Nq, D]``, rows of padding 0."""
        raise NotImplementedError

    def aux_losses(self) -> dict[str, Tensor]:
        """The live auxiliary losses of the last forward, scaled as they join the model's loss (fp32 scalars)."""
        return {}

    def unscaled_losses(self) -> dict[str, Tensor]:
        """The same without their coefficients, detached: figures to report."""
        return {}

    def figures(self) -> dict[str, float]:
        """Figures of the last forward to report: spans, cluster sizes, mask density."""
        return {}

    def reads_listed_keys(self, inputs: AttentionInputs) -> bool:
        """Whether this call can take the keys that a cache kept, by their slots, without those that it dropped."""
        return False

    def expired_keys(self) -> Tensor | None:
        """Key slots of the last forward that no later query can read, bool ``[B, Nk]`` (padding too), or None."""
        return None

    def tie(self, layers: Sequence[SparseAttention]) -> None:
        """Called once all layers are built (again is harmless), on each module of a stack that runs this config, with
        all of them in layer order: what layers share is set up here."""

    def advance_step(self) -> None:
        """Called once per outer training forward, before it, and never in a recomputation."""

    def drop_graph(self) -> None:
        """Forget graph tensors of the last forward: a kept one breaks deepcopy and holds memory."""

    def geometry(self, inputs: AttentionInputs, query_length: int, key_length: int) -> Geometry:
        return Geometry(
            key_length, query_length, self.heads, self.spec.num_heads, self.spec.layer_idx, inputs.causal, inputs.band
        )  # fmt: skip


def default_scale(head_dim: int) -> float:
    return 1.0 / math.sqrt(head_dim)
