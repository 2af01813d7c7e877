"""Data for the scripts: the embedded corpus, synthetic tasks, local files and hub data sets, as rows of tokens."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from sa_hf.errors import SparseAttentionError
from sa_hf.tasks.labels import numbers_of
from sa_hf.tasks.language import longest_chunk, token_chunks
from sa_hf.tasks.made import LANGUAGE, MADE_NAMES, Ask, counts_given, made_source
from sa_hf.tasks.masking import MaskingCollator
from sa_hf.tasks.packed import PackedRows
from sa_hf.tasks.questions import encode_questions, question_batch, question_source
from sa_hf.tasks.ranks import say
from sa_hf.tasks.series import table_series
from sa_hf.tasks.source import CLASSIFICATION, FORECASTING, QUESTIONS, SUMMARIES, Rows, Source
from sa_hf.tasks.summaries import encode_summaries, summary_source
from sa_hf.tasks.tables import HELD_OUT_SHARE, Choice, Texts, cut_texts, labelled_rows, load, parts_of, texts_of

# Tokenized in one call, of all cores; their tokens are lists of Python integers until they are packed.
DOCUMENTS_AT_ONCE = 256


def load_source(
    task: str,
    dataset: str,
    *,
    max_length: int,
    dataset_config: str | None = None,
    text_column: str | None = None,
    label_column: str | None = None,
    train_rows: int | None = None,
    evaluation_rows: int | None = None,
    seed: int = 0,
    eval_split: str | None = None,
    encoding: str | None = None,
    evaluate_only: bool = False,
    label2id: Mapping[str, int] | None = None,
    fields: Mapping[str, Any] | None = None,
) -> Source:
    """Find the rows of a data set.

    Args:
        dataset: one that is made (``sa_hf.tasks.made.MADE_NAMES``: of the embedded corpus, or synthetic), a local
            text/json/parquet/csv file or a folder of such, or a hub name.
        train_rows, evaluation_rows: at most so many rows; None is all, or 256 and 64 where rows are made or are cut
            from the embedded corpus.
        seed: draws the rows that are made; which rows are held out does not depend on it.
        eval_split: "validation" or "test" (None: the first that is there); "all" for every row, if ``evaluate_only``.
        encoding: of local text, json and csv files; None is UTF-8.
        evaluate_only: leave out training rows where evaluation has rows of its own.
        label2id: the numbers of a trained model's classes, by which labels go.
        fields: of a data set that is made, e.g. ``{"needles": 8}``.

    Raises:
        SparseAttentionError: the data set is not there or does not serve the task, a column is missing, a row holds
            something else than a text and a class, a label is unknown, or a number is too small.
    """
    for flag, value, least in (
        ("train_rows", train_rows, 1), ("eval_rows", evaluation_rows, 1), ("max_length", max_length, 2)
    ):  # fmt: skip
        if value is not None and value < least:
            raise SparseAttentionError(f"{flag}={value} must be at least {least}; nearest: {least}")
    counts = counts_given(train_rows, evaluation_rows)
    made = made_source(Ask(task, dataset, max_length, *counts, seed, fields or {}, evaluate_only))
    if made is None:
        for name in fields or {}:
            raise SparseAttentionError(
                f"dataset_set {name}: {dataset!r} is none of the data sets that are made, so it has no such field; "
                f"they are {', '.join(MADE_NAMES)}"
            )
        choice = Choice(
            dataset, dataset_config, text_column, label_column, train_rows, evaluation_rows, eval_split, encoding,
            evaluate_only, MADE_NAMES,
        )  # fmt: skip
        return _from_tables(task, choice, label2id, max_length)
    given = {"dataset_config": dataset_config, "text_column": text_column, "label_column": label_column}
    for flag, choice_of_columns in {**given, "eval_split": eval_split, "encoding": encoding}.items():
        if choice_of_columns is not None:
            raise SparseAttentionError(f"{flag}={choice_of_columns!r} is for files and hub data sets, not {dataset!r}")
    if label2id is not None and made.labels is not None and "text" in made.train[0]:
        return _renumbered(made, label2id)
    return made


def _renumbered(source: Source, label2id: Mapping[str, int]) -> Source:
    """Rows whose labels number ``source.labels``, with the model's numbers."""
    names = source.labels or []
    parts = [
        [
            {**row, "label": number}
            for row, number in zip(
                rows, numbers_of([r["label"] for r in rows], label2id, names, lambda row: f"row {row + 1}"), strict=True
            )
        ]
        for rows in (source.train, source.evaluation)
    ]
    return replace(source, train=parts[0], evaluation=parts[1])


