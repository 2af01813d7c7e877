"""LongNet: the loss falls as the context grows."""

from __future__ import annotations

import math
from typing import Any

from sa_hf.patterns.longnet import LongNetAttentionConfig
from sa_hf.tasks.context import sliding_loss
from sa_hf.tools.claims.claim import Claim, Figures
from sa_hf.tools.claims.small import BYTES, shuffled, small_decoder, source_rows, train

CHUNK, CHUNKS_AT_ONCE, CHUNKS_HELD_OUT = 512, 8, 64
CONTEXTS = (64, 128, 256, 512)
SEGMENTS = LongNetAttentionConfig(segment_length=(64, 128, 256, 512), dilated_ratio=(1, 2, 4, 8))


def by_context(config: Any, seed: int, steps: int) -> Figures:
    model = small_decoder(BYTES, CHUNK, config, seed)
    rows = shuffled(source_rows("train", CHUNK, CHUNKS_AT_ONCE * steps), CHUNKS_AT_ONCE, seed)
    train(model, lambda step: (rows(step), rows(step)), steps, 3e-3)
    held_out = source_rows("evaluation", CHUNK, CHUNKS_HELD_OUT)
    means = {n: [sliding_loss(model, ids, n, 8) for ids in held_out] for n in CONTEXTS}
    return {f"bits per byte at {n}": sum(losses) / len(losses) / math.log(2) for n, losses in means.items()}


LONGNET_CONTEXT = Claim(
    name="longnet_context",
    system="longnet",
    statement="The loss falls as the context grows (arXiv 2307.02486).",
    setting=f"decoder of 2 layers and width 64 on bytes of the standard library's source, {CHUNK} at a time, segments "
    f"64 to 512; the same bytes of {CHUNKS_HELD_OUT} held-out chunks by a sliding window of each length",
    variants={"longnet": SEGMENTS},
    measure=by_context,
    steps=300,
    holds=lambda figures: (
        sorted(figures["longnet"].values(), reverse=True)
        == [figures["longnet"][f"bits per byte at {n}"] for n in CONTEXTS]
    ),
    rule="each doubling of the context lowers the bits per byte",
)
