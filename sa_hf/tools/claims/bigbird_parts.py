"""BigBird: random, window and global blocks together against each alone, in a pretrained encoder."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import torch
import transformers
from torch import Tensor
from torch.nn.functional import cosine_similarity

import sa_hf
from sa_hf.patterns.bigbird import BigBirdAttentionConfig
from sa_hf.tasks.language import stdlib_texts, token_chunks
from sa_hf.tasks.load import minilm_path
from sa_hf.tools.claims.claim import Claim, Figures

LENGTH, TEXTS, BLOCK = 512, 64, 16
R, W, G = {"num_random_blocks": 3}, {"num_window_blocks": 3}, {"num_global_blocks": 2}


def blocks(*parts: dict[str, int]) -> dict[str, int]:
    """The options of a BigBird of some of its parts; the own block is always read."""
    options = {"block_size": BLOCK, "num_random_blocks": 0, "num_window_blocks": 0, "num_global_blocks": 0}
    for part in parts:
        options |= part
    return options


@lru_cache(maxsize=1)
def texts(count: int) -> Tensor:
    """Held-out source of the standard library, int64 ``[count, LENGTH]``."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(str(minilm_path()))
    chunks = token_chunks(stdlib_texts("evaluation")[::20], tokenizer, LENGTH, count)
    return torch.stack([chunk["input_ids"] for chunk in chunks])


@torch.no_grad()
def embeddings(model: Any, ids: Tensor) -> Tensor:
    """Means of the last states, ``[rows, hidden]``."""
    return torch.cat([model(input_ids=some).last_hidden_state.mean(1) for some in ids.split(8)])


def agreement(options: Mapping[str, Any], seed: int, steps: int) -> Figures:
    """Nothing is trained: ``seed`` draws the random blocks, and ``steps`` are none."""
    del steps
    config = BigBirdAttentionConfig(**options, seed=seed)
    model = transformers.AutoModel.from_pretrained(str(minilm_path()), add_pooling_layer=False).eval()
    ids = texts(TEXTS)
    dense = embeddings(model, ids)
    sparse = embeddings(sa_hf.patch_model(model, config), ids)
    return {
        "cosine similarity to dense": float(cosine_similarity(sparse, dense).mean()),
        "pairs kept": config.density(LENGTH),
    }


def in_order(figures: Mapping[str, Figures]) -> bool:
    """All three parts are nearest to dense attention, and two nearer than each of them alone."""
    near = {label: found["cosine similarity to dense"] for label, found in figures.items()}
    return near["R + W + G"] > near["R + W"] > max(near["R"], near["W"])


BIGBIRD_PARTS = Claim(
    name="bigbird_parts",
    system="bigbird",
    statement="Random, window and global blocks together do better than random and window, and these than each alone "
    "(table 1).",
    setting=f"the pretrained MiniLM, not trained, on {TEXTS} held-out texts of {LENGTH} tokens, blocks of {BLOCK}: "
    "three random, three of the window, two global; the seed draws the random blocks",
    variants={"R": blocks(R), "W": blocks(W), "R + W": blocks(R, W), "R + W + G": blocks(R, W, G)},
    measure=agreement,
    steps=0,
    holds=in_order,
    rule="embeddings are nearest to dense attention's with R + W + G, and nearer with R + W than with R or W",
)
