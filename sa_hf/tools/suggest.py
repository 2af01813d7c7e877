"""Which pattern for which model and length: cost by counting pairs, and the attention mass that a pattern keeps."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sa_hf.config import SparseAttentionConfig, pattern_class
from sa_hf.errors import SparseAttentionError
from sa_hf.ops.counts import kept_pairs
from sa_hf.patterns.base import Geometry, StaticPatternConfig, dense_multiplicity, finished_plan

# What each pattern is for, from its paper's own tasks.
PURPOSE = {
    "sliding_window": "local text, streaming with sinks",
    "bigbird": "long documents, question answering",
    "longnet": "very long text, any distance at falling resolution",
    "logsparse": "time series and signals, few keys per row",
    "sparse_transformer": "images, audio, code: fixed strides",
    "star": "short texts with a global summary",
}


@dataclass(frozen=True)
class Suggestion:
    """One candidate: kept pairs relative to dense; the dense model's attention mass on them (None: unmeasured)."""

    config: SparseAttentionConfig
    density: float
    mass: float | None
    purpose: str


def candidates(causal: bool, length: int) -> Iterator[StaticPatternConfig]:
    """Static patterns in their published shapes that make sense at a length."""
    for name in PURPOSE:
        variants: dict[str, list[dict[str, Any]]] = {
            "sparse_transformer": [{"kind": "fixed"}, {"kind": "strided"}],
            "star": [{"ring": not causal}],
        }
        for fields in variants.get(name, [{}]):
            config = pattern_class(name)(**fields)
            if isinstance(config, StaticPatternConfig):
                yield config


def suggest(
    *, num_heads: int, causal: bool, length: int, attention: list[Tensor] | None = None, max_density: float = 0.5
) -> list[Suggestion]:
    """Candidates at a length, the best first: by attention mass where it was measured, else by cost.

    Args:
        attention: the dense model's probabilities per layer, ``[B, H, n, n]``, on real text of one length.
        max_density: leave out patterns that keep more than this share of the dense pairs.

    Raises:
        SparseAttentionError: the length is below 1.
    """
    if length < 1:
        raise SparseAttentionError(f"length={length} must be at least 1; nearest: 1")
    dense = num_heads * (length * (length + 1) // 2 if causal else length * length)
    found = []
    for config in candidates(causal, length):
        geometry = Geometry(length, length, tuple(range(num_heads)), num_heads, 0, causal)
        density = kept_pairs(finished_plan(config, geometry, torch.device("cpu")), length, num_heads) / dense
        if density <= max_density:
            mass = None if attention is None else attention_mass(config, attention, causal)
            found.append(Suggestion(config, density, mass, PURPOSE[config.name]))
    return sorted(found, key=lambda s: (-(s.mass or 0.0), s.density))


def attention_mass(config: StaticPatternConfig, attention: list[Tensor], causal: bool) -> float:
    """Share of the dense model's attention probability that falls on the pattern's pairs, mean over layers and rows."""
    shares = []
    for layer, probabilities in enumerate(attention):
        heads, length = probabilities.shape[1], probabilities.shape[-1]
        geometry = Geometry(length, length, tuple(range(heads)), heads, layer, causal)
        kept = (dense_multiplicity(config, geometry) > 0).to(probabilities.device)
        shares.append((probabilities * kept).sum(-1).mean())
    return float(torch.stack(shares).mean())


def dense_attention_of(model: Any, input_ids: Tensor) -> list[Tensor]:
    """The probabilities of every self-attention layer of an unpatched encoder or decoder, by its eager attention."""
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")
    try:
        with torch.no_grad():
            output = model(input_ids=input_ids, output_attentions=True)
    finally:
        model.set_attn_implementation(before)
    return list(output.attentions)
