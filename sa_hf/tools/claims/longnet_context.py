"""LongNet: the loss falls as the context grows."""

from __future__ import annotations

import math
from typing import Any

import torch
import transformers
from torch import Tensor

from sa_hf.patterns.longnet import LongNetAttentionConfig
from sa_hf.tasks.context import sliding_loss
from sa_hf.tasks.language import stdlib_texts, token_chunks
from sa_hf.tools.claims.claim import Claim, Figures
from sa_hf.tools.claims.small import small_decoder, train

CHUNK, CHUNKS_AT_ONCE, CHUNKS_HELD_OUT = 512, 8, 64
CONTEXTS = (64, 128, 256, 512)
SEGMENTS = LongNetAttentionConfig(segment_length=(64, 128, 256, 512), dilated_ratio=(1, 2, 4, 8))


def by_context(config: Any, seed: int, steps: int) -> Figures:
    tokenizer = transformers.ByT5Tokenizer()
    chunks = token_chunks(stdlib_texts("train")[:400], tokenizer, CHUNK, CHUNKS_AT_ONCE * steps)
    rows = torch.stack([chunk["input_ids"] for chunk in chunks])
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))
    model = small_decoder(len(tokenizer), CHUNK, config, seed)

    def batch(step: int) -> tuple[Tensor, Tensor]:
        at = torch.arange(step * CHUNKS_AT_ONCE, (step + 1) * CHUNKS_AT_ONCE) % len(rows)
        return rows[order[at]], rows[order[at]]

    train(model, batch, steps, 3e-3)
    held_out = token_chunks(stdlib_texts("evaluation")[::40], tokenizer, CHUNK, CHUNKS_HELD_OUT)
    means = {n: [sliding_loss(model, chunk["input_ids"], n, 8) for chunk in held_out] for n in CONTEXTS}
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
