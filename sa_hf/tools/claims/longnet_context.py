"""LongNet: the loss falls as the context grows."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from sa_hf.patterns.longnet import LongNetAttentionConfig
from sa_hf.tasks.source import EVALUATION_SEEDS
from sa_hf.tools.claims.claim import Claim, Figures
from sa_hf.tools.claims.small import loss, small_decoder, train

LENGTH, ROWS_AT_ONCE, ROWS_HELD_OUT = 512, 8, 400
KINDS = 128  # of tokens, the r-th of a row's own order drawn by Zipf's law, as 1 / r
CONTEXTS, SCORED = (64, 128, 256, 512), 32
SEGMENTS = LongNetAttentionConfig(segment_length=CONTEXTS, dilated_ratio=(1, 2, 3, 4))


def own_words(count: int, seed: int) -> Tensor:
    """Rows of tokens by Zipf's law, each in an order of its own, int64 ``[count, LENGTH]``: the more of a row is known,
    the better its frequent tokens are."""
    generator = torch.Generator().manual_seed(seed)
    rank = torch.rand(count, KINDS, generator=generator).argsort(-1)
    return (1.0 / (1 + rank)).multinomial(LENGTH, replacement=True, generator=generator)


def by_context(config: Any, seed: int, steps: int) -> Figures:
    model = small_decoder(KINDS, LENGTH, config, seed)

    def batch(step: int) -> tuple[Tensor, Tensor]:
        rows = own_words(ROWS_AT_ONCE, seed * 10**6 + step)
        return rows, rows

    train(model, batch, steps, 3e-3)
    held_out = own_words(ROWS_HELD_OUT, seed + EVALUATION_SEEDS)
    # The same tokens at each length, which end a segment of every size that is as long or shorter.
    bits = {n: loss(model, held_out[:, -n:], scored=SCORED) / math.log(2) for n in CONTEXTS}
    return {f"bits per token at {n}": found for n, found in bits.items()}


LONGNET_CONTEXT = Claim(
    name="longnet_context",
    system="longnet",
    statement="The loss falls as the context grows (section 4.4).",
    setting=f"decoder of 2 layers and width 64, {LENGTH} tokens of {KINDS} kinds by Zipf's law, in an order of the "
    f"row's own that the context tells; segments of {', '.join(map(str, CONTEXTS))} by dilations of "
    f"{', '.join(map(str, SEGMENTS.dilated_ratio))}; the same last {SCORED} tokens of {ROWS_HELD_OUT} rows at the end "
    "of contexts of each length",
    variants={"longnet": SEGMENTS},
    measure=by_context,
    steps=600,
    holds=lambda figures: (
        sorted(figures["longnet"].values(), reverse=True)
        == [figures["longnet"][f"bits per token at {n}"] for n in CONTEXTS]
    ),
    rule="each doubling of the context lowers the bits per token",
    tried="the same model on the standard library's source, seed 3: after 1,600 steps on bytes, and 500 on pieces of "
    "words, its loss is the same at each length; tokens that follow one another in an order of the row's own are not "
    "learned in 600 steps",
)
