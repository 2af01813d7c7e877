"""Which pattern for which model and length: cost by counting pairs, and the attention mass that a pattern keeps."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sa_hf.config import SparseAttentionConfig, available_patterns
from sa_hf.errors import SparseAttentionError
from sa_hf.layer import Geometry
from sa_hf.ops.counts import kept_pairs
from sa_hf.patterns.base import StaticPatternConfig, dense_multiplicity, finished_plan, whole_geometry
from sa_hf.patterns.block_topk import BlockTopKAttentionConfig
from sa_hf.patterns.dense import DenseAttentionConfig
from sa_hf.patterns.expire_span import ExpireSpanAttentionConfig
from sa_hf.patterns.routing import RoutingAttentionConfig
from sa_hf.patterns.sparsebert import SparseBertAttentionConfig

# What each pattern is for, from its paper's own tasks.
PURPOSE = {
    "sliding_window": "local text, streaming with sinks",
    "bigbird": "long documents, question answering",
    "longnet": "very long text, any distance at falling resolution",
    "logsparse": "time series and signals, few keys per row",
    "sparse_transformer": "images, audio, code: fixed strides",
    "star": "short texts with a global summary",
}
MAX_DENSITY = 0.5  # a pattern that keeps more of the dense pairs saves too little to be worth its loss

DEFAULT_TOKENS = 512  # dense attention of every layer is held: it grows with the square
# A pattern that keeps more than this share of each measured row keeps its mass, too, whatever its shape.
TRIVIAL_DENSITY = 0.9


@dataclass(frozen=True)
class Measured:
    """What a pattern keeps of ``length`` measured tokens.

    ``density``: its share of the dense pairs; ``mass``: its share of the dense model's attention probability, mean over
    rows; ``chance``: the mass that it would keep of even attention, the mean over rows of their kept share.
    """

    length: int
    density: float
    mass: float
    chance: float

    @property
    def gain(self) -> float | None:
        """How far the mass exceeds that of as many pairs chosen blindly, 0, on the way to all of it, 1; None where
        nearly all pairs are kept."""
        return None if self.chance > TRIVIAL_DENSITY else (self.mass - self.chance) / (1 - self.chance)


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
    """One stack of self-attention of a model, and the dense probabilities of its layers on a text, if measured."""

    name: str
    num_heads: int
    causal: bool
    attention: list[Tensor] | None = None


def candidates(causal: bool, length: int) -> Iterator[StaticPatternConfig]:
    """Static patterns in their published shapes that make sense at a length, those that a user registered included."""
    for name, cls in available_patterns().items():
        variants: dict[str, list[dict[str, Any]]] = {
            "sparse_transformer": [{"kind": "fixed"}, {"kind": "strided"}],
            "star": [{"ring": not causal}],
        }
        for fields in variants.get(name, [{}]):
            config = cls(**fields)
            if isinstance(config, StaticPatternConfig) and not isinstance(config, DenseAttentionConfig):
                yield config


def suggest(
    *,
    num_heads: int,
    causal: bool,
    length: int,
    attention: list[Tensor] | None = None,
    max_density: float = MAX_DENSITY,
) -> list[Suggestion]:
    """Candidates at a length, the best first: by the attention mass gained where it was measured, else by cost.

    Args:
        attention: the dense model's probabilities per layer, ``[B, H, n, n]``, on real text of one length.
        max_density: leave out patterns that keep more than this share of the dense pairs.

    Raises:
        SparseAttentionError: the length is below 1.
    """
    if length < 1:
        raise SparseAttentionError(f"length={length} must be at least 1; nearest: 1")
    found = []
    for config in candidates(causal, length):
        density = density_of(config, num_heads, causal, length)
        if density <= max_density:
            measured = None if attention is None else measure(config, attention, causal)
            found.append(Suggestion(config, density, measured, PURPOSE.get(config.name, "")))
    return sorted(found, key=lambda s: s.rank)


def density_of(config: StaticPatternConfig, num_heads: int, causal: bool, length: int) -> float:
    """Pairs that a layer computes, over those of dense attention."""
    geometry = Geometry(length, length, tuple(range(num_heads)), num_heads, 0, causal)
    kept = kept_pairs(finished_plan(config, geometry, torch.device("cpu")), length, num_heads)
    return kept / (num_heads * dense_pairs(length, causal))


def dense_pairs(length: int, causal: bool) -> int:
    return length * (length + 1) // 2 if causal else length * length


def left_out(found: list[Suggestion], *, num_heads: int, causal: bool, length: int) -> list[tuple[str, str]]:
    """The patterns that have no row in ``found``, and why: (name, reason)."""
    ranked = {s.config.name for s in found}
    too_many = {c.name: density_of(c, num_heads, causal, length) for c in candidates(causal, length)}
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
    if isinstance(config, RoutingAttentionConfig):
        window = min(length, config.cluster_window(length, causal))
        pairs = _window_pairs(length, window) if causal else config.num_clusters * window * window
        share = min(pairs / dense, 1.0)
        return f"clusters by content: at most {share:.3f} of the dense pairs; num_clusters and window set the bound"
    if isinstance(config, BlockTopKAttentionConfig):
        blocks = config.top_k + config.num_window_blocks + config.num_sink_blocks
        share = min(1.0, _window_pairs(length, blocks * config.block_size) / dense)
        return f"chooses blocks by content: at most {share:.3f} of the dense pairs; top_k and block_size set the bound"
    if isinstance(config, SparseBertAttentionConfig):
        return "searches for its mask densely; frozen (freeze_masks), it costs what it has learned to keep"
    return f"what it keeps depends on training or data; `sa-hf bench {config.name}` times it"


def _window_pairs(length: int, window: int) -> int:
    """Pairs of a causal window."""
    full = min(length, window)
    return full * (full + 1) // 2 + (length - full) * full


def measure(config: StaticPatternConfig, attention: list[Tensor], causal: bool) -> Measured:
    """A pattern's share of the pairs and of the probability, at the length of the given attention."""
    heads, length = attention[0].shape[1], attention[0].shape[-1]
    kept = config.row_sizes(whole_geometry(length, heads, 0, causal)).double()
    # A causal row has few pairs at its start: its share of them is not the share of all pairs.
    dense = torch.arange(1, length + 1) if causal else torch.full((length,), length)
    density, chance = float(kept.sum() / (dense.sum() * heads)), float((kept / dense).mean())
    return Measured(length, density, attention_mass(config, attention, causal), chance)


