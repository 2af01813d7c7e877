"""The sets of ``block_topk`` by plain loops from their definition, and dense attention over them, in fp64."""

from __future__ import annotations

import torch
from torch import Tensor

from sa_hf.patterns.block_topk import BlockTopKAttentionConfig


def always_read(config: BlockTopKAttentionConfig, block: int, blocks: int, causal: bool) -> set[int]:
    w = config.num_window_blocks
    window = range(block - w + 1, block + 1) if causal else range(block - w // 2, block + w // 2 + 1)
    sinks = range(config.num_sink_blocks)
    return {j for j in [*window, *sinks] if 0 <= j < blocks and (j <= block or not causal)}


def score(config: BlockTopKAttentionConfig, vectors: list[Tensor], keys: Tensor) -> float:
    """The sum over a group's query vectors of their product with a block's pooled keys ``[positions, d]``."""
    pooled = keys.mean(0) if config.pooling == "mean" else keys.max(0).values
    return sum(float(v @ pooled) for v in vectors)


def chosen(
    config: BlockTopKAttentionConfig, query: Tensor, key: Tensor, heads: list[int], i: int, causal: bool,
    left: int | None = None,
) -> list[int]:  # fmt: skip
    """The blocks that position ``i`` of these query heads chooses; query ``[H, n, d]``, key ``[n, d]``."""
    b, n = config.block_size, len(key)
    blocks, own = -(-n // b), i // b
    rows = [i]
    if config.selection == "query_block":
        of = own - 1 if causal else own
        rows = list(range(of * b, min((of + 1) * b, n))) if of >= 0 else []
    vectors = [query[h, rows].mean(0) for h in heads] if rows else []
    fixed = always_read(config, own, blocks, causal)
    last = own - config.num_window_blocks if causal else blocks - 1
    candidates = [j for j in range(last + 1) if j not in fixed]
    if left is not None:  # the model's own window must hold the whole block, for all that choose it together
        choosing = [i] if config.selection == "query" else [own * b, own * b + b - 1]
        far = [(j, abs(c - k)) for j in candidates for c in choosing for k in (j * b, j * b + b - 1)]
        candidates = [j for j in candidates if all(distance <= left for at, distance in far if at == j)]
    ranked = sorted(candidates, key=lambda j: (-score(config, vectors, key[j * b : (j + 1) * b]), j))
    return ranked[: config.top_k]


def kept_pairs(
    config: BlockTopKAttentionConfig, query: Tensor, key: Tensor, causal: bool, left: int | None = None
) -> Tensor:
    """Which pairs one sequence reads, bool ``[H, n, n]``; query ``[H, n, d]``, key ``[Hkv, n, d]``, fp64."""
    heads, n, _ = query.shape
    group, b = heads // key.shape[0], config.block_size
    kept = torch.zeros(heads, n, n, dtype=torch.bool)
    for h in range(heads):
        mates = [m for m in range(heads) if m // group == h // group] if config.shared_by_group else [h]
        for i in range(n):
            read = always_read(config, i // b, -(-n // b), causal)
            read |= set(chosen(config, query, key[h // group], mates, i, causal, left))
            for j in range(n):
                inside = j // b in read and (j <= i or not causal)
                kept[h, i, j] = inside and (left is None or (abs(i - j) <= left))
            if config.drop_diagonal and kept[h, i].sum() > 1:
                kept[h, i, i] = False
    return kept


def attention(query: Tensor, key: Tensor, value: Tensor, kept: Tensor, scale: float) -> Tensor:
    """Dense attention of one sequence over the pairs kept, ``[H, n, d]``; rows without a key are 0."""
    group = query.shape[0] // key.shape[0]
    key, value = key.repeat_interleave(group, 0), value.repeat_interleave(group, 0)
    scores = (query @ key.transpose(-1, -2) * scale).masked_fill(~kept, -torch.inf)
    return torch.softmax(scores, dim=-1).nan_to_num(0.0) @ value
