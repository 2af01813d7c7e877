"""The small decoder of the claims, and its training loop."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
import transformers
from torch import Tensor

import sa_hf
from sa_hf.tasks.language import stdlib_texts, token_chunks
from sa_hf.tasks.synthetic import IGNORED

WARMUP = 0.1
BYTES = 384  # tokens of ByT5's tokenizer


def small_decoder(vocab_size: int, length: int, pattern: Any, seed: int, layers: int = 2, hidden: int = 64) -> Any:
    """A freshly made Llama with a pattern, the same weights for the same seed (at the scale of its width: at
    Transformers' 0.02 so narrow a model takes thousands of steps to tell tokens apart)."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        config = transformers.LlamaConfig(
            vocab_size=vocab_size, hidden_size=hidden, intermediate_size=2 * hidden, num_hidden_layers=layers,
            num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=length, bos_token_id=None,
            eos_token_id=None, pad_token_id=0, initializer_range=hidden**-0.5,
        )  # fmt: skip
        return sa_hf.patch_model(transformers.LlamaForCausalLM(config), pattern)


def train(model: Any, batch: Callable[[int], tuple[Tensor, Tensor]], steps: int, rate: float) -> Any:
    """Train a language model by :func:`fit`.

    Args:
        batch: step -> int64 ``[B, n]`` inputs and labels.

    Returns:
        The model, in evaluation mode.
    """

    def named(step: int) -> dict[str, Tensor]:
        ids, labels = batch(step)
        return {"input_ids": ids, "labels": labels}

    return fit(model, named, steps, rate)


def fit(
    model: Any, batch: Callable[[int], dict[str, Tensor]], steps: int, rate: float, sparse_rate: float = 1e-2
) -> Any:
    """Train by AdamW, the rate rising over a tenth of the steps and falling linearly to 0.

    Args:
        batch: step -> what the model is called with, labels among it.
        sparse_rate: of masks and spans.

    Returns:
        The model, in evaluation mode.
    """
    model.train()
    optimizer = torch.optim.AdamW(sa_hf.parameter_groups(model, 0.0, sparse_rate), lr=rate)
    warm = max(1, int(WARMUP * steps))
    factor = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warm, max(0.0, (steps - step) / max(1, steps - warm)))
    )
    for step in range(steps):
        model(**batch(step)).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        factor.step()
        optimizer.zero_grad()
    return model.eval()


@lru_cache(maxsize=4)
def source_rows(split: str, length: int, limit: int) -> Tensor:
    """Bytes of the standard library's source from all over the files of a split, int64 ``[limit, length]``."""
    texts = stdlib_texts(split)[:400] if split == "train" else stdlib_texts(split)[::40]
    chunks = token_chunks(texts, transformers.ByT5Tokenizer(), length, limit)
    return torch.stack([chunk["input_ids"] for chunk in chunks])


def shuffled(rows: Tensor, at_once: int, seed: int) -> Callable[[int], Tensor]:
    """step -> the rows of its batch, in an order that the seed draws, again and again."""
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))
    return lambda step: rows[order[torch.arange(step * at_once, (step + 1) * at_once) % len(rows)]]


@torch.no_grad()
def right(model: Any, ids: Tensor, labels: Tensor, at_once: int = 32) -> float:
    """Share of the labelled tokens that are the likeliest ones."""
    hits = total = 0
    for some, wanted in zip(ids.split(at_once), labels.split(at_once), strict=True):
        found = model(input_ids=some).logits[:, :-1].argmax(-1)
        counted = wanted[:, 1:] != IGNORED
        hits += int((found == wanted[:, 1:])[counted].sum())
        total += int(counted.sum())
    return hits / total


@torch.no_grad()
def loss(model: Any, ids: Tensor, at_once: int = 32, scored: int | None = None) -> float:
    """Mean negative log-likelihood in nats of the last ``scored`` tokens of rows, int64 ``[B, n]``; None is the second
    half."""
    first = ids.shape[1] // 2 if scored is None else ids.shape[1] - scored
    losses = []
    for some in ids.split(at_once):
        labels = some.clone()
        labels[:, :first] = IGNORED
        losses.append(float(model(input_ids=some, labels=labels).loss) * len(some))
    return sum(losses) / len(ids)
