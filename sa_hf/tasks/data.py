"""Data for the scripts: the embedded corpus, synthetic tasks, local files and hub data sets, as rows of tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sa_hf.errors import SparseAttentionError
from sa_hf.tasks.language import longest_chunk, stdlib_texts, token_chunks
from sa_hf.tasks.metrics import accuracy
from sa_hf.tasks.synthetic import CorridorTask, MaskedSummationTask, SeriesTask
from sa_hf.tasks.topic import TopicTask

Rows = Sequence[dict[str, Any]]
STDLIB, SHORT, DOCSTRINGS = "stdlib", "stdlib-short", "stdlib-docstrings"
CORRIDOR, SUMMATION, SERIES = "corridor", "summation", "series"
CLASSIFICATION, FORECASTING = "sequence-classification", "forecasting"
# Where the source of rows has no end of its own.
DEFAULT_TRAIN_ROWS, DEFAULT_EVALUATION_ROWS = 256, 64
MASKED_SHARE = 0.15
# The share of a single text's chunks that is held out, where nothing else is there to evaluate on.
HELD_OUT = 0.1
_LOADERS = {
    ".txt": "text",
    ".md": "text",
    ".py": "text",
    ".json": "json",
    ".jsonl": "json",
    ".parquet": "parquet",
    ".csv": "csv",
}
_TEXT_COLUMNS = ("text", "content", "sentence", "document", "code")
_LABEL_COLUMNS = ("label", "labels", "class", "target")


@dataclass(frozen=True)
class Source:
    """Rows before tokenizing: ``{"text"}`` with ``"label"`` for classification, or ready inputs of the model.

    ``evaluation`` is empty where there is one text alone: the last tenth of its chunks is held out. ``labels`` are the
    class names; ``vocab_size`` is set for synthetic token ids, which a freshly made model reads; ``model_options`` are
    fields that the data asks of such a model's config.
    """

    train: Rows
    evaluation: Rows
    labels: list[str] | None = None
    vocab_size: int | None = None
    model_options: dict[str, Any] | None = None


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
) -> Source:
    """Find the rows of a data set.

    Args:
        dataset: "stdlib" (the embedded corpus), "stdlib-short" (texts of 512 tokens, for classification),
            "stdlib-docstrings" (for language models), "corridor", "summation", "series", a local
            text/json/parquet/csv file or a folder of such, or a hub name.
        train_rows, evaluation_rows: at most so many rows; None is all, or 256 and 64 where rows are made.

    Raises:
        SparseAttentionError: the data set is not there or does not serve the task, a column is missing, or a number is
            too small.
    """
    for flag, value, least in (
        ("train_rows", train_rows, 1), ("eval_rows", evaluation_rows, 1), ("max_length", max_length, 2)
    ):  # fmt: skip
        if value is not None and value < least:
            raise SparseAttentionError(f"{flag}={value} must be at least {least}; nearest: {least}")
    train, evaluation = train_rows or DEFAULT_TRAIN_ROWS, evaluation_rows or DEFAULT_EVALUATION_ROWS
    if dataset == CORRIDOR:
        _needs(task, "causal-lm", dataset)
        corridor = CorridorTask(length=max_length)
        return Source(corridor.rows(train, seed), corridor.rows(evaluation, seed + 1), vocab_size=corridor.vocab_size)
    if dataset == SUMMATION:
        _needs(task, CLASSIFICATION, dataset)
        summation = MaskedSummationTask(length=max_length - 1)
        names = [str(i) for i in range(summation.num_labels)]
        rows, held_out = summation.rows(train, seed), summation.rows(evaluation, seed + 1)
        return Source(rows, held_out, names, summation.vocab_size)
    if (dataset == SERIES) != (task == FORECASTING):
        raise SparseAttentionError(f"dataset {dataset!r} does not serve task {task!r}: {FORECASTING} takes {SERIES!r}")
    if dataset == SERIES:
        return _series(max_length, train, evaluation, seed)
    if dataset == SHORT:
        _needs(task, CLASSIFICATION, dataset)
        topic = TopicTask()
        rows = topic.short_texts("train", train, seed)
        held_out = topic.short_texts("evaluation", evaluation, seed)
        return Source(rows, held_out, list(topic.topics))
    if dataset == STDLIB:
        if task == CLASSIFICATION:
            topic = TopicTask()
            rows, held_out = topic.documents("train", train, seed), topic.documents("evaluation", evaluation, seed)
            return Source(rows, held_out, list(topic.topics))
        return _stdlib_texts("source")
    if dataset == DOCSTRINGS:
        return _stdlib_texts("docstrings")
    return _from_datasets(task, dataset, dataset_config, text_column, label_column, (train_rows, evaluation_rows), seed)


def tokenize(
    source: Source, task: str, tokenizer: Any, max_length: int, train_rows: int | None, evaluation_rows: int | None
) -> tuple[Rows, Rows]:
    """Rows of token ids for the Trainer, at most ``max_length``: chunks for language models, else documents."""
    if "text" not in source.train[0]:
        return source.train, source.evaluation
    if task == CLASSIFICATION:
        return _documents(source.train, tokenizer, max_length), _documents(source.evaluation, tokenizer, max_length)
    limits = train_rows or DEFAULT_TRAIN_ROWS, evaluation_rows or DEFAULT_EVALUATION_ROWS
    if not source.evaluation:
        return _one_text(source.train, tokenizer, max_length, limits)
    chunks = []
    for rows, limit, split in zip((source.train, source.evaluation), limits, ("training", "evaluation"), strict=True):
        found = token_chunks((r["text"] for r in rows), tokenizer, max_length, limit)
        if not found:
            longest = longest_chunk((r["text"] for r in rows), tokenizer)
            raise SparseAttentionError(
                f"the {split} texts fill no chunk of max_length={max_length} tokens; give longer ones, or max_length "
                f"of at most {longest}"
            )
        chunks.append(found)
    return chunks[0], chunks[1]


def _one_text(rows: Rows, tokenizer: Any, max_length: int, limits: tuple[int, int]) -> tuple[Rows, Rows]:
    # The cut does not depend on the limits, so that scripts/evaluate.py finds what training held out.
    found = token_chunks((r["text"] for r in rows), tokenizer, max_length)
    if len(found) < 2:
        longest = longest_chunk((r["text"] for r in rows), tokenizer)
        raise SparseAttentionError(
            f"the one text holds about {longest} tokens; at max_length={max_length} it must fill two chunks, one of "
            f"them for evaluation: give a longer text, or max_length of at most {longest // 2}"
        )
    held_out = max(1, int(len(found) * HELD_OUT))
    return found[:-held_out][: limits[0]], found[-held_out:][: limits[1]]


def collator(task: str, tokenizer: Any, seed: int = 0) -> Callable[[list[dict[str, Any]]], Any]:
    """What makes a batch: padding, labels, and for masked language models the masks."""
    import transformers

    batch: Callable[[list[dict[str, Any]]], Any] = _stacked
    if task == "masked-lm":
        batch = transformers.DataCollatorForLanguageModeling(tokenizer, mlm_probability=MASKED_SHARE, seed=seed)
    elif task == CLASSIFICATION:
        batch = transformers.DataCollatorWithPadding(tokenizer)
    return batch


def metrics_of(task: str) -> tuple[Callable[[Any], dict[str, float]] | None, Callable[[Any, Any], Tensor] | None]:
    """The Trainer's ``compute_metrics`` and ``preprocess_logits_for_metrics``: accuracy, from the classes predicted."""
    if task in ("causal-lm", FORECASTING):
        return None, None

    def compute(prediction: Any) -> dict[str, float]:
        return {"accuracy": accuracy(torch.as_tensor(prediction.predictions), torch.as_tensor(prediction.label_ids))}

    return compute, lambda logits, labels: (logits[0] if isinstance(logits, tuple) else logits).argmax(-1)


