"""What a row is compared with, where its parity held: speed-ups over dense attention, and how much faster we are than
other sparse attention."""

from __future__ import annotations

from typing import Any

from sa_hf.tools.bench.baselines import FIGURES, over_dense
from sa_hf.tools.bench.parity import (
    parity_held,
)
from sa_hf.tools.bench.suite import Suite


def speed_ups(suite: Suite, row: dict[str, Any], tail: str, *labels: str) -> dict[str, Any]:
    """Speed-ups of a row over the fastest dense attention, where the parity of all the kernels named holds in the dtype
    of the timing."""
    rows, causal = suite.report.rows("parity"), tail.startswith("/causal/")
    if not all(parity_held(rows, label, causal, suite.dtype) for label in labels):
        return {"speed-up": "not shown: parity failed or not run"}
    return over_dense(suite.report.rows("dense"), row, tail)


def renew_speed_ups(suite: Suite) -> None:
    """Compare again: a run that was resumed may have got the dense or the parity rows after ours."""
    for key, row in suite.report.rows("ours").items():
        if "ms" in row:
            for name in [n for n in row if n.startswith(("speed-up", "over"))]:
                del row[name]
            label, tail = key.split("/", 1)
            row.update(speed_ups(suite, row, f"/{tail}", label))


def faster_than(suite: Suite, row: dict[str, Any], case: str, tail: str) -> dict[str, Any]:
    """How much faster we are than the row of another sparse attention, where parity holds."""
    label, direction = case.split("/")
    if not parity_held(suite.report.rows("parity"), label, direction == "causal", suite.dtype):
        return {}
    mine = suite.report.rows("ours").get(case + tail, {})
    return {f"ours is faster by{e}": row[f] / mine[f] for f, e in FIGURES if f in row and f in mine}
