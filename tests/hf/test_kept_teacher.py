"""A teacher on disk: the distance to it is that to the live one, whatever the batches, and it is of no other rows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from hf_cases import VOCABULARY, tiny_model, tokens
from test_distillation import WINDOW, padded_batch, trainer_of, with_head
from torch import Tensor

import sa_hf
from sa_hf.hf.trainer import keep_teacher
from sa_hf.hf.training.kept_teacher import KeptTeacher, kept_divergence


def distances(model: Any, folder: Path, batch: dict[str, Tensor], teacher: Path | None) -> tuple[float, Tensor]:
    """The distance to a teacher, and the gradient of the loss with it in the embeddings."""
    trainer = trainer_of(model.train(), folder, distill="logits", teacher=teacher)
    model.zero_grad()
    trainer.compute_loss(model, dict(batch)).backward()
    return trainer.distillation.figures["distill_logits"], model.get_input_embeddings().weight.grad.clone()


@pytest.mark.parametrize("family", ["llama", "bert"])
def test_with_all_classes_it_is_the_live_teacher(family: str, tmp_path: Path) -> None:
    model, batch = sa_hf.patch_model(with_head(family), WINDOW), padded_batch()
    assert keep_teacher(model, [batch], tmp_path / "kept", top_k=VOCABULARY) == 2
    live, live_gradient = distances(model, tmp_path, batch, None)
    kept, gradient = distances(model, tmp_path, batch, tmp_path / "kept")
    assert kept == pytest.approx(live, rel=1e-5)
    assert kept > 1e-3
    torch.testing.assert_close(gradient, live_gradient, rtol=1e-4, atol=1e-7)
    assert trainer_of(model, tmp_path, distill="logits", teacher=tmp_path / "kept").distillation.frozen is None


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-5), ("float16", 5e-3)])
def test_with_some_classes_the_others_count_as_one(dtype: str, tolerance: float, tmp_path: Path) -> None:
    model, batch = sa_hf.patch_model(tiny_model("llama"), WINDOW), padded_batch()
    keep_teacher(model, [batch], tmp_path / "kept", top_k=5, dtype=dtype)
    kept, _ = distances(model, tmp_path, batch, tmp_path / "kept")
    real = batch["attention_mask"].bool()
    with torch.no_grad():
        ours = model(**batch).logits[real].double().softmax(-1)
        with sa_hf.dense(model):
            theirs = model.eval()(**batch).logits[real].double().softmax(-1)
    best = theirs.topk(5).indices
    p, q = theirs.gather(1, best), ours.gather(1, best)
    p, q = (torch.cat([x, 1 - x.sum(1, keepdim=True)], 1) for x in (p, q))
    assert kept == pytest.approx(float((p * (p / q).log()).sum(1).mean()), rel=tolerance)


def test_rows_are_found_in_other_batches_under_other_padding(tmp_path: Path) -> None:
    model, batch = sa_hf.patch_model(tiny_model("llama"), WINDOW), padded_batch()
    keep_teacher(model, [batch], tmp_path / "kept", top_k=7)
    kept = KeptTeacher(tmp_path / "kept")
    there = kept.rows_of(batch)
    ids, length = batch["input_ids"], 9  # of the second row
    alone = {
        "input_ids": torch.cat([ids[1:, 9:], ids[1:, :9]], 1),  # padded on the left
        "attention_mask": torch.cat([torch.zeros(1, 5), torch.ones(1, length)], 1).long(),
    }
    found = kept.rows_of(alone)
    assert torch.equal(found.classes, there.classes[-length:])
    assert torch.equal(found.log_probs, there.log_probs[-length:])
    student = torch.randn(1, 14, VOCABULARY, generator=torch.Generator().manual_seed(0))
    moved = torch.cat([student[:, 5:], student[:, :5]], 1)
    first = {"input_ids": ids[1:], "attention_mask": batch["attention_mask"][1:]}
    assert float(kept_divergence(student, found)) == pytest.approx(float(kept_divergence(moved, kept.rows_of(first))))
    packed = {"input_ids": ids[:1], "sequence_ids": (torch.arange(14) > 6).long()[None]}
    with pytest.raises(sa_hf.SparseAttentionError, match="row 0 of the batch is none of the 2"):
        kept.rows_of(packed)  # the same tokens, which read less of each other


def test_a_cut_off_call_goes_on_and_another_teacher_is_refused(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr("sa_hf.hf.training.kept_teacher.SHARD_TOKENS", 20)
    model = sa_hf.patch_model(tiny_model("llama"), WINDOW)
    batches = [{"input_ids": row[None]} for row in tokens(5, 14)]

    def cut_off() -> Any:
        yield from batches[:3]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        keep_teacher(model, cut_off(), tmp_path, top_k=4)
    assert len(KeptTeacher(tmp_path)) == 2  # the whole shard
    assert keep_teacher(model, [*batches, batches[0]], tmp_path, top_k=4) == 3
    assert keep_teacher(model, batches, tmp_path, top_k=4) == 0
    about = json.loads((tmp_path / "index.json").read_text())
    assert sorted(length for _, _, length in about["rows"].values()) == [14] * 5
    with pytest.raises(sa_hf.SparseAttentionError, match="top_k=4, and this one has 6"):
        keep_teacher(model, batches, tmp_path, top_k=6)
    with torch.no_grad():
        model.lm_head.weight += 0.1
    with pytest.raises(sa_hf.SparseAttentionError, match="weights="):
        keep_teacher(model, batches, tmp_path, top_k=4)


def test_adapters_are_off_while_it_is_kept_and_training_needs_no_dense_pass(tmp_path: Path, monkeypatch: Any) -> None:
    base = sa_hf.patch_model(tiny_model("llama"), WINDOW)
    data = [{"input_ids": row, "labels": row} for row in tokens(4, 14)]
    keep_teacher(base, [{"input_ids": row["input_ids"][None]} for row in data], tmp_path / "base", top_k=8)
    config = peft.LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)
    model = peft.get_peft_model(base, sa_hf.prepare_peft(config, base))
    options = {"distill": "logits", "teacher": tmp_path / "base", "max_steps": 4, "per_device_train_batch_size": 2}
    trainer = trainer_of(model, tmp_path, data, **options)
    assert keep_teacher(model, trainer.get_train_dataloader(), tmp_path / "base", top_k=8) == 0  # the same weights

    def never(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("a dense pass")

    monkeypatch.setattr("sa_hf.hf.training.distillation.dense", never)
    trainer.train()
    seen = [record["distill_logits"] for record in trainer.state.log_history if "distill_logits" in record]
    assert len(seen) == 4
    assert seen[-1] != seen[0]


def test_what_cannot_be_is_refused(tmp_path: Path) -> None:
    model, batch = sa_hf.patch_model(tiny_model("llama"), WINDOW), padded_batch()
    with pytest.raises(sa_hf.SparseAttentionError, match=r"top_k=100 must lie in \[1, 99\]; nearest: 99"):
        keep_teacher(model, [batch], tmp_path / "kept", top_k=100)
    with pytest.raises(sa_hf.SparseAttentionError, match="dtype='int8'"):
        keep_teacher(model, [batch], tmp_path / "kept", dtype="int8")
    with pytest.raises(sa_hf.SparseAttentionError, match="holds no teacher"):
        trainer_of(model, tmp_path, distill="logits", teacher=tmp_path / "kept")
    keep_teacher(model, [batch], tmp_path / "kept", top_k=3)
    with pytest.raises(sa_hf.SparseAttentionError, match="holds logits alone"):
        trainer_of(model, tmp_path, distill="both", teacher=tmp_path / "kept")
    with pytest.raises(sa_hf.SparseAttentionError, match="distill is None"):
        trainer_of(model, tmp_path, teacher=tmp_path / "kept")
    with pytest.raises(sa_hf.SparseAttentionError, match="live teacher"):
        keep_teacher(sa_hf.patch_model(tiny_model("t5"), WINDOW), [batch], tmp_path / "t5")
    with pytest.raises(sa_hf.SparseAttentionError, match="gives no logits of tokens"):
        keep_teacher(sa_hf.patch_model(tiny_model("llama").model, WINDOW), [batch], tmp_path / "body")
    with pytest.raises(sa_hf.SparseAttentionError, match="patch"):
        keep_teacher(tiny_model("llama"), [batch], tmp_path / "dense")
    wrong = {"input_ids": batch["input_ids"] + 1}
    trainer = trainer_of(model.train(), tmp_path, distill="logits", teacher=tmp_path / "kept")
    with pytest.raises(sa_hf.SparseAttentionError, match="row 0 of the batch is none of the 2"):
        trainer.compute_loss(model, {**wrong, "labels": wrong["input_ids"]})
