"""What a user's files can hold: an error names file, row and column on one line, or the rows are read as meant."""

from __future__ import annotations

import bz2
import gzip
import json
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset

from sa_hf import SparseAttentionError
from sa_hf.tasks.data import Source, load_source

CLASSES = "sequence-classification"


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("cache")))


def lines(*rows: Any) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


GOOD = [{"text": "one", "label": "a"}, {"text": "two", "label": "b"}]


def load(folder: Path, name: str, content: str | bytes, task: str = CLASSES, **options: Any) -> Source:
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return load_source(task, str(path), max_length=8, evaluate_only=False, **options)


def rows_of(source: Source) -> list[tuple[str, str]]:
    rows = [*source.train, *source.evaluation]
    return sorted((row["text"], source.labels[row["label"]]) for row in rows)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.jsonl", lines(*GOOD, {"label": "a"}), "x.jsonl, row 3: column 'text' is missing"),
        ("x.jsonl", lines(*GOOD, {"text": "three"}), "x.jsonl, row 3: column 'label' is missing"),
        ("x.jsonl", lines(*GOOD, {"text": " \n\t", "label": "a"}), "row 3: column 'text' holds no text but blanks"),
        ("x.jsonl", lines(*GOOD, {"text": "three", "label": ["a"]}), r"row 3.*label.*\['a'\]"),
        ("x.jsonl", lines({"text": "one", "label": ["a"]}), r"row 1: column 'label' is \['a'\]; a row has one class"),
        ("x.jsonl", lines(*GOOD, {"text": "three", "label": 1}), "row 3.*label.*1"),
        ("x.jsonl", lines({"text": 1, "label": "a"}), "row 1: column 'text' is 1, a int and no text"),
        ("x.jsonl", lines({"text": {"body": "one"}, "label": "a"}), "row 1: column 'text' is .*a dict and no text"),
        ("x.jsonl", lines(*GOOD, {"text": "a", "label": "long " * 99}), "row 3: column 'label'.*and label swapped"),
        ("x.jsonl", lines(*({"text": "a", "label": f"{i} words"} for i in range(30))), "30 different values in 30"),
        ("x.jsonl", lines(*({"text": "a", "label": x} for x in (0.5, 1.5))), "row 1.*0.5, a number and no class"),
        ("x.jsonl", lines(*({"text": f"{i}", "label": "a"} for i in range(4))), "have the label 'a'.*at least 2"),
        ("x.jsonl", lines({"words": "one", "label": "a"}), r"none of the usual columns.*text_column.*'words'"),
        ("x.jsonl", lines({"txet": "one", "label": "a"}), r"did you mean 'txet'"),
        ("x.jsonl", lines(*({**row, "labels": "c"} for row in GOOD)), r"\['label', 'labels'\].*set label_column"),
        ("x.jsonl", lines(*GOOD) + '{"text": "b",\n', "x.jsonl cannot be read as json"),
        ("x.json", json.dumps({"data": GOOD}), "none of the usual columns.*'data'"),
        ("x.jsonl", "", "x.jsonl is empty"),
        ("x.jsonl", "\n\n", "x.jsonl is empty"),
        ("x.json", "[]", "x.json cannot be read as json: it holds no rows"),
        ("x.csv", "", "x.csv is empty"),
        ("x.csv", "text,label\n", "x.csv cannot be read as csv: it holds no rows"),
        ("x.csv", "text,label\none,a\ntwo,\n", "x.csv, row 2: column 'label' is missing"),
        ("x.csv", "text,label\none,1\ntwo,\n", "x.csv, row 2: column 'label' is missing"),
        ("x.csv", "text,label\na,one,1\nb,two,0\n", "x.csv.*more values than its header has columns"),
        ("x.csv", "text,label\none,1\ntwo,0,1\n", "x.csv cannot be read as csv.*line 3"),
        ("x.csv", 'text,label\n"one,1\ntwo,0\n', "x.csv cannot be read as csv.*row 1"),
        ("x.csv", "text;label\none;1\n", r"x.csv has one column, 'text;label'.*parted by ';'; save the file with comm"),
        ("x.csv", "text\tlabel\none\t1\n", "parted by .*with tabs as .tsv"),
        ("x.jsonl", lines({"text": ["long " * 99] * 9, "label": "a"}), r"row 1.* is \['long .{0,130}\.\.\., a list"),
        ("x.csv", "label,text\none,1\ntwo,0\n", "x.csv, row 1: column 'text' is 1"),
        ("x.parquet", "hello", "x.parquet cannot be read as parquet"),
        ("x.jsonl.gz", b"hello", "x.jsonl.gz cannot be unpacked"),
    ],
)  # fmt: skip
def test_a_bad_row_or_file_is_named(name: str, content: str | bytes, message: str, tmp_path: Path) -> None:
    with pytest.raises(SparseAttentionError, match=message) as raised:
        load(tmp_path, name, content)
    assert "\n" not in str(raised.value)
    assert len(str(raised.value)) < 700