def attention_mass(config: StaticPatternConfig, attention: list[Tensor], causal: bool) -> float:
    """Share of the dense model's attention probability that falls on the pattern's pairs, mean over layers and rows."""
    shares = []
    for layer, probabilities in enumerate(attention):
        heads, length = probabilities.shape[1], probabilities.shape[-1]
        geometry = Geometry(length, length, tuple(range(heads)), heads, layer, causal)
        kept = (dense_multiplicity(config, geometry) > 0).to(probabilities.device)
        shares.append((probabilities * kept).sum(-1).mean())
    return float(torch.stack(shares).mean())


def stacks_of(model: Any, input_ids: Tensor | None = None) -> list[Stack]:
    """The stacks of an unpatched model, encoder before decoder, with their attention on ``input_ids`` where given.

    Raises:
        UnsupportedModelError: the model's attention cannot be made sparse.
    """
    from sa_hf.hf.patching.families import find_sites

    found = find_sites(model).stacks
    attention = {} if input_ids is None else dense_attention_of(model, input_ids)
    stacks = []
    for name in sorted(found, reverse=True):
        spec = found[name][0].spec
        # A model of one stack gives its attention without a name.
        stacks.append(Stack(name, spec.num_heads, spec.causal, attention.get(name, attention.get(""))))
    return stacks


def dense_attention_of(model: Any, input_ids: Tensor) -> dict[str, list[Tensor]]:
    """The probabilities of every self-attention layer of an unpatched model, by its eager attention: ``{"": layers}``,
    of an encoder-decoder model ``{"encoder": layers, "decoder": layers}``, both on the same text."""
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")
    both = bool(model.config.is_encoder_decoder)
    try:
        with torch.no_grad():
            inputs = {"input_ids": input_ids, **({"decoder_input_ids": input_ids} if both else {})}
            output = model(**inputs, output_attentions=True)
    finally:
        model.set_attn_implementation(before)
    if both:
        return {"encoder": list(output.encoder_attentions), "decoder": list(output.decoder_attentions)}
    return {"": list(output.attentions)}


def tokens_to_measure(limit: int | None, tokens: int | None) -> int:
    """How many tokens of a text to measure on: as asked, else 512 or the model's limit.

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
