"""What a model's own mask adds to a pattern, or takes from it: chunks (Llama 4), tokens of an image that read each
other (Gemma 3); layers left dense take them as they are."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import transformers as tf
from eager_cases import (
    HIDDEN,
    SIZES,
    TOKENS,
    check_against_eager,
    dense_under,
    eager_under_its_pattern,
    log_weights,
    scattered,
)
from test_towers import IMAGE, VISION, made, padded
from torch import Tensor
from transformers.masking_utils import create_causal_mask

import sa_hf
from sa_hf import SparseAttentionError, UnsupportedModelError

WINDOW = sa_hf.SlidingWindowAttentionConfig(window=5, num_sink_tokens=2)
TWICE = sa_hf.LongNetAttentionConfig(segment_length=(4, 64), dilated_ratio=(1, 2))  # some pairs in both branches
PATTERNS = {
    "window": WINDOW,
    "longnet": TWICE,
    "bigbird": sa_hf.BigBirdAttentionConfig(block_size=2, num_random_blocks=1),
    "by head": {"heads": {"0-1": WINDOW, "2-3": "logsparse"}},
}
CHUNK = 7
# Older releases say in a function of the model's own which tokens are of one image: refused, and dense layers take it.
says_blocks = pytest.mark.skipif(
    "block_sequence_ids" not in inspect.signature(create_causal_mask).parameters, reason="no blocks in this release"
)


def llama4() -> Any:
    config = tf.Llama4TextConfig(
        **{**SIZES, **TOKENS, "num_hidden_layers": 3}, num_key_value_heads=2, head_dim=8, intermediate_size_mlp=32,
        num_local_experts=2, attention_chunk_size=CHUNK, no_rope_layers=[1, 1, 0],
    )  # fmt: skip
    torch.manual_seed(0)
    return scattered(tf.Llama4ForCausalLM(config)).eval()


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_chunks_cut_the_pattern(pattern: str, side: str) -> None:
    model = sa_hf.patch_model(llama4(), PATTERNS[pattern])
    assert [site.spec.chunk for site in model.sa_hf_patch.sites.all_sites] == [CHUNK, CHUNK, None]
    check_against_eager(model, *padded(side), 1e-4)


def test_decoding_in_chunks() -> None:
    model = sa_hf.patch_model(llama4(), WINDOW)
    ids, mask = padded("left")
    options = {"attention_mask": mask, "max_new_tokens": 9, "do_sample": False, "eos_token_id": None}
    whole = model.generate(ids, **options, use_cache=False)
    assert torch.equal(model.generate(ids, **options), whole)
    assert torch.equal(model.generate(ids, **options, past_key_values=sa_hf.sparse_cache(model)), whole)


def test_what_learns_its_pairs_is_refused_in_chunks_alone() -> None:
    model = llama4()
    with pytest.raises(UnsupportedModelError, match="chunks of 7 tokens, in which 'expire_span'"):
        sa_hf.patch_model(model, "expire_span", max_span=8, ramp=4)
    sa_hf.patch_model(model, "expire_span", max_span=8, ramp=4, layers="2")


def test_dense_layers_take_the_models_own_chunks() -> None:
    model, (ids, mask) = llama4(), padded("left")
    with torch.no_grad():
        dense = model(ids, mask).logits
        assert torch.equal(sa_hf.patch_model(model, "dense")(ids, mask).logits, dense)


# -- images in Gemma 3 ---------------------------------------------------------------------------------------------


def with_image(side: str) -> dict[str, Tensor]:
    ids, mask = padded(side)
    ids = torch.cat([ids[:, :10], torch.full((2, 4), IMAGE), ids[:, 10:]], 1)
    mask = torch.cat([mask[:, :10], torch.ones(2, 4, dtype=torch.long), mask[:, 10:]], 1)
    pixels = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(5))
    types = (ids == IMAGE).long()
    return {"input_ids": ids, "attention_mask": mask, "pixel_values": pixels, "token_type_ids": types}


@contextmanager
def eager_with_its_images(model: Any, given: dict[str, Tensor]) -> Iterator[None]:
    """The layers' own attention over the pattern's pairs and those of two tokens of the image, inside the window."""
    mask, images = given["attention_mask"].bool(), given["token_type_ids"].bool()

    def under(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        hidden, child = kwargs.get("hidden_states", args[0] if args else None), module.sparse
        n, left = mask.shape[1], child.spec.band.left
        whole = torch.full((len(mask), child.spec.num_heads, n, n), HIDDEN)
        for row, real in enumerate(mask):
            at = real.nonzero().flatten()
            pairs = log_weights(child, module, hidden[row : row + 1, at], left)
            image = images[row, at]
            place = torch.arange(len(at))
            added = image[:, None] & image[None, :] & (place[:, None] - place[None, :] <= (n if left is None else left))
            whole[row, :, at[:, None], at[None, :]] = pairs.where(~added | (pairs > HIDDEN / 2), 0.0)
        return args, {**kwargs, "attention_mask": whole}

    with dense_under(model, under):
        yield


@says_blocks
@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("pattern", ["window", "longnet", "bigbird"])
def test_pairs_of_an_image_are_added_to_the_pattern(pattern: str, side: str) -> None:
    model, given = sa_hf.patch_model(made("gemma3"), PATTERNS[pattern]), with_image(side)

    def run() -> tuple[Tensor, list[Tensor]]:
        logits = model(**given).logits[given["attention_mask"].bool()]
        upstream = torch.randn(logits.shape, generator=torch.Generator().manual_seed(9))
        found = torch.autograd.grad(logits, list(model.parameters()), upstream, allow_unused=True)
        return logits, [g for g in found if g is not None]

    ours, gradients = run()
    with eager_with_its_images(model, given):
        expected, wanted = run()
    assert torch.allclose(ours, expected, atol=1e-4)
    for got, want in zip(gradients, wanted, strict=True):
        assert (got - want).norm() <= 1e-4 * max(want.norm(), 1.0)  # a key's bias has a gradient of rounding alone
    text = model(**{**given, "token_type_ids": torch.zeros_like(given["token_type_ids"])}).logits
    assert (text[given["attention_mask"].bool()] - expected).abs().max() > 0.1  # without these pairs it is another


@says_blocks
def test_generation_from_an_image_whose_tokens_read_each_other() -> None:
    model, given = sa_hf.patch_model(made("gemma3"), PATTERNS["by head"]), with_image("left")
    options = {**given, "max_new_tokens": 4, "do_sample": False, "eos_token_id": None}
    whole = model.generate(**options, use_cache=False)
    assert torch.equal(model.generate(**options), whole)


@says_blocks
def test_learned_patterns_refuse_an_image_and_take_text() -> None:
    model, given = sa_hf.patch_model(made("gemma3"), "expire_span", max_span=8, ramp=4), with_image("right")
    with pytest.raises(SparseAttentionError, match=r"read each other.*'expire_span'.*keep the layer dense"):
        model(**given)
    ids, mask = padded("right")
    model(input_ids=ids, attention_mask=mask, token_type_ids=torch.zeros_like(ids))


def test_dense_layers_take_images_and_ready_made_masks() -> None:
    model, given = made("gemma3"), with_image("left")
    with torch.no_grad():
        dense = model(**given).logits
        sa_hf.patch_model(model, "dense")
        assert torch.equal(model(**given).logits, dense)
        ready = torch.full((2, 1, 28, 28), HIDDEN).triu(1)
        ids = given["input_ids"] % IMAGE
        own = dict.fromkeys(("full_attention", "sliding_attention"), ready)
        ours = model(input_ids=ids, attention_mask=own).logits
        with sa_hf.dense(model):
            assert torch.equal(ours, model(input_ids=ids, attention_mask=own).logits)
        sa_hf.patch_model(model, {"1": WINDOW})
        model(input_ids=ids, attention_mask=own)  # causality, which a pattern has
        ready[0, 0, 9, 4] = HIDDEN
        with pytest.raises(SparseAttentionError, match=r"\(2, 28, 28\) is not causality"):
            model(input_ids=ids, attention_mask=own)
        own["full_attention"] = ready.expand(2, 4, -1, -1)
        with pytest.raises(SparseAttentionError, match=r"\(2, 4, 28, 28\) reached"):
            model(input_ids=ids, attention_mask=own)


def test_a_union_that_holds_everything_is_bidirectional() -> None:
    """EmbeddingGemma: a Gemma 3 whose masks are causality or everything, in the window and without one."""
    config = tf.Gemma3TextConfig(
        **{**SIZES, **TOKENS}, num_key_value_heads=2, head_dim=8, sliding_window=10,
        layer_types=["sliding_attention", "full_attention"], use_bidirectional_attention=True,
    )  # fmt: skip
    torch.manual_seed(0)
    model, (ids, mask) = scattered(tf.Gemma3TextModel(config)).eval(), padded("left")
    with torch.no_grad():
        dense = model(ids, mask).last_hidden_state[mask.bool()]
        sa_hf.patch_model(model, "sliding_window", window=1000)
        assert torch.allclose(model(ids, mask).last_hidden_state[mask.bool()], dense, atol=1e-5)
    specs = [site.spec for site in model.sa_hf_patch.sites.all_sites]
    assert [(spec.causal, spec.band.left, spec.band.right) for spec in specs] == [(False, 5, 5), (False, None, None)]
    sa_hf.patch_model(model, WINDOW)
    with torch.no_grad():
        ours = model(ids, mask).last_hidden_state[mask.bool()]
        with eager_under_its_pattern(model, mask):
            assert torch.allclose(ours, model(ids, mask).last_hidden_state[mask.bool()], atol=1e-5)
    assert (ours - dense).abs().max() > 0.1


@says_blocks
def test_a_prefix_reads_itself_and_the_rest_is_causal() -> None:
    """PaliGemma: its modules say that they are not causal, its masks that all but the prefix is."""
    config = tf.PaliGemmaConfig(
        text_config=tf.GemmaConfig(**{**SIZES, **TOKENS}, num_key_value_heads=1, head_dim=8),
        vision_config=tf.SiglipVisionConfig(**VISION, projection_dim=32), image_token_id=IMAGE, projection_dim=32,
    )  # fmt: skip
    torch.manual_seed(0)
    model, (ids, mask) = scattered(tf.PaliGemmaForConditionalGeneration(config)).eval(), padded("left")
    model.set_attn_implementation("eager")
    types = torch.ones_like(ids)
    types[:, :14] = 0
    given = {"input_ids": ids, "attention_mask": mask, "token_type_ids": types}
    with torch.no_grad():
        dense = model(**given).logits[mask.bool()]
        sa_hf.patch_model(model, "sliding_window", window=1000)
        assert [layer.stack for layer in sa_hf.summary(model).layers] == ["decoder"] * 2
        assert torch.allclose(model(**given).logits[mask.bool()], dense, atol=1e-4)
    sa_hf.patch_model(model, WINDOW)
    check_against_eager(model, ids, mask, 1e-4)
    assert (model(**given).logits[mask.bool()] - model(ids, None, mask).logits[mask.bool()]).abs().max() > 0.1
