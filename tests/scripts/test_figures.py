"""Figures are numbers, and the same ones from training, from evaluation, and from run to run."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from finetune_cases import FEW_STEPS
from transformers import ByT5Tokenizer

from sa_hf.tasks.data import collator
from sa_hf.tasks.masking import masked_once
from sa_hf.tools import evaluate, finetune

TOKENIZER = ByT5Tokenizer(mask_token="<extra_id_0>")
ENCODER = ["--model", "tiny-bert", "--pattern", "sliding_window", "--set", "window=4"]
SHORT = ["--task", "sequence-classification", "--dataset", "stdlib-short", "--max_length", "48"]
SERIES = ["--task", "forecasting", "--dataset", "series", "--max_length", "32"]


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("cache")))


def row(*ids: int) -> dict[str, list[int]]:
    return {"input_ids": list(ids), "attention_mask": [1] * len(ids)}


def test_every_batch_has_a_masked_token() -> None:
    for seed in range(20):
        collate = collator("masked-lm", TOKENIZER, seed)
        batch = collate([row(40, 41)])
        labelled = batch["labels"] != -100
        assert 1 <= int(labelled.sum()) <= 2
        assert torch.equal(batch["labels"][labelled], torch.tensor([[40, 41]])[labelled])
    # The end token of this tokenizer is 1: never masked beside others, and masked where there is nothing else.
    for seed in range(20):
        assert not bool((collator("masked-lm", TOKENIZER, seed)([row(1, 50, 1)])["labels"] == 1).any())
    assert int((collator("masked-lm", TOKENIZER)([row(1, 1)])["labels"] != -100).sum()) == 1


def test_masks_of_evaluation_depend_on_the_rows_alone() -> None:
    rows = [row(*range(10 * i + 3, 10 * i + 43)) for i in range(5)]
    once, again = masked_once(rows, TOKENIZER), masked_once(rows, TOKENIZER)
    for a, b in zip(once, again, strict=True):
        assert all(torch.equal(a[name], b[name]) for name in a)
    stacked = collator("masked-lm", TOKENIZER, seed=9)(once)
    assert torch.equal(stacked["labels"], torch.stack([r["labels"] for r in once]))


def test_losses_of_short_chunks_are_numbers(tmp_path: Path) -> None:
    model = ["--model", "tiny-bert", "--pattern", "none"]
    flags = [*model, "--task", "masked-lm", "--max_length", "3", "--output_dir", str(tmp_path), "--verify", "none"]
    metrics = finetune.main([*FEW_STEPS, *flags, "--max_steps", "6", "--batch_size", "1", "--eval_batch_size", "1"])
    losses = [record["loss"] for record in metrics["log"] if "loss" in record]
    assert len(losses) == 6
    assert all(math.isfinite(loss) and loss > 0 for loss in (*losses, metrics["eval_loss"]))


@pytest.mark.parametrize("seed", ["0", "5"])
@pytest.mark.parametrize(
    ("model", "task"),
    [
        (ENCODER, ["--task", "masked-lm", "--max_length", "24"]),
        (ENCODER, SHORT),
        (["--model", "tiny-llama", "--pattern", "none"], ["--task", "causal-lm", "--max_length", "24"]),
        (["--model", "convtrans", "--pattern", "logsparse", "--set", "local_window=4"], SERIES),
    ],
    ids=["masked-lm", "classification", "causal-lm", "forecasting"],
)
def test_training_and_evaluation_find_the_same(model: list[str], task: list[str], seed: str, tmp_path: Path) -> None:
    folder = ["--output_dir", str(tmp_path), "--verify", "none", "--seed", seed]
    trained = finetune.main([*FEW_STEPS, *model, *task, *folder, "--eval_rows", "7", "--eval_batch_size", "2"])
    # Texts and series are drawn by the seed; chunks and their masks are not.
    drawn = ["--seed", seed] if task in (SHORT, SERIES) else []
    for batch_size in ("1", "3", "7"):
        flags = ["--model", str(tmp_path), *task, *drawn, "--eval_rows", "7", "--batch_size", batch_size, "--cpu"]
        found = evaluate.main(flags)
        if task is SERIES:
            assert found == {name: trained[name] for name in ("R_0.5", "R_0.9")}
        else:
            assert found["loss"] == pytest.approx(trained["eval_loss"], rel=1e-5)
            assert found["accuracy"] == trained["eval_accuracy"]


def test_the_same_seed_gives_the_same_forecasts(tmp_path: Path) -> None:
    flags = [*FEW_STEPS, "--model", "convtrans", "--pattern", "logsparse", "--set", "local_window=4", *SERIES]
    found = []
    for name in ("one", "two"):
        metrics = finetune.main([*flags, "--output_dir", str(tmp_path / name), "--verify", "none"])
        found.append((metrics["R_0.5"], metrics["R_0.9"]))
        torch.rand(3)  # whatever was drawn before
    assert found[0] == found[1]
    before = torch.get_rng_state()
    evaluated = evaluate.main(["--model", str(tmp_path / "one"), *SERIES, "--eval_rows", "2", "--cpu"])
    assert torch.equal(torch.get_rng_state(), before)
    assert (evaluated["R_0.5"], evaluated["R_0.9"]) == found[0]
