"""The module of a static pattern in one attention layer: no state, its plans cached."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from sa_hf.ops.attend import attend
from sa_hf.ops.engine import choose_engine
from sa_hf.ops.parts import Part, ScoreOptions
from sa_hf.patterns.base import AttentionInputs, Geometry, SparseAttention, StaticPatternConfig, finished_plan

# Plans of one model: at most (distinct layers) x (distinct lengths) of a run; the oldest go first.
PLANS_CACHED = 256


@lru_cache(maxsize=PLANS_CACHED)
def cached_plan(config: StaticPatternConfig, geometry: Geometry, device: torch.device) -> tuple[Part, ...]:
    """The plan of a geometry; layers and calls share it."""
    with torch.no_grad():
        return tuple(finished_plan(config, geometry, device))


def score_options(inputs: AttentionInputs, heads: tuple[int, ...] | None = None) -> ScoreOptions:
    """The options of one call; with dropout, one seed is drawn from torch's generator (checkpointing restores it)."""
    seed = None
    if inputs.dropout > 0:
        seed = torch.randint(2**62, (), device=inputs.query.device)
    return ScoreOptions(
        scale=inputs.scale,
        softcap=inputs.softcap,
        distance_bias=inputs.distance_bias,
        dropout=inputs.dropout,
        seed=seed,
        extra_tokens=inputs.sequences.extra_tokens,
        heads=heads,
    )


class StaticSparseAttention(SparseAttention):
    """Runs a :class:`StaticPatternConfig`."""

    config: StaticPatternConfig

    def forward(self, inputs: AttentionInputs) -> Tensor:
        options = score_options(inputs, self.heads)
        engine = choose_engine(inputs.engine, inputs.query, options)
        device = inputs.query.device

        def plan_for(query_length: int, key_length: int) -> tuple[Part, ...]:
            return cached_plan(self.config, self.geometry(inputs, query_length, key_length), device)

        return attend(inputs.query, inputs.key, inputs.value, inputs.sequences, plan_for, options, engine)
