"""torch's function transforms over the kernels: gradients of each sample, and what is refused."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor, func
from torch.autograd import forward_ad

from sa_hf import SlidingWindowAttentionConfig, SparseAttentionError, sparse_attention

CONFIG = SlidingWindowAttentionConfig(window=9)


def loss(engine: str, *sample: Tensor) -> Tensor:
    out = sparse_attention(*(x[None] for x in sample), CONFIG, causal=True, engine=engine)
    return (out * torch.linspace(-1, 1, 16)).square().sum()


def draw() -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randn(2, heads, 20, 16, generator=generator) for heads in (2, 1, 1))


def test_gradients_of_each_sample() -> None:
    found, expected = (
        func.vmap(func.grad(partial(loss, engine), argnums=(0, 1, 2)))(*draw()) for engine in ("triton", "reference")
    )
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_forward_mode_and_a_second_derivative_are_refused() -> None:
    query, key, value = (x[0] for x in draw())
    with pytest.raises(SparseAttentionError, match="forward-mode"):
        func.jvp(partial(loss, "triton"), (query, key, value), (query, key, value))
    with forward_ad.dual_level(), pytest.raises(SparseAttentionError, match="forward-mode"):
        loss("triton", query, key, forward_ad.make_dual(value, value))
    query.requires_grad_()
    (first,) = torch.autograd.grad(loss("triton", query, key, value), query, create_graph=True)
    with pytest.raises(SparseAttentionError, match="twice"):
        torch.autograd.grad(first.sum() + query.sum(), query)
