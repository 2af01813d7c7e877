"""The module of a static pattern in one attention layer: no state, its plans cached."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache

import torch
from torch import Tensor

from sa_hf.config import SparseAttention
from sa_hf.layer import AttentionInputs, Geometry
from sa_hf.ops.cpp.steps import PreparedStep, missing_key
from sa_hf.ops.decode import decode_attention, runs_in_place
from sa_hf.ops.parts import ScoreOptions
from sa_hf.ops.reads import Reads, RunLists, runs_of
from sa_hf.ops.sequences import Sequences
from sa_hf.patterns.base import StaticPatternConfig
from sa_hf.patterns.custom_op import cached_plan, layer_key, static_attention
from sa_hf.patterns.image_blocks import with_blocks
from sa_hf.patterns.steps import is_step, run_step, step_reads

DECODE_CACHED = 4096


def static_options(
    query: Tensor, scale: float, dropout: float, heads: tuple[int, ...] | None = None
) -> ScoreOptions:  # fmt: skip
    """The options of a bare call."""
    return ScoreOptions(scale, dropout=dropout, seed=dropout_seed(query, dropout), heads=heads)


def dropout_seed(query: Tensor, dropout: float) -> Tensor | None:
    """One seed of a call's dropout, drawn from torch's generator."""
    return torch.randint(2**62, (), device=query.device) if dropout > 0 else None


def score_options(inputs: AttentionInputs, heads: tuple[int, ...] | None = None) -> ScoreOptions:
    """The options of one call of a layer; checkpointing restores the generator that the dropout seed is drawn from."""
    return ScoreOptions(
        inputs.scale,
        inputs.softcap,
        inputs.distance_bias,
        dropout=inputs.dropout,
        seed=dropout_seed(inputs.query, inputs.dropout),
        extra_tokens=inputs.sequences.extra_tokens,
        heads=heads,
        sinks=inputs.sinks,
        query_term=inputs.query_term,
        key_term=inputs.key_term,
    )


class StaticSparseAttention(SparseAttention):
    """Runs a :class:`StaticPatternConfig`."""

    config: StaticPatternConfig

    def forward(self, inputs: AttentionInputs) -> Tensor:
        options = score_options(inputs, self.heads)
        out = self._attend(inputs, options)
        if inputs.blocks is None:
            return out
        return with_blocks(out, inputs, self.config, self._at(inputs), options)

    def _at(self, inputs: AttentionInputs) -> Geometry:
        layer = self.config.layer_of_plan(self.spec.layer_idx)
        return Geometry(1, 1, self.heads, self.spec.num_heads, layer, inputs.causal, inputs.band, chunk=inputs.chunk)

    def _attend(self, inputs: AttentionInputs, options: ScoreOptions) -> Tensor:
        if is_step(inputs):
            at = self._at(inputs)
            if runs_in_place(inputs.query, inputs.key, inputs.value, options, inputs.engine):
                reads = static_reads(self.config, at, inputs.sequences)
                return run_step(inputs, reads, options)
            index = _index_on(self.config, at, inputs.sequences, inputs.query.device)
            if inputs.key_slots is not None:
                index = _places(index, inputs.key_slots)
            return decode_attention(inputs.query, inputs.key, inputs.value, index, options, inputs.engine)
        key = layer_key(
            self.config, self.heads, self.spec.num_heads, self.spec.layer_idx, inputs.causal, inputs.band,
            inputs.engine, inputs.chunk,
        )  # fmt: skip
        return static_attention(inputs.query, inputs.key, inputs.value, inputs.sequences, key, options)

    def repeated(self, earlier: SparseAttention, step: PreparedStep, inputs: AttentionInputs) -> PreparedStep | None:
        return step.relisted(static_reads(self.config, self._at(inputs), inputs.sequences))

    def reads_listed_keys(self, inputs: AttentionInputs) -> bool:
        return is_step(inputs)


StaticPatternConfig.runs_in = StaticSparseAttention


def _places(index: Tensor, key_slots: Tensor) -> Tensor:
    """Where the listed slots stand among those that a cache kept; every listed one must be there."""
    places = torch.searchsorted(key_slots, index.clamp(min=0)).clamp(max=max(0, len(key_slots) - 1))
    if bool(((key_slots[places] != index) & (index >= 0)).any()):
        raise missing_key()
    return places.where(index >= 0, -1)


@lru_cache(maxsize=DECODE_CACHED)
def _row(config: StaticPatternConfig, at: Geometry, position: int) -> Tensor:
    """What the query at ``position`` reads, int64 ``[H | 1, keys]``, -1 where a head reads fewer."""
    geometry = replace(at, key_length=position + 1)
    rows = config.decode_keys(position, geometry)
    rows = rows[:1] if config.same_for_all_heads(geometry) else rows
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=-1)


# The layers of a step share what they read.
@lru_cache(maxsize=64)
def static_reads(config: StaticPatternConfig, at: Geometry, sequences: Sequences) -> Reads:
    """What the new queries of causal sequences read."""
    alone = config.drop_diagonal and not config.extra_tokens
    return step_reads(
        sequences, at.band.left, lambda i: _run_lists(config, at, max(i, config.runs_serve(i))), skip_own=alone,
        chunk=at.chunk,
    )  # fmt: skip


@lru_cache(maxsize=DECODE_CACHED)
def _run_lists(config: StaticPatternConfig, at: Geometry, position: int) -> RunLists:
    geometry = replace(at, key_length=position + 1)
    heads = at.heads[:1] if config.same_for_all_heads(geometry) else at.heads
    if type(config).decode_keys is not StaticPatternConfig.decode_keys:  # says itself what is read
        return RunLists.of([runs_of(keys) for keys in config.decode_keys(position, geometry)[: len(heads)]])
    return RunLists.of([config.row_runs(head, position, geometry) for head in heads])


def _index_on(config: StaticPatternConfig, at: Geometry, sequences: Sequences, device: torch.device) -> Tensor:
    if sequences.extra_tokens or not sequences.is_full:
        return decode_index(config, at, sequences).to(device)
    return _whole_index(config, at, sequences.query_length, sequences.key_length, device)


# The layers of a step share one index, and one copy to the device.
@lru_cache(maxsize=64)
def _whole_index(
    config: StaticPatternConfig, at: Geometry, query_length: int, key_length: int, device: torch.device
) -> Tensor:  # fmt: skip
    return decode_index(config, at, Sequences.full(1, query_length, key_length)).to(device)


def decode_index(config: StaticPatternConfig, at: Geometry, sequences: Sequences) -> Tensor:
    """Key slots that each new query reads, int64 ``[B | 1, H | 1, Nq, keys]``; -1 is an empty place, and a query slot
    of padding has no key."""
    spans = sequences.spans[:1] if sequences.is_full else sequences.spans
    rows: list[tuple[int, int, Tensor]] = []
    for span in spans:
        first = span.key_length - span.query_length
        for new in range(span.query_length):
            keys = _row(config, at, first + new)
            slots = torch.where(keys >= 0, keys + span.key_start, -1)
            query = span.query_start + new
            if sequences.key_gather is not None and sequences.query_gather is not None:
                order = sequences.key_gather[span.row].cpu()
                slots = torch.where(keys >= 0, order[slots.clamp(min=0)], -1)
                query = int(sequences.query_gather[span.row, query])
            rows.append((span.row, query, slots))
    heads = max((slots.shape[0] for _, _, slots in rows), default=1)
    width = max((slots.shape[1] for _, _, slots in rows), default=1)
    index = torch.full((1 if sequences.is_full else sequences.batch_size, heads, sequences.query_length, width), -1)
    for row, query, slots in rows:
        index[row, :, query, : slots.shape[1]] = slots
    return index


__all__ = ["StaticSparseAttention", "cached_plan", "score_options"]
