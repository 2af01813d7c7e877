"""What a data set is before it is tokenized, the same for those that are made, read from files, or of the hub."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

Rows = Sequence[dict[str, Any]]
CLASSIFICATION, FORECASTING = "sequence-classification", "forecasting"
QUESTIONS, SUMMARIES = "question-answering", "summarization"
CAUSAL = "causal-lm"
# Where the source of rows has no end of its own.
DEFAULT_TRAIN_ROWS, DEFAULT_EVALUATION_ROWS = 256, 64
# Added to --seed for rows that are made for evaluation: no seed of training draws them.
EVALUATION_SEEDS = 2**40


@dataclass(frozen=True)
class Source:
    """Rows before tokenizing: ``{"text"}`` with ``"label"`` for classification, ``{"text", "summary"}``,
    ``{"question", "context", "answer", "start"}``, or ready inputs of the model.

    ``evaluation`` is empty where there is one text alone: the last tenth of its chunks is held out. ``labels`` are the
    class names; ``vocab_size`` is set for synthetic token ids, which a freshly made model reads; ``model_options`` are
    fields that the data asks of such a model's config; ``chunks`` are the numbers of chunks of training and evaluation
    unless others are asked for, None is all. ``made_of_tokens`` makes both parts with a tokenizer, in place of rows.
    """

    train: Rows
    evaluation: Rows
    labels: list[str] | None = None
    vocab_size: int | None = None
    model_options: dict[str, Any] | None = None
    chunks: tuple[int | None, int | None] = (None, None)
    made_of_tokens: Callable[[Any], tuple[Rows, Rows]] | None = None
