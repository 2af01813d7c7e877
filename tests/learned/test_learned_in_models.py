"""The learned patterns inside Transformers models: training, checkpointing, segments, generation, saving."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, BartConfig, BartForConditionalGeneration, LlamaConfig, LlamaForCausalLM

import sa_hf
from sa_hf.errors import SparseAttentionError
from sa_hf.patterns.learned import LearnedAttention
from sa_hf.patterns.sparsebert import SparseBertAttention

PATTERNS: dict[str, dict[str, Any]] = {
    "sparsebert": {"mask_length": 64},
    "expire_span": {"max_span": 128, "ramp": 8, "initial_span": 10.0, "span_loss_coef": 0.01},
    "routing": {"num_clusters": 4, "window": 6, "num_local_heads": 2, "local_window": 4, "commitment_coef": 0.1},
}
# Each pattern so configured that it keeps everything at 40 tokens.
EVERYTHING: dict[str, dict[str, Any]] = {
    "sparsebert": {"mask_length": 64},
    "expire_span": {"max_span": 128, "ramp": 8, "initial_span": 60.0},
    "routing": {"num_clusters": 1, "window": 64},
}


def llama(name: str | None = None, **options: Any) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=128, initializer_range=0.2,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    if name is not None:
        sa_hf.patch_model(model, name, **options)
    return model


def patched(name: str) -> LlamaForCausalLM:
    model = llama(name, **PATTERNS[name])
    for module in model.modules():
        if isinstance(module, SparseBertAttention) and module.logits is not None:
            module.logits.data = 0.3 + torch.randn(module.logits.shape, generator=torch.Generator().manual_seed(2))
    return model


def tokens(length: int = 40) -> Tensor:
    return torch.randint(1, 64, (2, length), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", PATTERNS)
def test_a_pattern_that_keeps_everything_equals_the_dense_model(name: str) -> None:
    dense, model = llama(), llama(name, **EVERYTHING[name])
    torch.testing.assert_close(model(tokens()).logits, dense(tokens()).logits, rtol=1e-4, atol=1e-4)
    assert (patched(name)(tokens()).logits - dense(tokens()).logits).abs().max() > 1e-2


@pytest.mark.parametrize("name", PATTERNS)
def test_training_with_and_without_checkpointing_is_equal(name: str) -> None:
    results = []
    for checkpointed in (False, True):
        model = patched(name).train()
        if checkpointed:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        for _ in range(2):
            model(tokens(), labels=tokens(), use_cache=False).loss.backward()
        learned = [module for module in model.modules() if isinstance(module, LearnedAttention)]
        assert [int(module.step) for module in learned] == [2, 2]  # once per forward, not in a recomputation
        trained = {n: p.grad for n, p in model.named_parameters() if "sparse" in n}
        assert all(grad is not None and float(grad.abs().max()) > 0 for grad in trained.values())
        assert (len(trained) > 0) is (name != "routing")
        losses = sa_hf.auxiliary_losses(model)
        assert len(losses) == 1
        assert not any(loss.requires_grad for module in learned for loss in module._live.values())
        results.append([p.grad for p in model.parameters() if p.grad is not None] + list(losses.values()))
    for plain, again in zip(*results, strict=True):
        assert torch.equal(plain, again)


@pytest.mark.parametrize("name", PATTERNS)
def test_own_loss_holds_the_auxiliary_one_in_training_alone(name: str) -> None:
    model = patched(name)
    bare = torch.nn.functional.cross_entropy(model(tokens()).logits[:, :-1].flatten(0, 1), tokens()[:, 1:].flatten())
    torch.testing.assert_close(model(tokens(), labels=tokens()).loss, bare)
    extra = sum(sa_hf.auxiliary_losses(model).values())
    assert float(extra) > 0
    model.train()
    output = model(tokens(), labels=tokens())
    own = torch.nn.functional.cross_entropy(output.logits[:, :-1].flatten(0, 1), tokens()[:, 1:].flatten())
    coefficient = {"sparsebert": 20.0, "expire_span": 0.01, "routing": 0.1}[name]
    torch.testing.assert_close(output.loss, own + coefficient * sum(sa_hf.auxiliary_losses(model).values()))


@pytest.mark.parametrize(
    ("name", "frozen"), [("sparsebert", False), ("sparsebert", True), ("expire_span", False), ("routing", False)]
)
def test_generation_equals_the_forward(name: str, frozen: bool) -> None:
    model = patched(name)
    if frozen:
        sa_hf.freeze_masks(model)
    mask = torch.ones_like(tokens(24))
    mask[0, :7] = 0
    made = model.generate(
        tokens(24), attention_mask=mask, max_new_tokens=16, do_sample=False, output_scores=True,
        return_dict_in_generate=True, pad_token_id=0, eos_token_id=None,
    )  # fmt: skip
    whole = torch.cat([mask, mask.new_ones(2, 16)], dim=1)
    rows = model(made.sequences, attention_mask=whole).logits[:, 23:-1]
    torch.testing.assert_close(torch.stack(made.scores, 1), rows, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "structure"),
    [("sparsebert", "structured"), ("sparsebert", "unstructured"), ("expire_span", None), ("routing", None)],
)
def test_eviction_is_lossless(name: str, structure: str | None) -> None:
    if structure is not None:
        model = llama(name, structure=structure, mask_length=80, share_layers=False)
        for module in model.modules():
            if isinstance(module, SparseBertAttention) and module.logits is not None:
                # Sparse, and nothing kept at distances above 11 (structured) or of keys 4 to 29 (unstructured).
                module.logits.data = torch.randn(module.logits.shape, generator=torch.Generator().manual_seed(2))
                module.logits.data[..., 12:] = -1
                module.logits.data[..., 4:12] -= 0.0 if structure == "structured" else 9.0
        sa_hf.freeze_masks(model)
    else:
        model = patched(name)
    mask = torch.ones_like(tokens(24))
    mask[0, :7] = 0
    options = {
        "attention_mask": mask, "max_new_tokens": 50, "do_sample": False, "output_scores": True,
        "return_dict_in_generate": True, "pad_token_id": 0, "eos_token_id": None,
    }  # fmt: skip
    cache = sa_hf.sparse_cache(model)
    kept = model.generate(tokens(24), past_key_values=cache, **options)
    plain = model.generate(tokens(24), **options)
    assert torch.equal(kept.sequences, plain.sequences)
    torch.testing.assert_close(torch.stack(kept.scores), torch.stack(plain.scores), rtol=1e-4, atol=1e-5)
    assert all(layer["kept"] < layer["seen"] == 73 for layer in cache.report().values())


@pytest.mark.parametrize("name", PATTERNS)
def test_state_is_saved_and_reloaded(name: str, tmp_path: Path) -> None:
    model = patched(name).train()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(2):
        model(tokens(), labels=tokens()).loss.backward()
        optimizer.step()
        for module in model.modules():
            if hasattr(module, "update_centroids"):
                module.update_centroids()
    model.eval().save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, trust_remote_code=True)
    assert torch.equal(loaded.eval()(tokens()).logits, model(tokens()).logits)
    state, again = model.state_dict(), loaded.state_dict()
    sparse = [key for key in state if "sparse" in key]
    assert [key for key in again if "sparse" in key] == sparse
    assert all(torch.equal(state[key], again[key]) for key in sparse)


@pytest.mark.parametrize("name", PATTERNS)
def test_a_token_changes_no_earlier_logit(name: str) -> None:
    model = patched(name)
    before = model(tokens()).logits
    changed = tokens()
    changed[:, 25] = 63 - changed[:, 25]
    after = model(changed).logits
    torch.testing.assert_close(before[:, :25], after[:, :25], rtol=0, atol=1e-5)
    assert not torch.allclose(before[:, 25:], after[:, 25:])


def test_expire_span_learns_over_segments_with_a_carried_cache() -> None:
    """One layer: the second segment's loss has the span gradient of the whole sequence's forward."""
    model = llama(None)
    model.model.layers = model.model.layers[:1]
    model.config.num_hidden_layers = 1
    sa_hf.patch_model(model, "expire_span", max_span=60, ramp=8, initial_span=18.0, span_loss_coef=0.0)
    model.train()
    labels = tokens()
    labels[:, :21] = -100
    model(tokens(), labels=labels, use_cache=False).loss.backward()
    weight = model.model.layers[0].self_attn.sparse.weight
    whole, weight.grad = weight.grad, None

    cache = model(tokens()[:, :20], use_cache=True).past_key_values
    for layer in cache.layers:
        layer.keys, layer.values = layer.keys.detach(), layer.values.detach()
    # Targets of the second segment alone: its first token predicts the next one, as in the whole sequence.
    model(tokens()[:, 20:], past_key_values=cache, labels=tokens()[:, 20:]).loss.backward()
    assert whole is not None
    assert weight.grad is not None
    torch.testing.assert_close(weight.grad, whole, rtol=1e-3, atol=1e-6)
    # Keys of the first segment count: with the ramp at distances 18 to 26 they carry most of it.
    weight.grad = None
    model(tokens()[:, 20:], labels=tokens()[:, 20:], use_cache=False).loss.backward()
    assert not torch.allclose(weight.grad, whole, rtol=0.2)


def test_expire_span_refuses_encoders_before_anything_changes() -> None:
    from transformers import BertConfig, BertModel

    model = BertModel(BertConfig(vocab_size=20, hidden_size=16, num_hidden_layers=1, num_attention_heads=2))
    names = [name for name, _ in model.named_modules()]
    with pytest.raises(SparseAttentionError, match="causal only"):
        sa_hf.patch_model(model, "expire_span")
    assert [name for name, _ in model.named_modules()] == names


def test_each_stack_of_an_encoder_decoder_model_has_its_own_shared_mask() -> None:
    torch.manual_seed(0)
    model = BartForConditionalGeneration(
        BartConfig(
            vocab_size=64, d_model=16, encoder_ffn_dim=16, decoder_ffn_dim=16, encoder_layers=2, decoder_layers=2,
            encoder_attention_heads=2, decoder_attention_heads=2, max_position_embeddings=64, decoder_start_token_id=0,
        )
    )  # fmt: skip
    sa_hf.patch_model(model, "sparsebert", mask_length=64)
    model.train()
    model(tokens(12), labels=tokens(12)).loss.backward()
    masks = {name: p for name, p in model.named_parameters() if name.endswith("logits")}
    assert sorted(name.split(".")[1] for name in masks) == ["decoder", "encoder"]
    assert all(p.grad is not None for p in masks.values())
    assert float(sa_hf.auxiliary_losses(model)["sparsebert_density"]) > 1.8


def test_state_stays_fp32_in_a_16_bit_model() -> None:
    for name in PATTERNS:
        model = patched(name)
        before = {key: value.clone() for key, value in model.state_dict().items() if "sparse" in key}
        model.to(torch.bfloat16).train()
        after = model.state_dict()
        assert all(torch.equal(after[key], value) and after[key].dtype == value.dtype for key, value in before.items())
        assert model.lm_head.weight.dtype == torch.bfloat16
        model(tokens(), labels=tokens()).loss.backward()
