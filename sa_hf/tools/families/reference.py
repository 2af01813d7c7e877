"""A model's own eager attention under the pairs that its patterns keep."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers.masking_utils import AttentionMaskInterface, eager_mask
from transformers.modeling_utils import AttentionInterface

import sa_hf
from sa_hf.config import SparseAttention
from sa_hf.hf.patching.asking_merged import AskingMerged
from sa_hf.hf.state.activity import IMPLEMENTATION
from sa_hf.hf.state.layers import active_child
from sa_hf.hf.state.patch import required_patch

NAME = f"{IMPLEMENTATION}_families"
HIDDEN = torch.finfo(torch.float32).min
FAR = -9e3  # below it a model's own mask hides: by the least number, or by -10000


class NoReference(Exception):
    """A call whose pairs are not written here (one with a cache)."""


@contextmanager
def own_attention(model: Any, *, patterns: bool = True, zeros: bool = False) -> Iterator[None]:
    """Inside, a patched model runs its original eager attention under its own mask and the pairs of its patterns.

    Args: patterns: False is its own mask alone; zeros: what a row of padding attends to is 0, as it is here.
    """
    patch = required_patch(model, "own_attention")

    def attend(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any = None, **kwargs: Any
    ) -> Any:
        child = active_child(module)
        if patterns and isinstance(child, SparseAttention):
            n = query.shape[2] if isinstance(module, AskingMerged) else key.shape[2]
            pairs = under_pattern(child, attention_mask, query, key[:, :, :n])
            if n < key.shape[2]:  # the encoder's keys stand behind the layer's own
                pairs = torch.cat([pairs, attention_mask[..., n:].expand(*pairs.shape[:3], -1)], -1)
            attention_mask = pairs
        eager = sys.modules[type(module).__module__].eager_attention_forward
        out = eager(module, query, key, value, attention_mask, **kwargs)
        if zeros and isinstance(child, SparseAttention):
            real = (attention_mask > FAR).any(1).any(1)
            out = (out[0] * real[:, :, None, None], *out[1:])
        return out

    AttentionInterface.register(NAME, attend)
    AttentionMaskInterface.register(NAME, eager_mask)
    try:
        with sa_hf.dense(model):
            for config, _ in patch.configs:
                config._attn_implementation_internal = NAME
            yield
    finally:
        AttentionInterface._global_mapping.pop(NAME, None)
        AttentionMaskInterface._global_mapping.pop(NAME, None)


def under_pattern(child: SparseAttention, mask: Tensor | None, query: Tensor, key: Tensor) -> Tensor:
    """The model's own mask ``[batch, 1 or heads, n, n]`` (or None) with the pairs that a static pattern keeps of the
    real tokens of each sequence; one is real where any query reads it. A pair that counts twice gets log 2. Tokens that
    read each other in a causal layer, those of one image or of a prefix, do so beside the pattern."""
    batch, n, keys = query.shape[0], query.shape[2], key.shape[2]
    if n != keys:
        raise NoReference(f"{n} queries of {keys} keys")
    spec = child.spec
    whole = torch.zeros(batch, spec.num_heads, n, n, dtype=query.dtype)
    if mask is not None:
        if mask.dtype == torch.bool:
            mask = torch.where(mask, 0.0, HIDDEN)
        whole = whole + mask[..., :n].to(query.dtype)
    seen = (whole > FAR).any(1)  # [batch, queries, keys]
    for row in range(batch):
        for real in sequences(seen[row]):
            pairs = log_weights(child, len(real)).to(query.dtype)
            if spec.causal:
                mutual = seen[row][real[:, None], real]
                mutual = (mutual & mutual.T).fill_diagonal_(False)
                pairs = torch.where(mutual, pairs.clamp(min=0), pairs)
            at = torch.tensor(row), slice(None), real[:, None], real[None, :]
            whole[at] = torch.clamp(whole[at] + pairs, min=HIDDEN)
    return whole


def sequences(seen: Tensor) -> list[Tensor]:
    """The places of a row's real tokens: of each group whose tokens read each other and nothing else (``seen [n, n]``),
    or of all, where it does not fall into such groups."""
    real = seen.any(0).nonzero().flatten()
    pairs = seen[real[:, None], real]
    alike = (pairs[:, None] == pairs[None]).all(-1)
    if not torch.equal(alike, pairs):
        return [real]
    return [real[group] for group in torch.unique(pairs, dim=0)]


def log_weights(child: Any, n: int) -> Tensor:
    """The logarithm of how often each pair counts, ``[heads, n, n]``."""
    config, spec = child.config, child.spec
    if hasattr(config, "multiplicity"):
        weight = config.multiplicity(n, spec.num_heads, spec.layer_idx, spec.causal)
    else:
        weight = config.mask(n, spec.num_heads, spec.layer_idx, spec.causal)
    weight = weight.float()
    return torch.where(weight > 0, weight.clamp(min=1).log(), torch.tensor(HIDDEN))