@pytest.mark.parametrize("suffix", ["jsonl", "csv", "txt"])
@pytest.mark.parametrize("encoding", ["latin-1", "utf-16", "utf-8-sig"])
def test_other_encodings_are_named_or_read_as_said(encoding: str, suffix: str, tmp_path: Path) -> None:
    task = "causal-lm" if suffix == "txt" else CLASSES
    content = {
        "jsonl": '{"text": "caf\xe9", "label": "a"}\n{"text": "two", "label": "b"}\n',
        "csv": "text,label\ncaf\xe9,a\ntwo,b\n",
        "txt": "caf\xe9",
    }[suffix].encode(encoding)
    if encoding != "utf-8-sig":
        with pytest.raises(SparseAttentionError, match=rf"x.{suffix}, line \d: byte .*--encoding {encoding}"):
            load(tmp_path, f"x.{suffix}", content, task)
    source = load(tmp_path, f"x.{suffix}", content, task, encoding=None if encoding == "utf-8-sig" else encoding)
    assert "caf\xe9" in {row["text"] for row in (*source.train, *source.evaluation)}


@pytest.mark.parametrize("encoding", ["utf-32", "utf-16-le", "utf-16-be"])
@pytest.mark.parametrize("word", ["cafe", "caf\xe9"])
def test_an_encoding_that_looks_like_another_is_named(encoding: str, word: str, tmp_path: Path) -> None:
    """UTF-32 begins with the mark of UTF-16; UTF-16 without a mark is UTF-8, too, with a 0 after each letter."""
    content = f"{word} and more".encode(encoding)
    with pytest.raises(SparseAttentionError, match=rf"x.txt, line 1: byte .*--encoding {encoding}$"):
        load(tmp_path, "x.txt", content, "causal-lm")
    assert load(tmp_path, "x.txt", content, "causal-lm", encoding=encoding).train[0]["text"] == f"{word} and more"


@pytest.mark.parametrize(("encoding", "near"), [("latin-99", "latin-1"), ("base64", None), ("utf8x", "utf-8")])
def test_what_is_no_encoding_is_refused(encoding: str, near: str | None, tmp_path: Path) -> None:
    hint = rf" \(did you mean '{near}'\?\)" if near else ".*"
    with pytest.raises(SparseAttentionError, match=f"encoding='{encoding}' is no encoding of text{hint}; examples"):
        load(tmp_path, "x.txt", "words", "causal-lm", encoding=encoding)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("x.json", json.dumps(GOOD)),
        ("x.jsonl", json.dumps(GOOD)),
        ("x.jsonl", lines(*GOOD)),
        ("x.ndjson", lines(*GOOD)),
        ("x.csv", "text,label\none,a\ntwo,b\n"),
        ("x.csv", '"text","label"\n"one"," a "\n"two","b"\n'),
        ("x.tsv", "text\tlabel\none\ta\ntwo\tb\n"),
        ("x.jsonl.gz", gzip.compress(lines(*GOOD).encode(), mtime=0)),
        ("x.csv.bz2", bz2.compress(b"text,label\none,a\ntwo,b\n")),
    ],
    ids=lambda given: given if isinstance(given, str) and len(given) < 20 else "",
)
def test_every_kind_of_file_reads_the_same(name: str, content: str | bytes, tmp_path: Path) -> None:
    assert rows_of(load(tmp_path, name, content)) == [("one", "a"), ("two", "b")]


def test_quotes_line_ends_and_words_for_nothing_are_text(tmp_path: Path) -> None:
    source = load(tmp_path, "x.csv", 'text,label\n"a, ""b""\nc",NA\nnull,None\n')
    assert rows_of(source) == [('a, "b"\nc', "NA"), ("null", "None")]


@pytest.mark.parametrize(
    ("labels", "names"),
    [
        ([10, 9, 10], ["9", "10"]),
        ([1.0, 0.0, 1.0], ["0", "1"]),
        (["10", "9", "9"], ["10", "9"]),
        ([True, False, True], ["False", "True"]),
    ],
)
def test_classes_are_numbered_in_order(labels: list[Any], names: list[str], tmp_path: Path) -> None:
    source = load(tmp_path, "x.jsonl", lines(*({"text": f"{i}", "label": v} for i, v in enumerate(labels))))
    assert source.labels == names


