"""Blocks chosen by content (after MoBA, arXiv 2502.13189; NSA, 2502.11089; InfLLM-V2, 2509.24663).

Positions are cut into blocks of ``block_size``. A query always reads the first blocks (sinks) and a window of blocks up
to its own, and of the others the ``top_k`` whose pooled keys have the highest product with it. Attention inside what is
read is exact; the choice carries no gradient. Causal rows choose among complete blocks behind their window, by queries
that no later token changes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, TypeAlias

import torch
from torch import Tensor

from sa_hf.config import (
    SparseAttention,
    SparseAttentionConfig,
    check_bool,
    check_choice,
    check_integer,
    register_pattern,
)
from sa_hf.errors import SparseAttentionError
from sa_hf.layer import AttentionInputs, LayerSpec
from sa_hf.ops.grouped import Group, map_groups
from sa_hf.ops.parts import Band
from sa_hf.ops.planned import planned_attention
from sa_hf.ops.reference import dense_attention
from sa_hf.ops.sequences import Sequences
from sa_hf.patterns.block_sets import BLOCK_TOPK, BlockSets, block_queries, choose_blocks, kept_pairs, pooled_keys
from sa_hf.patterns.static import score_options

# Of a group: queries [G, H, m, D] and the position of the first.
Recent: TypeAlias = Callable[[Group], tuple[Tensor, int]]


@register_pattern
@dataclass(frozen=True, kw_only=True)
class BlockTopKAttentionConfig(SparseAttentionConfig):
    """Blocks chosen by content.

    Args:
        block_size: positions per block; multiples of 64 are the fastest, then those of 16.
        top_k: blocks that are chosen, besides those always read.
        num_window_blocks: blocks always read: the own and those before it (causal), or around it (odd).
        num_sink_blocks: leading blocks always read.
        selection: "query_block" (one choice per block of queries, by their mean; causal: by the mean of the block
            before) or "query" (each query chooses).
        pooling: of a block's keys, "mean" or "max" (elementwise).
        shared_by_group: one choice for the query heads of a key head, by the sum of their scores; else one each.
        indexer: learned projections choose.
    """

    name: ClassVar[str] = "block_topk"

    block_size: int = 64
    top_k: int = 8
    num_window_blocks: int = 2
    num_sink_blocks: int = 1
    selection: str = "query_block"
    pooling: str = "mean"
    shared_by_group: bool = True
    indexer: bool = False

    def validate(self) -> None:
        for field in ("block_size", "top_k", "num_window_blocks"):
            check_integer(self, field, minimum=1)
        check_integer(self, "num_sink_blocks", minimum=0)
        check_choice(self, "selection", ("query_block", "query"))
        check_choice(self, "pooling", ("mean", "max"))
        check_bool(self, "shared_by_group")
        check_bool(self, "indexer")
        if self.indexer:
            raise SparseAttentionError(
                "block_topk.indexer=True (learned projections that choose) is not built yet; use indexer=False"
            )

    @classmethod
    def presets(cls) -> dict[str, dict[str, Any]]:
        return {
            # Beside the own block; MoBA's code counts that one among its top k, so that its 4 is this 3.
            "moba": {
                "block_size": 512, "top_k": 3, "num_window_blocks": 1, "num_sink_blocks": 0, "selection": "query",
                "shared_by_group": False,
            },
            "infllm-v2": {
                "block_size": 64, "top_k": 16, "num_window_blocks": 32, "num_sink_blocks": 1, "selection": "query",
            },
        }  # fmt: skip

    def sets(self, causal: bool) -> BlockSets:
        """Which blocks are read always, and among which the others are chosen."""
        return BlockSets(self.block_size, self.num_window_blocks, self.num_sink_blocks, causal)

    def check_layer(self, spec: LayerSpec) -> None:
        self.check_causality(spec.causal, f"layer {spec.layer_idx}")
        if self.shared_by_group and not spec.whole_groups:
            raise SparseAttentionError(
                f"block_topk.shared_by_group=True makes one choice for all query heads of a key head, but heads "
                f"{list(spec.heads or ())} of layer {spec.layer_idx} are a part of a group; give the part whole "
                "groups, or use shared_by_group=False"
            )

    def check_causality(self, causal: bool, where: str) -> None:
        """Raise ``SparseAttentionError`` where the window cannot lie around a bidirectional layer's blocks."""
        if not causal and self.num_window_blocks % 2 == 0:
            raise SparseAttentionError(
                f"block_topk.num_window_blocks={self.num_window_blocks} must be odd in a bidirectional layer (the own "
                f"block and as many on either side), and {where} is one; nearest: {self.num_window_blocks - 1} or "
                f"{self.num_window_blocks + 1}"
            )

    def build(self, spec: LayerSpec) -> BlockTopKAttention:
        return BlockTopKAttention(self, spec)


