"""Patched decoders, prompts, and the full forward that generation is compared to."""

from __future__ import annotations

from typing import Any

import torch
import transformers as tf
from hf_cases import BOTH, tiny_model, tokens
from torch import Tensor

import sa_hf

NEW, PROMPT = 12, 15
TOLERANCE = 1e-4  # logits are of order 10

EXPIRING = sa_hf.ExpireSpanAttentionConfig(max_span=8, ramp=3, initial_span=4)
PATTERNS: dict[str, Any] = {
    "window": sa_hf.SlidingWindowAttentionConfig(window=4, num_sink_tokens=2),
    "bigbird": sa_hf.BigBirdAttentionConfig(block_size=16, num_random_blocks=1, num_window_blocks=1),
    "longnet": sa_hf.LongNetAttentionConfig(segment_length=(4, 8), dilated_ratio=(1, 2)),
    "logsparse": sa_hf.LogSparseAttentionConfig(local_window=2, restart_length=8),
    "convolution": sa_hf.LogSparseAttentionConfig(conv_kernel_size=3),
    "fixed": sa_hf.SparseTransformerAttentionConfig(stride=4, summary=1, head_mode="per_head"),
    "star": sa_hf.StarAttentionConfig(),
    "expire_span": EXPIRING,
    "routing": sa_hf.RoutingAttentionConfig(num_clusters=3, window=4),
    "sparsebert": sa_hf.SparseBertAttentionConfig(mask_length=64),
    "block_topk": sa_hf.BlockTopKAttentionConfig(block_size=3, top_k=2, num_window_blocks=1),
    "chosen_by_query": sa_hf.BlockTopKAttentionConfig(
        block_size=4, top_k=1, num_window_blocks=1, selection="query", pooling="max", shared_by_group=False
    ),
    "three": {"0": {"heads": {"0-1": EXPIRING, "2": "star", "3": "dense"}}, "1": "bigbird"},
}
LOSSLESS = {name: pattern for name, pattern in PATTERNS.items() if name not in ("bigbird", "three")}


def patched(family: str, pattern: str) -> Any:
    model = tiny_model(family)
    config = PATTERNS[pattern]
    if family in BOTH:
        config = {"decoder": config}
    sa_hf.patch_model(model, config)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".sparse." in name and not name.endswith("bias"):
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return model


def prompt() -> tuple[Tensor, Tensor]:
    """Two rows, the second padded on the left."""
    mask = torch.ones(2, PROMPT, dtype=torch.long)
    mask[1, :5] = 0
    return tokens(2, PROMPT), mask


def generate(model: Any, ids: Tensor, mask: Tensor, **options: Any) -> Any:
    return model.generate(
        ids, attention_mask=mask, max_new_tokens=NEW, min_new_tokens=NEW, do_sample=False, pad_token_id=0,
        return_dict_in_generate=True, output_logits=True, **options,
    )  # fmt: skip


def full_rows(model: Any, ids: Tensor, mask: Tensor, sequences: Tensor) -> Tensor:
    """The logits that the full forward gives for each generated token, ``[batch, NEW, vocabulary]``."""
    with torch.no_grad():
        if model.config.is_encoder_decoder:
            out = model(input_ids=ids, attention_mask=mask, decoder_input_ids=sequences[:, :-1], use_cache=False).logits
            return out[:, -NEW:]
        whole = torch.cat([mask, torch.ones(len(ids), NEW, dtype=torch.long)], dim=1)[:, :-1]
        inputs = {"input_ids": sequences[:, :-1], "attention_mask": whole, "use_cache": False}
        if not isinstance(model, tf.OPTForCausalLM):  # counts positions by the mask alone
            inputs["position_ids"] = (whole.cumsum(-1) - 1).clamp(min=0)
        return model(**inputs).logits[:, -NEW:]


def check(model: Any, **options: Any) -> Any:
    ids, mask = prompt()
    out = generate(model, ids, mask, **options)
    expected = full_rows(model, ids, mask, out.sequences)
    assert (torch.stack(out.logits, 1) - expected).abs().max() < TOLERANCE
    return out
