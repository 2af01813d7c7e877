"""Masks of pairs that a model, or its caller, makes ready: read where they are causality, padding and sequences; and
rows of packed patches, which are cut by lengths."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers as tf
from eager_cases import HIDDEN, SIZES, TOKENS, scattered
from older_releases import listed, older_releases_may
from torch import Tensor

import sa_hf
from sa_hf import SparseAttentionError
from sa_hf.config import SparseAttention
from sa_hf.hf.forward.adapter import sparse_attention_forward
from sa_hf.hf.forward.ready_masks import packed_request, read_mask, relation_of
from sa_hf.tools.families.check import build, check
from sa_hf.tools.families.compare import RIGHT

WINDOW = sa_hf.SlidingWindowAttentionConfig(window=3, num_sink_tokens=1)
IMAGE = 98
PACKED = ["Qwen2_5_VisionTransformerPretrainedModel", "Qwen3VLVisionModel", "Glm4vVisionModel", "Exaone4_5_VisionModel"]


def blocks(ids: list[int], causal: bool = False) -> Tensor:
    """Pairs ``[n, n]`` of tokens with the same number; -1 is padding."""
    numbers = torch.tensor(ids)
    same = (numbers[:, None] == numbers) & (numbers >= 0)
    return same.tril() if causal else same


def additive(pairs: Tensor) -> Tensor:
    return torch.where(pairs, 0.0, HIDDEN)


# -- what a mask says ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("made", [additive, lambda pairs: pairs], ids=["to add", "bool"])
def test_padding_and_sequences_are_read(made: Any, causal: bool) -> None:
    rows = [[0, 0, 0, 1, 1, 2], [-1, 0, -1, 0, 3, 3], [-1] * 6]
    padding, ids = relation_of(made(torch.stack([blocks(row, causal) for row in rows])), causal)
    assert padding is not None
    assert ids is not None
    assert padding.tolist() == [[number >= 0 for number in row] for row in rows]
    assert ids[0].tolist() == [1, 1, 1, 2, 2, 3]
    assert ids[1][padding[1]].tolist() == [1, 1, 2, 2]
    whole = relation_of(made(blocks([0] * 5, causal)[None]), causal)
    assert whole == (None, None)


def test_rows_of_padding_may_read_what_they_will() -> None:
    pairs = blocks([0, 0, 0, -1])
    pairs[3, :3] = True
    padding, ids = relation_of(pairs[None], causal=False)
    assert padding is not None
    assert padding.tolist() == [[True, True, True, False]]
    assert ids is None


def test_new_tokens_after_cached_ones() -> None:
    pairs = torch.tensor([[False, True, True, True, False], [False, True, True, True, True]])
    padding, ids = relation_of(pairs[None], causal=True)
    assert padding is not None
    assert padding.tolist() == [[False, True, True, True, True]]
    assert ids is None


def _without(pairs: Tensor, i: int, j: int) -> Tensor:
    pairs[i, j] = ~pairs[i, j]
    return pairs


OTHER = {
    "a pair too few": (_without(blocks([0] * 5), 3, 1), False),
    "a pair too many": (_without(blocks([0, 0, 1, 1]), 0, 3), False),
    "groups that are no neighbours": (blocks([0, 1, 0, 1]), False),
    "a window": (torch.ones(6, 6, dtype=torch.bool).tril().triu(-2), True),
    "a window both ways": (torch.ones(6, 6, dtype=torch.bool).tril(1).triu(-1), False),
    "causality in a stack that is not causal": (blocks([0] * 4, causal=True), False),
    "all pairs in a causal stack": (blocks([0] * 4), True),
    "places behind the newest token": (torch.tensor([[True, True, True, False, False]]), True),
}


@pytest.mark.parametrize("kind", OTHER)
def test_what_else_a_mask_says_raises(kind: str) -> None:
    pairs, causal = OTHER[kind]
    with pytest.raises(SparseAttentionError, match=r"is not .* inside padding and sequences one after another"):
        relation_of(pairs[None], causal)


def test_numbers_that_are_added_raise() -> None:
    mask = additive(blocks([0] * 4))
    mask[1, 2] = 0.5
    with pytest.raises(SparseAttentionError, match="adds numbers to the scores"):
        relation_of(mask[None], causal=False)


def test_a_mask_of_keys_says_what_is_padding() -> None:
    """Hidden by -10000, as some models hide."""
    mask = torch.tensor([[0.0] * 5, [0.0, 0.0, 0.0, -1e4, -1e4]])[:, None, None]
    x = torch.zeros(2, 1, 5, 8)
    request = read_mask(mask, x, x, causal=False)
    assert request.padding.tolist() == [[1] * 5, [1, 1, 1, 0, 0]]
    assert not request.causal


def test_a_mask_is_read_anew_where_it_is_written_to_or_means_another_thing() -> None:
    mask, x = torch.zeros(1, 1, 1, 5), torch.zeros(1, 1, 1, 8)
    keys = torch.zeros(1, 1, 5, 8)
    first = read_mask(mask, x, keys, causal=True)
    assert read_mask(mask, x, keys, causal=True) is first
    mask[..., 0] = HIDDEN
    assert read_mask(mask, x, keys, causal=True).padding.tolist() == [[0, 1, 1, 1, 1]]
    other = read_mask(mask, torch.zeros(1, 1, 5, 8), keys, causal=False)
    assert (first.causal, other.causal) == (True, False)


def test_lengths_that_do_not_make_up_a_row_raise() -> None:
    with pytest.raises(SparseAttentionError, match="a row of 8 tokens end at 7"):
        packed_request(torch.tensor([0, 3, 7]), torch.zeros(8, 4))


# -- a mask that the caller gives ----------------------------------------------------------------------------------


def llama() -> Any:
    torch.manual_seed(0)
    return scattered(tf.LlamaForCausalLM(tf.LlamaConfig(**{**SIZES, **TOKENS}))).eval()


def test_a_callers_mask_of_packed_rows_is_sequence_ids() -> None:
    model, ids = sa_hf.patch_model(llama(), WINDOW), torch.arange(3, 15)[None]
    numbers = [0] * 5 + [1] * 7
    positions = torch.tensor([[*range(5), *range(7)]])
    mask = additive(blocks(numbers, causal=True))[None, None]
    with torch.no_grad():
        expected = model(ids, position_ids=positions, sequence_ids=torch.tensor([numbers])).logits
        assert torch.equal(model(ids, position_ids=positions, attention_mask=mask).logits, expected)
        with pytest.raises(SparseAttentionError, match="already tells them apart"):
            model(ids, attention_mask=mask, sequence_ids=torch.tensor([numbers]))
        # Positions that restart elsewhere do not cut what the mask says.
        others = torch.tensor([[*range(3), *range(9)]])
        for layers in (None, "0"):  # the other, left dense, has the mask that it was given
            sa_hf.patch_model(model, WINDOW, layers=layers)
            expected = model(ids, position_ids=others, sequence_ids=torch.tensor([numbers])).logits
            found = model(ids, position_ids=others, attention_mask=mask).logits
            assert torch.allclose(found, expected, atol=1e-6)


def test_positions_that_restart_do_not_cut_a_callers_mask_of_one_sequence() -> None:
    model, ids = llama(), torch.arange(3, 15)[None]
    mask = additive(blocks([0] * 12, causal=True))[None, None]
    inputs = {"position_ids": torch.tensor([[*range(5), *range(7)]]), "attention_mask": mask}
    with torch.no_grad():
        expected = model(ids, **inputs).logits
        for layers in (None, "0"):
            sa_hf.patch_model(model, "sliding_window", window=100, layers=layers)
            assert torch.allclose(model(ids, **inputs).logits, expected, atol=1e-5)


def test_a_layer_called_by_itself_is_told_of_its_sequences_once() -> None:
    layer = sa_hf.patch_model(llama(), WINDOW).model.layers[0].self_attn
    mask, x = additive(blocks([0] * 2 + [1] * 3, causal=True))[None, None], torch.randn(1, 4, 5, 8)
    request, ids = read_mask(mask, x, x, causal=True), torch.tensor([[0, 0, 1, 1, 1]])
    assert [(span.key_start, span.key_length) for span in request.sequences(0).spans] == [(0, 2), (2, 3)]
    with pytest.raises(SparseAttentionError, match="already tells them apart"):
        sparse_attention_forward(layer, x, x, x, request, sequence_ids=ids)


def test_a_mask_that_is_given_again_is_read_again() -> None:
    """It is kept for the layers of one forward: the next has its own training step, and the mask may have changed."""
    model, ids = sa_hf.patch_model(llama(), "expire_span", max_span=8, ramp=4).train(), torch.arange(3, 15)[None]
    mask = additive(blocks([0] * 12, causal=True))[None, None]
    for _ in range(2):
        model(ids, attention_mask=mask).logits.sum().backward()
    mask[..., 5:, :5] = HIDDEN
    changed = model.eval()(ids, attention_mask=mask).logits
    expected = model(ids, sequence_ids=torch.tensor([[0] * 5 + [1] * 7])).logits
    assert torch.allclose(changed, expected, atol=1e-6)


# -- models that make their mask -----------------------------------------------------------------------------------


def pixtral(heads: int = 4) -> Any:
    torch.manual_seed(0)
    vision = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": heads}
    return tf.PixtralVisionConfig(**vision, image_size=64, patch_size=4, attn_implementation="eager")


def images() -> dict[str, Any]:
    """Two images, of 20 and of 6 patches."""
    pixels = torch.randn(2, 3, 16, 20, generator=torch.Generator().manual_seed(1))
    return {"pixel_values": pixels, "image_sizes": torch.tensor([[16, 20], [8, 12]])}


def test_patches_read_those_of_their_own_image_by_the_pattern() -> None:
    model = scattered(tf.PixtralVisionModel(pixtral())).eval()
    given = images()
    with torch.no_grad(), older_releases_may("gets a ready-made mask"):
        dense = model(**given).last_hidden_state
        sa_hf.patch_model(model, "sliding_window", window=1000)
        assert torch.allclose(model(**given).last_hidden_state, dense, atol=1e-5)
        sa_hf.patch_model(model, WINDOW, layers="0")
        both = model(**given).last_hidden_state
        assert (both - dense).abs().max() > 0.1
        alone = model(given["pixel_values"][1:, :, :8, :12]).last_hidden_state
        assert torch.allclose(both[:, 20:], alone, atol=1e-5)
        sa_hf.patch_model(model, "star", relay="token")  # reads the first token of its sequence, which is its image's
        both = model(**given).last_hidden_state
        alone = model(given["pixel_values"][1:, :, :8, :12]).last_hidden_state
        assert torch.allclose(both[:, 20:], alone, atol=1e-5)
    with pytest.raises(SparseAttentionError, match="already tells them apart"):
        model(**given, sequence_ids=torch.zeros(1, 26, dtype=torch.long))


def test_pixtral_as_the_tower_of_a_language_model() -> None:
    text = {**SIZES, **TOKENS, "num_key_value_heads": 2, "head_dim": 8}
    config = tf.LlavaConfig(
        vision_config=pixtral(), text_config=tf.MistralConfig(**text, sliding_window=None), image_token_id=IMAGE,
        vision_feature_layer=-1, vision_feature_select_strategy="full",
    )  # fmt: skip
    model, given = scattered(tf.LlavaForConditionalGeneration(config)).eval(), images()
    ids = torch.cat([torch.full((1, 26), IMAGE), torch.arange(3, 12)[None]], 1)
    with torch.no_grad(), older_releases_may("gets a ready-made mask"):
        dense = model(input_ids=ids, **given).logits
        sa_hf.patch_model(model, {"vision": sa_hf.SlidingWindowAttentionConfig(window=1000)})
        assert torch.allclose(model(input_ids=ids, **given).logits, dense, atol=1e-3)
        sa_hf.patch_model(model, {"vision": WINDOW})
        assert (model(input_ids=ids, **given).logits - dense).abs().max() > 0.1


def test_kosmos_2_writes_with_every_cache() -> None:
    sizes = {"vocab_size": 99, "embed_dim": 32, "layers": 2, "ffn_dim": 32, "attention_heads": 4}
    config = tf.Kosmos2Config(
        text_config={**sizes, "max_position_embeddings": 128, "attn_implementation": "eager"},
        vision_config={"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4},
        latent_query_num=4,
    )  # fmt: skip
    torch.manual_seed(0)
    model = scattered(tf.Kosmos2ForConditionalGeneration(config)).eval().text_model
    with older_releases_may("gets a ready-made mask"):
        sa_hf.patch_model(model, WINDOW)
    ids = torch.randint(5, 90, (2, 12), generator=torch.Generator().manual_seed(2))
    mask = torch.ones_like(ids)
    ids[1, :4], mask[1, :4] = 1, 0
    options = {"input_ids": ids, "attention_mask": mask, "max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    whole = model.generate(**options, use_cache=False)
    assert torch.equal(model.generate(**options), whole)
    assert torch.equal(model.generate(**options, past_key_values=sa_hf.sparse_cache(model)), whole)


def test_a_layer_left_dense_keeps_a_mask_that_is_not_read() -> None:
    """Canary's encoder adds its positions to the mask; its decoder gets a pattern all the same."""
    model, inputs = build(listed("CanaryForConditionalGeneration"))
    sa_hf.patch_model(model, {"decoder": WINDOW})
    with torch.no_grad():
        ours = model(**inputs).logits
        with sa_hf.dense(model):
            dense = model(**inputs)
        assert (ours - dense.logits).abs().max() > 1e-3
        assert torch.equal(model(**inputs).encoder_last_hidden_state, dense.encoder_last_hidden_state)


