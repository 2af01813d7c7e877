"""Summaries by an encoder-decoder model: rows from files, or docstrings without their first line, and ROUGE-L."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch

from sa_hf.tasks.corpus import documented
from sa_hf.tasks.files import Loaded
from sa_hf.tasks.metrics import bootstrap
from sa_hf.tasks.ranks import say
from sa_hf.tasks.source import Rows, Source
from sa_hf.tasks.synthetic import IGNORED
from sa_hf.tasks.tables import TEXT_COLUMNS, Choice, checked_text, column_of, cut_texts, parts_of

STDLIB_SUMMARIES = "stdlib-summaries"
SUMMARY_COLUMNS = ("summary", "highlights", "abstract", "target")
SOURCE_COLUMNS = (*TEXT_COLUMNS, "article", "dialogue", "report")
MOST_TOKENS = 128  # of a summary


def stdlib_summaries(split: str, count: int, seed: int = 0) -> list[dict[str, Any]]:
    """``count`` rows ``{"text", "summary"}``: a docstring's name and body, and its first line. Files for evaluation are
    not those for training; where there are fewer docstrings, all of them once."""
    pool = list(documented(split == "evaluation"))
    random.Random(f"summaries {split} {seed}").shuffle(pool)
    return [{"text": f"{e.name}\n{e.text.partition(chr(10))[2].strip()}", "summary": e.summary} for e in pool[:count]]


def summary_source(loaded: Loaded, choice: Choice) -> Source:
    """Rows of a table with a column of texts and one of summaries (``label_column``; else summary, highlights, ...).

    Raises:
        SparseAttentionError: a column is missing, or a row of it is no text.
    """
    train, held_out = parts_of(loaded, choice)
    if held_out is None:
        assert train is not None
        parts = cut_texts(train[1], None, choice)
        names = [train[0], train[0]]
    else:
        parts = [part[1] if part is not None else [] for part in (train, held_out)]
        names = [part[0] if part is not None else "" for part in (train, held_out)]
    rows = []
    for name, data, limit in zip(names, parts, (choice.train_rows, choice.eval_rows), strict=True):
        found: list[dict[str, Any]] = []
        if len(data):
            text = column_of(data, choice.text_column, SOURCE_COLUMNS, "text_column", loaded, name)
            summary = column_of(data, choice.label_column, SUMMARY_COLUMNS, "label_column", loaded, name)
            for number, row in enumerate(data.select(range(min(len(data), limit or len(data))))):

                def where(number: int = number, name: str = name) -> str:
                    return loaded.where(name, number)

                found.append(
                    {
                        "text": checked_text(row[text], where, text),
                        "summary": checked_text(row[summary], where, summary),
                    }
                )
        rows.append(found)
    say(f"data: {len(rows[0])} texts to train on, {len(rows[1])} to evaluate on")
    return Source(rows[0], rows[1])


def encode_summaries(rows: Rows, tokenizer: Any, max_length: int) -> list[dict[str, Any]]:
    """``{"input_ids", "attention_mask", "labels"}``, each cut: texts at ``max_length`` tokens, summaries at 128."""
    encoded = []
    for row in rows:
        text = tokenizer(row["text"], truncation=True, max_length=max_length)
        labels = tokenizer(text_target=row["summary"], truncation=True, max_length=MOST_TOKENS)["input_ids"]
        encoded.append({"input_ids": text["input_ids"], "attention_mask": text["attention_mask"], "labels": labels})
    return encoded


@torch.no_grad()
def summary_figures(model: Any, tokenizer: Any, rows: Rows) -> dict[str, float]:
    """``rouge_l``: the mean F1 of the longest common run of words in order between what the model writes greedily and
    the summary, words in lower case and without stems; and its 95 % bootstrap interval."""
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    scores = []
    for row in rows:
        ids = torch.tensor([row["input_ids"]], device=device)
        written = model.generate(input_ids=ids, max_new_tokens=MOST_TOKENS, do_sample=False, num_beams=1)[0]
        wanted = [token for token in row["labels"] if token != IGNORED]
        pair = [tokenizer.decode(tokens, skip_special_tokens=True) for tokens in (written, wanted)]
        scores.append(rouge_l(pair[0], pair[1]))
    model.train(was_training)
    low, high = bootstrap(scores)
    return {"rouge_l": sum(scores) / max(1, len(scores)), "rouge_l_low": low, "rouge_l_high": high}


def rouge_l(found: str, wanted: str) -> float:
    """F1 of the longest common subsequence of words (Lin 2004, section 3.1, with beta 1)."""
    a, b = found.lower().split(), wanted.lower().split()
    if not a or not b or not Counter(a) & Counter(b):
        return 0.0
    common = _common(a, b)
    return 2 * common / (len(a) + len(b))


def _common(a: Sequence[str], b: Sequence[str]) -> int:
    row = [0] * (len(b) + 1)
    for word in a:
        before = 0
        for at, other in enumerate(b, start=1):
            before, row[at] = row[at], before + 1 if word == other else max(row[at], row[at - 1])
    return row[-1]