class BlockTopKAttention(SparseAttention):
    """The choice of one layer, and attention to what it chose; no state."""

    config: BlockTopKAttentionConfig
    figure_names = ("blocks_chosen", "blocks_back")

    def __init__(self, config: BlockTopKAttentionConfig, spec: LayerSpec) -> None:
        config.check_layer(spec)
        super().__init__(config, spec)
        # A step of decoding chooses by the queries of the block before its own.
        self.remembers = spec.causal and config.selection == "query_block"
        self._seen: list[tuple[Tensor, Tensor]] = []  # choices [G, C, R, k] of the last forward, the rows' blocks [R]

    def forward(self, inputs: AttentionInputs) -> Tensor:
        self.config.check_causality(inputs.causal, "this call")
        recent = self._recent_queries(inputs)
        options = score_options(inputs, self.heads)
        sets, config = self.config.sets(inputs.causal), self.config
        by_row = config.selection == "query"
        self._seen = []

        def attend_group(group: Group) -> Tensor:
            chosen = self._choose(group, sets, inputs, recent)
            chosen = chosen.repeat_interleave(group.query.shape[1] // chosen.shape[1], 1)
            if inputs.engine == "reference":
                lengths = group.query.shape[2], group.key.shape[2]
                kept = kept_pairs(chosen, sets, by_row, *lengths, inputs.band, config.drop_diagonal)
                return dense_attention(group.query, group.key, group.value, kept, group.options)[0]
            return planned_attention(
                group.query, group.key, group.value, BLOCK_TOPK, group.options, inputs.engine,
                tensors=[chosen], numbers=[*map(int, sets), int(by_row), int(config.drop_diagonal), *inputs.band],
            )  # fmt: skip

        return map_groups(inputs.query, inputs.key, inputs.value, inputs.sequences, options, attend_group)

    @torch.no_grad()
    def _choose(self, group: Group, sets: BlockSets, inputs: AttentionInputs, recent: Recent) -> Tensor:
        """What :func:`chosen_blocks` gives for a group; kept for the figures."""
        query, start = recent(group)
        pooled = self._pooled(group, inputs)
        lengths = group.query_offset, group.key.shape[2]
        chosen, rows = chosen_blocks(self.config, query, start, pooled, *lengths, sets, inputs.band)
        self._seen.append((chosen, rows))
        return chosen

    def _pooled(self, group: Group, inputs: AttentionInputs) -> Tensor:
        """The pooled keys of the blocks that may be chosen; of whole rows with a cache, those known are kept beside it,
        so that a step reads new blocks alone."""
        key, block, known = group.key.detach(), self.config.block_size, None
        if not inputs.causal:
            return pooled_keys(key, block, self.config.pooling)
        key = key[:, :, : key.shape[2] // block * block]  # no causal row chooses a block that is not complete
        beside = inputs.beside if inputs.sequences.is_full else None
        if beside is not None:
            known = beside("pooled")
        if known is None or beside is None:
            pooled = pooled_keys(key, block, self.config.pooling)
            if beside is not None:
                beside("pooled", pooled)
            return pooled
        count = min(known.shape[2], group.query_offset // block)
        fresh = key[:, :, count * block :]
        if fresh.shape[2] == 0 and known.shape[2] == count:
            return known
        pooled = torch.cat([known[:, :, :count], pooled_keys(fresh, block, self.config.pooling)], dim=2)
        beside("pooled", pooled)
        return pooled

    def _recent_queries(self, inputs: AttentionInputs) -> Recent:
        """The queries of a group's last positions ``[G, H, m, D]``, those of the new tokens and with a cache of the
        block before them; and the position of the first."""
        query = inputs.query.detach()
        if inputs.remember is None or not self.remembers:
            return lambda group: (group.query.detach(), group.query_offset)
        query = inputs.remember("queries", query, dim=2, need=2 * self.config.block_size)
        slots = inputs.key.shape[2]
        missing = slots - query.shape[2]
        if inputs.sequences.is_full:
            return lambda group: (query, missing)
        check_remembered(inputs.sequences, missing, self.config.sets(True))
        filled = torch.nn.functional.pad(query, (0, 0, missing, 0))
        return lambda group: (group.keys(filled), 0)

    def figures(self) -> dict[str, float]:
        if not self._seen:
            return {}
        listed = [(chosen >= 0, (own[:, None] - chosen).abs()) for chosen, own in self._seen]
        taken = sum(int(there.sum()) for there, _ in listed)
        rows = sum(there[..., 0].numel() for there, _ in listed)
        back = sum(int(distance[there].sum()) for there, distance in listed)
        return {"blocks_chosen": taken / rows, "blocks_back": back / max(1, taken)}


def chosen_blocks(
    config: BlockTopKAttentionConfig, query: Tensor, start: int, pooled: Tensor, offset: int, length: int,
    sets: BlockSets, band: Band,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The chosen blocks of each row, int64 ``[G, C, R, k]``, and the rows' own blocks ``[R]``.

    Rows are query blocks or queries from position ``offset`` on, C key heads where their query heads choose together,
    else query heads.

    Args:
        query: ``[G, H, m, D]``, the queries of the last m positions, from ``start`` on: those of the rows, and of the
            block before them.
        pooled: ``[G, Hkv, blocks, D]``, of the whole sequence of ``length``.
    """
    if offset and not sets.causal:
        raise SparseAttentionError(
            "bidirectional block_topk attends whole sequences: query and key length must be equal"
        )
    device = pooled.device
    if config.selection == "query":
        low = high = torch.arange(offset, length, device=device)
        vectors = query[:, :, offset - start :]
    else:
        first = offset // sets.block
        low = torch.arange(first, sets.count(length), device=device) * sets.block
        high = low + sets.block - 1
        choosing = max(first, sets.window + sets.sinks)
        if sets.causal and choosing < sets.count(length) and start > (choosing - 1) * sets.block:
            raise SparseAttentionError(
                f'block_topk.selection="query_block" chooses for block {choosing} by the queries of block '
                f"{choosing - 1}, and this call has those from position {start} on; give it the queries of the whole "
                'sequence, or use selection="query"'
            )
        # No row's choice may depend on tokens behind it: a causal block goes by the queries of the one before.
        vectors = block_queries(query, start, first - sets.causal, len(low), sets.block)
    group_size = vectors.shape[1] // pooled.shape[1]
    if not config.shared_by_group:
        pooled = pooled.repeat_interleave(group_size, 1)
    elif group_size > 1:
        vectors = vectors.unflatten(1, (-1, group_size)).sum(2, dtype=torch.float64)
    return choose_blocks(vectors, pooled, (low, high), sets, band, config.top_k), low // sets.block


def read_pairs(config: BlockTopKAttentionConfig, query: Tensor, key: Tensor, causal: bool = True) -> Tensor:
    """Which pairs whole sequences ``query [G, H, n, D]``, ``key [G, Hkv, n, D]`` read, bool ``[G, H, n, n]``."""
    length, sets = key.shape[2], config.sets(causal)
    pooled = pooled_keys(key, sets.block, config.pooling)
    chosen, _ = chosen_blocks(config, query, 0, pooled, 0, length, sets, Band())
    chosen = chosen.repeat_interleave(query.shape[1] // chosen.shape[1], 1)
    return kept_pairs(chosen, sets, config.selection == "query", length, length, Band(), config.drop_diagonal)


def check_remembered(sequences: Sequences, start: int, sets: BlockSets) -> None:
    """That the queries which a choice goes by lie at slot ``start`` or behind it.

    Raises:
        SparseAttentionError: padding between the real tokens of a row sets them further apart than the cache keeps.
    """
    gather = None if sequences.key_gather is None else sequences.key_gather.cpu()
    for span in sequences.spans:
        own = (span.key_length - span.query_length) // sets.block
        if span.query_length == 0 or own < sets.window:
            continue
        at = span.key_start + (own - 1) * sets.block
        slot = at if gather is None else int(gather[span.row, at])
        if slot < start:
            raise SparseAttentionError(
                f"row {span.row}: block_topk chooses by the queries from slot {slot} on, and the cache keeps those "
                f"from slot {start} on: zeros inside attention_mask set tokens apart. Pad on the left, or use "
                'selection="query"'
            )
