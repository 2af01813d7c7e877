"""What the rows of a decoding step read: runs of positions, made on the host without tensors and shared by layers.

A list of runs that says nothing of where a row ends may serve many steps: what a row reads is its list cut to
``low <= position < high``.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

Run: TypeAlias = tuple[int, int, int]  # first, end, step: range(first, end, step)


@dataclass(frozen=True, eq=False)
class RunLists:
    """Runs of one row, a list for each of its heads (one where they are alike): those of list l are
    ``runs[starts[l] : starts[l + 1]]``, three numbers each."""

    starts: array[int]
    runs: array[int]

    @classmethod
    def of(cls, lists: Iterable[Sequence[Run]]) -> RunLists:
        starts, runs = array("q", [0]), array("q")
        for one in lists:
            for run in one:
                runs.extend(run)
            starts.append(len(runs) // 3)
        return cls(starts, runs)

    @property
    def heads(self) -> int:
        return len(self.starts) - 1


NOTHING = RunLists.of([[]])


class Row(NamedTuple):
    """A query: its batch row and query slot, its list, the key slot of its sequence's position 0, its position, and
    the positions ``low <= j < high`` that it may read."""

    batch: int
    query: int
    list: int
    first: int
    position: int
    low: int
    high: int


@dataclass(frozen=True, eq=False)
class Reads:
    """What the rows of a step read.

    Args:
        rows: the fields of each :class:`Row`, one after the other.
        lists: the runs of all lists.
        list_heads: lists of a row: 1, the key heads or the query heads.
        complete: every query has a row; the others give 0.
        relative: runs count back from the row's position.
        skip_own: a row leaves its own position out where it reads another.
        own_if_empty: a row that would read nothing reads its own position.
        order: int64 ``[B, Nk]`` on the host, the slots of a row in the order of its positions, or None.
    """

    rows: array[int]
    lists: RunLists
    list_heads: int
    complete: bool
    relative: bool = False
    skip_own: bool = False
    own_if_empty: bool = False
    order: Tensor | None = None

    @classmethod
    def of(
        cls, rows: Iterable[tuple[Row, RunLists]], queries: int, *, relative: bool = False, skip_own: bool = False,
        own_if_empty: bool = False, order: Tensor | None = None,
    ) -> Reads:  # fmt: skip
        """Rows with their lists (the field ``list`` is set here), of ``queries`` in all. Lists that are one object are
        stored once."""
        flat, distinct, numbers = array("q"), list[RunLists](), dict[int, int]()
        for row, lists in rows:
            number = numbers.get(id(lists))
            if number is None:
                number = numbers[id(lists)] = len(distinct)
                distinct.append(lists)
            flat.extend(row._replace(list=number))
        heads = distinct[0].heads if distinct else 1
        complete = len(flat) == queries * len(Row._fields)
        return cls(flat, _joined(distinct), heads, complete, relative, skip_own, own_if_empty, order)

    @property
    def count(self) -> int:
        return len(self.rows) // len(Row._fields)


def _joined(lists: Sequence[RunLists]) -> RunLists:
    if len(lists) == 1:
        return lists[0]
    starts, runs = array("q", [0]), array("q")
    for one in lists:
        shift = starts[-1]
        starts.extend(start + shift for start in one.starts[1:])
        runs.extend(one.runs)
    return RunLists(starts, runs)


def runs_of(positions: Tensor) -> list[Run]:
    """Ascending positions as runs; a repeated position stands in as many runs."""
    runs: list[Run] = []
    for at in positions.tolist():
        if runs and runs[-1][1] == at:
            runs[-1] = (runs[-1][0], at + 1, 1)
        else:
            runs.append((at, at + 1, 1))
    return runs


def positions_of(runs: Sequence[Run]) -> Tensor:
    """The positions of runs as ascending int64, repeats kept."""
    pieces = [torch.arange(*run) for run in runs if run[0] < run[1]]
    return torch.cat(pieces).sort().values if pieces else torch.empty(0, dtype=torch.int64)
