"""Questions: what those of the docs ask, SQuAD's formats, spans in tokens, and the figures by their definition."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer, ByT5Tokenizer

from sa_hf import SparseAttentionError
from sa_hf.tasks.data import collator, load_source, tokenize
from sa_hf.tasks.load import minilm_path
from sa_hf.tasks.questions import QuestionTask, best_spans, encode_questions, span_figures

TASK = "question-answering"


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(minilm_path())


def test_the_answer_is_the_first_line_below_the_name_asked_for() -> None:
    for split in ("train", "evaluation"):
        for row in QuestionTask(entries=6).rows(split, 8):
            name = row["question"].removeprefix("What does ").removesuffix(" do?")
            before, after = row["context"][: row["start"]], row["context"][row["start"] :]
            assert before.endswith(f"{name}\n")
            assert after.startswith(row["answer"] + "\n")
            assert row["context"].count(row["answer"]) == 1
            assert row["context"].count("\n\n") >= 6
    train, evaluation = (QuestionTask(entries=40).rows(split, 20) for split in ("train", "evaluation"))
    assert {r["question"] for r in train}.isdisjoint(r["question"] for r in evaluation)
    assert QuestionTask(entries=6).rows("train", 3, 5) == QuestionTask(entries=6).rows("train", 3, 5)


def test_spans_are_the_tokens_of_the_answer(tokenizer: Any) -> None:
    rows = QuestionTask(entries=4).rows("evaluation", 6)
    whole = encode_questions(rows, tokenizer, 4096)
    for row, encoded in zip(rows, whole, strict=True):
        span = encoded["input_ids"][encoded["start_positions"] : encoded["end_positions"] + 1]
        assert span == tokenizer(row["answer"], add_special_tokens=False)["input_ids"]
    cut = encode_questions(rows, tokenizer, 48)
    assert all(len(encoded["input_ids"]) == 48 for encoded in cut)
    lost = [c["start_positions"] for c, w in zip(cut, whole, strict=True) if w["end_positions"] >= 47]
    assert lost
    assert set(lost) == {0}


def test_answers_that_begin_inside_a_token_are_covered(tokenizer: Any) -> None:
    row = {"question": "Which?", "context": "an unbelievable end", "answer": "believable end", "start": 5}
    (encoded,) = encode_questions([row], tokenizer, 64)
    covered = tokenizer.decode(encoded["input_ids"][encoded["start_positions"] : encoded["end_positions"] + 1])
    assert covered.replace(" ", "").endswith("believableend")


def article(answer: int = 4) -> dict[str, Any]:
    questions = [
        {"id": "a", "question": "Who?", "answers": [{"text": "Ada", "answer_start": answer}]},
        {"id": "b", "question": "Why?", "answers": [], "is_impossible": True},
    ]
    return {"version": "2.0", "data": [{"title": "t", "paragraphs": [{"context": "Yes Ada did.", "qas": questions}]}]}


def test_both_formats_of_squad_are_read(tmp_path: Path) -> None:
    (tmp_path / "nested").mkdir()
    for split in ("train", "validation"):
        (tmp_path / "nested" / f"{split}.json").write_text(json.dumps(article()))
    flat = {"question": "Who?", "context": "Yes Ada did.", "answers": {"text": ["Ada"], "answer_start": [4]}}
    (tmp_path / "flat.jsonl").write_text((json.dumps(flat) + "\n") * 10)
    nested = load_source(TASK, str(tmp_path / "nested"), max_length=32)
    expected = {"question": "Who?", "context": "Yes Ada did.", "answer": "Ada", "start": 4}
    unanswered = {"question": "Why?", "context": "Yes Ada did.", "answer": "", "start": 0}
    assert nested.train == nested.evaluation == [expected, unanswered]
    one = load_source(TASK, str(tmp_path / "flat.jsonl"), max_length=32, evaluation_rows=1)
    assert (one.train, one.evaluation) == ([expected] * 9, [expected])


def test_an_answer_that_is_not_at_its_place_is_named(tmp_path: Path) -> None:
    (tmp_path / "train.json").write_text(json.dumps(article(answer=5)))
    with pytest.raises(SparseAttentionError, match=r"question 'a': the answer 'Ada' does not stand at character 5"):
        load_source(TASK, str(tmp_path / "train.json"), max_length=32, evaluate_only=True, eval_split="all")
    (tmp_path / "train.jsonl").write_text('{"question": "Who?", "answers": {"text": [], "answer_start": []}}\n' * 3)
    with pytest.raises(SparseAttentionError, match="no 'context'"):
        load_source(TASK, str(tmp_path / "train.jsonl"), max_length=32)


def test_a_tokenizer_without_places_is_refused() -> None:
    source = load_source(TASK, "stdlib-questions", max_length=64, train_rows=1, evaluation_rows=1)
    with pytest.raises(SparseAttentionError, match="fast tokenizer, such as 'minilm'"):
        tokenize(source, TASK, ByT5Tokenizer(), 64, None, None)


def test_batches_are_padded_and_keep_their_places(tokenizer: Any) -> None:
    rows = encode_questions(QuestionTask(entries=2).rows("evaluation", 3), tokenizer, 96)
    batch = collator(TASK, tokenizer)(rows)
    assert batch["input_ids"].shape == (3, max(len(r["input_ids"]) for r in rows))
    assert batch["attention_mask"].sum(1).tolist() == [len(r["input_ids"]) for r in rows]
    assert batch["start_positions"].tolist() == [r["start_positions"] for r in rows]


def test_the_best_span_is_the_best_of_all_pairs() -> None:
    generator = torch.Generator().manual_seed(0)
    start, end = torch.randn(2, 12, 90, generator=generator)
    for row, span in enumerate(best_spans(start, end).tolist()):
        pairs = {(i, j): float(start[row, i] + end[row, j]) for i in range(90) for j in range(i, min(90, i + 64))}
        assert tuple(span) == max(pairs, key=pairs.__getitem__)


def test_figures_by_hand() -> None:
    found = span_figures(torch.tensor([[2, 5], [3, 3], [0, 1]]), [2, 4, 1], [5, 6, 4])
    # exact; apart; one of two and one of four tokens shared
    assert found["accuracy"] == pytest.approx(1 / 3)
    assert found["f1"] == pytest.approx((1 + 0 + 2 * 1 / 6) / 3)