# -- rows of packed patches ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PACKED)
def test_a_tower_of_packed_patches_is_its_own_attention_under_the_pattern(name: str) -> None:
    found = check(listed(name))
    assert found.status == RIGHT, found.reason
    assert {"bigbird", "longnet gradients", "reload"} <= found.figures.keys()


def qwen_tower() -> tuple[Any, dict[str, Tensor]]:
    """And two images, of 24 and of 8 patches."""
    model, given = build(listed("Qwen3VLVisionModel"))
    width = given["hidden_states"].shape[1]
    patches = torch.randn(32, width, generator=torch.Generator().manual_seed(3))
    return model, {"hidden_states": patches, "grid_thw": torch.tensor([[1, 4, 6], [1, 2, 4]])}


def test_an_image_does_not_depend_on_those_beside_it() -> None:
    model, given = qwen_tower()
    second = {"hidden_states": given["hidden_states"][24:], "grid_thw": given["grid_thw"][1:]}
    calls: list[int] = []
    with torch.no_grad():
        dense = model(**given).last_hidden_state
        sa_hf.patch_model(model, WINDOW)
        child = next(module for module in model.modules() if isinstance(module, SparseAttention))
        child.register_forward_pre_hook(lambda module, args: calls.append(args[0].query.shape[2]))
        both = model(**given).last_hidden_state
        assert calls == [32]  # one call for both images
        assert (both - dense).abs().max() > 0.1
        assert torch.allclose(both[24:], model(**second).last_hidden_state, atol=1e-5)
        with sa_hf.dense(model):
            assert torch.equal(model(**given).last_hidden_state, dense)
        with pytest.raises(SparseAttentionError, match="already tells them apart"):
            model(**given, sequence_ids=torch.zeros(1, 32, dtype=torch.long))
        assert torch.equal(sa_hf.unpatch_model(model)(**given).last_hidden_state, dense)