def tokenize(
    source: Source, task: str, tokenizer: Any, max_length: int, train_rows: int | None, evaluation_rows: int | None
) -> tuple[Rows, Rows]:
    """Rows of token ids for the Trainer, at most ``max_length``: chunks for language models, else documents.

    Raises:
        SparseAttentionError: the texts fill no chunk, or the tokenizer does not serve the task.
    """
    if source.made_of_tokens is not None:
        return source.made_of_tokens(tokenizer)
    encode = {QUESTIONS: encode_questions, SUMMARIES: encode_summaries}.get(task)
    if encode is not None:
        parts_of_task = [encode(rows, tokenizer, max_length) for rows in (source.train, source.evaluation)]
        return parts_of_task[0], parts_of_task[1]
    if "text" not in (source.train or source.evaluation)[0]:
        return source.train, source.evaluation
    if task == CLASSIFICATION:
        parts = [_documents(rows, tokenizer, max_length) for rows in (source.train, source.evaluation)]
        both = [length for part in parts for length in part.lengths()]
        full = sum(length == max_length for length in both)
        if full:
            say(f"data: {full} of {len(both)} texts reach max_length={max_length} tokens; what is longer is cut there")
        return parts[0], parts[1]
    limits = train_rows or source.chunks[0], evaluation_rows or source.chunks[1]
    if source.evaluation:
        chunks = [
            _chunks(rows, tokenizer, max_length, limit, name) if rows else []
            for rows, limit, name in zip(
                (source.train, source.evaluation), limits, ("training", "evaluation"), strict=True
            )
        ]
    else:
        chunks = _one_text(source.train, tokenizer, max_length, limits)
    uses = zip(chunks, ("train on", "evaluate on"), strict=True)
    counts = ", ".join(f"{len(part)} to {use}" for part, use in uses if len(part))
    reached = [
        f"{flag} {limit}" for flag, limit, part in zip(("--train_rows", "--eval_rows"), limits, chunks, strict=True)
        if limit is not None and len(part) == limit
    ]  # fmt: skip
    say(f"data: chunks of {max_length} tokens, {counts}" + (f" ({' and '.join(reached)} reached)" if reached else ""))
    return chunks[0], chunks[1]


def _chunks(rows: Rows, tokenizer: Any, max_length: int, limit: int | None, split: str) -> Rows:
    found = token_chunks((r["text"] for r in rows), tokenizer, max_length, limit)
    if not found:
        longest = longest_chunk((r["text"] for r in rows), tokenizer)
        raise SparseAttentionError(
            f"the {split} texts fill no chunk of max_length={max_length} tokens; give longer ones, or max_length "
            f"of at most {longest}"
        )
    return found


def _one_text(rows: Rows, tokenizer: Any, max_length: int, limits: tuple[int | None, int | None]) -> list[Rows]:
    # The cut does not depend on the limits, so that evaluation finds what training held out.
    found = token_chunks((r["text"] for r in rows), tokenizer, max_length)
    if len(found) < 2:
        longest = longest_chunk((r["text"] for r in rows), tokenizer)
        raise SparseAttentionError(
            f"the one text holds about {longest} tokens; at max_length={max_length} it must fill two chunks, one of "
            f"them for evaluation: give a longer text, or max_length of at most {longest // 2}"
        )
    held_out = max(1, int(len(found) * HELD_OUT_SHARE))
    say(f"data: one text, so the last tenth of its {len(found)} chunks is held out")
    return [found[:-held_out][: limits[0]], found[-held_out:][: limits[1]]]


def collator(task: str, tokenizer: Any, seed: int = 0) -> Callable[[list[dict[str, Any]]], Any]:
    """What makes a batch: padding, labels, and for masked language models the masks."""
    import transformers

    batch: Callable[[list[dict[str, Any]]], Any] = _stacked
    if task == "masked-lm":
        batch = MaskingCollator(tokenizer, seed)
    elif task == CLASSIFICATION:
        batch = transformers.DataCollatorWithPadding(tokenizer)
    elif task == QUESTIONS:
        batch = functools.partial(question_batch, tokenizer)
    elif task == SUMMARIES:
        batch = transformers.DataCollatorForSeq2Seq(tokenizer)
    return batch


def _stacked(rows: list[dict[str, Any]]) -> dict[str, Tensor]:
    # Rows are of one length, so there is nothing to pad; a causal language model shifts the labels itself.
    batch = {name: torch.stack([torch.as_tensor(row[name]) for row in rows]) for name in rows[0]}
    if "labels" not in batch:
        batch["labels"] = batch["input_ids"].clone()
    return batch


def _documents(rows: Rows, tokenizer: Any, max_length: int) -> PackedRows:
    documents = PackedRows()
    for begin in range(0, len(rows), DOCUMENTS_AT_ONCE):
        part = rows[begin : begin + DOCUMENTS_AT_ONCE]
        encoded = tokenizer([row["text"] for row in part], truncation=True, max_length=max_length)
        for i, row in enumerate(part):
            documents.add({name: encoded[name][i] for name in encoded}, int(row["label"]))
    return documents


def _from_tables(task: str, choice: Choice, label2id: Mapping[str, int] | None, max_length: int) -> Source:
    """The rows of the user's files, or of a hub data set."""
    loaded = load(choice, classify=task not in LANGUAGE)
    if task == FORECASTING:
        return table_series(loaded, choice, max_length)
    if task in (QUESTIONS, SUMMARIES):
        return (question_source if task == QUESTIONS else summary_source)(loaded, choice)
    train, held_out = parts_of(loaded, choice)
    if task == CLASSIFICATION:
        (rows, evaluation), names = labelled_rows(loaded, choice, train, held_out, label2id)
        return Source(rows, evaluation, names)
    # The limits count chunks here, which are cut later: texts are read lazily until there are enough.
    if train is None and held_out is not None:
        return Source([], texts_of(loaded, choice, *held_out))
    assert train is not None
    texts = texts_of(loaded, choice, *train)
    if held_out is not None:
        return Source(texts, texts_of(loaded, choice, *held_out, texts.column))
    if len(texts) == 0:
        raise SparseAttentionError(f"dataset {choice.dataset!r} holds no rows")
    if len(texts) == 1:
        return Source(texts, [])
    cut = cut_texts(texts.dataset, None, choice)
    parts: list[Rows] = [Texts(part, texts.column, texts.where) if len(part) else [] for part in cut]
    return Source(parts[0], parts[1])
