"""Data sets that are made and not read: the embedded corpus and the synthetic tasks, by name."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from sa_hf.config import did_you_mean
from sa_hf.errors import SparseAttentionError
from sa_hf.tasks.arena import ListOpsTask
from sa_hf.tasks.language import stdlib_texts
from sa_hf.tasks.questions import STDLIB_QUESTIONS, QuestionTask
from sa_hf.tasks.retrieval import KINDS, Haystack, RetrievalTask, haystack_texts
from sa_hf.tasks.series import made_series
from sa_hf.tasks.source import (
    CAUSAL,
    CLASSIFICATION,
    DEFAULT_EVALUATION_ROWS,
    DEFAULT_TRAIN_ROWS,
    EVALUATION_SEEDS,
    FORECASTING,
    QUESTIONS,
    SUMMARIES,
    Rows,
    Source,
)
from sa_hf.tasks.summaries import STDLIB_SUMMARIES, stdlib_summaries
from sa_hf.tasks.synthetic import CorridorTask, MaskedSummationTask, PiecewiseTask, SeriesTask
from sa_hf.tasks.topic import TopicTask

STDLIB, SHORT, DOCSTRINGS = "stdlib", "stdlib-short", "stdlib-docstrings"
RETRIEVAL = "retrieval-"
LANGUAGE = (CAUSAL, "masked-lm")


@dataclass(frozen=True)
class Ask:
    """What is asked of a data set that is made; ``fields`` are those of ``--dataset_set``, and with ``evaluate_only``
    rows for training need not be made."""

    task: str
    dataset: str
    max_length: int
    train: int
    evaluation: int
    seed: int
    fields: Mapping[str, Any] = field(default_factory=dict)
    evaluate_only: bool = False

    def build(self, cls: Any, also: tuple[str, ...] = (), **fields: Any) -> Any:
        """A task's object of these fields, and those of the user but for ``also``.

        Raises:
            SparseAttentionError: a field that the class has not.
        """
        known = [*(f.name for f in dataclasses.fields(cls) if f.name not in fields), *also]
        for name in self.fields:
            if name not in known:
                raise SparseAttentionError(
                    f"dataset {self.dataset!r} has no field {name!r} to set{did_you_mean(name, known)}; fields: {known}"
                )
        return cls(**fields, **{name: value for name, value in self.fields.items() if name not in also})

    def plain(self) -> None:
        """Raise ``SparseAttentionError`` where a field is set of a data set without fields."""
        for name in self.fields:
            raise SparseAttentionError(f"dataset {self.dataset!r} has no field {name!r} to set; it has none at all")


def _corridor(ask: Ask) -> Source:
    task = ask.build(CorridorTask, length=ask.max_length)
    return Source(*_both(ask, task.rows), vocab_size=task.vocab_size)


def _summation(ask: Ask) -> Source:
    task = ask.build(MaskedSummationTask, length=ask.max_length - 1)
    return Source(*_both(ask, task.rows), [str(i) for i in range(task.num_labels)], task.vocab_size)


def _listops(ask: Ask) -> Source:
    task = ask.build(ListOpsTask, max_length=ask.max_length)
    return Source(*_both(ask, task.rows), [str(i) for i in range(task.num_labels)], task.vocab_size)


def _both(ask: Ask, rows: Callable[[int, int], Rows]) -> tuple[Rows, Rows]:
    return rows(ask.train, ask.seed), rows(ask.evaluation, ask.seed + EVALUATION_SEEDS)


def _seasons(ask: Ask) -> Source:
    horizon = max(1, ask.max_length // 8)
    task = ask.build(SeriesTask, context=ask.max_length - horizon, horizon=horizon)
    return made_series(task, task.context, ask.train, ask.evaluation, ask.seed)


def _piecewise(ask: Ask) -> Source:
    horizon = int(ask.fields.get("horizon", PiecewiseTask.horizon))
    task = ask.build(PiecewiseTask, t0=ask.max_length - horizon)
    return made_series(task, task.t0, ask.train, ask.evaluation, ask.seed)


def _topics(ask: Ask) -> Source:
    topic = ask.build(TopicTask)
    make = topic.short_texts if ask.dataset == SHORT else topic.documents
    return Source(make("train", ask.train, ask.seed), make("evaluation", ask.evaluation, ask.seed), list(topic.topics))


def _texts(ask: Ask) -> Source:
    ask.plain()
    kind = "source" if ask.dataset == STDLIB else "docstrings"
    train, evaluation = ([{"text": t} for t in stdlib_texts(split, kind)] for split in ("train", "evaluation"))
    return Source(train, evaluation, chunks=(DEFAULT_TRAIN_ROWS, DEFAULT_EVALUATION_ROWS))


def _questions(ask: Ask) -> Source:
    task = ask.build(QuestionTask)
    return Source(task.rows("train", ask.train, ask.seed), task.rows("evaluation", ask.evaluation, ask.seed))


def _summaries(ask: Ask) -> Source:
    ask.plain()
    return Source(stdlib_summaries("train", ask.train, ask.seed), stdlib_summaries("evaluation", ask.evaluation, 0))


def _retrieval(ask: Ask) -> Source:
    kind = ask.dataset.removeprefix(RETRIEVAL).replace("-", "_")
    hidden_in = str(ask.fields.get("haystack", "stdlib"))
    held_out = haystack_texts(hidden_in, "evaluation")  # what is no text is said before a model is loaded
    task = ask.build(RetrievalTask, also=("haystack",), kind=kind)

    def made(tokenizer: Any) -> tuple[Rows, Rows]:
        parts = []
        for split, count, seed in (
            ("train", 0 if ask.evaluate_only else ask.train, ask.seed),
            ("evaluation", ask.evaluation, ask.seed + EVALUATION_SEEDS),
        ):
            texts = haystack_texts(hidden_in, split) if count and split == "train" else held_out
            samples = task.samples(Haystack(tokenizer, texts), ask.max_length, count, seed)
            parts.append([sample.row() for sample in samples])
        return parts[0], parts[1]

    return Source([], [], made_of_tokens=made)


# By name: what makes it, and the tasks that it serves.
_MADE: dict[tuple[str, tuple[str, ...]], Callable[[Ask], Source]] = {
    ("corridor", (CAUSAL,)): _corridor,
    ("summation", (CLASSIFICATION,)): _summation,
    ("listops", (CLASSIFICATION,)): _listops,
    ("series", (FORECASTING,)): _seasons,
    ("piecewise", (FORECASTING,)): _piecewise,
    (SHORT, (CLASSIFICATION,)): _topics,
    (STDLIB, (CLASSIFICATION,)): _topics,
    (STDLIB, LANGUAGE): _texts,
    (DOCSTRINGS, LANGUAGE): _texts,
    (STDLIB_QUESTIONS, (QUESTIONS,)): _questions,
    (STDLIB_SUMMARIES, (SUMMARIES,)): _summaries,
    **{(RETRIEVAL + kind.replace("_", "-"), (CAUSAL,)): _retrieval for kind in KINDS},
}
MADE_NAMES = tuple(dict.fromkeys(name for name, _ in _MADE))


def made_source(ask: Ask) -> Source | None:
    """The data set of a name; None where no data set that is made has it.

    Raises:
        SparseAttentionError: it does not serve the task, or has no such field.
    """
    serves = [(tasks, make) for (name, tasks), make in _MADE.items() if name == ask.dataset]
    for tasks, make in serves:
        if ask.task in tasks:
            return make(ask)
    if not serves:
        return None
    wanted = [task for tasks, _ in serves for task in tasks]
    others = sorted({name for name, tasks in _MADE if ask.task in tasks})
    raise SparseAttentionError(
        f"dataset {ask.dataset!r} serves task {' or '.join(map(repr, wanted))}, not {ask.task!r}; use --task "
        f"{wanted[0]}" + (f", or one of {others}" if others else "")
    )


def counts_given(train: int | None, evaluation: int | None) -> tuple[int, int]:
    """Rows of training and evaluation where they are made: as asked for, else 256 and 64."""
    return train or DEFAULT_TRAIN_ROWS, evaluation or DEFAULT_EVALUATION_ROWS