def test_learned_patterns_train_over_several_images() -> None:
    """They are called once a forward: their steps and losses count once."""
    model, given = qwen_tower()
    sa_hf.patch_model(model, "sparsebert", mask_length=32).train()
    seen: list[Any] = []
    child = next(module for module in model.modules() if isinstance(module, SparseAttention))
    child.register_forward_pre_hook(lambda module, args: seen.append(args[0].hidden_states))
    model(**given).last_hidden_state.square().sum().backward()
    children: list[Any] = [module for module in model.modules() if isinstance(module, SparseAttention)]
    assert {child.forwards for child in children} == {1}
    assert [x.dim() for x in seen] == [3]  # what a pattern reads of its layer has a batch, as everywhere
    learned = [p for name, p in model.named_parameters() if ".sparse." in name]
    assert learned
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in learned)


def test_convolutions_in_a_tower_of_packed_patches_are_refused() -> None:
    joined, _ = qwen_tower()
    with pytest.raises(SparseAttentionError, match="no projection of queries and keys"):
        sa_hf.patch_model(joined, "logsparse", conv_kernel_size=3)
    apart, _ = build(listed("HunYuanVLVisionTransformer"))
    with pytest.raises(sa_hf.UnsupportedModelError, match="over whose ends a convolution would reach"):
        sa_hf.patch_model(apart, "logsparse", conv_kernel_size=3)
