"""LongNet over a sequence that several ranks share (Ding et al. 2023, arXiv 2307.02486, section 3.3).

Rank ``p`` of a group holds the positions ``[p * l, (p + 1) * l)``. A branch whose segments lie inside a rank
(``w <= l``) is local. Where a segment spans ranks (``w > l``), each rank shares the keys and values that the branch
keeps, at most ``ceil(l / r)`` of its ``l``, with the other ranks of the segment (an all-gather whose size does not
depend on the number of ranks in the group), and attends with its own queries. The backward is the matching
reduce-scatter. Phases and causality are those of global positions, so that the result is the single-process one.

Use inside an attention layer: give every rank its ``l`` tokens, ``position_ids = rank * l + arange(l)`` to the rotary
embedding, and call :func:`sequence_parallel_longnet` on the projected query, key and value. Everything else in a
Transformer works token by token; gradients of the parameters are summed over the group as under DDP, and a causal
language model's labels are shifted before they are cut into ranks.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import ClassVar
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import Tensor

from sa_hf.errors import SparseAttentionError
from sa_hf.functional import check_inputs
from sa_hf.ops.choice import check_engine, choose_engine
from sa_hf.ops.engine import Engine
from sa_hf.ops.parts import Band, ScoreOptions, SegmentPart
from sa_hf.ops.slots import merge_into, put, take
from sa_hf.ops.transforms import differentiable, given
from sa_hf.patterns.base import default_scale
from sa_hf.patterns.longnet import LongNetAttentionConfig
from sa_hf.patterns.static import static_options

# Plans of one model: its distinct lengths and layouts of ranks; the oldest go first.
PLANS_CACHED = 64


def sequence_parallel_longnet(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    config: LongNetAttentionConfig,
    group: dist.ProcessGroup | None = None,
    *,
    causal: bool = False,
    scale: float | None = None,
    dropout: float = 0.0,
    engine: str = "auto",
) -> Tensor:
    """LongNet attention of a sequence of which each rank holds ``l`` contiguous tokens, in rank order; differentiable.

    A collective call: every rank of ``group`` makes it, with the same ``l``, config and options, and runs the
    backward. Sequences are whole: padding may only stand at the end of a causal one.

    Args:
        query: ``[batch, num_heads, l, head_dim]``, this rank's tokens.
        key, value: ``[batch, num_key_value_heads, l, head_dim]``.
        config: ``w <= l`` must divide ``l``, and ``w > l`` be a multiple of it.
        group: the ranks that share the sequence; None is the default group.
        scale: of the query-key product; None is ``head_dim ** -0.5``.
        dropout: of the attention probabilities; its seed is drawn on the group's first rank.
        engine: "auto", "triton", "native" or "torch".

    Returns:
        ``[batch, num_heads, l, head_dim]``, the rows of ``sparse_attention`` on the whole sequence.

    Raises:
        SparseAttentionError: inputs that do not fit together, on any rank before anything is exchanged but the
            lengths; ``drop_diagonal``.
    """
    if not isinstance(config, LongNetAttentionConfig):
        raise SparseAttentionError(f"config must be a LongNetAttentionConfig, not {type(config).__name__}")
    check_inputs(query, key, value, scale, dropout)
    if query.shape[2] != key.shape[2]:
        raise SparseAttentionError(
            f"query has {query.shape[2]} tokens and key {key.shape[2]}; a rank's queries and keys are the same tokens"
        )
    if config.drop_diagonal:
        raise SparseAttentionError(
            "drop_diagonal=True is decided on the union of all branches of a row, which no rank sees before the "
            "exchange; sequence parallel LongNet takes drop_diagonal=False"
        )
    check_engine(engine)
    group = dist.group.WORLD if group is None else group
    if group is None:
        raise SparseAttentionError("torch.distributed has no process group; call init_process_group first")
    rank, ranks, length = dist.get_rank(group), dist.get_world_size(group), query.shape[2]
    _check_equal_lengths(length, group, query.device)
    _check_lengths(config, length, ranks)
    if ranks * length > config.segment_length[-1]:
        warnings.warn(
            f"longnet: a sequence of {ranks * length} tokens is longer than the largest segment, "
            f"{config.segment_length[-1]}: nothing passes between its segments; add a branch that covers it",
            stacklevel=2,
        )
    branches = _branches(config, rank, ranks, length, query.shape[1], key.shape[1], causal, query.device)
    options = _options(query, default_scale(query.shape[3]) if scale is None else float(scale), dropout, group)
    options = replace(options, query_offset=rank * length)
    subgroups = [None if b.sent is None else _subgroup(group, b.ranks) for b in branches]
    chosen = choose_engine(engine, query, options)
    return differentiable(_SequenceParallel(branches, subgroups, options, chosen), query, key, value)


def _check_lengths(config: LongNetAttentionConfig, length: int, ranks: int) -> None:
    for w in config.segment_length:
        w = min(w, ranks * length)
        if w % length and length % w:
            small, large = min(w, length), max(w, length)
            raise SparseAttentionError(
                f"{length} tokens per rank and a segment length of {w}: one must divide the other; nearest: "
                f"{'segments' if w > length else 'ranks'} of {max(round(large / small), 1) * small} tokens"
            )


def _check_equal_lengths(length: int, group: dist.ProcessGroup, device: torch.device) -> None:
    # Unequal sizes in the gathers below would hang or corrupt: one small reduction makes that an error on every rank.
    extremes = torch.tensor([length, -length], device=device)
    dist.all_reduce(extremes, dist.ReduceOp.MAX, group=group)
    most, least = int(extremes[0]), -int(extremes[1])
    if most != least:
        raise SparseAttentionError(
            f"the ranks hold between {least} and {most} tokens; every rank must hold the same number: pad the end of a "
            f"causal sequence to {most} per rank"
        )


def _options(query: Tensor, scale: float, dropout: float, group: dist.ProcessGroup) -> ScoreOptions:
    options = static_options(query, scale, dropout)
    if options.seed is not None:
        dist.broadcast(options.seed, dist.get_global_rank(group, 0), group=group)
    return replace(options, sequence_ids=torch.arange(query.shape[0], device=query.device))


# -- what one rank does in one branch ------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _Branch:
    """One branch on one rank.

    ``part.query_index`` holds the rank's own query slots, ``part.key_index`` global positions. ``sent [1, Hx, m]``
    are the positions in the rank that it shares (-1 pads to ``m = ceil(l / r)``), None where the branch is local;
    ``ranks`` share the segment; ``read [1, Hx, slots]`` are the slots of the gathered keys (of the rank's own keys
    where local) in the part's order. ``Hx`` is the number of key heads, or of query heads where the heads of a
    group have different phases.
    """

    part: SegmentPart
    ranks: tuple[int, ...]
    sent: Tensor | None
    read: Tensor

    def share(self, x: Tensor, y: Tensor, group: dist.ProcessGroup) -> tuple[Tensor, Tensor]:
        """Gather the shared slots of two tensors ``[B, Hkv, l, D]``: ``[B, Hx, len(ranks) * m, D]`` each."""
        own = torch.stack([take(x, self.sent), take(y, self.sent)])
        gathered = own.new_empty(len(self.ranks), *own.shape)
        dist.all_gather(list(gathered.unbind()), own, group=group)
        both = gathered.permute(1, 2, 3, 0, 4, 5).flatten(3, 4)
        return both[0], both[1]

    def collect(self, x: Tensor, y: Tensor, like: Tensor, group: dist.ProcessGroup) -> tuple[Tensor, Tensor]:
        """The adjoint of :meth:`share`: every rank's gradients of the gathered slots, summed where the slots live."""
        both = torch.stack([x, y]).unflatten(3, (len(self.ranks), -1)).permute(3, 0, 1, 2, 4, 5)
        # Summed in fp32 at the least: the ranks' contributions are rounded once.
        both = both.to(torch.promote_types(both.dtype, torch.float32)).contiguous()
        own = torch.empty_like(both[0])
        dist.reduce_scatter(own, list(both.unbind()), group=group)
        own = own.to(like.dtype)
        return put(own[0], self.sent, like), put(own[1], self.sent, like)


