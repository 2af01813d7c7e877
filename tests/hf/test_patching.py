"""What patch_model takes, refuses and leaves alone."""

from __future__ import annotations

import copy
import json
import pickle
from typing import Any

import pytest
import torch
import transformers as tf
from hf_cases import CONFIGS, case, error, tiny_model, tokens

import sa_hf
from sa_hf import ConfigVersionError, SparseAttentionError
from sa_hf.hf.state.assignment import assignment_from_dict, assignment_to_dict, parse_assignment

WINDOW = sa_hf.SlidingWindowAttentionConfig(window=3)
STAR = sa_hf.StarAttentionConfig()
ONE = {"encoder": [4, 4, 4, 4, 4, 4]}
TWO = {"encoder": [4, 4], "decoder": [4, 4, 4]}


# -- what it takes -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("pattern", "layers", "options", "expected"),
    [
        (WINDOW, None, {}, {0: WINDOW, 1: WINDOW, 2: WINDOW, 3: WINDOW, 4: WINDOW, 5: WINDOW}),
        ("sliding_window", "0-1, 5", {"window": 3}, {0: WINDOW, 1: WINDOW, 5: WINDOW}),
        ("sliding_window", [4, 2], {"window": 3}, {2: WINDOW, 4: WINDOW}),
        ("sliding_window", 3, {"window": 3}, {3: WINDOW}),
        (sa_hf.SlidingWindowAttentionConfig(window=9), "4-", {"window": 3}, {4: WINDOW, 5: WINDOW}),
        ({"0-3": "dense", "4-": WINDOW}, None, {}, {4: WINDOW, 5: WINDOW}),
        ({"0,2": WINDOW, 1: STAR}, None, {}, {0: WINDOW, 1: STAR, 2: WINDOW}),
        ("dense", None, {}, {}),
        ({"5": {"heads": {"0-1": WINDOW, "2-": STAR}}}, None, {}, {5: {"heads": {"0-1": WINDOW, "2-3": STAR}}}),
        ({"heads": {"0-": STAR}}, None, {}, dict.fromkeys(range(6), STAR)),
        (
            {"5": {"heads": {"1": WINDOW}}}, None, {},
            {5: {"heads": {"1": WINDOW, "0,2-3": sa_hf.DenseAttentionConfig()}}},
        ),
    ],
)  # fmt: skip
def test_assignments(pattern: Any, layers: Any, options: Any, expected: Any) -> None:
    found = parse_assignment(pattern, ONE, layers=layers, options=options)
    assert found == {"encoder": expected}
    written = json.loads(json.dumps(assignment_to_dict(found)))
    assert written["layers"]["encoder"].keys() == {str(layer) for layer in expected}
    assert assignment_from_dict(written) == found


def test_a_preset_takes_fields_alone() -> None:
    with pytest.raises(SparseAttentionError, match="did you mean 'block_size'"):
        sa_hf.BigBirdAttentionConfig.preset("paper", blok_size=32)


def test_assignments_of_two_stacks() -> None:
    assert parse_assignment("star", TWO) == {
        "encoder": dict.fromkeys(range(2), STAR),
        "decoder": dict.fromkeys(range(3), STAR),
    }
    assert parse_assignment(STAR, TWO, layers="1") == {"encoder": {1: STAR}, "decoder": {1: STAR}}
    found = parse_assignment({"encoder": "star", "decoder": {"1-": WINDOW}}, TWO)
    assert found == {"encoder": {0: STAR, 1: STAR}, "decoder": {1: WINDOW, 2: WINDOW}}
    assert parse_assignment({"decoder": STAR}, TWO)["encoder"] == {}


# -- what it refuses -----------------------------------------------------------------------------------------------

