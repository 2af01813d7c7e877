"""Inputs and small tools shared by the tests of the learned patterns."""

from __future__ import annotations

import torch
from torch import Tensor

from sa_hf.layer import AttentionInputs, LayerSpec
from sa_hf.ops.sequences import Sequences
from sa_hf.patterns.routing import RoutingAttention, RoutingAttentionConfig
from sa_hf.patterns.sparsebert import SparseBertAttention, SparseBertAttentionConfig


def layer_spec(
    heads: int = 2, kv_heads: int | None = None, dim: int = 16, causal: bool = False, layer: int = 0, layers: int = 2
) -> LayerSpec:
    return LayerSpec(layer, layers, heads, kv_heads or heads, dim, heads * dim, causal)


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def attention_inputs(
    batch: int = 2, heads: int = 2, kv_heads: int | None = None, length: int = 24, dim: int = 16, causal: bool = False,
    seed: int = 0, sequences: Sequences | None = None, **more: object,
) -> AttentionInputs:  # fmt: skip
    kv_heads = kv_heads or heads
    query = draw(batch, heads, length, dim, seed=seed).requires_grad_()
    key = draw(batch, kv_heads, length, dim, seed=seed + 1).requires_grad_()
    value = draw(batch, kv_heads, length, dim, seed=seed + 2).requires_grad_()
    hidden = draw(batch, length, heads * dim, seed=seed + 3).requires_grad_()
    where = sequences or Sequences.full(batch, length, length)
    return AttentionInputs(
        query, key, value, where, causal, dim**-0.5, hidden_states=hidden, **{"dropout": 0.0, **more}  # type: ignore[arg-type]
    )  # fmt: skip


def rms_ratio(ours: Tensor, oracle: Tensor) -> float:
    ours, oracle = ours.detach(), oracle.detach()
    error = (ours.double() - oracle.double()).pow(2).mean().sqrt()
    return float(error / oracle.double().pow(2).mean().sqrt().clamp(min=1e-30))


class Memory:
    """What a cache remembers of each named per-token tensor: ``AttentionInputs.remember`` over a growing sequence; and
    ``beside``, what was made of the keys."""

    def __init__(self) -> None:
        self.kept: dict[str, Tensor] = {}
        self.made: dict[str, Tensor] = {}

    def __call__(self, name: str, tensor: Tensor, dim: int, need: int | None = None) -> Tensor:
        joined = tensor if name not in self.kept else torch.cat([self.kept[name], tensor], dim)
        self.kept[name] = joined
        return joined

    def beside(self, name: str, tensor: Tensor | None = None) -> Tensor | None:
        if tensor is not None:
            self.made[name] = tensor
        return self.made.get(name)


def padded_and_packed(length: int = 24) -> Sequences:
    """Three rows padded on the left, on the right and inside, the last of two sequences."""
    mask = torch.ones(3, length, dtype=torch.long)
    mask[0, :7] = 0
    mask[1, 15:] = 0
    mask[2, [3, 9]] = 0
    ids = torch.zeros(3, length, dtype=torch.long)
    ids[2, 12:] = 1
    return Sequences.from_mask(3, length, length, mask, ids)


def build_routing(
    heads: int = 2, kv_heads: int | None = None, causal: bool = False, **fields: object
) -> RoutingAttention:
    config = RoutingAttentionConfig(**{"num_clusters": 4, "window": 5, "local_window": 3, **fields})
    return config.build(layer_spec(heads, kv_heads, causal=causal))


def build_sparsebert(
    heads: int = 2, kv_heads: int | None = None, causal: bool = False, **fields: object
) -> SparseBertAttention:
    config = SparseBertAttentionConfig(**{"mask_length": 16, **fields})
    return config.build(layer_spec(heads, kv_heads, causal=causal))


def scatter_logits(module: SparseBertAttention, seed: int = 5, keep: float = 0.4) -> None:
    """Logits of both signs, none near 0."""
    assert module.logits is not None
    raw = draw(*module.logits.shape, seed=seed)
    uniform = torch.rand(module.logits.shape, generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        module.logits.copy_(torch.where(uniform < keep, raw.abs() + 0.2, -raw.abs() - 0.2))


def normalised(x: Tensor) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()


def cosine(x: Tensor, mu: Tensor) -> Tensor:
    """``[n, k]``"""
    return normalised(x) @ (mu / mu.norm(dim=-1, keepdim=True)).t()
