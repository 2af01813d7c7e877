"""The Hugging Face Trainer where it computes the loss itself, and where it drops columns of the data."""

from __future__ import annotations

import warnings
from typing import Any

import datasets
import pytest
import torch
import transformers as tf
from hf_cases import accumulated_by_the_release, tiny_model, tokens
from torch import Tensor

import sa_hf
from sa_hf.hf.training.trainer import SparseTrainer

EXPIRING = sa_hf.ExpireSpanAttentionConfig(max_span=12, ramp=4, initial_span=6, span_loss_coef=0.1)
MASKS = sa_hf.SparseBertAttentionConfig(mask_length=32, density_coef=2.0)


def squared(outputs: Any, labels: Any, num_items_in_batch: Any = None) -> Tensor:
    """A loss that reaches no span: the gradient of a bias is the penalty's alone."""
    assert outputs.get("loss") is None
    return 0.0 * outputs.logits.square().sum()


def trainer_of(kind: Any, model: Any, data: Any, folder: Any, **options: Any) -> Any:
    extra = {name: options.pop(name) for name in ("compute_loss_func",) if name in options}
    arguments = tf.TrainingArguments(
        str(folder), per_device_train_batch_size=1, max_steps=1, report_to=[], use_cpu=True, save_strategy="no",
        disable_tqdm=True, max_grad_norm=0.0, optim="sgd", learning_rate=1.0, lr_scheduler_type="constant", **options,
    )  # fmt: skip
    return kind(model, arguments, train_dataset=data, **extra)


@pytest.mark.parametrize("steps", [1, 2])
@pytest.mark.parametrize(
    "options",
    [{"label_smoothing_factor": 0.1}, {"compute_loss_func": squared}],
    ids=["label smoothing", "loss function"],
)
def test_the_sparse_trainer_trains_on_losses_where_the_model_gets_no_labels(
    options: dict[str, Any], steps: int, tmp_path: Any
) -> None:
    model = sa_hf.patch_model(tiny_model("llama"), EXPIRING).train()
    data = [{"input_ids": row, "labels": row} for row in tokens(2, 6)]
    trainer = trainer_of(SparseTrainer, model, data, tmp_path, gradient_accumulation_steps=steps, **options)
    trainer.sparse_lr = 1.0
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*not trained on")
        trainer.train()
    # All spans outlast the sequence: d(0.1 mean e) / db = 0.1 e (1 - e / L), once per step whatever it accumulates.
    moved = -float(0.1 * 6 * (1 - 6 / 12)) * (1.0 if steps == 1 else accumulated_by_the_release(tmp_path))
    fresh = sa_hf.patch_model(tiny_model("llama"), EXPIRING)
    for layer, before in zip(model.model.layers, fresh.model.layers, strict=True):
        change = layer.self_attn.sparse.bias - before.self_attn.sparse.bias
        assert change.item() == pytest.approx(moved, rel=1e-3)


def test_a_stock_trainer_that_keeps_the_labels_back_trains_on_them(tmp_path: Any) -> None:
    model = sa_hf.patch_model(tiny_model("llama"), EXPIRING)
    data = [{"input_ids": row, "labels": row} for row in tokens(2, 6)]
    before = [layer.self_attn.sparse.bias.clone() for layer in model.model.layers]
    trainer_of(tf.Trainer, model, data, tmp_path, label_smoothing_factor=0.1).train()
    # All spans outlast the sequence: their loss alone moves them.
    for layer, bias in zip(model.model.layers, before, strict=True):
        assert layer.self_attn.sparse.bias < bias


@pytest.mark.parametrize("pattern", [EXPIRING, MASKS], ids=lambda c: c.name)
def test_a_trainer_that_calls_the_body_alone_weighs_as_the_stock_one(pattern: Any, tmp_path: Any) -> None:
    """The items of a step are counted for the whole model: of each row one label fewer than the body would count."""

    class OfTheBody(tf.Trainer):
        def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **more: Any) -> Any:
            logits = model.lm_head(model.model(input_ids=inputs["input_ids"])[0]).float()
            labels = inputs["labels"][:, 1:].flatten()
            summed = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels, reduction="sum")
            return summed / more["num_items_in_batch"]

    class Look(tf.TrainerCallback):
        def on_pre_optimizer_step(self, *args: Any, model: Any = None, **kwargs: Any) -> None:
            found.append({name: p.grad.clone() for name, p in model.named_parameters()})

    found: list[dict[str, torch.Tensor]] = []
    data = [{"input_ids": row, "labels": row} for row in (tokens(n, seed=n) for n in (12, 4, 7))]
    for kind in (tf.Trainer, OfTheBody):
        model = sa_hf.patch_model(tiny_model("llama"), pattern)
        trainer = trainer_of(kind, model, data, tmp_path, gradient_accumulation_steps=3)
        trainer.add_callback(Look())
        trainer.train()
    for name, gradient in found[0].items():
        assert torch.allclose(found[1][name], gradient, rtol=1e-3, atol=1e-6), name


def test_the_sparse_trainer_keeps_the_sequence_ids_of_a_data_set(tmp_path: Any) -> None:
    """They reach the model, which knows other rows by them, though its forward does not name them."""
    ids = tokens(2, 12)
    packed = torch.tensor([0] * 5 + [1] * 7).expand(2, -1)
    columns = {"input_ids": ids.tolist(), "labels": ids.tolist(), "sequence_ids": packed.tolist(), "other": [1, 2]}
    model = sa_hf.patch_model(tiny_model("llama"), EXPIRING)
    seen: list[Any] = []
    model.register_forward_pre_hook(lambda _, args, kwargs: seen.append(kwargs), with_kwargs=True, prepend=True)
    trainer_of(SparseTrainer, model, datasets.Dataset.from_dict(columns), tmp_path).train()
    assert torch.equal(seen[0]["sequence_ids"], packed[:1])
    assert "other" not in seen[0]