BAD: list[tuple[Any, dict[str, Any], str]] = [
    ("bigbrd", {}, "did you mean 'bigbird'"),
    (3, {}, "a name, a config or a mapping"),
    ("bigbird", {"block_size": 48}, "block_size=48"),
    ("bigbird", {"num_random_blocks": -1}, "num_random_blocks=-1"),
    ("sliding_window", {"window": 0}, "nearest: 1"),
    ("sliding_window", {"windw": 3}, "did you mean 'window'"),
    ("star", {"layers": "7-"}, "layers 0 to 1.*nearest: '1'"),
    ("star", {"layers": "1-4"}, "reaches layer 4.*nearest: '1'"),
    ("star", {"layers": [0, 9]}, "reaches layer 9.*nearest: '0-1'"),
    ("star", {"layers": [0, -3]}, "reaches layer -3.*nearest: '0'"),
    ("star", {"layers": "1-0"}, "'0-1'"),
    ("star", {"layers": "a"}, "no layer range"),
    ("star", {"layers": "0,0-1"}, "layer 0 twice"),
    ("star", {"layers": []}, "names no layer"),
    ("star", {"layers": -1}, "reaches layer -1"),
    ("star", {"layers": 1.5}, "must be a range"),
    ({"0-1": "star", "1": "dense"}, {}, "must not overlap"),
    ({"0-": "star"}, {"layers": "0"}, "beside a mapping"),
    ({"0-": "star"}, {"window": 3}, "beside a mapping"),
    ({}, {}, "mapping is empty"),
    ({"encoder": "star"}, {}, "no 'encoder' stack"),
    ({"decoder": "star", "0": "star"}, {}, "mixes stacks"),
    ({"heads": {"0-1": "star"}, "0": "star"}, {}, "stands beside"),
    ({"0": {"1": "star"}}, {}, "a layer takes"),
    ({"heads": {"0-7": "star"}}, {}, "heads 0 to 3"),
    ({"heads": {"0-2": "star", "2-": "dense"}}, {}, "head 2 is in both"),
    ({"heads": {}}, {}, "maps head ranges"),
    ({"heads": {"0": sa_hf.LogSparseAttentionConfig(conv_kernel_size=3), "1-": "star"}}, {}, "conv_kernel_size=3"),
    ({"heads": {"0": sa_hf.RoutingAttentionConfig(shared_qk=True), "1-": "star"}}, {}, "shared_qk=True"),
    ({"heads": {"0": sa_hf.BigBirdAttentionConfig(num_extra_tokens=2), "1-": "star"}}, {}, "extra tokens"),
    ("bigbird", {"num_extra_tokens": 2}, "encoders only"),
    ("star", {"relay": "virtual"}, "encoders only"),
    ("star", {"engine": "cuda"}, "engine='cuda'"),
    ("star", {"engine": "reference"}, "engine='reference' is the dense fp64 oracle of sa_hf.sparse_attention"),
    ("star", {"max_length": 0}, "max_length=0"),
    ("star", {"max_length": 32}, "nearest: 64"),
    ("star", {"max_length": True}, "max_length=True"),
    ("star", {"tokenizer": 3}, "tokenizer=3 has no model_max_length"),
    ({"0": "bigbird", "1": {"heads": {"0": "routing", "1-": "stars"}}}, {}, "did you mean 'star'"),
]


@pytest.mark.parametrize(("pattern", "options", "message"), BAD, ids=[str(i) for i in range(len(BAD))])
@pytest.mark.parametrize("already", [False, True])
def test_bad_input_raises_and_changes_nothing(pattern: Any, options: Any, message: str, already: bool) -> None:
    c = case("llama")
    if already:
        sa_hf.patch_model(c.model, "sliding_window", window=3)
    before = c.output()
    names = [name for name, _ in c.model.named_modules()]
    config, settings = c.model.config, copy.deepcopy(c.model.config.to_dict())
    with pytest.raises(SparseAttentionError, match=message):
        sa_hf.patch_model(c.model, pattern, **options)
    assert [name for name, _ in c.model.named_modules()] == names
    assert c.model.config is config
    assert c.model.config.to_dict() == settings
    assert torch.equal(c.output(), before)


