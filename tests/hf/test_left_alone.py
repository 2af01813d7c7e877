"""What patching leaves as it was: after a refusal, after unpatching, beside other threads and other models."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
import transformers as tf
from hf_cases import VOCABULARY, case, tiny_model, tokens
from older_releases import REFUSED_THERE, older_releases_may

import sa_hf
from sa_hf import SparseAttentionError, UnsupportedModelError

WINDOW = sa_hf.SlidingWindowAttentionConfig(window=3)


def big_bird() -> Any:
    config = tf.BigBirdConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64, vocab_size=VOCABULARY,
        max_position_embeddings=64, attention_type="original_full",
    )  # fmt: skip
    torch.manual_seed(0)
    return tf.BigBirdModel(config).eval()


def state(model: Any) -> list[Any]:
    modules = list(model.modules())
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in modules]
    attributes = [sorted(vars(m)) for m in modules]
    return [[type(m) for m in modules], hooks, attributes, id(model.config), model.config.to_dict()]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rope_parameters": {"rope_type": "yarm", "factor": 2.0}}, "did you mean 'yarn'"),
        ({"rope_parameters": {"rope_type": "linear"}}, "factor"),
        ({"rope_parameters": 3}, "must be a dict"),
        ({"max_length": 128, "tokenizer": 3}, "model_max_length"),
    ],
)
def test_a_refused_lengthening_changes_nothing(options: dict[str, Any], message: str) -> None:
    model = tiny_model("llama")
    before = state(model)
    with pytest.raises(SparseAttentionError, match=message):
        sa_hf.patch_model(model, WINDOW, **options)
    assert state(model) == before


@pytest.mark.parametrize(
    ("pattern", "options"),
    [("none", {}), ("expire_span", {}), ("bigbird", {"max_length": 1}), ("bigbird", {"engine": "x"})],
)
@pytest.mark.parametrize("make", [big_bird, lambda: tiny_model("bert")], ids=["big_bird", "bert"])
def test_a_refused_patch_changes_nothing(make: Any, pattern: str, options: dict[str, Any]) -> None:
    model = make()
    before = state(model)
    with pytest.raises(SparseAttentionError):
        sa_hf.patch_model(model, pattern, **options)
    assert state(model) == before


def test_big_bird_itself_is_patched_and_restored() -> None:
    model, ids = big_bird(), tokens(2, 40)
    classes = [type(m) for m in model.modules()]
    with torch.no_grad():
        dense = model(ids)[0]
        with older_releases_may(REFUSED_THERE):
            sa_hf.patch_model(model, WINDOW)
        assert not torch.allclose(model(ids)[0], dense, atol=1e-2)
        sa_hf.patch_model(model, "sliding_window", window=64)
        assert torch.allclose(model(ids)[0], dense, atol=1e-5)
        sa_hf.unpatch_model(model)
        assert torch.equal(model(ids)[0], dense)
    assert [type(m) for m in model.modules()] == classes


def test_a_config_that_was_changed_meanwhile_keeps_the_change() -> None:
    config = tiny_model("llama").config
    model, other = tf.LlamaForCausalLM(config), tf.LlamaForCausalLM(config)
    sa_hf.patch_model(model, WINDOW, max_length=128, rope_parameters={"rope_type": "linear", "factor": 2.0})
    model.resize_token_embeddings(VOCABULARY + 5)
    sa_hf.unpatch_model(model)
    assert model.config.vocab_size == VOCABULARY + 5 == model.model.embed_tokens.num_embeddings
    assert model.model.config is model.config
    assert (model.config.max_position_embeddings, model.config.rope_parameters["rope_type"]) == (64, "default")
    assert not {"sa_hf", "auto_map", "attn_implementation"} & set(vars(model.config))
    assert model.config._attn_implementation == "sdpa"
    assert other.config is config
    assert config.vocab_size == VOCABULARY


def test_several_models_in_one_module_are_told_apart_by_the_user() -> None:
    pair = torch.nn.ModuleDict({"query": tiny_model("bert"), "passage": tiny_model("bert", seed=1)})
    with pytest.raises(UnsupportedModelError, match=r"\['query', 'passage'\]"):
        sa_hf.patch_model(pair, WINDOW)
    sa_hf.patch_model(pair["passage"], WINDOW)
    assert not hasattr(pair["query"], "sa_hf_patch")
    wrapped = torch.nn.Sequential(pair["passage"])
    assert sa_hf.patch_model(wrapped, "star") is wrapped
    assert sa_hf.summary(wrapped).layers[0].pattern == "star"


def test_models_are_patched_in_threads() -> None:
    models = [tiny_model("llama", seed) for seed in range(4)]
    failed: list[Exception] = []

    def work(model: Any) -> None:
        try:
            for _ in range(3):
                sa_hf.unpatch_model(sa_hf.patch_model(model, WINDOW))
        except Exception as error:
            failed.append(error)

    threads = [threading.Thread(target=work, args=(model,)) for model in models]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failed == []


def test_frozen_masks_reach_the_configs_of_the_models_inside() -> None:
    c = case("t5")
    sa_hf.freeze_masks(sa_hf.patch_model(c.model, "sparsebert", mask_length=32))
    for model in (c.model, c.model.encoder, c.model.decoder):
        assert model.config.sa_hf["layers"]["encoder"]["0"]["frozen"] is True


def test_summary_follows_the_model() -> None:
    model = sa_hf.patch_model(tiny_model("llama"), WINDOW)
    wide = sa_hf.summary(model, 32).layers[0].memory
    half = sa_hf.summary(model.to(torch.bfloat16), 32).layers[0].memory
    # Queries, keys, values and the output take half; statistics and lists stay.
    assert wide - half == 2 * 32 * (4 + 2) * 8 * 2
