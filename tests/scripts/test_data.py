"""Data sets of the scripts: local files of each kind, splits, columns, synthetic tasks."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import ByT5Tokenizer

from sa_hf import SparseAttentionError
from sa_hf.tasks.data import Source, collator, load_source, metrics_of, tokenize

TOKENIZER = ByT5Tokenizer(mask_token="<extra_id_0>")


def write_jsonl(path: Path, rows: list[dict]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("cache")))


def test_jsonl_with_labels_by_name(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "train.jsonl", [{"content": f"text {i}", "label": "ab"[i % 2]} for i in range(6)])
    write_jsonl(tmp_path / "test.jsonl", [{"content": "held out", "label": "b"}])
    source = load_source("sequence-classification", str(tmp_path), max_length=16, train_rows=4)
    assert source.labels == ["a", "b"]
    assert [r["label"] for r in source.train] == [0, 1, 0, 1]
    assert list(source.evaluation) == [{"text": "held out", "label": 1}]
    rows, _ = tokenize(source, "sequence-classification", TOKENIZER, 5, None, None)
    batch = collator("sequence-classification", TOKENIZER)(list(rows))
    assert batch["input_ids"].shape == (4, 5)
    assert batch["labels"].tolist() == [0, 1, 0, 1]


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
    assert TOKENIZER.decode([t for r in rows for t in r["input_ids"]]) == "first line\nsecon"
    assert TOKENIZER.decode(held_out[0]["input_ids"]) == "held out"
    batch = collator("causal-lm", TOKENIZER)(list(rows))
    assert torch.equal(batch["labels"], batch["input_ids"])
    with pytest.raises(SparseAttentionError, match="without labels"):
        load_source("sequence-classification", str(tmp_path), max_length=8)


def test_mixed_kinds_and_short_texts_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("short")
    short = Source([{"text": "short"}], [{"text": "short"}])
    with pytest.raises(SparseAttentionError, match="max_length=64"):
        tokenize(short, "causal-lm", TOKENIZER, 64, None, None)
    write_jsonl(tmp_path / "b.jsonl", [{"text": "x"}])
    with pytest.raises(SparseAttentionError, match="one kind"):
        load_source("causal-lm", str(tmp_path), max_length=8)


def test_masks_are_labelled_and_accuracy_counts_them_alone() -> None:
    rows = [{"input_ids": list(range(3, 203)), "attention_mask": [1] * 200}]
    batch = collator("masked-lm", TOKENIZER, seed=5)(rows)
    labelled = batch["labels"] != -100
    assert 10 < int(labelled.sum()) < 60
    assert torch.equal(batch["labels"][labelled], torch.arange(3, 203)[None][labelled])
    compute, preprocess = metrics_of("masked-lm")
    logits = torch.nn.functional.one_hot(batch["labels"].clamp(min=0), 384).float()
    classes = preprocess(logits, batch["labels"])
    prediction = type("P", (), {"predictions": classes.numpy(), "label_ids": batch["labels"].numpy()})
    assert compute(prediction) == {"accuracy": 1.0}


def test_synthetic_tasks_carry_their_vocabulary() -> None:
    corridor = load_source("causal-lm", "corridor", max_length=12, train_rows=3, evaluation_rows=2)
    assert (len(corridor.train), len(corridor.evaluation), corridor.vocab_size) == (3, 2, 7)
    assert len(corridor.train[0]["input_ids"]) == 12
    summation = load_source("sequence-classification", "summation", max_length=12, train_rows=3)
    assert len(summation.train[0]["input_ids"]) == 12
    assert summation.labels == [str(i) for i in range(7)]
