"""Longer inputs: tables are tiled, RoPE is scaled, and unpatching undoes it."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from hf_cases import BOTH, CONFIGS, case, tiny_model, tokens
from older_releases import older_releases_may

import sa_hf
from sa_hf import SparseAttentionError, UnsupportedModelError
from sa_hf.hf.state.positions import lengthening

LONG = 150
# The check of 5.5's configs, which its save runs, looks for a layer type's fields in the wrong place.
NO_YARN_BY_LAYER = "do not fit .* KeyError: 'original_max_position_embeddings'"
# family: (table, rows before its first position)
TABLES = {
    "bert": ("embeddings.position_embeddings", 0),
    "distilbert": ("embeddings.position_embeddings", 0),
    "albert": ("embeddings.position_embeddings", 0),
    "electra": ("embeddings.position_embeddings", 0),
    "roberta": ("embeddings.position_embeddings", 2),
    "xlm_roberta": ("embeddings.position_embeddings", 2),
    "gpt2": ("transformer.wpe", 0),
    "opt": ("model.decoder.embed_positions", 2),
    "bart": ("model.encoder.embed_positions", 2),
}
ROTARY = ["llama", "qwen3", "gpt_neox", "gemma3", "modernbert"]
YARN = {"rope_type": "yarn", "factor": 4.0}


class Tokenizer:
    model_max_length = 64


def run(model: Any, n: int) -> torch.Tensor:
    ids = tokens(1, n)
    extra = {"decoder_input_ids": ids} if model.config.is_encoder_decoder else {}
    with torch.no_grad():
        out: torch.Tensor = model(input_ids=ids, **extra)[0]
    return out


@pytest.mark.parametrize("family", TABLES)
def test_tables_are_tiled_and_cut_back(family: str) -> None:
    model = tiny_model(family)
    short, config = run(model, 60), model.config
    name, first = TABLES[family]
    old = model.get_submodule(name).weight.detach().clone()
    tokenizer = Tokenizer()
    sa_hf.patch_model(model, "sliding_window", window=1000, max_length=LONG, tokenizer=tokenizer)
    table = model.get_submodule(name).weight
    assert table.shape == (LONG + first, old.shape[1])
    assert torch.equal(table[: len(old)], old)
    for position in range(LONG):
        assert torch.equal(table[first + position], old[first + position % 64])
    assert torch.allclose(run(model, 60), short, atol=1e-5)
    assert run(model, LONG).shape[1] == LONG
    assert model.config.max_position_embeddings == LONG + (first if "roberta" in family else 0)
    assert tokenizer.model_max_length == LONG
    assert sa_hf.summary(model).length == LONG
    # What is saved loads into the same shapes.
    saved = type(config)(**{k: v for k, v in model.config.to_dict().items() if k in config.to_dict()})
    assert saved.max_position_embeddings == model.config.max_position_embeddings

    sa_hf.unpatch_model(model)
    assert torch.equal(model.get_submodule(name).weight, old)
    assert torch.equal(run(model, 60), short)
    assert model.config is config
    assert tokenizer.model_max_length == 64
    with pytest.raises((IndexError, RuntimeError, ValueError)):
        run(model, LONG)


def test_trained_rows_stay() -> None:
    model = tiny_model("bert")
    sa_hf.patch_model(model, "star", max_length=LONG)
    with torch.no_grad():
        model.embeddings.position_embeddings.weight[5] = 3.0
        model.embeddings.position_embeddings.weight[100] = 4.0
    sa_hf.patch_model(model, "sliding_window", window=3)  # another pattern, the same length
    assert sa_hf.summary(model).length == LONG
    assert torch.equal(model.embeddings.position_embeddings.weight[100], torch.full((32,), 4.0))
    sa_hf.patch_model(model, "star", max_length=2 * LONG)
    assert model.embeddings.position_embeddings.weight.shape[0] == 2 * LONG
    sa_hf.unpatch_model(model)
    assert model.embeddings.position_embeddings.weight.shape[0] == 64
    assert torch.equal(model.embeddings.position_embeddings.weight[5], torch.full((32,), 3.0))
    run(model, 64)


@pytest.mark.parametrize("patched", [False, True])
def test_extend_positions_is_for_good(patched: bool) -> None:
    config = CONFIGS["bert"]()
    model, other = tf.BertModel(config).eval(), tf.BertModel(config).eval()
    if patched:
        sa_hf.patch_model(model, "star")
    assert sa_hf.extend_positions(model, LONG) is model
    run(model, LONG)
    if patched:
        sa_hf.unpatch_model(model)
        assert run(model, LONG).shape[1] == LONG
    assert model.config.max_position_embeddings == LONG
    assert not hasattr(model.config, "sa_hf")
    assert config.max_position_embeddings == other.config.max_position_embeddings == 64
    sa_hf.patch_model(model, "star", max_length=2 * LONG)
    run(model, 2 * LONG)
    sa_hf.unpatch_model(model)
    assert model.config.max_position_embeddings == LONG
    run(model, LONG)


@pytest.mark.parametrize("family", ROTARY)
def test_rope_is_scaled_and_set_back(family: str) -> None:
    model = tiny_model(family)
    short, config = run(model, 40), model.config
    with older_releases_may(NO_YARN_BY_LAYER):
        sa_hf.patch_model(model, "sliding_window", window=1000, max_length=256, rope_parameters=YARN)
    fresh = type(config)(**{k: v for k, v in CONFIGS[family]().to_dict().items() if k != "rope_parameters"})
    fresh.max_position_embeddings = 256
    fresh.rope_parameters = model.config.rope_parameters
    expected = getattr(tf, type(model).__name__)(fresh).eval()
    expected.load_state_dict({k: v for k, v in model.state_dict().items() if ".sparse." not in k}, strict=False)
    assert torch.allclose(run(model, 200), run(expected, 200), atol=1e-4)
    assert not torch.allclose(run(model, 40), short, atol=1e-3)
    sa_hf.unpatch_model(model)
    assert model.config is config
    assert torch.equal(run(model, 40), short)


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_scaling_twice_is_scaling_once(family: str) -> None:
    """The second call finds the raised limit, and the length that the model was trained on beside it."""
    model = tiny_model(family)
    found = []
    for _ in range(2):
        with older_releases_may(NO_YARN_BY_LAYER):
            sa_hf.patch_model(model, "sliding_window", window=1000, max_length=256, rope_parameters=YARN)
        found.append((run(model, 200), str(model.config.rope_parameters)))
    assert found[0][1] == found[1][1]
    assert torch.equal(found[0][0], found[1][0])


def test_a_models_own_trained_length_stays() -> None:
    own = {"rope_type": "yarn", "factor": 2.0, "rope_theta": 10000.0, "original_max_position_embeddings": 32}
    model = tiny_model("llama", rope_parameters=own)
    sa_hf.patch_model(model, "star", max_length=128, rope_parameters={"rope_type": "yarn", "factor": 4.0})
    assert model.config.rope_parameters == {**own, "factor": 4.0}
    given = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
    sa_hf.patch_model(model, "star", max_length=128, rope_parameters=given)
    assert model.config.rope_parameters["original_max_position_embeddings"] == 16


def test_a_scaling_that_the_models_config_refuses_raises_at_once() -> None:
    """Phi-3's takes LongRoPE alone, and says so when it is saved: after the training."""
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 32}
    ids = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    model = tf.Phi3ForCausalLM(tf.Phi3Config(vocab_size=99, max_position_embeddings=64, **sizes, **ids))
    with pytest.raises(SparseAttentionError, match=r"do not fit Phi3ForCausalLM.*'longrope'.*got yarn"):
        sa_hf.patch_model(model, "star", max_length=256, rope_parameters=YARN)
    assert not hasattr(model, "sa_hf_patch")
    assert model.config.max_position_embeddings == 64


