"""A second opinion on ``block_topk``: attention-gym's ``gather_attn`` over the same set of keys."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from used_inside import checks

from sa_hf import BlockTopKAttentionConfig, sparse_attention
from sa_hf.patterns.block_topk import read_pairs

gather_attn = pytest.importorskip("attn_gym.sparse").gather_attn
SMALL: dict[str, Any] = {"block_size": 8, "top_k": 2, "num_window_blocks": 1}


@checks("attn_gym", "block_topk: outputs and gradients equal gather_attn over the chosen keys")
@pytest.mark.parametrize("fields", [{}, {"selection": "query"}, {"selection": "query", "pooling": "max"}], ids=str)
def test_attention_to_what_is_chosen(fields: dict[str, Any]) -> None:
    """Theirs takes one tensor as keys and values and one set for all heads, so each head is a call of its own."""
    config = BlockTopKAttentionConfig(**{**SMALL, **fields})
    length, generator = 90, torch.Generator().manual_seed(0)
    query = torch.randn(1, 2, length, 16, generator=generator)
    key = torch.randn(1, 2, length, 16, generator=generator)
    pairs = read_pairs(config, query, key)
    assert pairs.sum() < 0.7 * length * (length + 1)  # of the two heads: less than all
    for head in range(2):
        q, kv = (x[:, head : head + 1].clone().requires_grad_() for x in (query, key))
        # Their window of 1 reads the own position; the others are listed, -1 behind them.
        others = pairs[0, head] & ~torch.eye(length, dtype=torch.bool)
        positions = torch.where(others, torch.arange(length), length).sort(-1).values
        listed = torch.where(positions < length, positions, -1)[None]
        theirs = gather_attn(q, kv, kv, listed, sliding_window_size=1, impl="reference")
        ours = sparse_attention(q, kv, kv, config, causal=True)
        torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-6)
        grad = torch.randn(ours.shape, generator=generator)
        for a, b in zip(
            torch.autograd.grad(ours, (q, kv), grad), torch.autograd.grad(theirs, (q, kv), grad), strict=True
        ):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-5)
