"""``SparseTrainer(distill=...)``: what the distance to the dense teacher is, whom it trains, and what stays."""

from __future__ import annotations

import copy
from typing import Any

import peft
import pytest
import torch
import transformers as tf
from hf_cases import accumulated_by_the_release, tiny_model, tokens
from torch import Tensor

import sa_hf
from sa_hf.hf.training.trainer import SparseTrainer

WINDOW = sa_hf.SlidingWindowAttentionConfig(window=3)
WHOLE = sa_hf.SlidingWindowAttentionConfig(window=200)


def trainer_of(model: Any, folder: Any, data: Any = None, **options: Any) -> SparseTrainer:
    names = ("distill", "distill_weight", "teacher", "model_init")
    own = {name: options.pop(name) for name in names if name in options}
    given = {
        "per_device_train_batch_size": 1, "max_steps": 1, "report_to": [], "use_cpu": True, "save_strategy": "no",
        "disable_tqdm": True, "max_grad_norm": 0.0, "optim": "sgd", "learning_rate": 0.1, "logging_steps": 1,
        "lr_scheduler_type": "constant", "remove_unused_columns": False, **options,
    }  # fmt: skip
    return SparseTrainer(model, tf.TrainingArguments(str(folder), **given), train_dataset=data, **own)


def padded_batch() -> dict[str, Tensor]:
    ids = tokens(2, 14)
    mask = torch.ones_like(ids)
    mask[1, 9:] = 0
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


def with_head(family: str) -> Any:
    """A tiny model that gives logits of tokens, without dropout."""
    if family != "bert":
        return tiny_model(family, **({"dropout_rate": 0.0} if family == "t5" else {}))
    config = tiny_model("bert").config
    config.hidden_dropout_prob = config.attention_probs_dropout_prob = 0.0
    model = tf.BertForMaskedLM(config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.3, generator=generator)
    return model


def attention_outputs(model: Any, batch: dict[str, Tensor]) -> tuple[Any, list[Tensor]]:
    found: list[Tensor] = []
    layers = [m for n, m in model.named_modules() if n.endswith(("self_attn", "attention.self"))]
    handles = [m.register_forward_hook(lambda _m, _a, out: found.append(out[0])) for m in layers]
    answer = model(**batch)
    for handle in handles:
        handle.remove()
    return answer, found


@pytest.mark.parametrize("what", ["logits", "outputs", "both"])
@pytest.mark.parametrize("family", ["llama", "bert"])
def test_the_distance_is_that_of_its_definition(family: str, what: str, tmp_path: Any) -> None:
    model = sa_hf.patch_model(with_head(family), WINDOW).train()
    batch = padded_batch()
    real = batch["attention_mask"].bool()
    trainer = trainer_of(model, tmp_path, distill=what, distill_weight=0.5)
    loss = trainer.compute_loss(model, dict(batch))
    with torch.no_grad():
        answer, ours = attention_outputs(model, batch)
        with sa_hf.dense(model):
            taught, theirs = attention_outputs(model, batch)
    expected = answer.loss
    if what != "outputs":
        p, q = (x.logits[real].double().log_softmax(-1) for x in (taught, answer))
        expected = expected + 0.5 * (p.exp() * (p - q)).sum(-1).mean()
    if what != "logits":
        rows = [(a[i][real[i]], b[i][real[i]]) for a, b in zip(ours, theirs, strict=True) for i in range(2)]
        expected = expected + 0.5 * torch.stack([(a - b).square().sum() / b.square().sum() for a, b in rows]).mean()
    assert len(ours) == len(theirs) == model.config.num_hidden_layers
    assert float(loss.detach()) == pytest.approx(float(expected), rel=1e-5)
    assert all(value > 1e-3 for value in trainer.distillation.figures.values())
    assert model.training  # and the teacher's evaluation left no trace
    with torch.no_grad():
        assert float(trainer.compute_loss(model.eval(), dict(batch))) == pytest.approx(float(answer.loss), rel=1e-5)


@pytest.mark.parametrize("family", ["llama", "t5"])
def test_a_pattern_that_reads_all_is_at_no_distance(family: str, tmp_path: Any) -> None:
    model = sa_hf.patch_model(with_head(family), WHOLE).train()
    trainer = trainer_of(model, tmp_path, distill="both")
    trainer.compute_loss(model, padded_batch())
    figures = trainer.distillation.figures
    assert set(figures) == {"distill_logits", "distill_outputs"}
    assert all(abs(value) < 1e-6 for value in figures.values())


def test_packed_rows_are_packed_for_the_teacher_too(tmp_path: Any) -> None:
    model = sa_hf.patch_model(tiny_model("llama"), WHOLE).train()
    trainer = trainer_of(model, tmp_path, distill="both")
    ids = tokens(2, 12)
    trainer.compute_loss(
        model, {"input_ids": ids, "labels": ids, "sequence_ids": (torch.arange(12) > 4).long().expand(2, -1)}
    )
    assert all(abs(value) < 1e-6 for value in trainer.distillation.figures.values())


