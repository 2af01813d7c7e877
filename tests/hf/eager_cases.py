"""A model's own eager attention under the pairs that a pattern keeps: what a patched model is measured against.

The pairs are written here as a 4-D mask of each layer, from the pattern's definition (a learned one's from the layer's
state and input), and handed to the original layers inside ``dense(model)``.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from hf_cases import VOCABULARY, tokens
from torch import Tensor, nn

import sa_hf
from sa_hf.config import SparseAttention

TOKENS: dict[str, Any] = {"bos_token_id": 1, "eos_token_id": 1, "pad_token_id": 0}
SIZES: dict[str, Any] = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 32,
    "vocab_size": VOCABULARY, "max_position_embeddings": 128, "attn_implementation": "eager",
}  # fmt: skip
HIDDEN = torch.finfo(torch.float32).min  # a pair that no one reads; some models compute the softmax in fp32


def ragged(side: str) -> tuple[Tensor, Tensor]:
    """Ids and mask ``[3, 60]``: rows of 60, 43 and 11 tokens, padded on one side."""
    mask = torch.ones(3, 60, dtype=torch.long)
    for row, padding in enumerate((0, 17, 49)):
        if padding:
            mask[row, slice(60 - padding, None) if side == "right" else slice(padding)] = 0
    return tokens(3, 60), mask


def scattered(model: Any, seed: int = 3) -> Any:
    """Weights large enough that attention, sinks and learned state matter."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("sinks"):
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
            elif ".sparse." in name:
                size = 0 if name.endswith("bias") else 5.0 if "logits" in name else 0.3
                parameter.add_(size * torch.randn(parameter.shape, generator=generator).to(parameter.dtype))
            elif parameter.dim() > 1:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model


def log_weights(child: SparseAttention, module: nn.Module, hidden: Tensor, left: int | None) -> Tensor:
    """One sequence ``[1, n, hidden]``: the logarithm of what multiplies each pair, ``[heads, n, n]``."""
    n, heads, config = hidden.shape[1], child.spec.num_heads, child.config
    distance = torch.arange(n)[:, None] - torch.arange(n)[None, :]
    causal = child.spec.causal
    reached = ((distance >= 0) | (not causal)) & (distance.abs() <= (n if left is None else left))
    if child.spec.chunk is not None:
        chunk = torch.arange(n) // child.spec.chunk
        reached = reached & (chunk[:, None] == chunk[None, :])
    if config.name == "expire_span":
        gate = torch.clamp(1 + (child.spans(hidden)[0, :, None, :] - distance) / config.ramp, 0, 1)  # type: ignore[operator]
        weight = torch.where(distance == 0, 1.0, gate).expand(heads, n, n)
    elif config.name == "sparsebert":
        weight = child.mask(n).double()  # type: ignore[operator]
    elif config.name == "routing":
        weight = _routed(child, module, hidden, reached).double()
    else:
        weight = config.multiplicity(n, heads, child.spec.layer_idx, causal).double()  # type: ignore[attr-defined]
    weight = weight * reached
    safe = torch.where(weight > 0, weight, 1.0)
    return torch.where(weight > 0, safe.log().to(hidden.dtype), HIDDEN)


def _routed(child: Any, module: Any, hidden: Tensor, reached: Tensor) -> Tensor:
    """Each query reads itself and the last ``window - 1`` earlier keys of its cluster."""
    n, heads = hidden.shape[1], child.spec.num_heads
    clusters = []
    for projection in (module.q_proj, module.k_proj):
        x = projection(hidden)[0].view(n, -1, child.spec.head_dim).transpose(0, 1).float()
        x = (x - x.mean(-1, keepdim=True)) / (x.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt()
        mu = child.centroids.repeat_interleave(x.shape[0] // len(child.centroids), 0)
        nearest = (x @ (mu / mu.norm(dim=-1, keepdim=True)).transpose(-1, -2)).argmax(-1)
        clusters.append(nearest.repeat_interleave(heads // len(nearest), 0))
    kept = torch.eye(n, dtype=torch.bool).repeat(heads, 1, 1)
    for h in range(heads):
        for i in range(n):
            mine = [j for j in range(i) if reached[i, j] and clusters[1][h, j] == clusters[0][h, i]]
            kept[h, i, mine[max(0, len(mine) - child.config.window + 1) :]] = True
    return kept


@contextmanager
def eager_under_its_pattern(model: Any, mask: Tensor) -> Iterator[None]:
    """Inside, a patched model runs its own eager attention under its patterns' pairs; ``mask [batch, length]``."""

    def under(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        hidden = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
        batch, n = mask.shape
        parts = getattr(module.sparse, "parts", [module.sparse])
        places = getattr(module.sparse, "part_heads", [range(module.sparse.spec.num_heads)])
        whole = torch.full((batch, module.sparse.spec.num_heads, n, n), HIDDEN, dtype=hidden.dtype)
        for row in range(batch):
            real = mask[row].nonzero().flatten()
            for part, heads in zip(parts, places, strict=True):
                left = part.spec.band.left
                pairs = log_weights(part, module, hidden[row : row + 1, real], left)
                pairs = pairs[list(heads)] if len(pairs) > len(heads) else pairs
                at = (torch.tensor(row), torch.tensor(list(heads))[:, None, None], real[:, None], real[None, :])
                whole = whole.index_put(at, pairs)
        given = kwargs.get("attention_mask")
        if isinstance(given, dict):  # a mask for each kind of mixer (Zaya)
            return args, {**kwargs, "attention_mask": {**given, "causal": whole}}
        return args, {**kwargs, "attention_mask": whole}

    with dense_under(model, under):
        yield


@contextmanager
def dense_under(model: Any, hook: Any) -> Iterator[None]:
    """The model's own attention inside the block, its patched layers called as ``hook`` (a forward pre-hook) says."""
    layers = [m for m in model.modules() if isinstance(getattr(m, "sparse", None), SparseAttention)]
    assert layers
    handles = [layer.register_forward_pre_hook(hook, with_kwargs=True) for layer in layers]
    try:
        with sa_hf.dense(model):
            yield
    finally:
        for handle in handles:
            handle.remove()


def results(model: Any, ids: Tensor, mask: Tensor) -> dict[str, Tensor]:
    """Logits of the real tokens, and the gradient of each of the model's own parameters."""
    names, leaves = zip(*((n, p) for n, p in model.named_parameters() if "router" not in n), strict=True)
    logits = model(input_ids=ids, attention_mask=mask).logits[mask.bool()]
    upstream = torch.randn(logits.shape, generator=torch.Generator().manual_seed(9)).to(logits.dtype)
    grads = torch.autograd.grad(logits, leaves, upstream, allow_unused=True)
    return {"logits": logits.detach()} | {n: g for n, g in zip(names, grads, strict=True) if g is not None}


def check_against_eager(model: Any, ids: Tensor, mask: Tensor, limit: float) -> dict[str, Tensor]:
    """Logits and every gradient equal those of the model's own attention; returns ours."""
    ours = results(model, ids, mask)
    with eager_under_its_pattern(model, mask):
        expected = results(model, ids, mask)
    assert expected.keys() == ours.keys()
    for name, wanted in expected.items():
        # The gradient of a key's bias is 0 but for rounding; that of a span's bias, one number, sums terms of hundreds.
        size = wanted.double().square().mean().sqrt().clamp(min=1e-2 if wanted.numel() > 1 else 10)
        worst = float((ours[name] - wanted).double().square().mean().sqrt() / size)
        assert worst < limit, (name, worst)
    return ours