def _stacked(rows: list[dict[str, Any]]) -> dict[str, Tensor]:
    # Rows are of one length, so there is nothing to pad; a causal language model shifts the labels itself.
    batch = {name: torch.stack([torch.as_tensor(row[name]) for row in rows]) for name in rows[0]}
    if "labels" not in batch:
        batch["labels"] = batch["input_ids"].clone()
    return batch


def _series(length: int, train: int, evaluation: int, seed: int) -> Source:
    """Series of ``length`` values, the last eighth of which is the forecast."""
    task = SeriesTask(context=length - max(1, length // 8), horizon=max(1, length // 8))
    parts = []
    for count, part_seed in ((train, seed), (evaluation, seed + 1)):
        values, covariates = task.series(count, part_seed)
        parts.append([{"values": v, "covariates": c, "labels": v} for v, c in zip(values, covariates, strict=True)])
    options = {"context_length": task.context, "num_covariates": task.num_covariates}
    return Source(parts[0], parts[1], model_options=options)


def _stdlib_texts(kind: str) -> Source:
    train, evaluation = ([{"text": t} for t in stdlib_texts(split, kind)] for split in ("train", "evaluation"))
    return Source(train, evaluation)


def _documents(rows: Rows, tokenizer: Any, max_length: int) -> list[dict[str, Any]]:
    encoded = tokenizer([r["text"] for r in rows], truncation=True, max_length=max_length)
    return [{name: encoded[name][i] for name in encoded} | {"labels": int(row["label"])} for i, row in enumerate(rows)]


def _needs(task: str, wanted: str, dataset: str) -> None:
    if task != wanted:
        raise SparseAttentionError(f"dataset {dataset!r} serves task {wanted!r}, not {task!r}; use --task {wanted}")


def _from_datasets(
    task: str,
    dataset: str,
    dataset_config: str | None,
    text_column: str | None,
    label_column: str | None,
    limits: tuple[int | None, int | None],
    seed: int,
) -> Source:
    splits = _load_splits(dataset, dataset_config, task)
    train = splits["train"]
    held_out = next((splits[name] for name in ("validation", "dev", "test") if name in splits), None)
    if held_out is None and len(train) < 2:
        if not len(train) or task == CLASSIFICATION:
            raise SparseAttentionError(
                f"dataset {dataset!r} holds {len(train)} rows and no validation split; {task} needs at least "
                f"{2 if task == CLASSIFICATION else 1}, or a file whose name begins with 'validation'"
            )
        return Source(_Texts(train, _column(train.column_names, text_column, _TEXT_COLUMNS, "text_column")), [])
    if held_out is None:
        cut = train.train_test_split(test_size=0.1, seed=seed)
        train, held_out = cut["train"], cut["test"]
    text = _column(train.column_names, text_column, _TEXT_COLUMNS, "text_column")
    parts = [d.select(range(min(len(d), n or len(d)))) for d, n in zip((train, held_out), limits, strict=True)]
    if task != CLASSIFICATION:
        # The limits count chunks here, which are cut later: texts are read lazily until there are enough.
        return Source(_Texts(train, text), _Texts(held_out, text))
    label = _column(train.column_names, label_column, _LABEL_COLUMNS, "label_column")
    names = getattr(train.features[label], "names", None)
    if names is None:
        values = sorted(set(train[label]))
        names, index = [str(v) for v in values], {v: i for i, v in enumerate(values)}
    else:
        index = {i: i for i in range(len(names))}
    try:
        rows = [[{"text": r[text], "label": index[r[label]]} for r in d] for d in parts]
    except KeyError as unknown:
        raise SparseAttentionError(
            f"label {unknown} of the evaluation rows does not occur in training: {names}"
        ) from None
    return Source(rows[0], rows[1], list(names))


class _Texts(Sequence[dict[str, Any]]):
    """One column of a data set as rows ``{"text"}``, read when asked for."""

    def __init__(self, dataset: Any, column: str) -> None:
        self.dataset, self.column = dataset, column

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: Any) -> Any:
        return {"text": self.dataset[index][self.column]}


def _load_splits(dataset: str, dataset_config: str | None, task: str) -> Any:
    import datasets

    path = Path(dataset)
    if not path.exists():
        return _from_hub(dataset, dataset_config)
    files = sorted(p for p in path.rglob("*") if p.suffix in _LOADERS) if path.is_dir() else [path]
    kinds = {_LOADERS.get(p.suffix) for p in files}
    if len(kinds) != 1 or None in kinds:
        raise SparseAttentionError(
            f"{dataset!r} holds {sorted({p.suffix for p in files}) or 'no file'}; "
            f"give files of one kind, of {sorted(_LOADERS)}"
        )
    kind = kinds.pop()
    options = {"sample_by": "document"} if kind == "text" else {}
    if kind == "text" and task == CLASSIFICATION:
        raise SparseAttentionError(
            f"{dataset!r} is plain text without labels; classification needs json, parquet or csv"
        )
    return datasets.load_dataset(kind, data_files=_by_split(files), **options)


def _from_hub(dataset: str, dataset_config: str | None) -> Any:
    import datasets

    # Hub names are "name" or "owner/name", and no file of ours.
    if Path(dataset).suffix in _LOADERS or dataset.startswith((".", "/", "~")) or dataset.count("/") > 1:
        raise SparseAttentionError(
            f"dataset {dataset!r} does not exist; give a file or folder of {sorted(_LOADERS)}, a hub name, or "
            f"{STDLIB!r}"
        )
    try:
        return datasets.load_dataset(dataset, dataset_config)
    except OSError as error:
        raise SparseAttentionError(
            f"dataset {dataset!r} is no file or folder here, and the hub did not give it: {error}"
        ) from error


def _by_split(files: Sequence[Path]) -> dict[str, list[str]]:
    """Files named like a split ("validation.jsonl", "test-0.parquet") are that split; all others are for training."""
    splits: dict[str, list[str]] = {}
    for path in files:
        split = next((s for s in ("validation", "dev", "test") if path.stem.startswith(s)), "train")
        splits.setdefault(split, []).append(str(path))
    if "train" not in splits:
        splits = {"train": [str(p) for p in files]}
    return splits


def _column(columns: Sequence[str], wanted: str | None, usual: Sequence[str], flag: str) -> str:
    if wanted is not None and wanted not in columns:
        raise SparseAttentionError(f"{flag}={wanted!r} is not a column; columns: {list(columns)}")
    found = wanted or next((c for c in usual if c in columns), None)
    if found is None:
        raise SparseAttentionError(
            f"none of the usual columns {list(usual)} is there; set {flag} to one of {list(columns)}"
        )
    return found
