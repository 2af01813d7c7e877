"""Losses that are not ``output.loss``: the auxiliary ones reach the parameters once, scaled as in the stock Trainer."""

from __future__ import annotations

import copy
import warnings
from dataclasses import replace
from typing import Any

import pytest
import torch
import transformers as tf
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from hf_cases import case, tiny_model, tokens
from torch import Tensor

import sa_hf
from sa_hf import SparseAttentionError
from sa_hf.hf.forward.losses import collected_losses

EXPIRING = sa_hf.ExpireSpanAttentionConfig(max_span=12, ramp=4, initial_span=6, span_loss_coef=0.1)
MASKS = sa_hf.SparseBertAttentionConfig(mask_length=32, density_coef=2.0)
ROUTING = sa_hf.RoutingAttentionConfig(num_clusters=2, window=4, commitment_coef=0.1)


@pytest.fixture(autouse=True)
def no_accelerator() -> Any:
    """An Accelerator of another test would say the scale."""
    AcceleratorState._reset_state(True)
    GradientState._reset_state()


def cross_entropy(logits: Tensor, labels: Tensor, **options: Any) -> Tensor:
    return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), **options)


def gradients(model: Any, loss: Tensor) -> dict[str, Tensor]:
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def check_equal(got: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert got.keys() == expected.keys()
    for name, gradient in expected.items():
        assert torch.allclose(got[name], gradient, rtol=1e-4, atol=1e-6), name


@pytest.mark.parametrize("return_dict", [True, False])
@pytest.mark.parametrize("checkpointed", [True, False])
@pytest.mark.parametrize("pattern", [MASKS, EXPIRING, ROUTING], ids=lambda c: c.name)
def test_a_loss_of_the_callers_own_trains_as_output_loss_does(
    pattern: Any, checkpointed: bool, return_dict: bool
) -> None:
    model = sa_hf.patch_model(tiny_model("llama"), pattern).train()
    if checkpointed:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    first, second, third = model, copy.deepcopy(model), copy.deepcopy(model)
    ids = tokens(2, 20)
    expected = gradients(first, first(ids, labels=ids, use_cache=False).loss)
    loss = cross_entropy(second(ids, return_dict=return_dict, use_cache=False)[0], ids)
    with pytest.warns(UserWarning, match="not output.loss: with their full weight for each forward"):
        got = gradients(second, loss)
    check_equal(got, expected)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        second(ids, use_cache=False).logits.sum().backward()  # once
    # The labels are given, and the loss is not used: trl's fused head has it so.
    loss = cross_entropy(third(ids, labels=ids, use_cache=False).logits, ids)
    with pytest.warns(UserWarning, match="not output.loss"):
        got = gradients(third, loss)
    check_equal(got, expected)


@pytest.mark.parametrize("pattern", [MASKS, EXPIRING], ids=lambda c: c.name)
def test_the_models_loss_beside_one_of_the_callers_own_counts_once(pattern: Any) -> None:
    ids = tokens(2, 20)
    found = []
    for own in (0.0, 0.5):
        model = sa_hf.patch_model(tiny_model("llama"), replace(pattern, **{}))
        model.train()
        out = model(ids, labels=ids)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            grads = gradients(model, out.loss + own * out.logits.square().mean())
        with torch.no_grad():
            plain = sa_hf.patch_model(tiny_model("llama"), pattern).train()
        with collected_losses(plain) as extra:
            out = plain(ids, labels=ids)
        other = gradients(plain, out.loss + own * out.logits.square().mean() + sum(extra))
        check_equal(grads, other)
        found.append(grads)
    assert any(not torch.allclose(found[0][name], found[1][name]) for name in found[0])


@pytest.mark.parametrize("pattern", [MASKS, EXPIRING], ids=lambda c: c.name)
def test_two_losses_of_one_forward_add_them_once(pattern: Any) -> None:
    """Each has its own backward(): as their sum. Through output.loss, where they are a term of it, each adds them."""
    ids, found = tokens(2, 20), []
    for apart in (False, True):
        model = sa_hf.patch_model(tiny_model("llama"), pattern).train()
        logits = model(ids, use_cache=False).logits
        first, second = cross_entropy(logits, ids), 0.1 * logits.square().mean()
        if apart:
            with pytest.warns(UserWarning, match="not output.loss"):
                first.backward(retain_graph=True)
            with pytest.warns(UserWarning, match="a second backward"):
                found.append(gradients(model, second))
        else:
            found.append(gradients(model, first + second))
    check_equal(*found)


def test_output_loss_twice_adds_them_twice_and_before_another_loss_once() -> None:
    ids = tokens(2, 20)
    model = sa_hf.patch_model(tiny_model("llama"), EXPIRING).train()
    out = model(ids, labels=ids, use_cache=False)
    out.loss.backward(retain_graph=True)
    once = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    twice = gradients(model, out.loss)
    check_equal(twice, {name: 2 * gradient for name, gradient in once.items()})
    model.zero_grad()
    out = model(ids, labels=ids, use_cache=False)
    out.loss.backward(retain_graph=True)
    with pytest.warns(UserWarning, match="a second backward"):
        apart = gradients(model, 0.1 * out.logits.square().mean())
    model.zero_grad()
    out = model(ids, labels=ids, use_cache=False)
    check_equal(apart, gradients(model, out.loss + 0.1 * out.logits.square().mean()))


@pytest.mark.parametrize("family", ["llama", "bart"])
@pytest.mark.parametrize("pattern", [MASKS, ROUTING], ids=lambda c: c.name)
def test_output_loss_after_another_loss_adds_them_no_second_time(family: str, pattern: Any) -> None:
    """As their sum has them, also where the other one comes from one half of the model alone."""
    made = case(family)
    model = sa_hf.patch_model(made.model, pattern if family == "llama" else {"encoder": pattern, "decoder": MASKS})
    found, call = [], {**made.inputs, "labels": made.inputs.get("decoder_input_ids", made.inputs["input_ids"])}
    for apart in (False, True):
        twin = copy.deepcopy(model).train()
        torch.manual_seed(0)
        out = twin(**call)
        own = 0.1 * (out.logits if family == "llama" else out.encoder_last_hidden_state).square().mean()
        if not apart:
            found.append(gradients(twin, out.loss + own))
            continue
        with pytest.warns(UserWarning, match="not output.loss"):
            own.backward(retain_graph=True)
        with pytest.warns(UserWarning, match="a second backward"):
            found.append(gradients(twin, out.loss))
    check_equal(found[1], found[0])


def test_what_is_returned_keeps_its_values_and_takes_changes_in_place() -> None:
    model = sa_hf.patch_model(tiny_model("llama"), EXPIRING)
    ids = tokens(2, 20)
    expected = model(ids, output_hidden_states=True)
    out = model.train()(ids, output_hidden_states=True)
    assert torch.equal(out.logits, expected.logits)
    assert all(torch.equal(x, y) for x, y in zip(out.hidden_states, expected.hidden_states, strict=True))
    out.logits.div_(2.0)
    model(ids, labels=ids).loss.div_(4)


def test_fp16_with_a_scaler_of_ones_own_raises() -> None:
    model = sa_hf.patch_model(tiny_model("llama"), EXPIRING).train()
    ids = tokens(1, 8)
    with torch.autocast("cpu", torch.float16):
        out = model(ids)
        fine = model(ids, labels=ids).loss
    fine.backward()
    with pytest.raises(SparseAttentionError, match=r"under fp16.*collected_losses"):
        out.logits.float().sum().backward()


def test_no_coefficient_no_warning() -> None:
    for pattern in (replace(EXPIRING, span_loss_coef=0.0), replace(MASKS, density_coef=0.0)):
        model = sa_hf.patch_model(tiny_model("llama"), pattern).train()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            model(tokens(1, 6)).logits.sum().backward()


class OwnLoss(tf.Trainer):
    """As trl's SFTTrainer: a loss of its own from what the model returns, by the labels of the step."""

    views = 1

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        ids, labels = inputs["input_ids"], inputs["labels"]
        total = sum(cross_entropy(model(input_ids=ids).logits, labels, reduction="sum") for _ in range(self.views))
        return total / self.views / num_items_in_batch


class TwoViews(OwnLoss):
    views = 2


def step_gradients(cls: Any, tmp_path: Any, pattern: Any, accumulate: int, **more: Any) -> dict[str, Tensor]:
    """The gradients at the first optimizer step of a Trainer."""
    model = sa_hf.patch_model(tiny_model("llama"), pattern)
    data = [{"input_ids": row, "labels": row.clone()} for row in tokens(4, 16)]
    data[1]["labels"][3:] = -100
    found: dict[str, Tensor] = {}

    class Look(tf.TrainerCallback):
        def on_pre_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
            found.update({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})

    arguments = tf.TrainingArguments(
        str(tmp_path), per_device_train_batch_size=4 // accumulate, gradient_accumulation_steps=accumulate, max_steps=1,
        report_to=[], use_cpu=True, max_grad_norm=0.0, save_strategy="no", disable_tqdm=True, **more,
    )  # fmt: skip
    cls(model=model, args=arguments, train_dataset=data, callbacks=[Look()]).train()
    return found


@pytest.mark.parametrize("accumulate", [1, 4])
@pytest.mark.parametrize("pattern", [MASKS, EXPIRING], ids=lambda c: c.name)
def test_a_trainer_with_a_loss_of_its_own_scales_as_the_stock_one(tmp_path: Any, pattern: Any, accumulate: int) -> None:
    expected = step_gradients(tf.Trainer, tmp_path, pattern, accumulate)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        check_equal(step_gradients(OwnLoss, tmp_path, pattern, accumulate), expected)


def test_forwards_of_one_micro_batch_share_its_weight(tmp_path: Any) -> None:
    """Without noise two views of a batch are one: contrastive losses do not regularise twice."""
    expected = step_gradients(OwnLoss, tmp_path, EXPIRING, 2)
    check_equal(step_gradients(TwoViews, tmp_path, EXPIRING, 2), expected)


def test_label_smoothing_of_the_stock_trainer_trains_on_them(tmp_path: Any) -> None:
    """It keeps the labels back from the model; SparseTrainer adds the losses itself, with the same result."""
    from sa_hf.hf.training.trainer import SparseTrainer

    found = [
        step_gradients(cls, tmp_path, EXPIRING, 2, label_smoothing_factor=0.1) for cls in (tf.Trainer, SparseTrainer)
    ]
    check_equal(*found)
    without = step_gradients(tf.Trainer, tmp_path, replace(EXPIRING, span_loss_coef=0.0), 2, label_smoothing_factor=0.1)
    name = next(name for name in without if name.endswith("sparse.bias"))
    assert not torch.allclose(found[0][name], without[name])


def test_the_scaler_of_a_trainer_scales_them_too(tmp_path: Any, monkeypatch: Any) -> None:
    """fp16's scaler multiplies the loss; gradients are what they were times it."""
    expected = step_gradients(OwnLoss, tmp_path, EXPIRING, 2)

    class Scaled(OwnLoss):
        def create_accelerator_and_postprocess(self) -> None:
            super().create_accelerator_and_postprocess()
            self.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=8.0)

        def training_step(self, *args: Any, **kwargs: Any) -> Any:
            return super().training_step(*args, **kwargs)

    got = step_gradients(Scaled, tmp_path, EXPIRING, 2)
    check_equal({name: gradient / 8 for name, gradient in got.items()}, expected)


def test_accelerates_accumulation_divides_them() -> None:
    ids = tokens(4, 16)
    found = []
    try:
        for own in (False, True):
            AcceleratorState._reset_state(True)
            GradientState._reset_state()
            accelerator = Accelerator(gradient_accumulation_steps=4, cpu=True)
            model = sa_hf.patch_model(tiny_model("llama"), EXPIRING).train()
            model = accelerator.prepare(model)
            for row in ids:
                with accelerator.accumulate(model):
                    out = model(row[None], labels=row[None])
                    accelerator.backward(cross_entropy(out.logits, row[None]) if own else out.loss)
            found.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    finally:
        AcceleratorState._reset_state(True)
        GradientState._reset_state()
    check_equal(found[1], found[0])
