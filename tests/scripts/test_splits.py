"""Held-out rows stay held out: what files are named, how a single file is cut, and what evaluation reads."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers import ByT5Tokenizer

from sa_hf import SparseAttentionError
from sa_hf.tasks.data import load_source, tokenize
from sa_hf.tasks.splits import split_of

CLASSES = "sequence-classification"


def write(path: Path, texts: list[str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [{"text": text, "label": "ab"[i % 2]} for i, text in enumerate(texts)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def texts(rows: object) -> list[str]:
    return sorted(row["text"] for row in rows)


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("cache")))


@pytest.mark.parametrize(
    ("path", "split"),
    [
        ("val.jsonl", "validation"),
        ("valid-00.jsonl", "validation"),
        ("corpus.validation.jsonl", "validation"),
        ("dev_1.txt", "validation"),
        ("eval.txt", "test"),
        ("corpus_test.jsonl", "test"),
        ("Test.jsonl", "test"),
        ("validation/part.jsonl", "validation"),
        ("my data/test set/a.txt", "test"),
        ("train/a.jsonl", "train"),
        ("data/train-00000-of-00001.parquet", "train"),
        ("testimonials.jsonl", None),
        ("developer-guide.md", None),
        ("evaluate.py", None),
        ("trains.txt", None),
        # One of a pair of words is held out, and the file's own name tells between two that are.
        ("train_test.txt", "test"),
        ("test/training-manual.txt", "test"),
        ("training data/test.jsonl", "test"),
        ("eval/dev.jsonl", "validation"),
    ],
)
def test_a_split_is_a_whole_word_of_a_name(path: str, split: str | None) -> None:
    assert split_of(path) == split


@pytest.mark.parametrize(
    "held_out", ["val.jsonl", "eval.jsonl", "corpus_test.jsonl", "validation/x.jsonl", "dev/x.jsonl"]
)
def test_held_out_files_are_not_trained_on(held_out: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path / "corpus.jsonl", ["one", "two"])
    write(tmp_path / "testimonials.jsonl", ["three", "four"])
    write(tmp_path / held_out, ["five", "six"])
    for task in (CLASSES, "causal-lm"):
        source = load_source(task, str(tmp_path), max_length=8)
        assert texts(source.train) == ["four", "one", "three", "two"]
        assert texts(source.evaluation) == ["five", "six"]
    said = capsys.readouterr().err
    assert "train: 2 files (corpus.jsonl, testimonials.jsonl)" in said
    assert f": 1 file ({held_out})" in said


def test_every_kind_of_held_out_file_is_kept_out(tmp_path: Path) -> None:
    """Folders and files of a split in one folder: datasets would take the folders alone."""
    write(tmp_path / "corpus.jsonl", ["one", "two"])
    write(tmp_path / "validation" / "x.jsonl", ["three", "four"])
    write(tmp_path / "corpus_test.jsonl", ["five", "six"])
    source = load_source(CLASSES, str(tmp_path), max_length=8)
    assert (texts(source.train), texts(source.evaluation)) == (["one", "two"], ["four", "three"])
    source = load_source(CLASSES, str(tmp_path), max_length=8, eval_split="test")
    assert texts(source.evaluation) == ["five", "six"]


def test_files_beside_a_named_training_split_are_left_out_aloud(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path / "train.jsonl", ["one", "two"])
    write(tmp_path / "test.jsonl", ["three"])
    write(tmp_path / "unlabelled.jsonl", ["four"])
    assert texts(load_source("causal-lm", str(tmp_path), max_length=8).train) == ["one", "two"]
    assert "not used, as others name a split: 1 file (unlabelled.jsonl)" in capsys.readouterr().err


def test_a_test_file_is_evaluated_whole_and_not_trained_on(tmp_path: Path) -> None:
    write(tmp_path / "test.jsonl", [f"text {i}" for i in range(20)])
    path = str(tmp_path / "test.jsonl")
    source = load_source(CLASSES, path, max_length=8, evaluate_only=True, label2id={"a": 0, "b": 1})
    assert (len(source.train), len(source.evaluation)) == (0, 20)
    assert len(load_source("causal-lm", path, max_length=8, evaluate_only=True).evaluation) == 20
    for task in (CLASSES, "causal-lm"):
        with pytest.raises(SparseAttentionError, match="held-out rows alone"):
            load_source(task, path, max_length=8)


def test_evaluation_reads_what_training_held_out_of_one_file_whatever_the_seed(tmp_path: Path) -> None:
    write(tmp_path / "rows.jsonl", [f"text {i}" for i in range(30)])
    path, known = str(tmp_path / "rows.jsonl"), {"a": 0, "b": 1}
    trained = load_source(CLASSES, path, max_length=8, seed=7)
    evaluated = load_source(CLASSES, path, max_length=8, seed=0, evaluate_only=True, label2id=known)
    assert evaluated.evaluation == trained.evaluation
    assert len(trained.evaluation) == 3
    everything = load_source(CLASSES, path, max_length=8, evaluate_only=True, label2id=known, eval_split="all")
    assert len(everything.evaluation) == 30
    language = [load_source("causal-lm", path, max_length=8, seed=s, evaluate_only=e) for s, e in ((7, 0), (0, 1))]
    assert texts(language[0].evaluation) == texts(language[1].evaluation)
    assert len(language[0].train) == 27


def test_rows_that_are_made_for_evaluation_are_of_no_training_seed() -> None:
    evaluation = load_source(
        "sequence-classification", "summation", max_length=12, evaluation_rows=3, seed=0
    ).evaluation
    for seed in range(4):
        rows = load_source("sequence-classification", "summation", max_length=12, train_rows=3, seed=seed).train
        assert rows != evaluation


def test_what_stands_in_both_splits_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path / "train.jsonl", ["one", "two"])
    write(tmp_path / "test.jsonl", ["two", "three", "one"])
    load_source(CLASSES, str(tmp_path), max_length=8)
    assert "warning: 2 of 3 texts to evaluate on stand in the training rows" in capsys.readouterr().err


def test_a_cut_of_rows_sorted_by_label_holds_every_class(tmp_path: Path) -> None:
    for name in ("train", "validation"):
        rows = [{"text": f"{name} {i}", "label": "ab"[i >= 50]} for i in range(100)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    sources = [
        load_source(CLASSES, str(tmp_path), max_length=8, train_rows=20, evaluation_rows=20, seed=s) for s in (0, 5)
    ]
    for rows in (sources[0].train, sources[0].evaluation):
        assert len(rows) == 20
        assert 5 <= sum(row["label"] for row in rows) <= 15
    assert sources[0].evaluation == sources[1].evaluation


def test_a_local_file_is_trained_on_whole_and_a_limit_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tokenizer = ByT5Tokenizer()
    path = tmp_path / "one.txt"
    path.write_text("x" * (8 * 2_667))
    source = load_source("causal-lm", str(path), max_length=8)
    rows, held_out = tokenize(source, "causal-lm", tokenizer, 8, None, None)
    assert (len(rows), len(held_out)) == (2_401, 266)
    assert "chunks of 8 tokens, 2401 to train on, 266 to evaluate on" in capsys.readouterr().err
    tokenize(source, "causal-lm", tokenizer, 8, 100, None)
    assert "100 to train on, 266 to evaluate on (--train_rows 100 reached)" in capsys.readouterr().err
    held_out_alone = load_source("causal-lm", str(path), max_length=8, eval_split="all", evaluate_only=True)
    tokenize(held_out_alone, "causal-lm", tokenizer, 8, None, 3)
    assert "chunks of 8 tokens, 3 to evaluate on (--eval_rows 3 reached)" in capsys.readouterr().err


def test_texts_that_are_cut_are_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path / "train.jsonl", ["one", "a text that is far too long"])
    write(tmp_path / "test.jsonl", ["two"])
    source = load_source(CLASSES, str(tmp_path), max_length=8)
    tokenize(source, CLASSES, ByT5Tokenizer(), 8, None, None)
    assert "1 of 3 texts reach max_length=8 tokens" in capsys.readouterr().err


def test_a_folder_laid_out_for_the_hub_is_read_as_its_card_says(tmp_path: Path) -> None:
    write(tmp_path / "data" / "first.jsonl", ["one", "two"])
    write(tmp_path / "data" / "second.jsonl", ["three", "four"])
    card = "configs:\n- config_name: default\n  data_files:\n  - split: train\n    path: data/first.jsonl\n"
    (tmp_path / "README.md").write_text(f"---\n{card}  - split: test\n    path: data/second.jsonl\n---\n# My data\n")
    source = load_source(CLASSES, str(tmp_path), max_length=8)
    assert (texts(source.train), texts(source.evaluation)) == (["one", "two"], ["four", "three"])


def test_what_is_no_data_in_a_folder_is_passed_over(tmp_path: Path) -> None:
    write(tmp_path / "a" / "b" / "rows.jsonl", ["one", "two"])
    write(tmp_path / "test.jsonl", ["three"])
    write(tmp_path / ".hidden" / "rows.jsonl", ["four"])
    (tmp_path / "README.md").write_text("# My data\n")
    (tmp_path / "LICENSE").write_text("free")
    assert texts(load_source(CLASSES, str(tmp_path), max_length=8).train) == ["one", "two"]


def test_a_folder_of_save_to_disk_is_read(tmp_path: Path) -> None:
    import datasets

    rows = {"text": ["one", "two", "three"], "label": ["a", "b", "a"]}
    parts = {"train": datasets.Dataset.from_dict(rows), "test": datasets.Dataset.from_dict(rows).select([0])}
    datasets.DatasetDict(parts).save_to_disk(tmp_path / "saved")
    source = load_source(CLASSES, str(tmp_path / "saved"), max_length=8)
    assert (texts(source.train), texts(source.evaluation)) == (["one", "three", "two"], ["one"])


def test_a_class_without_a_row_to_train_on_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path / "rows.jsonl", ["one", "two"])
    load_source(CLASSES, str(tmp_path), max_length=8)
    assert "warning: no row to train on is of the class 'a'; all of them are held out" in capsys.readouterr().err
    write(tmp_path / "rows.jsonl", [f"text {i}" for i in range(40)])
    load_source(CLASSES, str(tmp_path), max_length=8)
    assert "warning" not in capsys.readouterr().err
