"""BigBird: random, window and global blocks together against each alone."""

from __future__ import annotations

from typing import Any

from sa_hf.patterns.bigbird import BigBirdAttentionConfig
from sa_hf.tools.claims.claim import Claim, Figures
from sa_hf.tools.claims.masked_bytes import ROWS_HELD_OUT, bits_per_masked_byte, small_encoder, train_encoder

LENGTH = 256
R, W, G = {"num_random_blocks": 2}, {"num_window_blocks": 3}, {"num_global_blocks": 2}


def blocks(*parts: dict[str, int]) -> BigBirdAttentionConfig:
    """A BigBird of some of its parts; the own block is always read."""
    options = {"num_random_blocks": 0, "num_window_blocks": 0, "num_global_blocks": 0}
    for part in parts:
        options |= part
    return BigBirdAttentionConfig(block_size=16, **options)


def by_parts(config: BigBirdAttentionConfig, seed: int, steps: int) -> Figures:
    model = train_encoder(small_encoder(LENGTH, config, seed), LENGTH, seed, steps, 3e-3)
    return {"bits per masked byte": bits_per_masked_byte(model, LENGTH), "pairs kept": config.density(LENGTH)}


def ordered(figures: Any) -> bool:
    """All three parts are best, two beat each of them alone."""
    bits = {label: found["bits per masked byte"] for label, found in figures.items()}
    return bits["R + W + G"] < bits["R + W"] < min(bits["R"], bits["W"])


BIGBIRD_PARTS = Claim(
    name="bigbird_parts",
    system="bigbird",
    statement="Random, window and global blocks together beat random and window, and these each alone (table 1).",
    setting=f"encoder of 2 layers and width 64 on masked bytes of the standard library's source, {LENGTH} at a time, "
    f"blocks of 16, two random, three of the window, two global; {ROWS_HELD_OUT} held-out rows",
    variants={
        "R": blocks(R), "W": blocks(W), "R + W": blocks(R, W), "R + W + G": blocks(R, W, G),
    },
    measure=by_parts,
    steps=600,
    holds=ordered,
    rule="the bits of R + W + G are lower than those of R + W, and these lower than those of R and of W",
)  # fmt: skip