def test_dictionary_columns_and_narrow_integers_of_parquet_are_read(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    texts = pa.array(["one", "two", "one"]).dictionary_encode()
    pq.write_table(pa.table({"text": texts, "label": pa.array([3, 1, 3], pa.uint8())}), tmp_path / "x.parquet")
    source = load_source(CLASSES, str(tmp_path / "x.parquet"), max_length=8)
    assert rows_of(source) == [("one", "3"), ("one", "3"), ("two", "1")]


def test_a_row_of_many_megabytes_is_read_and_cut_to_a_line_in_an_error(tmp_path: Path) -> None:
    huge = "x" * 25_000_000
    source = load(tmp_path, "x.jsonl", lines({"text": huge, "label": "a"}, GOOD[1]))
    assert max(len(text) for text, _ in rows_of(source)) == len(huge)
    with pytest.raises(SparseAttentionError, match=r"row 2.*25000000 characters") as raised:
        load(tmp_path, "y.jsonl", lines(GOOD[0], {"text": "one", "label": huge}))
    assert len(str(raised.value)) < 400


def test_files_that_share_the_columns_in_need_are_read_together(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(lines({"text": "one", "label": "a", "id": 1}))
    (tmp_path / "b.jsonl").write_text(lines({"label": "b", "text": "two", "source": "web"}))
    source = load_source(CLASSES, str(tmp_path), max_length=8)
    assert rows_of(source) == [("one", "a"), ("two", "b")]


@pytest.mark.parametrize(
    ("second", "message"),
    [
        ([{"content": "two", "label": "b"}], "'text' is missing from b.jsonl"),
        ([GOOD[0], {"text": "two", "label": None}], "b.jsonl, row 2: column 'label' is missing"),
    ],
)
def test_the_file_that_differs_is_named(second: list[dict[str, Any]], message: str, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(lines(*GOOD))
    (tmp_path / "b.jsonl").write_text(lines(*second))
    with pytest.raises(SparseAttentionError, match=message):
        load_source(CLASSES, str(tmp_path), max_length=8)


@pytest.mark.parametrize("suffix", ["jsonl", "json", "parquet"])
@pytest.mark.parametrize("column", ["text", "label"])
def test_integers_do_not_become_texts_in_silence(column: str, suffix: str, tmp_path: Path) -> None:
    """Files that are read together take the types of the first."""
    for name, value in (("a", "one"), ("b", 1)):
        rows = [{**row, column: value} for row in GOOD]
        path = tmp_path / f"{name}.{suffix}"
        if suffix == "parquet":
            Dataset.from_list(rows).to_parquet(path)
        else:
            path.write_text(lines(*rows) if suffix == "jsonl" else json.dumps(rows))
    with pytest.raises(SparseAttentionError, match=rf"b.{suffix}: column '{column}' holds (numbers|int)"):
        load_source(CLASSES, str(tmp_path), max_length=8)


def test_columns_of_two_types_are_named(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(lines({"text": "one", "label": 0}, {"text": "two", "label": 1}))
    (tmp_path / "b.jsonl").write_text(lines(*GOOD))
    with pytest.raises(
        SparseAttentionError, match=r"b.jsonl: column 'label' holds string, but in a.jsonl it holds int"
    ):
        load_source(CLASSES, str(tmp_path), max_length=8)


def test_a_label_that_training_does_not_know_is_named(tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_text(lines({"text": "one", "label": "good"}, {"text": "two", "label": "bad"}))
    (tmp_path / "test.jsonl").write_text(lines({"text": "three", "label": "bad"}, {"text": "four", "label": "godo"}))
    message = "test.jsonl, row 2, column 'label': label 'godo' is no class.*did you mean 'good'.*'bad', 'good'"
    with pytest.raises(SparseAttentionError, match=message):
        load_source(CLASSES, str(tmp_path), max_length=8)


def test_empty_texts_of_a_folder_are_left_out_aloud(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, text in (("a.py", "x = 1"), ("__init__.py", ""), ("blank.py", " \n"), ("b.py", "y = 2")):
        (tmp_path / name).write_text(text)
    source = load_source("causal-lm", str(tmp_path), max_length=8)
    assert sorted(row["text"] for row in (*source.train, *source.evaluation)) == ["x = 1", "y = 2"]
    said = capsys.readouterr().err
    assert "blank.py holds no text and is left out" in said
    (tmp_path / "only").mkdir()
    (tmp_path / "only" / "c.txt").write_text("")
    with pytest.raises(SparseAttentionError, match=r"every file of .* is empty"):
        load_source("causal-lm", str(tmp_path / "only"), max_length=8)


def test_a_missing_text_stops_a_language_model_too(tmp_path: Path) -> None:
    with pytest.raises(SparseAttentionError, match=r"x.jsonl, row 2: column 'text' is missing"):
        load(tmp_path, "x.jsonl", lines({"text": "one"}, {"other": 1}), "causal-lm")
