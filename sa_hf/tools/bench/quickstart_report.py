"""The picture of what scripts/quickstart.py has measured."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from sa_hf.patterns.palette import INTERVAL, colour_of, shades

DPI = 200  # 2,400 points across: twice what a page shows


def draw_results(rows: Mapping[str, Mapping[str, float]], path: Path) -> None:
    """Three bar charts side by side: quality, time, memory (needs matplotlib).

    Args:
        rows: by variant, dense ones first, ``eval_accuracy``, ``step_seconds``, ``train_peak_memory_mb``; with
            ``eval_accuracy_low`` and ``eval_accuracy_high`` the interval is drawn.
    """
    from matplotlib.figure import Figure

    panels = (
        ("accuracy (higher is better)", "{:.1%}", "eval_accuracy"),
        ("seconds per step", "{:.2f}", "step_seconds"),
        ("peak memory, MB", "{:,.0f}", "train_peak_memory_mb"),
    )
    dense = shades(colour_of("dense"), len(rows) - 1)[::-1] if len(rows) > 1 else []
    figure = Figure(figsize=(12, 3.2), dpi=DPI, layout="constrained", facecolor="white")
    for axis, (title, form, key) in zip(figure.subplots(1, len(panels), sharey=True), panels, strict=True):
        spread = None
        if all(f"{key}_low" in row for row in rows.values()):
            spread = [[abs(row[f"{key}_{end}"] - row[key]) for row in rows.values()] for end in ("low", "high")]
        bars = axis.barh(
            list(rows), [row[key] for row in rows.values()], color=[*dense, colour_of("bigbird")], xerr=spread,
            error_kw={"ecolor": INTERVAL, "capsize": 4, "elinewidth": 2},
        )  # fmt: skip
        axis.bar_label(bars, fmt=form, padding=3)
        axis.set_title(title)
        axis.margins(x=0.2)
        axis.spines[["top", "right"]].set_visible(False)
        if not axis.yaxis_inverted():
            axis.invert_yaxis()
    figure.savefig(path)
