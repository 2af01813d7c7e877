"""What we are measured against: dense SDPA by backend, compiled FlexAttention, Hugging Face's own BigBird."""

from __future__ import annotations

import importlib.util
import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from sa_hf.layer import Geometry
from sa_hf.patterns.base import StaticPatternConfig
from sa_hf.patterns.logsparse import LogSparseAttentionConfig

Run = Callable[[Tensor, Tensor, Tensor], Tensor]
# What is compared: the time of a call as its user has it, launches by the host included, and that of the device alone.
FIGURES = (("ms", ""), ("ms in a graph", " in a graph"))


@dataclass(frozen=True)
class Dense:
    """A dense attention; ``scope`` is entered once around all of its calls, which would be the longer for it."""

    label: str
    run: Run
    scope: Callable[[], AbstractContextManager[Any]] = nullcontext


def dense_runs(causal: bool, device: torch.device) -> Iterator[Dense]:
    """The dense attentions of this machine; one that cannot run raises when it is called."""

    def sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return _sdpa(q, k, v, causal)

    if device.type != "cuda":
        yield Dense("sdpa", sdpa)
        return
    for label, backend in (("sdpa-flash", SDPBackend.FLASH_ATTENTION), ("sdpa-cudnn", SDPBackend.CUDNN_ATTENTION)):
        yield Dense(label, sdpa, partial(sdpa_kernel, backend))
    if importlib.util.find_spec("flash_attn_interface") is not None:
        from flash_attn_interface import flash_attn_func  # type: ignore[import-not-found]  # FlashAttention 3, optional

        def flash3(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            result = flash_attn_func(*(x.transpose(1, 2) for x in (q, k, v)), causal=causal)
            out: Tensor = result[0] if isinstance(result, tuple) else result
            return out.transpose(1, 2)

        yield Dense("flash-attention-3", flash3)


def over_dense(dense: Mapping[str, Mapping[str, Any]], row: Mapping[str, Any], tail: str) -> dict[str, Any]:
    """A row's speed-ups over the fastest of the dense rows whose keys end in ``tail``: calls are compared with calls,
    graphs with graphs."""
    found: dict[str, Any] = {}
    for figure, ending in FIGURES:
        times = [(r[figure], k.split("/")[0]) for k, r in dense.items() if k.endswith(tail) and figure in r]
        if times and figure in row:
            fastest, name = min(times)
            found |= {f"speed-up{ending}": fastest / row[figure], f"over{ending}": name}
    return found


def _sdpa(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
    grouped = q.shape[1] != k.shape[1]
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=grouped)


def flex_run(
    config: StaticPatternConfig, length: int, num_heads: int, causal: bool, device: torch.device, block: int
) -> Run:
    """FlexAttention compiled with the pattern's own predicate (its set: a key in two LongNet branches counts once).

    Patterns that are constant on blocks, or depend on the distance alone, hand over a table, which costs one load per
    element; the others their formula.
    """
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    geometry = Geometry(length, length, tuple(range(num_heads)), num_heads, 0, causal)
    # The forward's own tiles are of up to 128, and have to divide the mask's.
    options = {"fwd_BLOCK_M": block, "fwd_BLOCK_N": block} if block < 128 else None
    # Without this the ninth mask of a process would run uncompiled, over all pairs.
    torch.compiler.reset()
    tables = (_block_table(config, geometry, device), _distance_table(config, geometry, device))
    mask_mod = next((table for table in tables if table is not None), _formula(config, geometry))
    shared = config.same_for_all_heads(geometry)
    block_mask = create_block_mask(
        mask_mod, None, None if shared else num_heads, length, length, device=str(device), BLOCK_SIZE=block,
        _compile=True,
    )  # fmt: skip
    compiled: Callable[..., Any] = torch.compile(flex_attention, dynamic=False)

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        grouped = q.shape[1] != k.shape[1]
        out: Tensor = compiled(q, k, v, block_mask=block_mask, enable_gqa=grouped, kernel_options=options)
        return out

    return run


def fresh_compiler() -> AbstractContextManager[Any]:
    """Inside, nothing is found that was compiled before, by this process or another."""
    from torch._inductor import utils

    fresh = getattr(utils, "fresh_cache", None) or utils.fresh_inductor_cache  # its name before torch 2.8
    found: AbstractContextManager[Any] = fresh()
    return found


def _formula(config: StaticPatternConfig, geometry: Geometry) -> Callable[..., Tensor]:
    branches = config.branches(geometry)

    def mask_mod(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        kept = branches[0](h, i, j)
        for branch in branches[1:]:
            kept = kept | branch(h, i, j)
        return kept & (j <= i) if geometry.causal else kept

    return mask_mod


def _block_table(config: StaticPatternConfig, geometry: Geometry, device: torch.device) -> Callable[..., Tensor] | None:
    size = getattr(config, "block_size", None)
    if not isinstance(size, int):
        return None
    blocks = -(-geometry.key_length // size)
    at = torch.arange(blocks) * size
    heads = torch.tensor(geometry.heads)[:, None, None]
    table = config.branches(geometry)[0](heads, at[None, :, None], at[None, None, :]).to(device)
    table = table.expand(len(geometry.heads), -1, -1).contiguous()

    def mask_mod(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        kept = table[h, i // size, j // size]
        return kept & (j <= i) if geometry.causal else kept

    return mask_mod


def _distance_table(
    config: StaticPatternConfig, geometry: Geometry, device: torch.device
) -> Callable[..., Tensor] | None:  # fmt: skip
    if not isinstance(config, LogSparseAttentionConfig):
        return None
    at = torch.arange(geometry.key_length)
    table = config.allowed(torch.zeros_like(at), at, torch.zeros_like(at), geometry).to(device)

    def mask_mod(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        kept = table[(i - j).abs()]
        return kept & (j <= i) if geometry.causal else kept

    return mask_mod


def hugging_face_bigbird(
    num_heads: int, head_dim: int, block_size: int, device: torch.device, dtype: torch.dtype
) -> Run:
    """The attention core of Hugging Face's BigBird (bidirectional, batch of unpadded rows)."""
    from transformers import BigBirdConfig
    from transformers.models.big_bird.modeling_big_bird import BigBirdBlockSparseAttention, BigBirdModel

    config = BigBirdConfig(
        hidden_size=num_heads * head_dim, num_attention_heads=num_heads, block_size=block_size, num_random_blocks=3
    )
    module = BigBirdBlockSparseAttention(config).to(device=device, dtype=dtype).train()
    core = module.bigbird_block_sparse_attention
    # Newer versions always return the weights and have no such argument.
    extra = {"output_attentions": False} if "output_attentions" in inspect.signature(core).parameters else {}

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        batch, _, length, _ = q.shape
        ones = torch.ones(batch, length, device=device, dtype=dtype)
        blocked, band, from_mask, to_mask = BigBirdModel.create_masks_for_block_sparse_attn(ones, block_size)
        out = core(
            q, k, v, band, from_mask, to_mask, blocked, blocked, num_heads, 3, head_dim, block_size, block_size,
            batch, length, length, seed=0, plan_from_length=None, plan_num_rand_blocks=None, **extra,
        )  # fmt: skip
        context: Tensor = out[0]  # [B, n, H, D]
        return context.transpose(1, 2)

    return run
