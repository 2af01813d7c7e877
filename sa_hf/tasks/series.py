"""Series for forecasting: those that are made, and the columns of a user's table."""

from __future__ import annotations

import datetime
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from sa_hf.config import shown
from sa_hf.errors import SparseAttentionError
from sa_hf.tasks.files import Loaded
from sa_hf.tasks.ranks import say
from sa_hf.tasks.source import EVALUATION_SEEDS, Rows, Source
from sa_hf.tasks.splits import TRAIN, held_out_of
from sa_hf.tasks.synthetic import PiecewiseTask, SeriesTask
from sa_hf.tasks.tables import ALL, HELD_OUT_SHARE, Choice

# Seasons of a table without times: of a day and a week of hours, as in the paper's data.
DAY, WEEK = 24, 168
NUM_COVARIATES = 4


def made_series(task: SeriesTask | PiecewiseTask, context: int, train: int, evaluation: int, seed: int) -> Source:
    """Series of a synthetic task; the last values, behind ``context``, are the forecast."""
    parts: list[Rows] = []
    for count, part_seed in ((train, seed), (evaluation, seed + EVALUATION_SEEDS)):
        values, covariates = task.series(count, part_seed)
        parts.append([_row(v, c) for v, c in zip(values, covariates, strict=True)])
    options = {"context_length": context, "num_covariates": task.num_covariates}
    return Source(parts[0], parts[1], model_options=options)


def table_series(loaded: Loaded, choice: Choice, length: int) -> Source:
    """Windows of ``length`` steps from a table: a row a step, a column of numbers a series; the last eighth of a window
    is the forecast.

    A column of times (ISO 8601) gives the covariates: sine and cosine of the hour of the day and of the week; without
    one, steps are hours. Where no split is held out, the last tenth of the steps is: windows that forecast in it serve
    evaluation, and no value of it is trained on.

    Raises:
        SparseAttentionError: no column of numbers, a missing value or a time that cannot be read, or too few steps.
    """
    horizon = max(1, length // 8)
    held_out = held_out_of(loaded.splits, None if choice.eval_split == ALL else choice.eval_split)
    name = TRAIN if TRAIN in loaded.splits else next(iter(loaded.splits))
    values, covariates = _columns(loaded, name)
    if held_out is not None and held_out != name:
        later = _columns(loaded, held_out)
        ends = range(length, len(later[1]) + 1, horizon)
        evaluation, last = _windows(later, length, ends, choice.eval_rows), len(covariates)
    else:
        steps = len(covariates)
        last = steps if choice.eval_split == ALL else steps - max(horizon, int(steps * HELD_OUT_SHARE))
        begin = length if choice.eval_split == ALL else max(length, last + horizon)
        evaluation = _windows((values, covariates), length, range(begin, steps + 1, horizon), choice.eval_rows)
        say(f"data: {values.shape[0]} series of {steps} steps; forecasts behind step {begin - horizon} are held out")
    train = (
        []
        if choice.evaluate_only
        else _windows((values, covariates), length, range(length, last + 1), choice.train_rows)
    )
    for rows, use in ((evaluation, "evaluation"), *(() if choice.evaluate_only else ((train, "training"),))):
        if not rows:
            raise SparseAttentionError(
                f"{choice.dataset!r} has too few steps ({len(covariates)}) for windows of max_length={length} in "
                f"{use}; nearest: max_length={max(2, int(len(covariates) * (1 - HELD_OUT_SHARE)) // 2)}"
            )
    options = {"context_length": length - horizon, "num_covariates": NUM_COVARIATES}
    return Source(train, evaluation, model_options=options)


def _row(values: Tensor, covariates: Tensor) -> dict[str, Any]:
    return {"values": values, "covariates": covariates, "labels": values}


def _windows(table: tuple[Tensor, Tensor], length: int, ends: range, limit: int | None) -> list[dict[str, Any]]:
    """Windows of every series that end before each of ``ends``; of too many, evenly spread ones."""
    values, covariates = table
    every = [(series, end) for end in ends for series in range(values.shape[0])]
    if limit is not None and limit < len(every):
        every = [every[i * len(every) // limit] for i in range(limit)]
    return [_row(values[s, end - length : end], covariates[end - length : end]) for s, end in every]


def _columns(loaded: Loaded, split: str) -> tuple[Tensor, Tensor]:
    """A split's series fp32 ``[series, steps]``, and the covariates fp32 ``[steps, 4]``."""
    data = loaded.splits[split]
    numbers, times = [], None
    for name in data.column_names:
        column = list(data[name])

        def where(row: int) -> str:
            return loaded.where(split, row)

        if all(isinstance(v, int | float | None) and not isinstance(v, bool) for v in column):
            numbers.append(_numbers(column, name, where))
        elif times is None:
            times = _hours(column, name, where)
    if not numbers:
        raise SparseAttentionError(
            f"split {split!r} has no column of numbers among {shown(list(data.column_names))}; forecasting takes a row "
            "a step and a column a series"
        )
    hours = torch.arange(len(data), dtype=torch.float64) if times is None else times
    phases = [2 * math.pi * hours / period for period in (DAY, WEEK)]
    return torch.stack(numbers), torch.stack([f(p) for p in phases for f in (torch.sin, torch.cos)], -1).float()


def _numbers(column: Sequence[Any], name: str, where: Callable[[int], str]) -> Tensor:
    for row, value in enumerate(column):
        if value is None or not math.isfinite(value):
            raise SparseAttentionError(
                f"{where(row)}: column {name!r} is {shown(value)}; a series has a finite number at every step"
            )
    return torch.tensor(column, dtype=torch.float32)


def _hours(column: Sequence[Any], name: str, where: Callable[[int], str]) -> Tensor:
    """Hours since a Monday's midnight."""
    hours = []
    for row, value in enumerate(column):
        try:
            time = value if isinstance(value, datetime.datetime) else datetime.datetime.fromisoformat(str(value))
        except ValueError as error:
            raise SparseAttentionError(
                f"{where(row)}: column {name!r} is {shown(value)}, neither a number nor a time such as "
                "2026-11-29T21:00; leave the column out"
            ) from error
        hours.append((time.replace(tzinfo=None) - datetime.datetime(2024, 1, 1)).total_seconds() / 3600)
    return torch.tensor(hours, dtype=torch.float64)
