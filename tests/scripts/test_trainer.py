"""The Trainer callback: figures in the record, centroids moved once per optimizer step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from finetune_cases import DECODER, FEW_STEPS
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

import sa_hf
from sa_hf.hf.forward.centroids import update_centroids
from sa_hf.hf.training.trainer import SparseAttentionCallback, training_figures
from sa_hf.tools import finetune

ROWS = [{"input_ids": list(range(i, i + 24)), "labels": list(range(i, i + 24))} for i in range(8)]


def patched(pattern: str, **options: Any) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2
    )
    return sa_hf.patch_model(LlamaForCausalLM(config), pattern, **options)


def trained(model: LlamaForCausalLM, folder: Path, **options: Any) -> Trainer:
    arguments = TrainingArguments(
        str(folder), max_steps=3, per_device_train_batch_size=2, logging_steps=1, use_cpu=True, report_to="none",
        save_strategy="no", disable_tqdm=True, dataloader_pin_memory=False, **options,
    )  # fmt: skip
    trainer = Trainer(model, arguments, train_dataset=ROWS, callbacks=[SparseAttentionCallback()])
    trainer.train()
    return trainer


def test_figures_stand_beside_the_loss_in_any_trainer(tmp_path: Path) -> None:
    model = patched("expire_span", max_span=16, ramp=4, span_loss_coef=0.1)
    trainer = trained(model, tmp_path)
    steps = [record for record in trainer.state.log_history if "loss" in record]
    assert len(steps) == 3
    spans = [16 * torch.sigmoid(torch.tensor(4.0)).item()]
    # Two layers, each 0.1 times its mean span; at the first step every span is its initial one.
    assert steps[0]["sparse/mean_span"] == pytest.approx(spans[0], rel=1e-3)
    assert steps[0]["sparse/expire_span"] == pytest.approx(2 * 0.1 * spans[0], rel=1e-3)
    assert not [
        record for record in trainer.state.log_history if "train_loss" in record and "sparse/mean_span" in record
    ]


def test_centroids_move_with_each_optimizer_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = patched("routing", num_clusters=2, window=4)
    moves: list[list[torch.Tensor]] = []

    def watched(moved: Any) -> None:
        update_centroids(moved)
        moves.append([b.clone() for n, b in model.named_buffers() if n.endswith("centroids")])

    monkeypatch.setattr("sa_hf.hf.training.trainer.update_centroids", watched)
    trained(model, tmp_path, gradient_accumulation_steps=2)
    assert len(moves) == 3
    assert all(len(buffers) == 2 for buffers in moves)
    assert not torch.equal(moves[0][0], moves[2][0])
    assert torch.equal(moves[2][0], next(b for n, b in model.named_buffers() if n.endswith("centroids")))


def test_a_dense_model_has_no_figures() -> None:
    assert training_figures(sa_hf.unpatch_model(patched("sliding_window"))) == {}


def test_the_scripts_record_holds_the_patterns_figures(tmp_path: Path) -> None:
    flags = ["--pattern", "sparsebert", "--set", "mask_length=64", *DECODER, *FEW_STEPS, "--sparse_lr", "4"]
    metrics = finetune.main([*flags, "--output_dir", str(tmp_path), "--verify", "none", "--max_steps", "4"])
    density = [record["sparse/mask_density"] for record in metrics["log"] if "loss" in record]
    assert len(density) == 4
    assert density[0] == pytest.approx(1.0, abs=0.1)
    # At this rate the density loss takes most logits below 0 in a few steps.
    assert density[-1] < 0.9
