"""Blocks chosen by content (after MoBA, arXiv 2502.13189; NSA, 2502.11089; InfLLM-V2, 2509.24663).

Positions are cut into blocks of ``block_size``. A query always reads the first blocks (sinks) and a window of blocks up
to its own, and of the others the ``top_k`` whose pooled keys have the highest product with it. Attention inside what is
read is exact; the choice carries no gradient. Causal rows choose among complete blocks behind their window, by queries
that no later token changes.

With ``indexer`` two small projections ``A`` and ``B`` of the layer's input join queries and keys in the choice: the
score of a block gains ``A x . pool(B x)``. ``A`` starts at zero, so that the choice starts as the unlearned one. They
learn from the mass that dense attention puts on each block (the warm-up of DeepSeek-V3.2's indexer, section 2.1).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, ClassVar, TypeAlias

import torch
from torch import Tensor, nn

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
from sa_hf.ops.cpp.choices import highest_blocks
from sa_hf.ops.cpp.steps import Listed, PreparedStep
from sa_hf.ops.grouped import Group, map_groups, whole_group
from sa_hf.ops.parts import Band, ScoreOptions
from sa_hf.ops.planned import planned_attention
from sa_hf.ops.reads import Reads, RunLists
from sa_hf.ops.reference import dense_attention
from sa_hf.ops.sequences import Sequences
from sa_hf.patterns.block_choice import Choice, check_remembered, choosing_vectors, chosen_blocks
from sa_hf.patterns.block_index import Index, divergence, keys_of, rows_mass, sampled_rows
from sa_hf.patterns.block_sets import BLOCK_TOPK, BlockSets, kept_pairs, pooled_keys
from sa_hf.patterns.learned import LearnedAttention, seeded_uniform
from sa_hf.patterns.static import score_options
from sa_hf.patterns.steps import is_step_in_place, run_step, step_reads

DENSE_ROWS = 1024  # queries of a forward whose dense attention an indexer learns from
INDEX_WIDTH = 16  # r


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
        indexer: two learned projections of the layer's input take part in the choice; in training they follow dense
            attention's mass on each block (of 1,024 queries a forward), and nothing else learns from that.
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

    def choice(self, causal: bool) -> Choice:
        """How the others are chosen."""
        return Choice(self.sets(causal), self.top_k, self.selection == "query", self.shared_by_group)

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
        return IndexedBlockTopKAttention(self, spec) if self.indexer else BlockTopKAttention(self, spec)


class BlockTopKAttention(SparseAttention):
    """The choice of one layer, and attention to what it chose; no state."""

    config: BlockTopKAttentionConfig
    figure_names = ("blocks_chosen", "blocks_back")

    def __init__(self, config: BlockTopKAttentionConfig, spec: LayerSpec) -> None:
        config.check_layer(spec)
        super().__init__(config, spec)
        # A step of decoding chooses by the queries of the block before its own, and by what was learned of the keys.
        self.remembers = spec.causal and (config.selection == "query_block" or config.indexer)
        self._seen: list[tuple[Tensor, Tensor]] = []  # choices [G, C, R, k] of the last forward, the rows' blocks [R]

    def forward(self, inputs: AttentionInputs) -> Tensor:
        self.config.check_causality(inputs.causal, "this call")
        index = self._index(inputs)
        recent = self._recent_queries(inputs, index)
        options = score_options(inputs, self.heads)
        sets, config = self.config.sets(inputs.causal), self.config
        by_row = config.selection == "query"
        self._seen = []
        whole = inputs.sequences.is_full and not inputs.sequences.extra_tokens
        if whole and not self.training and is_step_in_place(inputs):
            group = whole_group(inputs.query, inputs.key, inputs.value, options)
            listed = self._listed(group, sets, inputs, recent, index)
            reads = block_reads(sets, inputs.sequences, inputs.band.left, config.drop_diagonal)
            return run_step(inputs, reads, options, listed=listed)

        def attend_group(group: Group) -> Tensor:
            chosen = self._choose(group, sets, inputs, recent, index)
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

    def _index(self, inputs: AttentionInputs) -> Index | None:
        """What learned projections give of the tokens beside their queries and keys; None without them."""
        return None

    def repeated(self, earlier: SparseAttention, step: PreparedStep, inputs: AttentionInputs) -> PreparedStep | None:
        plain = type(self) is type(earlier) is BlockTopKAttention  # with projections, more is noted
        if not plain or earlier.config != self.config or self.training:
            return None
        self._seen = []
        group = whole_group(inputs.query, inputs.key, inputs.value, ScoreOptions(inputs.scale))
        recent = self._recent_queries(inputs, None)
        return step.again(listed=self._listed(group, self.config.sets(True), inputs, recent, None))

    def _listed(
        self, group: Group, sets: BlockSets, inputs: AttentionInputs, recent: Recent, index: Index | None
    ) -> Listed:
        """What a step of decoding chooses: the choice of a block's first query serves all of its queries."""
        offset, n_k = group.query_offset, group.key.shape[2]
        own, lasting = offset // sets.block, self.config.selection == "query_block" and n_k - offset == 1
        beside = inputs.beside if lasting else None
        known = None if beside is None else beside("chosen")
        if known is not None and known.shape[2] and int(known[0, 0, 0, -1]) == own:
            chosen = known[..., :-1]
            self._seen.append((chosen, torch.tensor([own])))
        elif self.config.selection == "query":
            chosen = self._choose_by_row(group, sets, inputs, recent, index)
        else:
            chosen = self._choose(group, sets, inputs, recent, index)
            if beside is not None:
                beside("chosen", torch.nn.functional.pad(chosen, (0, 1), value=own))
        if self.config.selection == "query_block" and not lasting:
            chosen = chosen[:, :, torch.arange(offset, n_k) // sets.block - own]
        return Listed(chosen, sets.block)

    @torch.no_grad()
    def _choose(
        self, group: Group, sets: BlockSets, inputs: AttentionInputs, recent: Recent, index: Index | None
    ) -> Tensor:
        """What :func:`chosen_blocks` gives for a group; kept for the figures."""
        query, start = recent(group)
        pooled = self._pooled(group, inputs, index)
        lengths = group.query_offset, group.key.shape[2]
        chosen, rows = chosen_blocks(self.config.choice(sets.causal), query, start, pooled, *lengths, inputs.band)
        self._seen.append((chosen, rows))
        return chosen

    @torch.no_grad()
    def _choose_by_row(
        self, group: Group, sets: BlockSets, inputs: AttentionInputs, recent: Recent, index: Index | None
    ) -> Tensor:
        """:meth:`_choose` for the rows of a step in C++."""
        query, pooled = recent(group)[0], self._pooled(group, inputs, index)
        rows = range(group.query_offset, group.key.shape[2])
        reach = [x for i in rows for x in sets.eligible_run(i, inputs.band.left)]
        together = query.shape[1] // pooled.shape[1] if self.config.shared_by_group else 1
        chosen = highest_blocks(query, pooled, reach, together, min(self.config.top_k, pooled.shape[2]))
        self._seen.append((chosen, torch.tensor([i // sets.block for i in rows])))
        return chosen

    def _pooled(self, group: Group, inputs: AttentionInputs, index: Index | None) -> Tensor:
        """The pooled keys of the blocks that may be chosen; of whole rows with a cache, those known are kept beside it,
        so that a step reads new blocks alone."""
        key, block, known = keys_of(group, index), self.config.block_size, None
        if not inputs.causal:
            return self._pool(key)
        complete = group.key.shape[2] // block * block  # no causal row chooses a block that is not complete
        key = [x[:, :, :complete] for x in key]
        beside = inputs.beside if inputs.sequences.is_full else None
        if beside is not None:
            known = beside("pooled")
        if known is None or beside is None:
            pooled = self._pool(key)
            if beside is not None:
                beside("pooled", pooled)
            return pooled
        count = min(known.shape[2], group.query_offset // block)
        if complete == count * block and known.shape[2] == count:
            return known
        pooled = torch.cat([known[:, :, :count], self._pool([x[:, :, count * block :] for x in key])], dim=2)
        beside("pooled", pooled)
        return pooled

    def _pool(self, key: Sequence[Tensor]) -> Tensor:
        """The pooled keys of all blocks, and beside them what was learned of the keys, pooled alike."""
        pooled = [pooled_keys(x, self.config.block_size, self.config.pooling) for x in key]
        return pooled[0] if len(pooled) == 1 else torch.cat(pooled, dim=-1)

    def _recent_queries(self, inputs: AttentionInputs, index: Index | None) -> Recent:
        """The queries of a group's last positions ``[G, H, m, D]``, those of the new tokens and with a cache of the
        block before them; and the position of the first. Of learned projections the new ones carry a graph."""
        query = inputs.query.detach() if index is None else torch.cat([inputs.query.detach(), index.queries], -1)
        if inputs.remember is None or not self.remembers or self.config.selection == "query":
            return lambda group: (group.queries(query), group.query_offset)
        given = inputs.remember("queries", query.detach(), dim=2, need=2 * self.config.block_size)
        slots, missing = inputs.key.shape[2], inputs.key.shape[2] - given.shape[2]
        if index is not None:
            given = torch.cat([given[:, :, : given.shape[2] - query.shape[2]], query], dim=2)
        if inputs.sequences.is_full:
            return lambda group: (given, missing)
        check_remembered(inputs.sequences, missing, self.config.sets(True))
        filled = torch.nn.functional.pad(given, (0, 0, slots - given.shape[2], 0))
        return lambda group: (group.keys(filled), 0)

    def figures(self) -> dict[str, float]:
        if not self._seen:
            return {}
        listed = [(chosen >= 0, (own[:, None] - chosen).abs()) for chosen, own in self._seen]
        taken = sum(int(there.sum()) for there, _ in listed)
        rows = sum(there[..., 0].numel() for there, _ in listed)
        back = sum(int(distance[there].sum()) for there, distance in listed)
        return {"blocks_chosen": taken / rows, "blocks_back": back / max(1, taken)}


class IndexedBlockTopKAttention(BlockTopKAttention, LearnedAttention):
    """The choice with learned projections.

    State: ``index_query`` fp32 ``[C, r, hidden]``, C choosing heads (key heads where their query heads choose together,
    else query heads), zero at the start; ``index_key`` fp32 ``[key heads, r, hidden]``, of unit variance; r is 16. They
    read the layer's input at a root mean square of 1 and are divided by ``hidden ** 0.75`` and ``hidden ** 0.5``, so
    that the learning rate of sparse state (1e-2) suits both at any width.
    """

    def __init__(self, config: BlockTopKAttentionConfig, spec: LayerSpec) -> None:
        super().__init__(config, spec)
        keys, width = spec.num_key_value_heads, spec.hidden_size
        choosing = keys if config.shared_by_group else len(self.heads)
        words = (spec.layer_idx, self.heads[0])
        draws = seeded_uniform(config.seed, words, keys * INDEX_WIDTH * width, spec.device)
        of_keys = (3**0.5 * (2 * draws - 1)).float().view(keys, INDEX_WIDTH, width)
        self.index_query = nn.Parameter(torch.zeros(choosing, INDEX_WIDTH, width, device=spec.device))
        self.index_key = nn.Parameter(of_keys)
        self._sums: list[tuple[Tensor, Tensor]] = []  # divergence and rows of each group of the running forward

    def forward(self, inputs: AttentionInputs) -> Tensor:
        self._sums = []
        out = super().forward(inputs)
        if self._sums:
            total, rows = (sum(x[1:], start=x[0]) for x in zip(*self._sums, strict=True))
            self._keep_loss("block_topk_indexer", total / rows.clamp(min=1), 1.0)
            self._sums = []
        elif not self.training:
            self._unscaled.pop("block_topk_indexer", None)  # of an earlier forward
        return out

    def _index(self, inputs: AttentionInputs) -> Index:
        hidden = inputs.hidden_states
        if hidden is None:
            raise SparseAttentionError("block_topk.indexer=True reads the layer's input, but hidden_states is None")
        x = hidden.detach().to(torch.promote_types(hidden.dtype, torch.float32))
        x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6)
        with torch.autocast(x.device.type, enabled=False):
            queries = torch.einsum("bnh,crh->bcnr", x, self.index_query.to(x.dtype))
            queries = queries / (inputs.scale * x.shape[-1] ** 0.75)
            keys = torch.einsum("bnh,crh->bcnr", x, self.index_key.to(x.dtype)) / x.shape[-1] ** 0.5
        if inputs.remember is not None:
            known = inputs.remember("index_keys", keys.detach(), dim=2)
            keys = torch.cat([known[:, :, : known.shape[2] - keys.shape[2]], keys], dim=2) if self.training else known
        return Index(queries.repeat_interleave(inputs.query.shape[1] // queries.shape[1], 1), keys)

    def _choose(
        self, group: Group, sets: BlockSets, inputs: AttentionInputs, recent: Recent, index: Index | None
    ) -> Tensor:
        chosen = super()._choose(group, sets, inputs, recent, index)
        if self.training:
            self._sums.append(self._divergence(group, sets, inputs, recent, index))
        return chosen

    def _divergence(
        self, group: Group, sets: BlockSets, inputs: AttentionInputs, recent: Recent, index: Index | None
    ) -> tuple[Tensor, Tensor]:
        """Of some of the rows that choose: the summed divergence of their scores from dense attention's mass, and their
        number."""
        query, start = recent(group)
        offset, length = group.query_offset, group.key.shape[2]
        pooled = self._pool(keys_of(group, index))
        choice = self.config.choice(sets.causal)
        vectors, pooled, low, high = choosing_vectors(choice, query, start, pooled, offset, length)
        per_row = 1 if choice.by_row else sets.block
        rows = sampled_rows(len(low), DENSE_ROWS // per_row, self.step - self.steps_back)
        there, rows = rows < len(low), rows.clamp(max=len(low) - 1)
        low, high, vectors = low[rows], high[rows], vectors[:, :, rows]
        mass = rows_mass(group, low, per_row, sets, inputs.band).unflatten(1, (vectors.shape[1], -1)).sum(2)
        # A key head's query heads choose by the sum of their scores; that of one is what dense attention knows.
        scores = (vectors @ pooled.to(vectors.dtype).transpose(-1, -2)).to(mass.dtype)
        scores = scores * (inputs.scale * vectors.shape[1] / inputs.query.shape[1])
        blocks = torch.arange(pooled.shape[2], device=low.device)
        allowed = sets.eligible(low[:, None], high[:, None], blocks, inputs.band)
        return divergence(mass, scores, allowed & there[:, None])


# The layers of a step share what they read.
@lru_cache(maxsize=64)
def block_reads(sets: BlockSets, sequences: Sequences, left: int | None, drop_diagonal: bool) -> Reads:
    """What the new queries read beside the blocks that they choose: their windows and the sinks (causal)."""

    def lists(position: int) -> RunLists:
        first = max(0, position // sets.block - sets.window + 1)
        return RunLists.of([[(0, min(sets.sinks, first) * sets.block, 1), (first * sets.block, position + 1, 1)]])

    return step_reads(sequences, left, lists, skip_own=drop_diagonal)


def read_pairs(
    config: BlockTopKAttentionConfig, query: Tensor, key: Tensor, causal: bool = True, positions: Tensor | None = None
) -> Tensor:
    """Which pairs whole sequences ``query [G, H, n, D]``, ``key [G, Hkv, n, D]`` read, bool ``[G, H, n, n]``; of the
    queries at ``positions``, int64 ``[r]``, alone, ``[G, H, r, n]``."""
    length, sets = key.shape[2], config.sets(causal)
    pooled = pooled_keys(key, sets.block, config.pooling)
    chosen, _ = chosen_blocks(config.choice(causal), query, 0, pooled, 0, length, Band())
    chosen = chosen.repeat_interleave(query.shape[1] // chosen.shape[1], 1)
    by_row = config.selection == "query"
    return kept_pairs(chosen, sets, by_row, length, length, Band(), config.drop_diagonal, positions)
