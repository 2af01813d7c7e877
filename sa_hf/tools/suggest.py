"""Which pattern for which model and length: cost by counting pairs, and the attention mass that a pattern keeps."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import torch
from torch import Tensor

from sa_hf.config import SparseAttentionConfig, available_patterns
from sa_hf.errors import SparseAttentionError
from sa_hf.layer import Geometry
from sa_hf.ops.counts import kept_pairs
from sa_hf.patterns.base import StaticPatternConfig, finished_plan
from sa_hf.patterns.block_topk import BlockTopKAttentionConfig
from sa_hf.patterns.dense import DenseAttentionConfig
from sa_hf.patterns.expire_span import ExpireSpanAttentionConfig
from sa_hf.patterns.routing import RoutingAttentionConfig
from sa_hf.patterns.sparsebert import SparseBertAttentionConfig
from sa_hf.tools.attention_rows import Measured, layers_kept, mean_of

# Patterns whose pairs can be counted, or the most that they can be, and measured on a model that was not trained with
# them (routing by the clusters that its training would start from on the text).
Candidate: TypeAlias = StaticPatternConfig | BlockTopKAttentionConfig | RoutingAttentionConfig
# What each pattern is for, from its paper's own tasks.
PURPOSE = {
    "sliding_window": "local text, streaming with sinks",
    "bigbird": "long documents, question answering",
    "longnet": "very long text, any distance at falling resolution",
    "logsparse": "time series and signals, few keys per row",
    "sparse_transformer": "images, audio, code: fixed strides",
    "star": "short texts with a global summary",
    "block_topk": "retrieval: blocks chosen by content",
    "routing": "themes that come back: clusters by content",
}
MAX_DENSITY = 0.5  # a pattern that keeps more of the dense pairs saves too little to be worth its loss

DEFAULT_TOKENS = 2048  # dense attention runs once, in linear memory and quadratic time


@dataclass(frozen=True)
class Suggestion:
    """One candidate: pairs computed at the wanted length relative to dense, and what was measured on a text, if so."""

    config: SparseAttentionConfig
    density: float
    measured: Measured | None
    purpose: str

    @property
    def rank(self) -> tuple[float, float]:
        """Smaller is better: by gain where there is one, then by cost."""
        gain = None if self.measured is None else self.measured.gain
        return (1.0 if gain is None else -gain, self.density)


@dataclass(frozen=True)
class Stack:
    """One stack of self-attention of a model, and what patterns keep of each of its layers on a text, if measured."""

    name: str
    num_heads: int
    causal: bool
    layers: list[dict[SparseAttentionConfig, Measured]] | None = None

    def measured(self) -> dict[SparseAttentionConfig, Measured] | None:
        """What each pattern keeps, the mean over layers."""
        if not self.layers:
            return None
        return {config: mean_of([layer[config] for layer in self.layers]) for config in self.layers[0]}


def candidates(causal: bool) -> Iterator[Candidate]:
    """Patterns in their published shapes whose pairs, or the most that they can be, are known before training, those
    that a user registered included: static ones, blocks chosen by content, and clusters."""
    for name, cls in available_patterns().items():
        variants: dict[str, list[dict[str, Any]]] = {
            "sparse_transformer": [{"kind": "fixed"}, {"kind": "strided"}],
            "star": [{"ring": not causal}],
            "block_topk": [{"num_window_blocks": 2 if causal else 3}],
        }
        for fields in variants.get(name, [{}]):
            config = cls(**fields)
            if isinstance(config, Candidate) and not isinstance(config, DenseAttentionConfig):
                yield config


def suggest(
    *,
    num_heads: int,
    causal: bool,
    length: int,
    measured: Mapping[SparseAttentionConfig, Measured] | None = None,
    max_density: float = MAX_DENSITY,
) -> list[Suggestion]:
    """Candidates at a length, the best first: by the attention mass gained where it was measured, else by cost.

    Args:
        measured: what patterns keep of the model's attention on a text.
        max_density: leave out patterns that keep more than this share of the dense pairs.

    Raises:
        SparseAttentionError: the length is below 1.
    """
    if length < 1:
        raise SparseAttentionError(f"length={length} must be at least 1; nearest: 1")
    found = []
    for config in candidates(causal):
        density = density_of(config, num_heads, causal, length)
        if density <= max_density:
            kept = None if measured is None else measured.get(config)
            found.append(Suggestion(config, density, kept, PURPOSE.get(config.name, "")))
    return sorted(found, key=lambda s: s.rank)


def density_of(config: Candidate, num_heads: int, causal: bool, length: int) -> float:
    """Pairs that a layer computes, over those of dense attention; of blocks and clusters the most that it can."""
    if isinstance(config, BlockTopKAttentionConfig):
        width = min(length, (config.top_k + config.num_window_blocks + config.num_sink_blocks) * config.block_size)
        return (_window_pairs(length, width) if causal else length * width) / dense_pairs(length, causal)
    if isinstance(config, RoutingAttentionConfig):
        window = min(length, config.cluster_window(length, causal))
        pairs = _window_pairs(length, window) if causal else config.num_clusters * window * window
        if not causal and config.fallback_local:  # the clusters may all have the same members
            pairs += (length - window) * min(length, config.local_window)
        return min(pairs / dense_pairs(length, causal), 1.0)
    geometry = Geometry(length, length, tuple(range(num_heads)), num_heads, 0, causal)
    kept = kept_pairs(finished_plan(config, geometry, torch.device("cpu")), length, num_heads)
    return kept / (num_heads * dense_pairs(length, causal))


def dense_pairs(length: int, causal: bool) -> int:
    return length * (length + 1) // 2 if causal else length * length


def left_out(found: list[Suggestion], *, num_heads: int, causal: bool, length: int) -> list[tuple[str, str]]:
    """The patterns that have no row in ``found``, and why: (name, reason)."""
    ranked = {s.config.name for s in found}
    too_many = {c.name: density_of(c, num_heads, causal, length) for c in candidates(causal)}
    reasons = []
    for name, cls in available_patterns().items():
        if name in ranked or cls is DenseAttentionConfig:
            continue
        if name in too_many:
            reasons.append((name, f"keeps {too_many[name]:.0%} of the dense pairs at {length} tokens"))
        else:
            reasons.append((name, _why_not_ranked(cls(), causal, length)))
    return reasons


def _why_not_ranked(config: SparseAttentionConfig, causal: bool, length: int) -> str:
    """Of a pattern that learns: what decides which pairs it keeps, and how many those can be."""
    dense = dense_pairs(length, causal)
    if isinstance(config, ExpireSpanAttentionConfig):
        if not causal:
            return "causal only"
        share = _window_pairs(length, config.max_span + config.ramp) / dense
        return f"learns its spans: at most {share:.3f} of the dense pairs, fewer once trained; max_span sets the bound"
    if isinstance(config, SparseBertAttentionConfig):
        return "searches for its mask densely; frozen (freeze_masks), it costs what it has learned to keep"
    return f"what it keeps depends on training or data; `sa-hf bench {config.name}` times it"


def _window_pairs(length: int, window: int) -> int:
    """Pairs of a causal window."""
    full = min(length, window)
    return full * (full + 1) // 2 + (length - full) * full


def stacks_of(
    model: Any, input_ids: Tensor | None = None, configs: Sequence[SparseAttentionConfig] | None = None
) -> list[Stack]:
    """The stacks of an unpatched model, encoder before decoder, with what patterns keep of their attention.

    Args:
        input_ids: a text, int64 ``[1, n]``; None measures nothing.
        configs: the patterns to measure; None is the candidates of each stack.

    Raises:
        UnsupportedModelError: the model's attention cannot be made sparse.
    """
    from sa_hf.hf.patching.families import find_sites

    found = find_sites(model).stacks
    stacks = []
    for name in sorted(found, reverse=True):
        spec = found[name][0].spec
        stacks.append(Stack(name, spec.num_heads, spec.causal))
    if input_ids is None:
        return stacks
    wanted = list(dict.fromkeys(configs or (c for s in stacks for c in candidates(s.causal))))
    measured = layers_kept(model, input_ids, wanted)
    return [replace(stack, layers=measured.get(stack.name)) for stack in stacks]


def tokens_to_measure(limit: int | None, tokens: int | None) -> int:
    """How many tokens of a text to measure on: as asked, else 2,048 or the model's limit.

    Raises:
        SparseAttentionError: fewer than 2, or more than the model takes.
    """
    if tokens is None:
        return DEFAULT_TOKENS if limit is None else min(DEFAULT_TOKENS, limit)
    if tokens < 2:
        raise SparseAttentionError(f"tokens={tokens} must be at least 2; nearest: 2")
    if limit is not None and tokens > limit:
        raise SparseAttentionError(f"tokens={tokens} is above the model's limit of {limit}; nearest: {limit}")
    return tokens