@pytest.mark.parametrize(
    ("data", "kind", "message"),
    [
        (None, SparseAttentionError, "must be"),
        ({"version": 1, "layers": []}, SparseAttentionError, "must be"),
        ({"version": 99, "layers": {}}, ConfigVersionError, "update it"),
        ({"version": True, "layers": {}}, ConfigVersionError, "update it"),
        ({"version": 1, "layers": {}, "new": 1}, ConfigVersionError, "'new'"),
        ({"version": 1, "layers": {"middle": {}}}, SparseAttentionError, "'middle'"),
        ({"version": 1, "layers": {"encoder": {"x": {}}}}, SparseAttentionError, "names layer 'x'"),
        ({"version": 1, "layers": {"encoder": {"0": {"name": "none"}}}}, SparseAttentionError, "unknown pattern"),
        ({"version": 1, "layers": {"encoder": {"0": {"heads": {}}}}}, SparseAttentionError, "'heads'"),
        ({"version": 1, "layers": {"encoder": {"0": {"name": "star", "glow": 1}}}}, ConfigVersionError, "'glow'"),
    ],
)
def test_a_config_file_is_not_trusted(data: Any, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        assignment_from_dict(data)


@pytest.mark.parametrize("name", ["unpatch_model", "dense", "summary", "auxiliary_losses", "sparse_cache"])
def test_functions_of_a_patched_model_say_so(name: str) -> None:
    model = tiny_model("llama")
    error = pytest.raises(SparseAttentionError, match=f"{name}: this LlamaForCausalLM is not patched")
    with error, getattr(sa_hf, name)(model):
        pass


def test_the_floor_of_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    from sa_hf.hf.state import versions

    monkeypatch.setattr(versions.transformers, "__version__", "5.4.1")
    with pytest.raises(SparseAttentionError, match=r"pip install 'transformers>=5\.5,<6'"):
        sa_hf.patch_model(tiny_model("llama"), "star")


# -- what it leaves alone ------------------------------------------------------------------------------------------


def test_models_of_one_config_object_stay_apart() -> None:
    config = CONFIGS["llama"]()
    torch.manual_seed(0)
    first, second = tf.LlamaForCausalLM(config).eval(), tf.LlamaForCausalLM(config).eval()
    ids = tokens(1, 30)
    with torch.no_grad():
        expected = second(ids).logits
        sa_hf.patch_model(first, "sliding_window", window=3)
        assert torch.equal(second(ids).logits, expected)
        third = tf.LlamaForCausalLM(config).eval()
        third(ids)
    assert second.config is config
    assert first.config is not config
    assert first.model.config is first.config  # sharing inside the model stays
    assert not hasattr(config, "sa_hf")
    assert config._attn_implementation == "sdpa"
    sa_hf.unpatch_model(first)
    assert first.config is config


def test_patching_again_replaces_the_whole_assignment() -> None:
    c = case("llama")
    dense = c.output()
    sa_hf.patch_model(c.model, "sliding_window", window=3, layers="0")
    first = c.output()
    sa_hf.patch_model(c.model, "sliding_window", window=3, layers="1")
    second = c.output()
    assert error(first, second) > 1e-3
    assert c.model.config.sa_hf["layers"] == {"decoder": {"1": {"name": "sliding_window", "version": 1, "seed": 0,
                                                                "drop_diagonal": False, "window": 3,
                                                                "num_sink_tokens": 0}}}  # fmt: skip
    fresh = case("llama")
    sa_hf.patch_model(fresh.model, "sliding_window", window=3, layers="1")
    assert torch.equal(second, fresh.output())
    hooks = sum(len(m._forward_pre_hooks) + len(m._forward_hooks) for m in c.model.modules())
    sa_hf.patch_model(c.model, "sliding_window", window=3, layers="1")
    assert sum(len(m._forward_pre_hooks) + len(m._forward_hooks) for m in c.model.modules()) == hooks
    assert torch.equal(c.output(), second)
    sa_hf.unpatch_model(c.model)
    assert torch.equal(c.output(), dense)


def test_patching_again_keeps_what_unchanged_layers_have_learned() -> None:
    model = tiny_model("bert")
    config = sa_hf.SparseBertAttentionConfig(mask_length=32, share_layers=False)
    sa_hf.patch_model(model, config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("sparse.logits"):
                parameter.fill_(-1.5)
    sa_hf.patch_model(model, {"0": "star", "1": config})
    logits = {name: p for name, p in model.named_parameters() if name.endswith("sparse.logits")}
    assert list(logits) == ["encoder.layer.1.attention.self.sparse.logits"]
    assert all(torch.equal(p, torch.full_like(p, -1.5)) for p in logits.values())


def test_copies_are_models_of_their_own() -> None:
    c = case("t5")
    sa_hf.patch_model(c.model, "sliding_window", window=3)
    expected = c.output()
    twin = copy.deepcopy(c.model)
    sa_hf.unpatch_model(c.model)
    dense = c.output()
    assert error(dense, expected) > 1e-3
    c.model, original = twin, c.model
    assert torch.equal(c.output(), expected)
    with sa_hf.dense(twin):
        assert torch.equal(c.output(), dense)
    sa_hf.unpatch_model(twin)
    assert torch.equal(c.output(), dense)
    assert twin.config is not original.config


@pytest.mark.parametrize("way", ["deepcopy", "pickle"])
def test_copies_made_inside_dense_are_sparse(way: str) -> None:
    c = case("t5")
    sa_hf.patch_model(c.model, "sliding_window", window=3)
    sparse, original = c.output(), c.model
    with sa_hf.dense(original):
        dense = c.output()
        c.model = copy.deepcopy(original) if way == "deepcopy" else pickle.loads(pickle.dumps(original))
        assert torch.equal(c.output(), sparse)
        part = copy.deepcopy(original.encoder)
        c.model, twin = original, c.model
        assert torch.equal(c.output(), dense)
    assert torch.equal(c.output(), sparse)
    c.model = twin
    assert torch.equal(c.output(), sparse)
    with sa_hf.dense(twin):
        assert torch.equal(c.output(), dense)
    with pytest.raises(SparseAttentionError, match=r"copy a part of a patched model outside of `dense`"):
        part(c.inputs["input_ids"])


def test_patching_and_unpatching_inside_dense() -> None:
    c = case("llama")
    dense = c.output()
    sa_hf.patch_model(c.model, "sliding_window", window=3)
    with sa_hf.dense(c.model):
        sa_hf.patch_model(c.model, "star")
        assert torch.equal(c.output(), dense)
    assert error(c.output(), dense) > 1e-3
    with sa_hf.dense(c.model):
        sa_hf.unpatch_model(c.model)
    assert torch.equal(c.output(), dense)
    sa_hf.patch_model(c.model, "star")
    with sa_hf.dense(c.model):
        c.model.config.vocab_size += 1  # so that the configs stay
        sa_hf.patch_model(sa_hf.unpatch_model(c.model), "star")
    sa_hf.unpatch_model(c.model)
    assert torch.equal(c.output(), dense)


def test_an_implementation_set_by_hand_does_not_run_dense() -> None:
    c = case("llama")
    sa_hf.patch_model(c.model, "sliding_window", window=3)
    c.model.config._attn_implementation = "eager"
    with pytest.raises(SparseAttentionError, match="attn_implementation='eager'"):
        c.output()


def test_dense_restores_after_an_error_and_nests() -> None:
    c = case("llama")
    dense = c.output()
    sa_hf.patch_model(c.model, "sliding_window", window=3)
    sparse = c.output()
    with pytest.raises(KeyError), sa_hf.dense(c.model):
        raise KeyError
    assert torch.equal(c.output(), sparse)
    with sa_hf.dense(c.model):
        with sa_hf.dense(c.model):
            assert torch.equal(c.output(), dense)
        assert torch.equal(c.output(), dense)
    assert torch.equal(c.output(), sparse)


def test_every_attention_module_has_a_sparse_child_without_parameters_of_its_own() -> None:
    model = tiny_model("bart")
    keys = set(model.state_dict())
    sa_hf.patch_model(model, {"encoder": {"0": "star"}})
    children = [name for name, _ in model.named_modules() if name.endswith(".sparse")]
    assert len(children) == 6  # two encoder layers, two decoder layers, two cross-attentions
    assert set(model.state_dict()) == keys


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_mixtures_by_head_use_the_models_own_head_indices(family: str) -> None:
    """Each head of a mixture gives what it gives where its pattern has all heads."""
    outputs = {}
    mixed = {"0": {"heads": {"0,3": "star", "1": sa_hf.SlidingWindowAttentionConfig(window=5), "2": "dense"}}}
    bigbird = sa_hf.BigBirdAttentionConfig(block_size=16, num_random_blocks=1, num_window_blocks=1)
    mixed["0"]["heads"]["2"] = bigbird
    for name, pattern in {
        "star": {"0": "star"}, "window": {"0": sa_hf.SlidingWindowAttentionConfig(window=5)}, "bigbird": {"0": bigbird},
        "mixed": mixed,
    }.items():  # fmt: skip
        model = tiny_model(family)
        sa_hf.patch_model(model, pattern)
        site = model.sa_hf_patch.sites.stacks["decoder"][0]
        projection = "o_proj" if family == "llama" else "c_proj"
        seen: list[torch.Tensor] = []
        getattr(model.get_submodule(site.name), projection).register_forward_pre_hook(
            lambda m, a, s=seen: s.append(a[0])
        )
        with torch.no_grad():
            model(tokens(2, 60))
        outputs[name] = seen[0].view(2, 60, 4, 8)
    for head, name in enumerate(["star", "window", "bigbird", "star"]):
        assert torch.allclose(outputs["mixed"][:, :, head], outputs[name][:, :, head], atol=1e-5)
    assert not torch.allclose(outputs["star"][:, :, 2], outputs["bigbird"][:, :, 2], atol=1e-3)


def test_state_of_parts_lives_under_their_numbers() -> None:
    model = tiny_model("bert")
    masks = sa_hf.SparseBertAttentionConfig(mask_length=16, share_layers=False)
    sa_hf.patch_model(model, {"1": {"heads": {"0-2": "star", "3": masks}}})
    logits = dict(model.named_parameters())["encoder.layer.1.attention.self.sparse.parts.1.logits"]
    assert logits.shape == (1, 16)


def test_summary() -> None:
    model = tiny_model("mistral")
    pattern = {"0": {"heads": {"0-1": sa_hf.SlidingWindowAttentionConfig(window=4), "2-": sa_hf.StarAttentionConfig()}}}
    sa_hf.patch_model(model, pattern)
    n = 20
    found = sa_hf.summary(model, n)
    pairs = n * (n + 1) // 2
    window = sum(min(i + 1, 4) for i in range(n))
    # The relay is out of the reach of Mistral's own window of 8 from position 8 on.
    star = sum(len({j for j in (0, i - 1, i) if j >= 0 and i - j < 8}) for i in range(n))
    own = sum(min(i + 1, 8) for i in range(n))
    assert found.layers[0].density == pytest.approx((window + star) / 2 / pairs)
    assert found.layers[1].density == pytest.approx(own / pairs)
    assert [layer.pattern for layer in found.layers] == ["sliding_window + star", "dense"]
    assert [layer.engine for layer in found.layers] == ["native", "sdpa"]
    assert "triton" in found.layers[0].reason
    assert json.loads(json.dumps(found.to_dict()))["layers"][0]["stack"] == "decoder"
    assert str(found).splitlines()[0] == "MistralForCausalLM at 20 tokens"
    assert len(str(found).splitlines()) == 4
    assert sa_hf.summary(model).length == 64
    with pytest.raises(SparseAttentionError, match="length=0"):
        sa_hf.summary(model, 0)
    t5 = tiny_model("t5")
    sa_hf.patch_model(t5, "star")
    with pytest.raises(SparseAttentionError, match="no length limit"):
        sa_hf.summary(t5)
    assert [layer.stack for layer in sa_hf.summary(t5, 16).layers] == ["encoder"] * 2 + ["decoder"] * 2


def test_summary_of_patterns_that_depend_on_data() -> None:
    model = tiny_model("llama")
    sa_hf.patch_model(model, {"0": "expire_span", "1": sa_hf.SparseBertAttentionConfig(mask_length=16)})
    found = sa_hf.summary(model, 16)
    assert found.layers[0].density is None
    assert found.layers[1].density == 1.0
    assert "by data" in str(found)
