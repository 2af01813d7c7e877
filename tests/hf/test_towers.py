"""Multimodal models: the language stack gets the pattern, towers stay as they are, with images as with text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from eager_cases import SIZES, TOKENS, check_against_eager, eager_under_its_pattern, scattered
from torch import Tensor

import sa_hf
from sa_hf import SparseAttentionError
from sa_hf.hf.state.towers import tower_model, tower_of

WINDOW = sa_hf.SlidingWindowAttentionConfig(window=4, num_sink_tokens=1)
IMAGE = 98
TEXT = {**SIZES, **TOKENS, "num_key_value_heads": 2, "head_dim": 8}
VISION: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 32,
    "patch_size": 8, "attn_implementation": "eager",
}  # fmt: skip
ROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2], "mrope_interleaved": True}

MODELS: dict[str, Any] = {
    "llava": lambda: tf.LlavaForConditionalGeneration(
        tf.LlavaConfig(
            vision_config=tf.CLIPVisionConfig(**VISION), text_config=tf.LlamaConfig(**TEXT), image_token_id=IMAGE
        )
    ),
    "gemma3": lambda: tf.Gemma3ForConditionalGeneration(
        tf.Gemma3Config(
            text_config=tf.Gemma3TextConfig(
                **TEXT, sliding_window=3, layer_types=["sliding_attention", "full_attention"]
            ),
            vision_config=tf.SiglipVisionConfig(**VISION), mm_tokens_per_image=4, image_token_id=IMAGE,
        )
    ),
    "qwen3_vl": lambda: tf.Qwen3VLForConditionalGeneration(
        tf.Qwen3VLConfig(
            text_config={**TEXT, "rope_parameters": ROPE},
            vision_config={
                "depth": 2, "hidden_size": 32, "intermediate_size": 32, "num_heads": 4, "out_hidden_size": 32,
                "patch_size": 4, "deepstack_visual_indexes": [0], "num_position_embeddings": 16,
            },
            image_token_id=IMAGE,
        )
    ),
}  # fmt: skip


def made(family: str) -> Any:
    torch.manual_seed(0)
    model = scattered(MODELS[family]()).eval()
    model.set_attn_implementation("eager")
    return model


def padded(side: str) -> tuple[Tensor, Tensor]:
    mask = torch.ones(2, 24, dtype=torch.long)
    mask[1, slice(15, None) if side == "right" else slice(0, 9)] = 0
    ids = torch.randint(3, 90, mask.shape, generator=torch.Generator().manual_seed(4))
    return ids * mask, mask


def text(side: str) -> dict[str, Tensor]:
    ids, mask = padded(side)
    return {"input_ids": ids, "attention_mask": mask}


def with_images(side: str) -> dict[str, Tensor]:
    """A row of one image and text for the LLaVA above, and one of text with another image, padded."""
    ids, mask = padded(side)
    ids = torch.cat([ids[:, :9], torch.full((2, 16), IMAGE), ids[:, 9:]], 1)
    mask = torch.cat([mask[:, :9], torch.ones(2, 16, dtype=torch.long), mask[:, 9:]], 1)
    pixels = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(5))
    return {"input_ids": ids, "attention_mask": mask, "pixel_values": pixels}


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("family", MODELS)
def test_text_alone_is_the_language_models_own_attention_under_the_pattern(family: str, side: str) -> None:
    model = made(family)
    dense = model(**text(side)).logits
    sa_hf.patch_model(model, WINDOW)
    ours = check_against_eager(model, *padded(side), 1e-4)
    assert (ours["logits"] - dense[padded(side)[1].bool()]).abs().max() > 0.1


@pytest.mark.parametrize("side", ["right", "left"])
def test_with_images_outputs_loss_and_gradients_are_eager_attentions(side: str) -> None:
    model, given = made("llava"), with_images(side)
    labels = given["input_ids"].where((given["input_ids"] != IMAGE) & given["attention_mask"].bool(), -100)
    sa_hf.patch_model(model, WINDOW)

    def run() -> tuple[Tensor, list[Tensor]]:
        loss = model(**given, labels=labels).loss
        parameters = [p for p in model.parameters() if p.requires_grad]
        return loss, [g for g in torch.autograd.grad(loss, parameters, allow_unused=True) if g is not None]

    ours, gradients = run()
    with eager_under_its_pattern(model, given["attention_mask"]):
        expected, wanted = run()
    with sa_hf.dense(model):
        assert abs(float(run()[0] - expected)) > 1e-3
    assert torch.allclose(ours, expected, atol=1e-5)
    assert any(g.abs().max() > 0 for g in wanted[:4])  # the tower is trained through the language model
    assert all(torch.allclose(a, b, atol=1e-5, rtol=1e-3) for a, b in zip(gradients, wanted, strict=True))

    model.train()
    model.gradient_checkpointing_enable()
    again, recomputed = run()
    assert torch.equal(again, ours)
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(gradients, recomputed, strict=True))


def test_generation_from_an_image() -> None:
    model = sa_hf.patch_model(made("llava"), WINDOW)
    given = with_images("left")
    options = {**given, "max_new_tokens": 5, "do_sample": False, "eos_token_id": None}
    whole = model.generate(**options, use_cache=False)
    assert torch.equal(model.generate(**options), whole)
    assert torch.equal(model.generate(**options, past_key_values=sa_hf.sparse_cache(model)), whole)


@pytest.mark.parametrize("family", MODELS)
def test_the_whole_saves_loads_and_is_undone(family: str, tmp_path: Path) -> None:
    model = made(family)
    given = text("left")
    with torch.no_grad():
        dense = model(**given).logits
        sa_hf.patch_model(model, WINDOW).save_pretrained(tmp_path)
        loaded = tf.AutoModelForImageTextToText.from_pretrained(tmp_path, trust_remote_code=True)
        assert [layer.pattern for layer in sa_hf.summary(loaded).layers] == ["sliding_window"] * 2
        assert torch.allclose(loaded(**given).logits, model(**given).logits, atol=1e-5)
        assert torch.equal(sa_hf.unpatch_model(model)(**given).logits, dense)


def test_the_summary_says_what_is_left() -> None:
    model = sa_hf.patch_model(made("llava"), WINDOW)
    summary = sa_hf.summary(model)
    assert [(layer.stack, layer.index) for layer in summary.layers] == [("decoder", 0), ("decoder", 1)]
    assert summary.length == 128
    assert "left as it is: vision, 2 layers" in str(summary)
    assert list(summary.to_dict()["left"]) == ["vision"]
    tower = model.model.vision_tower
    assert tower.config._attn_implementation == "eager"
    assert not any(hasattr(module, "sa_hf_place") for module in tower.modules())
    assert not hasattr(tower.config, "sa_hf")


def test_stacks_are_chosen_by_name() -> None:
    model = made("llava")
    sa_hf.patch_model(model, {"language": {"1": WINDOW}})
    assert [layer.pattern for layer in sa_hf.summary(model).layers] == ["dense", "sliding_window"]
    with pytest.raises(SparseAttentionError, match=r"no 'audio' stack; its stacks: \['decoder', 'vision'\]"):
        sa_hf.patch_model(model, {"audio": WINDOW})
    with pytest.raises(SparseAttentionError, match="'language' stands for all of"):
        sa_hf.patch_model(model, {"language": WINDOW, "decoder": WINDOW})


def test_a_tower_gets_a_pattern_where_it_is_named(tmp_path: Path) -> None:
    model, given = made("llava"), with_images("left")
    real = given["attention_mask"].bool()
    with torch.no_grad():
        dense = model(**given).logits[real]
        sa_hf.patch_model(model, {"vision": sa_hf.SlidingWindowAttentionConfig(window=1000)})
        assert torch.allclose(model(**given).logits[real], dense, atol=1e-3)
        sa_hf.patch_model(model, {"vision": {"0": WINDOW}, "language": "dense"})
        ours = model(**given).logits[real]
        assert (ours - dense).abs().max() > 0.1
        stacks = [(layer.stack, layer.pattern) for layer in sa_hf.summary(model).layers]
        assert stacks == [("decoder", "dense")] * 2 + [("vision", "sliding_window"), ("vision", "dense")]

        model.save_pretrained(tmp_path / "whole")
        loaded = tf.AutoModelForImageTextToText.from_pretrained(tmp_path / "whole", trust_remote_code=True)
        assert torch.allclose(loaded(**given).logits[real], ours, atol=1e-3)
        model.model.vision_tower.save_pretrained(tmp_path / "tower")
        tower = tf.AutoModel.from_pretrained(tmp_path / "tower", trust_remote_code=True)
        assert [layer.pattern for layer in sa_hf.summary(tower, 16).layers] == ["sliding_window", "dense"]

        with sa_hf.dense(model):  # patching anew inside, with another choice of towers
            sa_hf.patch_model(model, {"language": WINDOW})
            assert torch.equal(model(**given).logits[real], dense)
        assert (model(**given).logits[real] - dense).abs().max() > 0.1
        assert model.model.vision_tower.config._attn_implementation == "eager"
        assert not hasattr(model.model.vision_tower.config, "sa_hf")
        assert torch.equal(sa_hf.unpatch_model(model)(**given).logits[real], dense)


def test_a_tower_of_patches_with_a_grid_for_each_image() -> None:
    model = made("qwen3_vl")
    patches = torch.randn(20, 3 * 2 * 4 * 4, generator=torch.Generator().manual_seed(5))
    grids = torch.tensor([[1, 4, 4], [1, 2, 2]])
    ids = torch.cat([torch.arange(3, 9), torch.full((4,), IMAGE), torch.arange(9, 14), torch.tensor([IMAGE, 5, 6])])
    given = {"input_ids": ids[None], "pixel_values": patches, "image_grid_thw": grids}
    given["mm_token_type_ids"] = (given["input_ids"] == IMAGE).int()
    with torch.no_grad():
        dense = model(**given).logits
        sa_hf.patch_model(model, {"vision": sa_hf.SlidingWindowAttentionConfig(window=1000)})
        assert torch.allclose(model(**given).logits, dense, atol=1e-3)
        sa_hf.patch_model(model, {"vision": {"0": WINDOW}, "language": "dense"})
        assert (model(**given).logits - dense).abs().max() > 0.1
        assert torch.equal(sa_hf.unpatch_model(model)(**given).logits, dense)


def test_a_tower_that_asks_for_more_is_refused() -> None:
    class Asking(tf.CLIPVisionModel):  # type: ignore[misc]
        def forward(self, pixel_values: Tensor, spatial_shapes: Tensor, **kwargs: Any) -> Any:
            return super().forward(pixel_values, **kwargs)

    model = made("llava")
    model.model.vision_tower.__class__ = Asking
    name = next(name for name, module in model.named_modules() if type(module).__name__ == "CLIPAttention")
    with pytest.raises(SparseAttentionError, match=r"vision tower asks for .*'spatial_shapes'"):
        tower_model(model, name, "vision")


@pytest.mark.parametrize(
    ("make", "found"),
    [
        (MODELS["llava"], {"model.vision_tower": "vision", "model.language_model": None, "lm_head": None}),
        (MODELS["qwen3_vl"], {"model.visual.blocks.0.attn": "vision", "model.language_model.layers": None}),
        (lambda: tf.ViTModel(tf.ViTConfig(**VISION)), None),
        (lambda: tf.CLIPVisionModel(tf.CLIPVisionConfig(**VISION)), None),
    ],
    ids=["llava", "qwen3_vl", "vit", "clip_vision"],
)
def test_towers_are_told_from_language(make: Any, found: dict[str, str | None] | None) -> None:
    """None: of a model that takes images alone no part is a tower."""
    model = make()
    names = {name for name, _ in model.named_modules()}
    for name, kind in (dict.fromkeys(names) if found is None else found).items():
        assert name in names, sorted(names)[:40]
        assert tower_of(model, name) == kind
