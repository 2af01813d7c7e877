"""The probe: what it runs, what it leaves alone, and what it says where a model cannot be run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers as tf
from eager_cases import SIZES, TOKENS, check_against_eager, scattered
from hf_cases import error, tiny_model, tokens
from torch import Tensor
from transformers.models.llama.modeling_llama import LlamaMLP

import sa_hf
from sa_hf import UnsupportedModelError
from sa_hf.hf.patching.skeleton import LARGEST, partly_known, skeleton_of

COVERING = sa_hf.SlidingWindowAttentionConfig(window=1000)


def named(name: str, head: str = "ForCausalLM", **changed: Any) -> Any:
    if not hasattr(tf, f"{name}Config"):
        pytest.skip(f"transformers {tf.__version__} has no {name}")
    kind = getattr(tf, f"{name}Config")
    torch.manual_seed(0)
    return getattr(tf, name + head)(kind(**{**SIZES, **TOKENS, **changed})).eval()


def bert_and_gpt2() -> Any:
    encoder = tf.BertConfig(**SIZES)
    decoder = tf.GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=99, add_cross_attention=True, is_decoder=True)
    both = tf.EncoderDecoderConfig.from_encoder_decoder_configs(encoder, decoder)
    both.decoder_start_token_id, both.pad_token_id = 1, 0
    return tf.EncoderDecoderModel(both).eval()


def dinov3() -> Any:
    return tf.DINOv3ViTModel(
        tf.DINOv3ViTConfig(
            hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4, image_size=32,
            patch_size=8,
        )
    ).eval()  # fmt: skip


def gpt2(positions: int) -> Any:
    return tf.GPT2LMHeadModel(
        tf.GPT2Config(n_positions=positions, n_embd=32, n_layer=2, n_head=4, vocab_size=99)
    ).eval()


# Models whose code asks for a number, or whose inputs are shorter than others'.
MODELS: dict[str, Callable[[], Any]] = {
    "dynamic rope": lambda: named(
        "Llama", rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    ),
    "router": lambda: named("JetMoe", num_local_experts=4, num_experts_per_tok=2, num_key_value_heads=2, kv_channels=8),
    "HY": lambda: named(
        "HYV3", num_experts=4, num_experts_per_tok=2, num_key_value_heads=2, head_dim=8, moe_intermediate_size=16
    ),
    "LaraMini": lambda: named("LaraMini", num_key_value_heads=2, head_dim=8, num_hidden_layers=4),
    "8 positions": lambda: gpt2(8),
    "2 positions": lambda: gpt2(2),
    "20 positions": lambda: named("Bert", "Model", max_position_embeddings=20),
    "encoder-decoder of two": bert_and_gpt2,
    "DINOv3": dinov3,
}  # fmt: skip


@pytest.mark.parametrize("case", MODELS)
def test_what_itself_runs_is_reached(case: str) -> None:
    model = MODELS[case]()
    limit = getattr(model.config, "max_position_embeddings", 30)
    given = {"input_ids": tokens(2, min(limit, 30))}
    if case == "DINOv3":
        given = {"pixel_values": torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))}
    if model.config.is_encoder_decoder:
        given["decoder_input_ids"] = tokens(2, 9)
    with torch.no_grad():
        dense = model(**given)[0]
        sa_hf.patch_model(model, COVERING)
        assert error(model(**given)[0], dense) < 1e-5


def test_nothing_is_drawn_and_nothing_changes() -> None:
    model = named("JetMoe", num_local_experts=4, num_experts_per_tok=2, num_key_value_heads=2, kv_channels=8)
    before = torch.get_rng_state()
    state = {name: x.clone() for name, x in model.state_dict().items()}
    sa_hf.patch_model(model, COVERING)
    assert torch.equal(torch.get_rng_state(), before)
    after = model.state_dict()
    assert list(after) == list(state)
    assert all(torch.equal(after[name], x) for name, x in state.items())


def test_weights_are_shapes_and_what_is_large_as_well() -> None:
    model = tiny_model("llama")
    model.config.vocab_size, model.config.intermediate_size = 50_000, 90_000
    with partly_known() as mode:
        skeleton = skeleton_of(model, mode, "eager", "eager")
        assert all(x.is_meta for x in skeleton.parameters() if x.dim() > 1)
        assert not skeleton.model.rotary_emb.inv_freq.is_meta
        found: list[Tensor] = []
        skeleton.model.layers[0].mlp.down_proj.register_forward_hook(lambda _, args, out: found.extend([args[0], out]))
        ids = torch.zeros(1, 24, dtype=torch.long)
        logits = skeleton(ids, use_cache=False).logits
    assert found[0].shape == (1, 24, 90_000)
    assert found[0].numel() > LARGEST
    assert found[0].is_meta
    assert not found[1].is_meta  # narrow again
    assert logits.is_meta


def test_a_call_that_is_repeated_gets_the_same_noise() -> None:
    with partly_known() as mode:
        mode.building = True
        layer = torch.nn.Linear(8, 8)
        mode.building = False
        assert layer.weight.is_meta
        x = torch.ones(1, 8)
        mode.again()
        first, second = layer(x), layer(x)
        mode.again()
        third = layer(x)
    assert torch.equal(first, third)
    assert not torch.equal(first, second)


def test_values_are_those_of_the_inputs() -> None:
    with partly_known():
        mask = torch.ones(1, 24, dtype=torch.long)
        mask[0, 5:] = 0
        assert int(mask.sum()) == 5
        assert mask.nonzero().shape == (5, 2)
        assert not mask.all()
        assert mask.device.type == "cpu"
        counts = torch.nn.functional.linear(torch.ones(4), torch.empty(2**11, 2**11)[:, :4])
        assert len(counts.topk(2).indices.tolist()) == 2
        assert torch.tensor([3, 4]).tolist() == [3, 4]


def test_the_error_names_the_models_own_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        return x + self.down_proj(x)  # of another width

    monkeypatch.setattr(LlamaMLP, "forward", forward)
    model = tiny_model("llama")
    with pytest.raises(UnsupportedModelError, match=r"test_probe\.py:\d+, `return x \+ self\.down_proj\(x\)"):
        sa_hf.patch_model(model, COVERING)
    assert not any("sparse" in name for name, _ in model.named_modules())


SLIDING = {
    "swa_num_attention_heads": 2, "swa_num_key_value_heads": 2, "swa_q_lora_rank": 16, "swa_kv_lora_rank": 16,
    "swa_head_dim": 24, "swa_qk_nope_head_dim": 16, "swa_v_head_dim": 12, "sliding_window": 6,
}  # fmt: skip


def dots3(**changed: Any) -> Any:
    """Heads, widths and the window are each layer's own."""
    latent = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8}
    experts = {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1}
    if not hasattr(tf, "Dots3NoteTextConfig"):
        pytest.skip(f"transformers {tf.__version__} has no Dots 3")
    kind = tf.Dots3NoteTextConfig
    torch.manual_seed(0)
    return tf.Dots3NoteForCausalLM(
        kind(
            **SIZES, **TOKENS, **latent, **experts, **SLIDING, head_dim=16, num_key_value_heads=4,
            moe_intermediate_size=16, layer_types=["full_attention", "sliding_attention"], **changed,
        )
    ).eval()  # fmt: skip


