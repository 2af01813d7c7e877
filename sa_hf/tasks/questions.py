"""Extractive question answering: SQuAD's format, questions made from the standard library's docs, spans and figures."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sa_hf.config import shown
from sa_hf.errors import SparseAttentionError
from sa_hf.tasks.corpus import documented
from sa_hf.tasks.files import Loaded
from sa_hf.tasks.ranks import say
from sa_hf.tasks.source import Rows, Source
from sa_hf.tasks.tables import ALL, Choice, cut_texts, parts_of

STDLIB_QUESTIONS = "stdlib-questions"
MOST_TOKENS = 64  # of an answer


@dataclass(frozen=True)
class QuestionTask:
    """Questions about long documents of the standard library's docstrings.

    A document has ``entries`` functions or classes, name and docstring, in random order; the question asks what one of
    them does, and the answer is its docstring's first line. Files for evaluation are not those for training.
    """

    entries: int = 24

    def __post_init__(self) -> None:
        if self.entries < 2:
            raise SparseAttentionError(f"entries={self.entries} must be at least 2; nearest: 2")

    def rows(self, split: str, count: int, seed: int = 0) -> list[dict[str, Any]]:
        """``count`` rows ``{"question", "context", "answer", "start"}``; ``split`` is "train" or "evaluation"."""
        rng = random.Random(f"questions {split} {seed}")
        pool = documented(split == "evaluation")
        rows = []
        for _ in range(count):
            chosen = rng.sample(pool, min(self.entries, len(pool)))
            asked = rng.choice([e for e in chosen if sum(e.summary in other.text for other in chosen) == 1] or chosen)
            context, start = "", 0
            for entry in chosen:
                context += f"{entry.name}\n"
                start = len(context) if entry is asked else start
                context += f"{entry.text}\n\n"
            rows.append(
                {"question": f"What does {asked.name} do?", "context": context, "answer": asked.summary, "start": start}
            )
        return rows


def question_source(loaded: Loaded, choice: Choice) -> Source:
    """Rows of SQuAD's format: columns ``question``, ``context`` and ``answers`` (``text`` and ``answer_start``), or the
    nested file of articles with ``paragraphs``. A question without an answer has none in its text (SQuAD 2).

    Raises:
        SparseAttentionError: a column is missing, or an answer is not at its place in the text.
    """
    train, held_out = parts_of(loaded, choice)
    if held_out is None and choice.eval_split != ALL:
        assert train is not None
        if len(train[1]) < 2:
            raise SparseAttentionError(
                f"dataset {choice.dataset!r} holds {len(train[1])} row and no validation split; give a split whose "
                "name says 'validation', or --eval_split all to evaluate"
            )
        parts: list[Any] = cut_texts(train[1], None, choice)
        names = [train[0], train[0]]
    else:
        parts = [part[1] if part is not None else [] for part in (train, held_out)]
        names = [part[0] if part is not None else "" for part in (train, held_out)]
    limits = (choice.train_rows, choice.eval_rows)
    rows = [list(_squad(loaded, n, p))[:limit] for n, p, limit in zip(names, parts, limits, strict=True)]
    say(f"data: {len(rows[0])} questions to train on, {len(rows[1])} to evaluate on")
    return Source(rows[0], rows[1])


def _squad(loaded: Loaded, split: str, data: Any) -> Iterator[dict[str, Any]]:
    for number, row in enumerate(data):
        articles = row.get("data") or ([row] if "paragraphs" in row else None)
        if articles is None:
            yield _checked_row(row, f"{loaded.where(split, number)}")
            continue
        for article in articles:
            for paragraph in article["paragraphs"]:
                for question in paragraph["qas"]:
                    flat = {"context": paragraph["context"], **question}
                    yield _checked_row(flat, f"{loaded.where(split, number)}, question {shown(question.get('id'))}")


def _checked_row(row: Mapping[str, Any], where: str) -> dict[str, Any]:
    for name in ("question", "context", "answers"):
        if row.get(name) is None:
            raise SparseAttentionError(
                f"{where}: no {name!r}; SQuAD's format has the columns question, context and answers"
            )
    answers = row["answers"]
    if isinstance(answers, list):  # of the nested file
        answers = {key: [a[key] for a in answers] for key in ("text", "answer_start")}
    texts, starts = list(answers["text"]), list(answers["answer_start"])
    if not texts:
        return {"question": row["question"], "context": row["context"], "answer": "", "start": 0}
    text, start = texts[0], int(starts[0])
    if row["context"][start : start + len(text)] != text:
        raise SparseAttentionError(
            f"{where}: the answer {shown(text)} does not stand at character {start} of the context, where "
            f"{shown(row['context'][start : start + len(text)])} does"
        )
    return {"question": row["question"], "context": row["context"], "answer": text, "start": start}


def encode_questions(rows: Rows, tokenizer: Any, max_length: int) -> list[dict[str, Any]]:
    """Token ids of question and context, with ``start_positions`` and ``end_positions`` (the last token, inclusive); 0,
    the leading token, where there is no answer, or none within ``max_length``.

    Raises:
        SparseAttentionError: the tokenizer does not say where its tokens stand in the text.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise SparseAttentionError(
            f"{type(tokenizer).__name__} does not say where its tokens stand in a text, which extractive question "
            "answering needs; use a model with a fast tokenizer, such as 'minilm'"
        )
    encoded, cut = [], 0
    for row in rows:
        # Padding is the collator's.
        found = tokenizer(
            row["question"], row["context"], truncation="only_second", max_length=max_length,
            return_offsets_mapping=True,
        )  # fmt: skip
        offsets, owners = found.pop("offset_mapping"), found.sequence_ids()
        begin, end = row["start"], row["start"] + len(row["answer"])
        inside = [
            i for i, (o, (a, b)) in enumerate(zip(owners, offsets, strict=True)) if o == 1 and a < end and b > begin
        ]
        whole = bool(inside) and offsets[inside[-1]][1] >= end
        cut += bool(row["answer"]) and not whole
        places = (inside[0], inside[-1]) if whole else (0, 0)
        encoded.append({**found, "start_positions": places[0], "end_positions": places[1]})
    if cut:
        say(f"data: {cut} of {len(encoded)} answers lie behind max_length={max_length} tokens, and count as none")
    return encoded


