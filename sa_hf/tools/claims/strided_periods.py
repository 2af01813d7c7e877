"""Sparse Transformer: strided attention wins on data of period l, fixed attention on text."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from sa_hf.patterns.sparse_transformer import SparseTransformerAttentionConfig
from sa_hf.tasks.source import EVALUATION_SEEDS
from sa_hf.tools.claims.claim import Claim, Figures
from sa_hf.tools.claims.small import BYTES, loss, shuffled, small_decoder, source_rows, train

PERIOD, REACH, TOKENS, EACH, HELD_OUT = 32, 256, 16, 16, 128
REPEATS = 0.9  # chance of a token to be the one a period before
KINDS = {
    "sparse_transformer, strided": SparseTransformerAttentionConfig(kind="strided", stride=PERIOD),
    "sparse_transformer, fixed": SparseTransformerAttentionConfig(kind="fixed", stride=PERIOD, summary=8),
}
SHOWN = f"strided keeps {KINDS['sparse_transformer, strided'].density(REACH, causal=True):.0%} of the pairs, fixed "
SHOWN += f"{KINDS['sparse_transformer, fixed'].density(REACH, causal=True):.0%}"


def periodic(count: int, seed: int) -> Tensor:
    """Rows of tokens that mostly repeat those a period before, int64 ``[count, REACH]``."""
    generator = torch.Generator().manual_seed(seed)
    fresh = 1 + torch.randint(TOKENS, (count, REACH), generator=generator)
    repeats = torch.rand(count, REACH, generator=generator) < REPEATS
    for at in range(PERIOD, REACH):
        fresh[:, at] = torch.where(repeats[:, at], fresh[:, at - PERIOD], fresh[:, at])
    return fresh


def measure_periods(config: Any, seed: int, steps: int) -> Figures:
    model = small_decoder(1 + TOKENS, REACH, config, seed)

    def batch(step: int) -> tuple[Tensor, Tensor]:
        ids = periodic(EACH, seed * 10**6 + step)
        return ids, ids

    train(model, batch, steps, 3e-3)
    return {"loss, nats": loss(model, periodic(HELD_OUT, seed + EVALUATION_SEEDS))}


def measure_text(config: Any, seed: int, steps: int) -> Figures:
    model = small_decoder(BYTES, REACH, config, seed)
    rows = shuffled(source_rows("train", REACH, EACH * steps), EACH, seed)
    train(model, lambda step: (rows(step), rows(step)), steps, 3e-3)
    return {"bits per byte": loss(model, source_rows("evaluation", REACH, HELD_OUT)) / math.log(2)}


STRIDED_PERIODS = Claim(
    name="strided_periods",
    system="sparse_transformer",
    statement="On data of period l, strided attention of stride l beats fixed (section 4.3).",
    setting=f"{REACH} tokens of {TOKENS} kinds, each with chance {REPEATS:g} the one {PERIOD} before, stride "
    f"{PERIOD}, decoder of 2 layers and width 64; {SHOWN}; loss of the second half of {HELD_OUT} rows",
    variants=KINDS,
    measure=measure_periods,
    steps=250,
    holds=lambda figures: (
        figures["sparse_transformer, strided"]["loss, nats"] < figures["sparse_transformer, fixed"]["loss, nats"] - 0.1
    ),
    rule="strided's loss is lower by more than 0.1 nats",
)
FIXED_TEXT = Claim(
    name="fixed_text",
    system="sparse_transformer",
    statement="On text, fixed attention beats strided (section 4.3 and table 2).",
    setting=f"{REACH} bytes of the standard library's source, stride {PERIOD}, decoder of 2 layers and width 64; "
    f"{SHOWN}; the second half of {HELD_OUT} held-out rows",
    variants=KINDS,
    measure=measure_text,
    steps=250,
    holds=lambda figures: (
        figures["sparse_transformer, fixed"]["bits per byte"] < figures["sparse_transformer, strided"]["bits per byte"]
    ),
    rule="fixed's bits per byte are lower",
)