@lru_cache(maxsize=PLANS_CACHED)
def _branches(
    config: LongNetAttentionConfig, rank: int, ranks: int, length: int, heads: int, key_heads: int, causal: bool,
    device: torch.device,
) -> tuple[_Branch, ...]:  # fmt: skip
    built = []
    for w, r in zip(config.segment_length, config.dilated_ratio, strict=True):
        phase = config.offset(torch.arange(heads), r, heads).to(device)
        by_group = phase.view(key_heads, -1)
        shared = phase if bool((by_group != by_group[:, :1]).any()) else by_group[:, 0]
        w = min(w, ranks * length)
        build = _local_branch if w <= length else _spanning_branch
        built.append(build(w, r, rank, ranks, length, phase[:, None], shared[:, None], causal))
    return tuple(built)


def _local_branch(
    w: int, r: int, rank: int, ranks: int, length: int, phase: Tensor, shared: Tensor, causal: bool
) -> _Branch:
    """Whole segments inside the rank; ``phase [H, 1]``, ``shared [Hx, 1]``."""

    def kept(phases: Tensor) -> Tensor:
        inside = phases + torch.arange(0, w, r, device=phases.device)
        start = torch.arange(0, length, w, device=phases.device)[:, None, None]
        return torch.where(inside < w, start + inside, -1).movedim(0, 1).flatten(1)[None]

    queries, segment = kept(phase), -(-w // r)
    slots = queries.shape[2]
    part = SegmentPart(
        slots, slots, segment, segment, Band(None, 0) if causal else Band(),
        query_index=queries, key_index=torch.where(queries >= 0, queries + rank * length, -1),
    )  # fmt: skip
    return _Branch(part, (rank,), None, kept(shared))


def _spanning_branch(
    w: int, r: int, rank: int, ranks: int, length: int, phase: Tensor, shared: Tensor, causal: bool
) -> _Branch:
    """The rank's part of a segment that spans several ranks.

    The n-th position that a head keeps in the segment is ``phase + n r``: queries and keys are laid out by n, so
    that causality is a band whatever the phase.
    """
    device = phase.device
    first_rank = rank * length // w * (w // length)
    members = tuple(range(first_rank, min(first_rank + w // length, ranks)))
    begin, offset, end = first_rank * length, (rank - first_rank) * length, len(members) * length

    first, last = offset // r, -(-(offset + length) // r)
    queries = phase + torch.arange(first, last, device=device) * r - offset
    queries = torch.where((queries >= 0) & (queries < length), queries, -1)[None]
    keys = phase + torch.arange(-(-end // r), device=device) * r
    part = SegmentPart(
        queries.shape[2], keys.shape[1], queries.shape[2], keys.shape[1], Band(None, first) if causal else Band(),
        query_index=queries, key_index=torch.where(keys < end, keys + begin, -1)[None],
    )  # fmt: skip

    per_rank = -(-length // r)
    sent = (shared - offset) % r + torch.arange(per_rank, device=device) * r
    position = shared + torch.arange(-(-end // r), device=device) * r
    member, inside = position // length, position % length
    slot = member * per_rank + (inside - (shared - member * length) % r) // r
    return _Branch(
        part, members, torch.where(sent < length, sent, -1)[None], torch.where(position < end, slot, -1)[None]
    )  # fmt: skip


# Communicators of the segments of a group: creating one is a collective of its members, so each is made once.
_SUBGROUPS: WeakKeyDictionary[dist.ProcessGroup, dict[tuple[int, ...], dist.ProcessGroup]] = WeakKeyDictionary()


def _subgroup(group: dist.ProcessGroup, ranks: tuple[int, ...]) -> dist.ProcessGroup:
    """The process group of some of a group's ranks; called by those ranks together."""
    if len(ranks) == dist.get_world_size(group):
        return group
    known = _SUBGROUPS.setdefault(group, {})
    if ranks not in known:
        members = [dist.get_global_rank(group, r) for r in ranks]
        known[ranks] = dist.new_group(members, backend=dist.get_backend(group), use_local_synchronization=True)
    return known[ranks]


# -- forward and backward ------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _SequenceParallel:
    """All branches of one rank, merged into one softmax; the gradient through the mixing weights is exact, since the
    backward of each branch takes the merged output and log-sum-exp."""

    differentiable: ClassVar[int] = 3

    branches: Sequence[_Branch]
    subgroups: Sequence[dist.ProcessGroup | None]
    options: ScoreOptions
    engine: Engine

    @property
    def outputs(self) -> int:
        return 2 + 2 * sum(group is not None for group in self.subgroups)

    def run(self, *tensors: Tensor | None) -> tuple[Tensor, ...]:
        query, key, value = given(tensors[:3])
        stats = torch.promote_types(query.dtype, torch.float32)
        out = query.new_zeros(query.shape, dtype=stats)
        lse = query.new_full(query.shape[:3], -torch.inf, dtype=stats)
        gathered: list[Tensor] = []
        for branch, group in zip(self.branches, self.subgroups, strict=True):
            keys, values = (key, value) if group is None else branch.share(key, value, group)
            gathered += () if group is None else (keys, values)
            part = branch.part
            q, k, v = take(query, part.query_index), take(keys, branch.read), take(values, branch.read)
            part_out, part_lse = self.engine.forward(part, q, k, v, self.options)
            merge_into(out, lse, part_out.to(stats), part_lse.to(stats), part.query_index)
        return out.to(query.dtype), lse, *gathered

    def gradients(
        self, grad: Tensor, outputs: Sequence[Tensor], tensors: Sequence[Tensor | None]
    ) -> tuple[Tensor, ...]:
        out, lse, *gathered = outputs
        query, key, value = given(tensors[:3])
        total = [torch.zeros_like(x) for x in (query, key, value)]
        for branch, group in zip(self.branches, self.subgroups, strict=True):
            keys, values = (key, value) if group is None else (gathered.pop(0), gathered.pop(0))
            index = branch.part.query_index
            q, k, v = take(query, index), take(keys, branch.read), take(values, branch.read)
            o, g, row_lse = take(out, index), take(grad, index), take(lse.unsqueeze(-1), index).squeeze(-1)
            grads = self.engine.backward(branch.part, q, k, v, o, row_lse, g, self.options)
            grad_keys, grad_values = put(grads.key, branch.read, keys), put(grads.value, branch.read, values)
            if group is not None:
                grad_keys, grad_values = branch.collect(grad_keys, grad_values, key, group)
            total[0] += put(grads.query, index, query)
            total[1] += grad_keys
            total[2] += grad_values
        return tuple(total)

    def widened(self, copies: int, batch: int, mapped: object) -> None:
        """Dropout counts the sequences of one batch."""
