"""Expire-Span: the corridor is solved with a memory far below its length."""

from __future__ import annotations

from typing import Any

import torch

import sa_hf
from sa_hf.patterns.expire_span import ExpireSpanAttentionConfig
from sa_hf.tasks.source import EVALUATION_SEEDS
from sa_hf.tools.claims.claim import Claim, Figures
from sa_hf.tools.claims.longnet_segments import BATCH, CORRIDOR, LENGTH, ROWS, SOLVED, corridor_batch
from sa_hf.tools.claims.small import right, small_decoder, train

SMALL = 0.25  # of the corridor's tokens
TAUGHT = "span loss 3e-4"


def solved_with(variant: Any, seed: int, steps: int) -> Figures:
    config = ExpireSpanAttentionConfig(max_span=LENGTH, ramp=8, span_loss_coef=variant)
    model = small_decoder(CORRIDOR.vocab_size, LENGTH, config, seed)
    train(model, lambda step: corridor_batch(CORRIDOR, BATCH, seed * 10**6 + step), steps, 3e-3)
    ids, labels = corridor_batch(CORRIDOR, ROWS, seed + EVALUATION_SEEDS)
    return {"accuracy": right(model, ids, labels), "share of the keys kept": _kept(model, ids[:1, : LENGTH - 1])}


@torch.no_grad()
def _kept(model: Any, ids: torch.Tensor) -> float:
    """Tokens that the cache holds before the answer, mean over layers, over those that there were."""
    cache = sa_hf.sparse_cache(model)
    for at in range(ids.shape[1]):
        model(input_ids=ids[:, at : at + 1], past_key_values=cache, use_cache=True)
    kept = [int(layer.keys.shape[-2]) for layer in cache.layers]
    return sum(kept) / len(kept) / ids.shape[1]


EXPIRE_CORRIDOR = Claim(
    name="expire_corridor",
    system="expire_span",
    statement="A corridor is solved with a memory far below its length (section 5.1).",
    setting=f"corridor of {LENGTH} tokens and 4 colours, decoder of 2 layers and width 64, ramp 8, {ROWS} rows "
    "evaluated; memory: keys in `sparse_cache` before the answer, mean over layers",
    variants={TAUGHT: 3e-4, "no span loss": 0.0},
    measure=solved_with,
    steps=400,
    holds=lambda figures: figures[TAUGHT]["accuracy"] >= SOLVED and figures[TAUGHT]["share of the keys kept"] <= SMALL,
    rule=f"with the span loss the accuracy reaches {SOLVED:.0%} and at most {SMALL:.0%} of the keys are kept",
    tried="a span loss of 1e-3, with which one of the seeds 0 to 2 stayed below the bar; 3e-4 was chosen on the seeds "
    "3 to 5",
)
