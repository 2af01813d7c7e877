"""SparseBERT: the diagonal can go, and learned masks beat fixed ones that keep as much."""

from __future__ import annotations

from collections.abc import Mapping

from sa_hf.config import SparseAttentionConfig
from sa_hf.patterns import (
    BigBirdAttentionConfig,
    LogSparseAttentionConfig,
    SlidingWindowAttentionConfig,
    SparseBertAttentionConfig,
)
from sa_hf.patterns.sparsebert import SparseBertAttention
from sa_hf.tools.claims.claim import Claim, Figures
from sa_hf.tools.claims.masked_bytes import ROWS_HELD_OUT, bits_per_masked_byte, small_encoder, train_encoder

LENGTH, RATE, MASK_RATE = 128, 3e-3, 5e-2
WITHIN, WORSE = 0.02, 0.1
SETTING = (
    f"encoder of 2 layers and width 64 on masked bytes of the standard library's source, {LENGTH} at a time, "
    f"{ROWS_HELD_OUT} held-out rows"
)
LEARNED = "learned"


def bits_and_density(config: SparseAttentionConfig, seed: int, steps: int) -> Figures:
    model = train_encoder(small_encoder(LENGTH, config, seed), LENGTH, seed, steps, RATE, MASK_RATE)
    learned = [m.density(LENGTH) for m in model.modules() if isinstance(m, SparseBertAttention)]
    density = sum(learned) / len(learned) if learned else config.density(LENGTH)
    return {"bits per masked byte": bits_per_masked_byte(model, LENGTH), "pairs kept": density}


def as_good_without(figures: Mapping[str, Figures]) -> bool:
    """Nothing is lost without the diagonal, and it alone does not do."""
    bits = {label: found["bits per masked byte"] for label, found in figures.items()}
    return (
        bits["sliding_window without the diagonal"] <= (1 + WITHIN) * bits["sliding_window"]
        and bits["the diagonal alone"] >= (1 + WORSE) * bits["sliding_window"]
    )


def learned_is_best(figures: Mapping[str, Figures]) -> bool:
    """It keeps no more pairs than any fixed mask, and its bits are lower."""
    own = figures[LEARNED]
    return all(
        own["pairs kept"] <= found["pairs kept"] and own["bits per masked byte"] < found["bits per masked byte"]
        for label, found in figures.items()
        if label != LEARNED
    )


SPARSEBERT_DIAGONAL = Claim(
    name="sparsebert_diagonal",
    system="sparsebert",
    statement="Attention to the own position can go (section 4.2).",
    setting=SETTING,
    variants={
        "sliding_window": SlidingWindowAttentionConfig(window=8),
        "sliding_window without the diagonal": SlidingWindowAttentionConfig(window=8, drop_diagonal=True),
        "the diagonal alone": SlidingWindowAttentionConfig(window=1),
    },
    measure=bits_and_density,
    steps=800,
    holds=as_good_without,
    rule=f"without the diagonal a masked byte costs at most {WITHIN:.0%} more bits than with it, and with it alone at "
    f"least {WORSE:.0%} more",
)
SPARSEBERT_LEARNED = Claim(
    name="sparsebert_learned",
    system="sparsebert",
    statement="A learned mask beats fixed ones that keep as many pairs (section 5).",
    setting=SETTING,
    variants={
        LEARNED: SparseBertAttentionConfig(mask_length=LENGTH, density_coef=0.1),
        "sliding_window": SlidingWindowAttentionConfig(window=4),
        "logsparse": LogSparseAttentionConfig(local_window=1),
        "bigbird": BigBirdAttentionConfig(
            block_size=2, num_window_blocks=3, num_random_blocks=1, num_global_blocks=2
        ),
    },
    measure=bits_and_density,
    steps=800,
    holds=learned_is_best,
    rule="the learned mask keeps no more pairs than any fixed one, and a masked byte costs it fewer bits",
)  # fmt: skip
