"""LongNet: what lies d tokens back is found where a segment covers d, and else is not."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sa_hf.patterns.longnet import LongNetAttentionConfig
from sa_hf.tasks.source import EVALUATION_SEEDS
from sa_hf.tasks.synthetic import CorridorTask
from sa_hf.tools.claims.claim import Claim, Figures
from sa_hf.tools.claims.small import right, small_decoder, train

LENGTH, BATCH, ROWS = 128, 32, 400
SOLVED, CHANCE = 0.95, 0.25  # of four colours
CORRIDOR = CorridorTask(length=LENGTH, colours=4)


def corridor_batch(task: CorridorTask, count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Inputs and labels of a corridor, int64 ``[count, length]``."""
    rows = task.rows(count, seed)
    return torch.tensor([row["input_ids"] for row in rows]), torch.tensor([row["labels"] for row in rows])


def recall_of(variant: Any, seed: int, steps: int) -> Figures:
    config = LongNetAttentionConfig(segment_length=variant, dilated_ratio=(1, 2)[: len(variant)])
    model = small_decoder(CORRIDOR.vocab_size, LENGTH, config, seed)
    train(model, lambda step: corridor_batch(CORRIDOR, BATCH, seed * 10**6 + step), steps, 3e-3)
    return {"accuracy": right(model, *corridor_batch(CORRIDOR, ROWS, seed + EVALUATION_SEEDS))}


LONGNET_SEGMENTS = Claim(
    name="longnet_segments",
    system="longnet",
    statement="Recall at distance d needs a segment that covers d (arXiv 2307.02486).",
    setting=f"corridor of {LENGTH} tokens and 4 colours (chance {CHANCE:.0%}), decoder of 2 layers and width 64, "
    f"{ROWS} rows evaluated",
    variants={"segments of 32": (32,), "segments of 32 and 64": (32, 64), "segments of 32 and 128": (32, 128)},
    measure=recall_of,
    steps=200,
    holds=lambda figures: (
        figures["segments of 32 and 128"]["accuracy"] >= SOLVED
        and all(figures[v]["accuracy"] <= CHANCE + 0.1 for v in ("segments of 32", "segments of 32 and 64"))
    ),
    rule=f"the segment that covers the corridor reaches {SOLVED:.0%}, and the shorter ones stay within 10 points of "
    "chance",
)
