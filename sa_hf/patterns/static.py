"""The module of a static pattern in one attention layer: no state, its plans cached."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from sa_hf.ops.parts import ScoreOptions
from sa_hf.patterns.base import AttentionInputs, SparseAttention, StaticPatternConfig
from sa_hf.patterns.custom_op import cached_plan, layer_key, static_attention


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
        layer = layer_key(
            self.config, self.heads, self.spec.num_heads, self.spec.layer_idx, inputs.causal, inputs.band, inputs.engine
        )  # fmt: skip
        options = score_options(inputs, self.heads)
        return static_attention(inputs.query, inputs.key, inputs.value, inputs.sequences, layer, options)


__all__ = ["StaticSparseAttention", "cached_plan", "score_options"]
