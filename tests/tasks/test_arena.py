"""ListOps: every row is a tree whose value is its label, of a length that was asked for."""

from __future__ import annotations

import statistics
from collections.abc import Iterator

import pytest

from sa_hf import SparseAttentionError
from sa_hf.tasks.arena import ListOpsTask


def value(tokens: Iterator[int]) -> int | None:
    """A second reading of the definition: None is the closing bracket."""
    token = next(tokens)
    if token >= 7:
        return token - 7
    if token == 2:
        return None
    values = list(iter(lambda: value(tokens), None))
    assert 2 <= len(values) <= 5
    return [min, max, lambda v: int(statistics.median(v)), lambda v: sum(v) % 10][token - 3](values)


def depth(tokens: list[int]) -> int:
    deepest = at = 0
    for token in tokens:
        at += (3 <= token <= 6) - (token == 2)
        deepest = max(deepest, at)
    return deepest


def test_labels_are_the_values_of_the_trees() -> None:
    task = ListOpsTask(max_length=80, depth=4, arguments=5)
    rows = task.rows(200, seed=1)
    assert {row["labels"] for row in rows} == set(range(10))
    assert {t for row in rows for t in row["input_ids"]} == {1, *range(2, 17)}
    for row in rows:
        ids = row["input_ids"]
        assert 20 <= len(ids) <= 80
        assert ids[0] == 1
        tokens = iter(ids[1:])
        assert value(tokens) == row["labels"]
        assert not list(tokens)
        # A list below `depth` levels holds digits alone.
        assert 2 <= depth(ids) <= 3
    assert len({tuple(row["input_ids"]) for row in rows}) == 200


def test_rows_repeat_for_a_seed_and_lengths_spread() -> None:
    task = ListOpsTask(max_length=400)
    assert task.rows(5, seed=3) == task.rows(5, seed=3) != task.rows(5, seed=4)
    lengths = [len(row["input_ids"]) for row in task.rows(60)]
    assert min(lengths) < 200 < 300 < max(lengths)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"depth": 1}, "depth=1.*nearest: depth=2"),
        ({"max_length": 60, "min_length": 61}, "min_length=61.*nearest: min_length=60"),
        ({"depth": 2, "arguments": 3, "max_length": 40, "min_length": 30}, "nearest: min_length=6"),
    ],
)
def test_impossible_trees_are_refused(fields: dict[str, int], message: str) -> None:
    with pytest.raises(SparseAttentionError, match=message):
        ListOpsTask(**fields)


def test_too_few_trees_for_the_rows_asked_for_are_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sa_hf.tasks.arena.MOST_IN_VAIN", 2000)
    with pytest.raises(SparseAttentionError, match="ask for fewer rows"):
        ListOpsTask(max_length=5, min_length=5, depth=2, arguments=2).rows(500)
