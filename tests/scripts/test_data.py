"""Data sets of the scripts: local files of each kind, splits, columns, synthetic tasks."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import ByT5Tokenizer

from sa_hf import SparseAttentionError
from sa_hf.tasks.data import Source, collator, load_source, tokenize
from sa_hf.tasks.trainer import _classes_and_losses, _Figures

TOKENIZER = ByT5Tokenizer(mask_token="<extra_id_0>")


def write_jsonl(path: Path, rows: list[dict]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("cache")))


def read(rows: Any) -> list[list[int]]:
    return [row["input_ids"].tolist() for row in rows]


def test_jsonl_with_labels_by_name(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "train.jsonl", [{"content": f"text {i}", "label": "ab"[i % 2]} for i in range(6)])
    write_jsonl(tmp_path / "test.jsonl", [{"content": "held out", "label": "b"}])
    source = load_source("sequence-classification", str(tmp_path), max_length=16, train_rows=4)
    assert source.labels == ["a", "b"]
    assert len(source.train) == 4
    assert all(r["label"] == int(r["text"][-1]) % 2 for r in source.train)
    assert list(source.evaluation) == [{"text": "held out", "label": 1}]
    rows, _ = tokenize(source, "sequence-classification", TOKENIZER, 5, None, None)
    batch = collator("sequence-classification", TOKENIZER)(list(rows))
    assert batch["input_ids"].shape == (4, 5)
    assert batch["labels"].tolist() == [r["label"] for r in source.train]


def test_parquet_without_a_held_out_split_is_cut(tmp_path: Path) -> None:
    import datasets

    path = tmp_path / "rows.parquet"
    datasets.Dataset.from_dict({"body": [f"text {i}" for i in range(20)], "kind": [5, 9] * 10}).to_parquet(path)
    with pytest.raises(SparseAttentionError, match=r"text_column.*body"):
        load_source("sequence-classification", str(path), max_length=16)
    source = load_source("sequence-classification", str(path), max_length=16, text_column="body", label_column="kind")
    assert source.labels == ["5", "9"]
    texts = [r["text"] for r in (*source.train, *source.evaluation)]
    assert len(source.evaluation) == 2
    assert sorted(texts) == sorted(f"text {i}" for i in range(20))


def test_text_files_are_documents_for_language_models(tmp_path: Path) -> None:
    (tmp_path / "train.txt").write_text("first line\nsecond line")
    (tmp_path / "validation.txt").write_text("held out text")
    source = load_source("causal-lm", str(tmp_path), max_length=8)
    rows, held_out = tokenize(source, "causal-lm", TOKENIZER, 8, None, None)
    assert TOKENIZER.decode(torch.cat([r["input_ids"] for r in rows])) == "first line\nsecon"
    assert TOKENIZER.decode(held_out[0]["input_ids"]) == "held out"
    batch = collator("causal-lm", TOKENIZER)(list(rows))
    assert torch.equal(batch["labels"], batch["input_ids"])
    with pytest.raises(SparseAttentionError, match="without labels"):
        load_source("sequence-classification", str(tmp_path), max_length=8)


def test_mixed_kinds_and_short_texts_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("short")
    short = Source([{"text": "short"}], [{"text": "short"}])
    with pytest.raises(SparseAttentionError, match=r"max_length=64.*at most 6"):
        tokenize(short, "causal-lm", TOKENIZER, 64, None, None)
    write_jsonl(tmp_path / "b.jsonl", [{"text": "x"}])
    with pytest.raises(SparseAttentionError, match="one kind"):
        load_source("causal-lm", str(tmp_path), max_length=8)


def test_one_text_file_is_cut_after_chunking(tmp_path: Path) -> None:
    path = tmp_path / "one.txt"
    path.write_text("".join(f"{i:04d}" for i in range(60)))  # 240 bytes and an end token: 30 chunks of 8
    source = load_source("causal-lm", str(path), max_length=8)
    rows, held_out = tokenize(source, "causal-lm", TOKENIZER, 8, None, None)
    assert (len(rows), len(held_out)) == (27, 3)
    assert TOKENIZER.decode(held_out[0]["input_ids"]) == "00540055"
    # Evaluation holds out the same, whatever it asks to see of it.
    again = tokenize(source, "causal-lm", TOKENIZER, 8, 1, 2)
    assert [read(part) for part in again] == [read(rows[:1]), read(held_out[:2])]
    with pytest.raises(SparseAttentionError, match="max_length of at most 120"):
        tokenize(source, "causal-lm", TOKENIZER, 121, None, None)
    assert [len(part) for part in tokenize(source, "causal-lm", TOKENIZER, 120, None, None)] == [1, 1]


def test_one_row_cannot_be_split_for_classification(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "one.jsonl", [{"text": "x", "label": 1}])
    with pytest.raises(SparseAttentionError, match="holds 1 rows"):
        load_source("sequence-classification", str(tmp_path / "one.jsonl"), max_length=8)


@pytest.mark.parametrize("name", ["nofile.csv", "./folder", "/a/b", "a/b/c"])
def test_a_missing_file_is_not_looked_for_on_the_hub(name: str) -> None:
    with pytest.raises(SparseAttentionError, match="does not exist"):
        load_source("causal-lm", name, max_length=8)


@pytest.mark.parametrize(
    ("numbers", "message"),
    [
        ({"train_rows": 0}, "train_rows=0.*nearest: 1"),
        ({"evaluation_rows": -3}, "eval_rows=-3.*nearest: 1"),
        ({"max_length": 0}, "max_length=0.*nearest: 2"),
    ],
)
def test_numbers_too_small_are_refused(numbers: dict[str, int], message: str) -> None:
    with pytest.raises(SparseAttentionError, match=message):
        load_source("causal-lm", "stdlib", **{"max_length": 8, **numbers})


def test_masks_are_labelled_and_accuracy_counts_them_alone() -> None:
    rows = [{"input_ids": list(range(3, 203)), "attention_mask": [1] * 200}]
    batch = collator("masked-lm", TOKENIZER, seed=5)(rows)
    labelled = batch["labels"] != -100
    assert 10 < int(labelled.sum()) < 60
    assert torch.equal(batch["labels"][labelled], torch.arange(3, 203)[None][labelled])
    logits = torch.nn.functional.one_hot(batch["labels"].clamp(min=0), 384).float()
    classes, losses = _classes_and_losses(logits, batch["labels"])
    given = (classes.numpy(), losses.numpy())
    figures = _Figures(shifted=False)(SimpleNamespace(predictions=given, label_ids=batch["labels"].numpy()))
    # One logit of 1 among 384 that are 0.
    loss = pytest.approx(math.log(383 + math.e) - 1)
    assert figures == {"accuracy": 1.0, "accuracy_low": 1.0, "accuracy_high": 1.0, "token_loss": loss}


def test_synthetic_tasks_carry_their_vocabulary() -> None:
    corridor = load_source("causal-lm", "corridor", max_length=12, train_rows=3, evaluation_rows=2)
    assert (len(corridor.train), len(corridor.evaluation), corridor.vocab_size) == (3, 2, 7)
    assert len(corridor.train[0]["input_ids"]) == 12
    summation = load_source("sequence-classification", "summation", max_length=12, train_rows=3)
    assert len(summation.train[0]["input_ids"]) == 12
    assert summation.labels == [str(i) for i in range(7)]