def test_values_that_differ_by_layer_are_read_from_each_layers_config() -> None:
    model = dots3(use_dsa=False)
    sa_hf.patch_model(model, sa_hf.SlidingWindowAttentionConfig(window=9))
    specs = [site.spec for site in model.sa_hf_patch.sites.all_sites]
    assert [(spec.num_heads, spec.head_dim, spec.band.left) for spec in specs] == [(4, 16, None), (2, 24, 5)]
    mask = torch.ones(2, 40, dtype=torch.long)
    mask[1, 30:] = 0
    check_against_eager(scattered(model), tokens(2, 40), mask, limit=1e-4)


def test_an_indexer_counts_where_a_layer_has_one() -> None:
    """Up to as many tokens as it chooses; without one, in the test above, 40 tokens are no more than others."""
    model = sa_hf.patch_model(dots3(index_topk=8, index_n_heads=4, index_head_dim=16), COVERING)
    model(input_ids=tokens(2, 8))
    with pytest.raises(sa_hf.SparseAttentionError, match=r"over 40 tokens.*index_topk=8"):
        model(input_ids=tokens(2, 40))


def test_text_beside_an_image_in_one_call() -> None:
    """CLIP takes no text alone: its text layers get the pattern all the same."""
    vision = {"image_size": 16, "patch_size": 8, **{k: SIZES[k] for k in ("hidden_size", "intermediate_size")}}
    config = tf.CLIPConfig(
        text_config={**SIZES, "eos_token_id": 1, "pad_token_id": 0, "bos_token_id": 1},
        vision_config={**vision, "num_hidden_layers": 2, "num_attention_heads": 4}, projection_dim=16,
    )  # fmt: skip
    model = tf.CLIPModel(config).eval()
    given = {"input_ids": tokens(2, 20), "pixel_values": torch.ones(2, 3, 16, 16)}
    given["input_ids"][:, -1] = 1  # its head reads the end of the text
    with torch.no_grad():
        dense = model(**given).text_embeds
        sa_hf.patch_model(model, COVERING)
        assert error(model(**given).text_embeds, dense) < 1e-5
        sa_hf.patch_model(model, "sliding_window", window=3)
        assert error(model(**given).text_embeds, dense) > 1e-4
