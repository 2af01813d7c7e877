"""Training: auxiliary losses, steps, optimizer groups, PEFT."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
import transformers as tf
from hf_cases import EXPIRING, FAMILIES, MASKS, case, gradients, tiny_model, tokens
from torch import Tensor

import sa_hf
from sa_hf import SparseAttentionError


def test_replicas_of_data_parallel_raise() -> None:
    """As torch.nn.parallel.replicate makes them; their parameters are no longer Parameters."""
    model = sa_hf.patch_model(tiny_model("llama"), sa_hf.LogSparseAttentionConfig(conv_kernel_size=3))
    replica = model._replicate_for_data_parallel()
    with pytest.raises(SparseAttentionError, match=r"LlamaForCausalLM.*accelerate launch.*torchrun"):
        replica(tokens(1, 6))


@pytest.mark.parametrize("family", [f for f in FAMILIES if f != "vit"])
def test_gradients_reach_the_embeddings_as_in_the_dense_model(family: str) -> None:
    c = case(family)
    c.inputs["attention_mask"][:] = 1  # outputs of padding differ, and the loss here reads every output
    dense = gradients(c.model, c.inputs)
    sa_hf.patch_model(c.model, "sliding_window", window=1000)
    sparse = gradients(c.model, c.inputs)
    assert sparse.keys() == dense.keys()
    for name, gradient in dense.items():
        scale = gradient.abs().max()
        # A bias of the keys shifts all scores of a row alike: its gradient is rounding alone.
        if scale > 1e-5:
            assert (sparse[name] - gradient).abs().max() < 1e-4 * scale, name


# -- auxiliary losses ----------------------------------------------------------------------------------------------


def losses(model: Any, **inputs: Any) -> tuple[Any, dict[str, Tensor]]:
    return model(**inputs), sa_hf.auxiliary_losses(model)


@pytest.mark.parametrize("return_dict", [True, False])
def test_auxiliary_losses_join_in_training_where_labels_are_given(return_dict: bool) -> None:
    model = tiny_model("llama")
    ids = tokens(2, 20)
    with torch.no_grad():
        own = model(ids, labels=ids).loss
    sa_hf.patch_model(model, {"0": EXPIRING, "1": sa_hf.SlidingWindowAttentionConfig(window=1000)})
    assert sa_hf.auxiliary_losses(model) == {}
    with torch.no_grad():
        model.model.layers[0].self_attn.sparse.bias.fill_(30.0)  # spans at their maximum: nothing expires

    def loss_of(out: Any) -> Tensor:
        return out.loss if return_dict else out[0]

    with torch.no_grad():
        out, extra = losses(model, input_ids=ids[:, :12], labels=ids[:, :12], return_dict=return_dict)
        sa_hf.unpatch_model(copy.deepcopy(model))
    assert extra["expire_span"] == pytest.approx(12, rel=1e-4)
    assert not extra["expire_span"].requires_grad
    with torch.no_grad(), sa_hf.dense(model):
        own = loss_of(model(ids[:, :12], labels=ids[:, :12], return_dict=return_dict))
    assert torch.allclose(loss_of(out), own, atol=1e-5)  # evaluation: its own loss alone

    model.train()
    out, extra = losses(model, input_ids=ids[:, :12], labels=ids[:, :12], return_dict=return_dict)
    assert torch.allclose(loss_of(out), own + 0.1 * extra["expire_span"], atol=1e-5)
    out, extra = losses(model, input_ids=ids[:, :12], return_dict=return_dict)
    assert extra.keys() == {"expire_span"}
    assert model.model.layers[0].self_attn.sparse.aux_losses()["expire_span"].grad_fn is None
    copy.deepcopy(model)  # a graph tensor that is kept would break it


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    ("name", "make"),
    [
        ("expire_span", lambda c: replace(EXPIRING, span_loss_coef=c)),
        ("sparsebert_density", lambda c: replace(MASKS, density_coef=c, share_layers=False)),
        ("routing_commitment", lambda c: sa_hf.RoutingAttentionConfig(num_clusters=2, window=4, commitment_coef=c)),
    ],
)
def test_auxiliary_losses_are_figures_without_their_coefficients(name: str, make: Any, training: bool) -> None:
    """The same at every coefficient, 0 too; what joins the loss is theirs times it. Also in mixtures by heads."""
    ids = tokens(2, 20)
    for pattern in (make, lambda c: {"1": {"heads": {"0-1": "star", "2-": make(c)}}}):
        found, joined = {}, {}
        for coefficient in (0.0, 0.5, 2.0):
            model = sa_hf.patch_model(tiny_model("llama"), pattern(coefficient))
            model.train(training)
            out, extra = losses(model, input_ids=ids, labels=ids)
            found[coefficient], joined[coefficient] = extra, float(out.loss.detach())
        expected = found[2.0][name]
        assert not expected.requires_grad
        assert expected > 0.05
        for coefficient, extra in found.items():
            if name == "routing_commitment" and not training and coefficient == 0:
                assert extra == {}
                continue
            assert torch.allclose(extra[name], expected, rtol=1e-4)
            added = coefficient * float(expected) if training else 0.0
            assert joined[coefficient] - joined[0.0] == pytest.approx(added, rel=1e-3, abs=1e-4)


def test_the_loss_reaches_what_it_regularises() -> None:
    model = tiny_model("llama")
    sa_hf.patch_model(model, EXPIRING)
    model.train()
    ids = tokens(2, 6)
    model(ids, labels=ids).loss.backward()
    for layer in model.model.layers:
        sparse = layer.self_attn.sparse
        assert sparse.weight.grad.abs().max() > 0
        # All spans outlast the sequence: the regulariser alone moves the bias, d(0.1 mean e) / db = 0.1 e (1 - e / L).
        span = torch.tensor(6.0)
        assert sparse.bias.grad.item() == pytest.approx(float(0.1 * span * (1 - span / 12)), rel=1e-4)


def test_the_loss_counts_once_per_optimizer_step() -> None:
    """With `num_items_in_batch` the shares of the micro-batches sum to one auxiliary loss, weighted by their labels."""
    model = tiny_model("llama")
    ids = tokens(2, 20)
    labels = ids.clone()
    labels[1, 8:] = -100
    sa_hf.patch_model(model, EXPIRING)
    model.train()
    items = int((labels[:, 1:] != -100).sum())
    total, weighted, plain = 0.0, 0.0, 0.0
    for row in range(2):
        one, label = ids[row : row + 1], labels[row : row + 1]
        count = int((label[:, 1:] != -100).sum())
        out, extra = losses(model, input_ids=one, labels=label, num_items_in_batch=items)
        total += float(out.loss.detach())
        weighted += 0.1 * float(extra["expire_span"]) * count / items
        model.eval()
        plain += float(model(one, labels=label, num_items_in_batch=items).loss.detach())
        model.train()
    assert total == pytest.approx(plain + weighted, rel=1e-4)


@pytest.mark.parametrize(
    "pattern",
    [
        EXPIRING,
        {"0": {"heads": {"0-1": EXPIRING, "2-": "star"}}},
        sa_hf.RoutingAttentionConfig(num_clusters=2, window=4, commitment_coef=0.1),
    ],
    ids=["layers", "mixture", "no parameters"],
)
def test_reentrant_checkpointing_raises_instead_of_losing_the_loss(pattern: Any) -> None:
    model = tiny_model("llama")
    sa_hf.patch_model(model, pattern)
    model.train()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    ids = tokens(1, 6)
    with pytest.raises(SparseAttentionError, match="use_reentrant"):
        model(ids, labels=ids)
    with torch.no_grad():
        model(ids, labels=ids)  # nothing is trained here
    model.gradient_checkpointing_disable()
    model(ids, labels=ids)


def test_steps_count_outer_training_forwards() -> None:
    model = tiny_model("bert")
    sa_hf.patch_model(model, {"1": {"heads": {"0-1": "star", "2-": MASKS}}})
    step = next(b for name, b in model.named_buffers() if name.endswith("parts.1.step"))
    ids = tokens(1, 9)
    with torch.no_grad():
        model(ids)
        assert int(step) == 0
        model.train()
        first, second = model(ids)[0], model(ids)[0]
        assert int(step) == 2
        model.eval()
        model(ids)
    assert int(step) == 2
    assert not torch.equal(first, second)


def test_trainer_trains_and_logs(tmp_path: Any) -> None:
    model = tiny_model("llama")
    sa_hf.patch_model(model, EXPIRING)
    data = [{"input_ids": row, "labels": row} for row in tokens(4, 12)]
    arguments = tf.TrainingArguments(
        str(tmp_path), per_device_train_batch_size=1, gradient_accumulation_steps=2, max_steps=2, report_to=[],
        logging_steps=1, use_cpu=True, save_strategy="no", disable_tqdm=True, learning_rate=1e-3,
    )  # fmt: skip
    trainer = tf.Trainer(model, arguments, train_dataset=data)
    before = model.model.layers[0].self_attn.sparse.bias.clone()
    trainer.train()
    assert not torch.equal(model.model.layers[0].self_attn.sparse.bias, before)
    assert int(model.model.layers[0].self_attn.sparse.step) == 4


# -- optimizers and PEFT -------------------------------------------------------------------------------------------


def test_parameter_groups() -> None:
    model = tiny_model("llama")
    sa_hf.patch_model(model, {"0": EXPIRING, "1": sa_hf.LogSparseAttentionConfig(conv_kernel_size=2)})
    model.model.embed_tokens.weight.requires_grad_(False)
    names = {id(p): name for name, p in model.named_parameters()}
    decay, plain, sparse = sa_hf.parameter_groups(model, 0.1, sparse_lr=0.02)
    assert {names[id(p)] for p in sparse["params"]} == {
        f"model.layers.0.self_attn.sparse.{n}" for n in ("weight", "bias")
    }
    assert (sparse["lr"], sparse["weight_decay"]) == (0.02, 0.0)
    assert all("norm" in names[id(p)] for p in plain["params"])
    assert "model.layers.1.self_attn.sparse.conv.query" in {names[id(p)] for p in decay["params"]}
    assert (decay["weight_decay"], plain["weight_decay"]) == (0.1, 0.0)
    listed = [id(p) for group in (decay, plain, sparse) for p in group["params"]]
    assert sorted(listed) == sorted(id(p) for p in model.parameters() if p.requires_grad)
    torch.optim.AdamW([decay, plain, sparse], lr=1e-3).step()
    assert len(sa_hf.parameter_groups(tiny_model("bert"), 0.1)) == 2
    with pytest.raises(SparseAttentionError, match="sparse_lr=-1"):
        sa_hf.parameter_groups(model, 0.1, sparse_lr=-1)


PEFT_CASES: dict[str, Any] = {
    "spans": ("llama", EXPIRING),
    "masks": ("bert", MASKS),
    "convolution": ("llama", sa_hf.LogSparseAttentionConfig(conv_kernel_size=2)),
    "extra tokens": ("bert", sa_hf.BigBirdAttentionConfig(block_size=16, num_extra_tokens=2)),
    "mixture": ("llama", {"0": {"heads": {"0-1": EXPIRING, "2-": "star"}}}),
    "static": ("llama", sa_hf.StarAttentionConfig()),
}


@pytest.mark.parametrize("name", PEFT_CASES)
def test_lora_on_all_linear_layers_trains_and_carries_the_sparse_state(name: str, tmp_path: Any) -> None:
    peft = pytest.importorskip("peft")
    family, pattern = PEFT_CASES[name]
    c = case(family)
    base = copy.deepcopy(c.model)
    sa_hf.patch_model(c.model, pattern)
    before = c.output()
    config = sa_hf.prepare_peft(peft.LoraConfig(target_modules="all-linear", r=2), c.model)
    wrapped = peft.get_peft_model(c.model, config)
    assert not any("sparse" in n and "lora" in n for n, _ in wrapped.named_parameters())
    c.model = wrapped
    assert torch.equal(c.output(), before)
    trained = {n for n, p in wrapped.named_parameters() if p.requires_grad and ".sparse." in n}
    state = [n for n, p in wrapped.named_parameters() if ".sparse." in n and "original_module" not in n]
    assert trained == set(state)
    assert bool(trained) == (name != "static")

    wrapped.train()
    optimizer = torch.optim.AdamW(sa_hf.parameter_groups(wrapped, 0.0), lr=1e-2)
    for _ in range(2):
        out = wrapped(**c.inputs)[0].square().mean()
        (out + sum(sa_hf.auxiliary_losses(wrapped).values())).backward()
        optimizer.step()
        optimizer.zero_grad()
    wrapped.eval()
    after = c.output()
    assert not torch.equal(after, before)
    with sa_hf.dense(wrapped):
        assert not torch.equal(c.output(), after)
    assert torch.equal(c.output(), after)

    wrapped.save_pretrained(tmp_path)
    sa_hf.patch_model(base, pattern)
    c.model = peft.PeftModel.from_pretrained(base, tmp_path).eval()
    assert torch.allclose(c.output(), after, atol=1e-6)


def test_a_learned_pattern_on_an_adapter_that_does_not_carry_it_warns(recwarn: pytest.WarningsRecorder) -> None:
    peft = pytest.importorskip("peft")
    wrapped = peft.get_peft_model(tiny_model("llama"), peft.LoraConfig(target_modules="all-linear"))
    sa_hf.patch_model(wrapped, "sliding_window")
    assert not [w for w in recwarn if "PEFT" in str(w.message)]
    for learned in (EXPIRING, "routing"):  # parameters, and buffers alone
        with pytest.warns(UserWarning, match="before it was patched.*prepare_peft"):
            sa_hf.patch_model(wrapped, learned)


def test_prepare_peft_refuses_what_it_cannot_prepare() -> None:
    peft = pytest.importorskip("peft")
    model = tiny_model("llama")
    config = peft.LoraConfig(target_modules="all-linear", modules_to_save=["lm_head"])
    with pytest.raises(SparseAttentionError, match="not patched"):
        sa_hf.prepare_peft(config, model)
    sa_hf.patch_model(model, EXPIRING)
    with pytest.raises(SparseAttentionError, match="modules_to_save"):
        sa_hf.prepare_peft(object(), model)
    prepared = sa_hf.prepare_peft(config, model)
    assert config.modules_to_save == ["lm_head"]
    assert prepared.modules_to_save == ["lm_head", "model.layers.0.self_attn.sparse", "model.layers.1.self_attn.sparse"]
