"""Rows of several seeds as one entry: means over the seeds, and intervals over the items that they share."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from sa_hf.tools.recovery.grid import DENSE, ENOUGH, UNTRAINED
from sa_hf.tools.recovery.intervals import Interval, mean_interval, ratio_interval
from sa_hf.tools.recovery.rows import unpacked

LOWER_IS_BETTER = frozenset({"bits per byte"})
# What has to be kept for a row to have reached the goal; agreement is shown beside it.
JUDGED = {"decoder": ("bits per byte", "passkey", "multi-needle"), "encoder": ("recall@10",)}
YES, BY_MEAN, NO = "yes", "by the mean alone", "no"


@dataclass(frozen=True)
class Entry:
    """A pattern after ``step`` steps of a method.

    ``figures`` by task; ``kept`` their share of the untrained dense model's, ``kept_trained`` of the dense model's
    after the same training (empty where that was not measured, or is this).
    """

    part: str
    pattern: str
    method: str
    step: int
    seeds: tuple[int, ...]
    density: float
    figures: dict[str, Interval]
    kept: dict[str, Interval]
    kept_trained: dict[str, Interval]
    items: dict[str, list[float]]
    lengths: tuple[int, ...]  # of the decoder's prompts

    @property
    def reached(self) -> str:
        """Whether all that is judged is kept to 98 %: with its interval, by the mean alone, or not."""
        shares = [self.kept[name] for name in JUDGED[self.part]]
        if all(share.low >= ENOUGH for share in shares):
            return YES
        return BY_MEAN if all(share.value >= ENOUGH for share in shares) else NO


def pooled(rows: Iterable[dict[str, Any]], part: str, split: str = "report") -> list[Entry]:
    """The entries of a part, in the order in which their rows came; empty without the dense model's own row."""
    groups: dict[tuple[str, str, int], list[dict[str, Any]]] = defaultdict(list)
    for row in rows:
        if row["part"] == part and row["split"] == split:
            groups[row["pattern"], row["method"], row["step"]].append(row)
    dense = groups.get((DENSE, UNTRAINED, 0))
    if dense is None:
        return []
    reference = items_of(dense)
    entries = []
    for (pattern, method, step), found in groups.items():
        trained = groups.get((DENSE, method, step)) if pattern != DENSE and step else None
        items = items_of(found)
        entries.append(
            Entry(
                part,
                pattern,
                method,
                step,
                seeds=tuple(sorted(row["seed"] for row in found)),
                density=sum(row["density"] for row in found) / len(found),
                figures={name: _figure(found, items, name) for name in found[0]["figures"]},
                kept={name: kept_of(name, values, reference[name]) for name, values in items.items()},
                kept_trained=_kept_trained(items, trained),
                items=items,
                lengths=tuple(found[0].get("lengths", ())),
            )
        )
    return entries


def _kept_trained(items: dict[str, list[float]], dense: Sequence[dict[str, Any]] | None) -> dict[str, Interval]:
    if not dense:
        return {}
    reference = items_of(dense)
    return {name: kept_of(name, values, reference[name]) for name, values in items.items()}


def kept_of(name: str, ours: Sequence[float], dense: Sequence[float]) -> Interval:
    """The share of dense attention's quality that is kept, 1 is all: the ratio of the means over the same items,
    upside down for a figure of which less is better."""
    return ratio_interval(dense, ours) if name in LOWER_IS_BETTER else ratio_interval(ours, dense)


def items_of(rows: Sequence[dict[str, Any]]) -> dict[str, list[float]]:
    """By task the mean over the rows of each item."""
    found = {}
    for name in rows[0]["items"]:
        each = [_values(row["items"][name]) for row in rows]
        found[name] = [sum(values) / len(values) for values in zip(*each, strict=True)]
    return found


def _values(kept: Any) -> list[float]:
    return [float(hit) for hit in unpacked(kept)] if isinstance(kept, str) else kept


def _figure(rows: Sequence[dict[str, Any]], items: dict[str, list[float]], name: str) -> Interval:
    if name in items:
        return mean_interval(items[name])
    # Whose items are not kept: the mean, and the widest bounds of the seeds.
    values, lows, highs = zip(*(row["figures"][name] for row in rows), strict=True)
    return Interval(sum(values) / len(values), min(lows), max(highs))
