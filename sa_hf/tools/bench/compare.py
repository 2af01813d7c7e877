"""What a row is compared with, where its parity held: speed-ups over dense attention, and how much faster we are than
other sparse attention."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sa_hf.tools.bench.baselines import FIGURES, over_dense
from sa_hf.tools.bench.parity import parity_held
from sa_hf.tools.bench.suite import Suite


def speed_ups(suite: Suite, row: dict[str, Any], tail: str, *labels: str) -> dict[str, Any]:
    """Speed-ups of a row over the fastest dense attention, where the parity of all the kernels named holds in the dtype
    of the timing."""
    rows, causal = suite.report.rows("parity"), tail.startswith("/causal/")
    if not all(parity_held(rows, label, causal, suite.dtype) for label in labels):
        return {"speed-up": "not shown: parity failed or not run"}
    return over_dense(suite.report.rows("dense"), row, tail)


def renew_speed_ups(suite: Suite) -> None:
    """Compare again: a run that was resumed may have got the dense or the parity rows after ours. Last, from what
    length on we are the faster."""
    for key, row in suite.report.rows("ours").items():
        if "ms" in row:
            for name in [n for n in row if n.startswith(("speed-up", "over"))]:
                del row[name]
            label, tail = key.split("/", 1)
            row.update(speed_ups(suite, row, f"/{tail}", label))
    suite.report.data["sections"]["break-even"] = break_even(suite.report.rows("ours"))


def break_even(rows: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """By pattern, causal or not, head dimension and pass: the smallest length measured at which ours is at least as
    fast as dense attention, by calls and in graphs. Rows without a speed-up (parity has to hold for one) count as not
    measured."""
    faster: dict[str, dict[str, dict[int, bool]]] = {}
    for key, row in rows.items():
        *kind, length, backward = key.split("/")
        for _, ending in FIGURES:
            ratio = row.get(f"speed-up{ending}")
            if isinstance(ratio, float):
                lengths = faster.setdefault("/".join([*kind, backward]), {}).setdefault(f"from n{ending}", {})
                lengths[int(length[1:])] = ratio >= 1
    found: dict[str, dict[str, Any]] = {}
    for name, figures in faster.items():
        found[name] = {f: min((n for n, fast in x.items() if fast), default="none") for f, x in figures.items()}
        measured = sorted({n for x in figures.values() for n in x})
        found[name]["measured at"] = ", ".join(str(n) for n in measured)
    return found


def faster_than(suite: Suite, row: dict[str, Any], case: str, tail: str) -> dict[str, Any]:
    """How much faster we are than the row of another sparse attention, where parity holds."""
    label, direction = case.split("/")
    if not parity_held(suite.report.rows("parity"), label, direction == "causal", suite.dtype):
        return {}
    mine = suite.report.rows("ours").get(case + tail, {})
    return {f"ours is faster by{e}": row[f] / mine[f] for f, e in FIGURES if f in row and f in mine}