def gradients_of(model: Any, folder: Any, data: Any, **options: Any) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}

    class Look(tf.TrainerCallback):
        def on_pre_optimizer_step(self, *args: Any, model: Any = None, **kwargs: Any) -> None:
            found.update({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})

    trainer = trainer_of(model, folder, data, distill="both", **options)
    trainer.add_callback(Look())
    trainer.train()
    return found


def test_accumulation_and_checkpointing_change_no_gradient(tmp_path: Any) -> None:
    data = [{"input_ids": row, "labels": row} for row in tokens(2, 14)]
    model = sa_hf.patch_model(tiny_model("llama"), WINDOW)
    whole = gradients_of(copy.deepcopy(model), tmp_path, data, per_device_train_batch_size=2)
    parts = gradients_of(copy.deepcopy(model), tmp_path, data, gradient_accumulation_steps=2)
    again = gradients_of(
        copy.deepcopy(model), tmp_path, data, per_device_train_batch_size=2, gradient_checkpointing=True,
        gradient_checkpointing_kwargs={"use_reentrant": False},
    )  # fmt: skip
    share = accumulated_by_the_release(tmp_path)
    for name, gradient in whole.items():
        assert torch.allclose(again[name], gradient, rtol=1e-4, atol=1e-6), name
        assert torch.allclose(parts[name], share * gradient, rtol=1e-4, atol=1e-6), name


def test_the_teacher_keeps_its_weights_and_the_student_comes_nearer(tmp_path: Any) -> None:
    torch.manual_seed(0)
    data = [{"input_ids": row} for row in tokens(4, 14)]
    model = sa_hf.patch_model(tiny_model("llama"), WINDOW)

    class NoTask(SparseTrainer):
        def _own_loss(self, model: Any, inputs: Any, return_outputs: bool, items: Any) -> Any:
            answer = model(**inputs)
            return 0.0 * answer.logits.sum(), answer

    arguments = tf.TrainingArguments(
        str(tmp_path), max_steps=40, report_to=[], use_cpu=True, save_strategy="no", disable_tqdm=True,
        learning_rate=3e-3, per_device_train_batch_size=4, logging_steps=1, remove_unused_columns=False,
    )  # fmt: skip
    trainer = NoTask(model, arguments, train_dataset=data, distill="logits")
    frozen = trainer.distillation.frozen
    before = {name: p.clone() for name, p in frozen.named_parameters()}
    trainer.train()
    seen = [record["distill_logits"] for record in trainer.state.log_history if "distill_logits" in record]
    assert len(seen) == 40
    assert seen[-1] < 0.5 * seen[0]
    assert all(torch.equal(p, before[name]) for name, p in frozen.named_parameters())
    assert not torch.equal(model.lm_head.weight, frozen.lm_head.weight)


def test_adapters_alone_need_no_copy(tmp_path: Any) -> None:
    base = sa_hf.patch_model(tiny_model("llama"), WINDOW)
    with torch.no_grad(), sa_hf.dense(base):
        dense_logits = base(tokens(2, 14)).logits
    config = peft.LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)
    model = peft.get_peft_model(base, sa_hf.prepare_peft(config, base))
    trainer = trainer_of(model, tmp_path, distill="both")
    assert trainer.distillation.frozen is None
    taught, outputs = trainer.distillation.teach(model.train(), {"input_ids": tokens(2, 14)})
    torch.testing.assert_close(taught["logits"], dense_logits, rtol=0, atol=1e-5)
    assert len(outputs) == base.config.num_hidden_layers
    trainer.compute_loss(model, {"input_ids": tokens(2, 14), "labels": tokens(2, 14)}).backward()
    moved = [name for name, p in model.named_parameters() if p.grad is not None]
    assert moved
    assert all("lora_" in name for name in moved)


def test_what_cannot_be_is_refused(tmp_path: Any) -> None:
    model = sa_hf.patch_model(tiny_model("llama"), WINDOW)
    with pytest.raises(sa_hf.SparseAttentionError, match=r"distill='logit'.*nearest: 'logits'"):
        trainer_of(model, tmp_path, distill="logit")
    with pytest.raises(sa_hf.SparseAttentionError, match="distill_weight=-1"):
        trainer_of(model, tmp_path, distill="logits", distill_weight=-1)
    with pytest.raises(sa_hf.SparseAttentionError, match="not a model_init"):
        trainer_of(None, tmp_path, distill="logits", model_init=lambda: model)
    with pytest.raises(sa_hf.SparseAttentionError, match="patch"):
        trainer_of(tiny_model("llama"), tmp_path, distill="logits")
    body = sa_hf.patch_model(tiny_model("llama").model, WINDOW).train()
    with pytest.raises(sa_hf.SparseAttentionError, match=r"no logits.*distill='outputs'"):
        trainer_of(body, tmp_path, distill="both").distillation.teach(body, {"input_ids": tokens(2, 14)})
