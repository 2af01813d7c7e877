"""Falcon with ALiBi, which joins its bias to its mask: dense under a pattern of all pairs, and the same with caches."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers as tf
from older_releases import older_releases_may
from torch import Tensor

import sa_hf
from sa_hf.hf.patching import asking_decoders

ALL = sa_hf.SlidingWindowAttentionConfig(window=100_000)
WINDOW = sa_hf.SlidingWindowAttentionConfig(window=4, num_sink_tokens=1)


def falcon(*, multi_query: bool = False) -> Any:
    torch.manual_seed(0)
    config = tf.FalconConfig(
        vocab_size=64, hidden_size=48, num_hidden_layers=2, num_attention_heads=3, alibi=True, initializer_range=0.2,
        pad_token_id=0, bos_token_id=1, eos_token_id=2, attn_implementation="sdpa", multi_query=multi_query,
    )  # fmt: skip
    return tf.FalconForCausalLM(config).eval()


def patch(model: Any, pattern: Any, **options: Any) -> None:
    with older_releases_may("cannot be patched"):
        sa_hf.patch_model(model, pattern, **options)


def tokens(length: int, batch: int = 2) -> Tensor:
    return torch.randint(3, 64, (batch, length), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("side", ["left", "right", "none"])
def test_outputs_and_gradients_under_all_pairs(side: str) -> None:
    model, ids = falcon(), tokens(17)
    mask = torch.ones_like(ids)
    if side != "none":
        mask[1, slice(0, 6) if side == "left" else slice(11, None)] = 0

    def run() -> list[Tensor]:
        real = model(input_ids=ids, attention_mask=mask).logits[mask.bool()]
        upstream = torch.randn(real.shape, generator=torch.Generator().manual_seed(5))
        return [real, *torch.autograd.grad(real, list(model.parameters()), upstream)]

    dense = run()
    patch(model, ALL)
    for got, expected in zip(run(), dense, strict=True):
        assert (got - expected).abs().max() <= 1e-4 * expected.abs().max().clamp(min=0.1)
    with sa_hf.dense(model):
        assert all(torch.equal(got, expected) for got, expected in zip(run(), dense, strict=True))
    patch(model, ALL, layers="0")  # the other keeps its own attention
    assert (run()[0] - dense[0]).abs().max() < 1e-4
    patch(model, WINDOW)
    assert (run()[0] - dense[0]).abs().max() > 1e-2


def test_far_places_are_rounded_as_the_model_rounds_them() -> None:
    """In bfloat16, whose steps are 4 beyond 512: no table of distances has that."""
    model, ids = falcon(), tokens(700, 1)
    with torch.no_grad():
        dense = model(ids).logits
        patch(model, ALL)
        assert (model(ids).logits - dense).norm() < 1e-5 * dense.norm()


@pytest.mark.parametrize("cache", ["dynamic", "sparse"])  # with a static one the dense model does not run either
def test_generation_with_caches(cache: str) -> None:
    model, ids = falcon(), tokens(11)
    mask = torch.ones_like(ids)
    mask[1, :3] = 0
    patch(model, WINDOW)
    options: dict[str, Any] = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False, "attention_mask": mask}
    expected = model.generate(ids, use_cache=False, **options)
    held = tf.DynamicCache() if cache == "dynamic" else sa_hf.sparse_cache(model)
    assert torch.equal(model.generate(ids, past_key_values=held, **options), expected)
    if cache == "sparse":
        assert held.layers[0].keys.shape[2] < expected.shape[1] - 1


def test_what_cannot_be_had_is_refused() -> None:
    with pytest.raises(sa_hf.UnsupportedModelError, match="share the keys of 1"):
        patch(falcon(multi_query=True), WINDOW)
    with pytest.raises(sa_hf.SparseAttentionError, match="routing compares queries and keys"):
        patch(falcon(), "routing", num_clusters=2)


def test_numbers_joined_to_a_mask_are_never_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    """A layer that does not take them off (as a model would whose attention is not known)."""
    model, ids = falcon(), tokens(9)
    patch(model, WINDOW)
    monkeypatch.setattr(asking_decoders, "MaskRequest", type(None))
    with pytest.raises(sa_hf.SparseAttentionError, match="joins numbers to the mask of FalconAttention"):
        model(ids)