def best_spans(start_logits: Tensor, end_logits: Tensor) -> Tensor:
    """The likeliest span of at most 64 tokens of each row, int64 ``[B, 2]``, its last token included.

    Args:
        start_logits, end_logits: ``[B, n]``.
    """
    length = start_logits.shape[1]
    best = torch.full((len(start_logits),), -torch.inf, device=start_logits.device)
    spans = torch.zeros(len(start_logits), 2, dtype=torch.long, device=start_logits.device)
    for width in range(min(MOST_TOKENS, length)):
        scores = start_logits[:, : length - width].float() + end_logits[:, width:].float()
        score, start = scores.max(1)
        better = score > best
        best = torch.where(better, score, best)
        spans[better] = torch.stack([start, start + width], 1)[better]
    return spans


def span_figures(spans: Any, starts: Any, ends: Any) -> dict[str, float]:
    """``accuracy``, the share of spans that are exactly right, and ``f1``, the mean overlap, both over tokens.

    Args:
        spans: integers ``[B, 2]``; ``starts`` and ``ends``, ``[B]``, the last token included.
    """
    found, right = torch.as_tensor(spans), torch.stack([torch.as_tensor(starts), torch.as_tensor(ends)], 1)
    exact = (found == right).all(1)
    shared = (torch.minimum(found[:, 1], right[:, 1]) - torch.maximum(found[:, 0], right[:, 0]) + 1).clamp(min=0)
    sizes = (found[:, 1] - found[:, 0] + 1) + (right[:, 1] - right[:, 0] + 1)
    return {"accuracy": float(exact.double().mean()), "f1": float((2 * shared / sizes).double().mean())}


def question_batch(tokenizer: Any, rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
    """Rows of :func:`encode_questions`, padded."""
    places = ("start_positions", "end_positions")
    batch = tokenizer.pad([{k: v for k, v in row.items() if k not in places} for row in rows], return_tensors="pt")
    return {**batch, **{name: torch.tensor([row[name] for row in rows]) for name in places if name in rows[0]}}
