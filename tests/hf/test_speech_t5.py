"""SpeechT5: relative keys in its encoder, and a decoder beside it, under the pattern's pairs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers as tf
from gradient_cases import assert_close, with_gradients
from torch import Tensor

import sa_hf
from sa_hf.tools.families.check import check
from sa_hf.tools.families.compare import RIGHT, relative_error
from sa_hf.tools.families.reference import own_attention
from sa_hf.tools.families.registry import entries

ENTRIES = {entry.name: entry for entry in entries()}
WINDOW = sa_hf.SlidingWindowAttentionConfig(window=4, num_sink_tokens=1)
ALL = sa_hf.SlidingWindowAttentionConfig(window=100_000)
SOUND, WORDS = 800, 20


def model_of(**values: Any) -> Any:
    config = tf.SpeechT5Config(
        hidden_size=32, encoder_layers=2, encoder_attention_heads=4, encoder_ffn_dim=40, decoder_layers=2,
        decoder_attention_heads=4, decoder_ffn_dim=40, vocab_size=81, conv_dim=[16, 16], conv_kernel=[4, 4],
        conv_stride=[4, 4], num_feat_extract_layers=2, num_conv_pos_embeddings=8, num_conv_pos_embedding_groups=2,
        encoder_max_relative_position=9, max_text_positions=64, max_speech_positions=200, **values,
    )  # fmt: skip
    model = tf.SpeechT5ForSpeechToText(config)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.3, generator=generator)
    return model.eval()


def inputs() -> dict[str, Tensor]:
    """Two rows of sound and words, longer than the farthest distance, the second padded."""
    generator = torch.Generator().manual_seed(2)
    mask = torch.ones(2, SOUND, dtype=torch.long)
    mask[1, 500:] = 0
    return {
        "input_values": torch.randn(2, SOUND, generator=generator), "attention_mask": mask,
        "decoder_input_ids": torch.randint(5, 80, (2, WORDS), generator=generator),
    }  # fmt: skip


def run(model: Any, given: dict[str, Tensor]) -> dict[str, Tensor]:
    return with_gradients(model, model(**given).logits)


@pytest.mark.parametrize("stacks", [("encoder",), ("decoder",), ("encoder", "decoder")])
def test_a_pattern_is_the_models_own_attention_under_its_pairs(stacks: tuple[str, ...]) -> None:
    model, given = model_of(), inputs()
    dense = run(model, given)
    assert any("pe_k" in name for name in dense)
    sa_hf.patch_model(model, dict.fromkeys(stacks, ALL))
    assert_close(run(model, given), dense)
    sa_hf.patch_model(model, dict.fromkeys(stacks, WINDOW))
    narrow = run(model, given)
    assert relative_error(narrow["output"], dense["output"]) > 1e-2
    with own_attention(model):
        assert_close(narrow, run(model, given))
    with sa_hf.dense(model):
        assert all(torch.equal(x, dense[name]) for name, x in run(model, given).items())
    sa_hf.unpatch_model(model)
    assert all(torch.equal(x, dense[name]) for name, x in run(model, given).items())


@pytest.mark.parametrize("cache", ["dynamic", "sparse"])
def test_words_are_the_same_with_a_cache(cache: str) -> None:
    model, given = sa_hf.patch_model(model_of(), {"encoder": WINDOW, "decoder": WINDOW}), inputs()
    sound = {name: given[name] for name in ("input_values", "attention_mask")}
    options: dict[str, Any] = {"past_key_values": sa_hf.sparse_cache(model)} if cache == "sparse" else {}

    def made(**options: Any) -> Tensor:
        out = model.generate(
            **sound, max_new_tokens=12, min_new_tokens=12, do_sample=False, output_logits=True,
            return_dict_in_generate=True, **options,
        )  # fmt: skip
        return torch.stack(out.logits, 1)

    assert relative_error(made(**options), made(use_cache=False)) < 1e-4


def test_patterns_generation_and_reloads() -> None:
    found = check(ENTRIES["SpeechT5ForSpeechToText"])
    assert found.status == RIGHT, found.reason
    assert {"reload", "sliding_window gradients"} <= found.figures.keys()
    assert found.patched == "encoder, decoder"
