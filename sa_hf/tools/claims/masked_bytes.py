"""Masked bytes of the standard library's source, and the small encoder that the claims train on them."""

from __future__ import annotations

import math
from typing import Any

import torch
import transformers
from torch import Tensor
from torch.nn.functional import cross_entropy

import sa_hf
from sa_hf.tasks.masking import MASKED_SHARE
from sa_hf.tasks.source import EVALUATION_SEEDS
from sa_hf.tasks.synthetic import IGNORED
from sa_hf.tools.claims.small import BYTES, fit, shuffled, source_rows

MASK = BYTES - 1  # stands for what is masked
ROWS_AT_ONCE, ROWS_HELD_OUT = 16, 256


def small_encoder(length: int, pattern: Any, seed: int, layers: int = 2, hidden: int = 64) -> Any:
    """A freshly made BERT without dropout and with a pattern, the same weights for the same seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        config = transformers.BertConfig(
            vocab_size=BYTES, hidden_size=hidden, intermediate_size=2 * hidden, num_hidden_layers=layers,
            num_attention_heads=4, max_position_embeddings=length, hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0, initializer_range=hidden**-0.5,
        )  # fmt: skip
        return sa_hf.patch_model(transformers.BertForMaskedLM(config), pattern)


def masked(rows: Tensor, seed: int) -> dict[str, Tensor]:
    """The rows with a share of their bytes masked, and these as labels."""
    hidden = torch.rand(rows.shape, generator=torch.Generator().manual_seed(seed)) < MASKED_SHARE
    return {"input_ids": rows.masked_fill(hidden, MASK), "labels": rows.masked_fill(~hidden, IGNORED)}


def train_encoder(model: Any, length: int, seed: int, steps: int, rate: float, sparse_rate: float = 1e-2) -> Any:
    """Train on masked bytes; in evaluation mode after."""
    rows = shuffled(source_rows("train", length, ROWS_AT_ONCE * 400), ROWS_AT_ONCE, seed)
    return fit(model, lambda step: masked(rows(step), seed * 10**6 + step), steps, rate, sparse_rate)


@torch.no_grad()
def bits_per_masked_byte(model: Any, length: int) -> float:
    """Mean bits of the masked bytes of held-out rows; the same rows and masks for every model."""
    batch = masked(source_rows("evaluation", length, ROWS_HELD_OUT), EVALUATION_SEEDS)
    total = count = 0.0
    for ids, labels in zip(batch["input_ids"].split(32), batch["labels"].split(32), strict=True):
        logits = model(input_ids=ids).logits
        total += float(cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED, reduction="sum"))
        count += int((labels != IGNORED).sum())
    return total / count / math.log(2)
