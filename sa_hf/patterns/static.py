"""The module of a static pattern in one attention layer: no state, its plans cached."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache

import torch
from torch import Tensor

from sa_hf.ops.parts import ScoreOptions
from sa_hf.ops.sequences import Sequences
from sa_hf.patterns.base import AttentionInputs, Geometry, SparseAttention, StaticPatternConfig
from sa_hf.patterns.custom_op import cached_plan, layer_key, static_attention

# Up to this many new queries read their keys by lists of positions; above it (prefill in chunks) a plan is cheaper.
DECODE_QUERIES = 16
DECODE_CACHED = 4096


def static_options(query: Tensor, scale: float, dropout: float) -> ScoreOptions:
    """The options of a bare call; with dropout, one seed is drawn from torch's generator."""
    seed = torch.randint(2**62, (), device=query.device) if dropout > 0 else None
    return ScoreOptions(scale, dropout=dropout, seed=seed)


def score_options(inputs: AttentionInputs, heads: tuple[int, ...] | None = None) -> ScoreOptions:
    """The options of one call of a layer; checkpointing restores the generator that the dropout seed is drawn from."""
    return replace(
        static_options(inputs.query, inputs.scale, inputs.dropout),
        softcap=inputs.softcap,
        distance_bias=inputs.distance_bias,
        extra_tokens=inputs.sequences.extra_tokens,
        heads=heads,
    )


class StaticSparseAttention(SparseAttention):
    """Runs a :class:`StaticPatternConfig`."""

    config: StaticPatternConfig

    def forward(self, inputs: AttentionInputs) -> Tensor:
        new, held = inputs.query.shape[2], inputs.key.shape[2]
        if inputs.causal and new < held and new <= DECODE_QUERIES and inputs.dropout == 0:
            return self._decode(inputs)
        layer = layer_key(
            self.config, self.heads, self.spec.num_heads, self.spec.layer_idx, inputs.causal, inputs.band, inputs.engine
        )  # fmt: skip
        options = score_options(inputs, self.heads)
        return static_attention(inputs.query, inputs.key, inputs.value, inputs.sequences, layer, options)

    def _decode(self, inputs: AttentionInputs) -> Tensor:
        """A few new queries against a long cache: each reads its own keys and no others."""
        at = Geometry(1, 1, self.heads, self.spec.num_heads, self.spec.layer_idx, True, inputs.band)
        slots, distance = decode_index(self.config, at, inputs.sequences)
        device = inputs.query.device
        return gathered_attention(
            inputs.query, inputs.key, inputs.value, slots.to(device), distance.to(device), score_options(inputs)
        )


@lru_cache(maxsize=DECODE_CACHED)
def _row(config: StaticPatternConfig, at: Geometry, position: int) -> Tensor:
    """What the query at ``position`` reads, int64 ``[H | 1, keys]``, -1 where a head reads fewer."""
    geometry = replace(at, key_length=position + 1)
    rows = config.decode_keys(position, geometry)
    rows = rows[:1] if config.same_for_all_heads(geometry) else rows
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=-1)


def decode_index(config: StaticPatternConfig, at: Geometry, sequences: Sequences) -> tuple[Tensor, Tensor]:
    """Key slots of each new query and their distance to it (key minus query), int64 ``[B | 1, H | 1, Nq, keys]``.

    -1 is an empty place; a query slot of padding has no key.
    """
    spans = sequences.spans[:1] if sequences.is_full else sequences.spans
    rows: list[tuple[int, int, Tensor, Tensor]] = []
    for span in spans:
        first = span.key_length - span.query_length
        for new in range(span.query_length):
            keys = _row(config, at, first + new)
            slots = torch.where(keys >= 0, keys + span.key_start, -1)
            if sequences.key_gather is not None:
                order = sequences.key_gather[span.row].cpu()
                slots = torch.where(keys >= 0, order[slots.clamp(min=0)], -1)
            rows.append((span.row, span.query_start + new, slots, keys - first - new))
    batch = 1 if sequences.is_full else sequences.batch_size
    heads = max((slots.shape[0] for _, _, slots, _ in rows), default=1)
    width = max((slots.shape[1] for _, _, slots, _ in rows), default=1)
    index = torch.full((batch, heads, sequences.query_length, width), -1)
    distance = torch.zeros_like(index)
    for row, query, slots, apart in rows:
        at_query = query
        if sequences.query_gather is not None:
            at_query = int(sequences.query_gather[row, query])
        index[row, :, at_query, : slots.shape[1]] = slots
        distance[row, :, at_query, : slots.shape[1]] = apart
    return index, distance


def gathered_attention(
    query: Tensor, key: Tensor, value: Tensor, index: Tensor, distance: Tensor, options: ScoreOptions
) -> Tensor:
    """Attention of each query over its own list of key slots (repeats count); differentiable.

    Args:
        query: ``[B, H, Nq, D]``; key, value: ``[B, Hkv, Nk, D]``.
        index: int64 ``[B | 1, H | 1, Nq, keys]``, -1 where empty; distance: key minus query position, in its shape.
    """
    batch, heads, new, _ = query.shape
    group = heads // key.shape[1]
    slots = index.expand(batch, heads, new, -1)
    row = torch.arange(batch, device=query.device)[:, None, None, None]
    key_head = (torch.arange(heads, device=query.device) // group)[None, :, None, None]
    stats = torch.float64 if query.dtype == torch.float64 else torch.float32
    keys, values = (x[row, key_head, slots.clamp(min=0)].to(stats) for x in (key, value))
    scores = torch.einsum("bhqd,bhqkd->bhqk", query.to(stats), keys) * options.scale
    if options.softcap is not None:
        scores = options.softcap * torch.tanh(scores / options.softcap)
    if options.distance_bias is not None:
        centre = options.distance_bias.shape[1] // 2
        head = torch.arange(heads, device=query.device)[None, :, None, None]
        scores = scores + options.distance_bias[head, distance.expand_as(slots) + centre]
    empty = slots < 0
    scores = scores.masked_fill(empty, -torch.inf)
    # A query without a key would be 0 / 0: it gets one key of weight 0 instead.
    alone = empty.all(-1, keepdim=True)
    weights = torch.softmax(scores.masked_fill(alone, 0), dim=-1).masked_fill(empty, 0)
    return torch.einsum("bhqk,bhqkd->bhqd", weights, values).to(query.dtype)


__all__ = ["StaticSparseAttention", "cached_plan", "score_options"]
