"""Routing Transformer: what lies far back is found by its content, with no more keys a row than a window has."""

from __future__ import annotations

import random
from typing import Any

import torch
from torch import Tensor

from sa_hf.patterns.routing import RoutingAttentionConfig
from sa_hf.patterns.sliding_window import SlidingWindowAttentionConfig
from sa_hf.tasks.source import EVALUATION_SEEDS
from sa_hf.tasks.synthetic import IGNORED
from sa_hf.tools.claims.claim import Claim, Figures
from sa_hf.tools.claims.small import right, small_decoder, train

LENGTH, TOLD_BEFORE, ASKED_FROM = 256, 128, 224
NAMES, VALUES, KEYS = 16, 4, 24
# Token ids: 0 padding, 1 what fills the row, then questions, answers, and what tells a name's value.
QUESTION, ANSWER = 2, 2 + NAMES
TOLD = ANSWER + VALUES
VOCABULARY = TOLD + NAMES * VALUES
BATCH, ROWS = 16, 400


def clustered(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Rows that tell the value of each name once, far from the questions, and labels of the answers; int64 ``[count,
    LENGTH]``."""
    rng = random.Random(f"clustered {seed}")
    rows, labels = [], []
    for _ in range(count):
        ids = [1] * LENGTH
        wanted = [IGNORED] * LENGTH
        values = [rng.randrange(VALUES) for _ in range(NAMES)]
        for name, at in enumerate(rng.sample(range(TOLD_BEFORE), NAMES)):
            ids[at] = TOLD + name * VALUES + values[name]
        for number, name in enumerate(rng.sample(range(NAMES), NAMES)):
            at = ASKED_FROM + 2 * number
            ids[at : at + 2] = [QUESTION + name, ANSWER + values[name]]
            wanted[at + 1] = ids[at + 1]
        rows.append(ids)
        labels.append(wanted)
    return torch.tensor(rows), torch.tensor(labels)


def found_by(config: Any, seed: int, steps: int) -> Figures:
    model = small_decoder(VOCABULARY, LENGTH, config, seed)
    train(model, lambda step: clustered(BATCH, seed * 10**6 + step), steps, 3e-3)
    return {"accuracy": right(model, *clustered(ROWS, seed + EVALUATION_SEEDS))}


ROUTING_CLUSTERS = Claim(
    name="routing_clusters",
    system="routing",
    statement="Attention inside clusters finds by content what attention to a window of the same size cannot "
    "(section 4).",
    setting=f"{NAMES} names whose values ({VALUES} kinds, chance {1 / VALUES:.0%}) are told in the first {TOLD_BEFORE} "
    f"of {LENGTH} tokens and asked for in the last {LENGTH - ASKED_FROM}, decoder of 2 layers and width 64, at most "
    f"{KEYS} keys a row and head, {ROWS} rows evaluated",
    variants={
        "routing": RoutingAttentionConfig(num_clusters=4, window=KEYS, num_local_heads=1, local_window=KEYS),
        "sliding_window": SlidingWindowAttentionConfig(window=KEYS),
    },
    measure=found_by,
    steps=600,
    holds=lambda figures: (
        figures["routing"]["accuracy"] >= 2 / VALUES and figures["sliding_window"]["accuracy"] <= 1 / VALUES + 0.1
    ),
    rule="routing is right twice as often as chance, and a window stays within 10 points of chance",
)
