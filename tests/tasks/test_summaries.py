"""Summaries: rows from docs and tables, ROUGE-L by its definition, and what generation writes is what is scored."""

from __future__ import annotations

import itertools
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import ByT5Tokenizer

from sa_hf import SparseAttentionError
from sa_hf.tasks.data import collator, load_source
from sa_hf.tasks.summaries import encode_summaries, rouge_l, stdlib_summaries, summary_figures

TASK, TOKENIZER = "summarization", ByT5Tokenizer()


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("cache")))


def test_a_body_does_not_hold_its_summary_and_splits_are_apart() -> None:
    train, evaluation = stdlib_summaries("train", 200), stdlib_summaries("evaluation", 200)
    assert (len(train), 100 < len(evaluation) <= 200) == (200, True)
    for row in train:
        assert row["summary"].endswith(".")
        assert not row["text"].split("\n", 1)[1].startswith(row["summary"])
        assert len(row["text"]) > 80
    assert {r["text"] for r in train}.isdisjoint(r["text"] for r in evaluation)


def test_tables_have_a_text_and_a_summary(tmp_path: Path) -> None:
    (tmp_path / "train.csv").write_text("article,abstract\n" + "".join(f"long text {i},sum {i}\n" for i in range(20)))
    source = load_source(TASK, str(tmp_path / "train.csv"), max_length=32, evaluation_rows=1)
    assert (len(source.train), len(source.evaluation)) == (18, 1)
    number = source.evaluation[0]["summary"].split()[1]
    assert source.evaluation == [{"text": f"long text {number}", "summary": f"sum {number}"}]
    (tmp_path / "other.csv").write_text("article,digest\na,b\nc,d\n")
    with pytest.raises(SparseAttentionError, match=r"label_column.*digest"):
        load_source(TASK, str(tmp_path / "other.csv"), max_length=32)


def test_rows_are_cut_and_padded() -> None:
    rows = encode_summaries([{"text": "abcdefgh", "summary": "xy"}, {"text": "a", "summary": "z" * 200}], TOKENIZER, 5)
    assert [len(r["input_ids"]) for r in rows] == [5, 2]
    assert [len(r["labels"]) for r in rows] == [3, 128]
    batch = collator(TASK, TOKENIZER)(rows)
    assert batch["labels"].shape == (2, 128)
    assert batch["labels"][0, 3:].eq(-100).all()


def test_rouge_is_the_longest_common_run_of_words() -> None:
    found, wanted = "the cat sat on a mat", "The mat on the cat sat"
    words = [text.lower().split() for text in (found, wanted)]
    runs = [{c for n in range(7) for c in itertools.combinations(side, n)} for side in words]
    longest = max(map(len, runs[0] & runs[1]))
    assert longest == 3
    assert rouge_l(found, wanted) == pytest.approx(2 * longest / 12)
    assert (rouge_l("a b", "a b"), rouge_l("", "a"), rouge_l("x", "y")) == (1.0, 0.0, 0.0)


def test_what_is_generated_is_scored() -> None:
    class Echo(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(1))

        def generate(self, input_ids: torch.Tensor, **options: Any) -> torch.Tensor:
            assert options["max_new_tokens"] == 128
            return input_ids

    rows = encode_summaries([{"text": "one two", "summary": "one two"}, {"text": "a b", "summary": "b"}], TOKENIZER, 32)
    figures = summary_figures(Echo(), TOKENIZER, rows)
    assert figures["rouge_l"] == pytest.approx((1 + 2 / 3) / 2)
    assert (figures["rouge_l_low"], figures["rouge_l_high"]) == pytest.approx((2 / 3, 1.0))
    assert SimpleNamespace(**figures).rouge_l_low < figures["rouge_l"]