def test_rope_without_scaling_warns() -> None:
    model = tiny_model("llama")
    with pytest.warns(UserWarning, match="extrapolates"):
        sa_hf.patch_model(model, "star", max_length=128)
    assert sa_hf.summary(model).length == 128


@pytest.mark.parametrize("family", BOTH)
def test_encoder_decoders(family: str) -> None:
    model = tiny_model(family)
    sa_hf.patch_model(model, "sliding_window", window=5, max_length=LONG)
    assert run(model, LONG).shape[1] == LONG


def test_the_limit_is_the_tokens_that_the_model_takes() -> None:
    roberta, t5 = tiny_model("roberta"), tiny_model("t5")
    assert roberta.config.max_position_embeddings == 66  # two rows of the table belong to no token
    assert [lengthening(roberta, length) for length in (None, 64, 65)] == [None, None, 65]
    assert lengthening(t5, 10_000) is None


def test_what_cannot_be_lengthened_raises() -> None:
    vit = case("vit")
    before = vit.output()
    with pytest.raises(UnsupportedModelError, match="interpolate_pos_encoding"):
        sa_hf.patch_model(vit.model, "sliding_window", max_length=500)
    assert torch.equal(vit.output(), before)
    assert not hasattr(vit.model, "sa_hf_patch")
    bert = tiny_model("bert")
    with pytest.raises(UnsupportedModelError, match="no rotary embedding"):
        sa_hf.extend_positions(bert, LONG, rope_parameters=YARN)
    with pytest.raises(SparseAttentionError, match="nearest: 64"):
        sa_hf.extend_positions(bert, 10)
    with pytest.raises(SparseAttentionError, match="max_length=None"):
        sa_hf.extend_positions(bert, None)
    assert bert.config.max_position_embeddings == 64


def test_a_tokenizer_left_at_its_limit_is_told_of_once() -> None:
    model = tiny_model("bert")
    with pytest.warns(UserWarning, match=r"max_length=150 lengthens the model alone.*tokenizer=tokenizer") as told:
        sa_hf.patch_model(model, "bigbird", max_length=LONG)
    assert told[0].filename == __file__
    t5 = tiny_model("t5")
    with pytest.warns(UserWarning, match="lengthens the model alone"):
        sa_hf.patch_model(t5, "bigbird", max_length=LONG)
    with pytest.warns(UserWarning, match="lengthens the model alone"):
        sa_hf.extend_positions(tiny_model("gpt2"), LONG)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sa_hf.patch_model(model, "star", max_length=LONG + 1)
        sa_hf.patch_model(t5, "bigbird", max_length=LONG)
        sa_hf.patch_model(tiny_model("bert"), "bigbird", max_length=LONG, tokenizer=Tokenizer())
        sa_hf.patch_model(tiny_model("bert"), "bigbird")
        sa_hf.patch_model(tiny_model("bert"), "bigbird", max_length=64)


def test_a_lengthened_model_that_is_loaded_warns_of_no_tokenizer(tmp_path: Path) -> None:
    model = sa_hf.patch_model(tiny_model("bert"), "bigbird", max_length=LONG, tokenizer=Tokenizer())
    model.save_pretrained(tmp_path)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*tokenizer")
        tf.AutoModel.from_pretrained(tmp_path, trust_remote_code=True)
