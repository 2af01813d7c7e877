"""The CPU benchmark's result as Markdown tables and as a picture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sa_hf.patterns.palette import OTHER, colour_of
from sa_hf.tools.bench.cpu import HEAD_DIM, HEADS
from sa_hf.tools.bench.decode_report import decode_tables
from sa_hf.tools.bench.names import FLEX, LEGEND, NAMES, row_title
from sa_hf.tools.bench.product import PRODUCT_SIZE, of_product
from sa_hf.tools.bench.training import training_tables

DPI = 200  # 2,400 points across: twice what a page shows
MARKERS = "os^v"


def markdown(result: dict[str, Any]) -> str:
    """All tables of ``scripts/benchmark.py``'s result."""
    machine = ", ".join(f"{key} {value}" for key, value in result["machine"].items())
    lines = [
        "# CPU benchmark",
        "",
        f"`{result['command']}`; {result['shape']}; {machine}.",
        "",
        _parity(result),
        "",
        "Configurations at 16,384 tokens: "
        + "; ".join(f"*{row_title(label)}*: {fields}" for label, fields in result.get("configs", {}).items())
        + ".",
        "",
        LEGEND,
    ]
    plain = [row for row in result["speed"] if not row["dropout"]]
    trained = [row for row in result["speed"] if row["dropout"]]
    lines += _speed("Speed", plain) + _speed("With dropout 0.1", trained)
    lines += _memory(result["memory"]) + _growth(result["growth"]) + decode_tables(result.get("decode", []))
    lines += training_tables(result.get("training", []))
    return "\n".join(lines) + "\n"


def _parity(result: dict[str, Any]) -> str:
    """Each pattern's figure, or that it was not measured; where it was measured apart from the tables, when and how."""
    by = result.get("parity_by")
    apart = (
        f"; by `{by['command']}`, {by['device']}, torch {by['torch']}, {by['date']}, commit {by['commit']}"
        if by
        else ""
    )
    figures = (
        f"{row_title(label)} {'not measured' if error is None else f'{error:.0e}'}"
        for label, error in result.get("parity", {}).items()
    )
    return f"Parity with a dense fp64 oracle (outputs and gradients, RMS ratio{apart}): {'; '.join(figures)}."


def _speed(title: str, rows: list[dict[str, Any]]) -> list[str]:
    if not rows:
        return []
    lines = [
        "", f"## {title}", "",
        "Medians in seconds, called in turn in one process (where it says n processes, the median of their medians); "
        "in brackets the speed-up over dense SDPA of the same row. First call: plan and layout included. Efficiency: "
        "time per kept pair of dense over ours. Of the product: operations on kept pairs a second (4 head_dim a pair "
        f"forward, 14 with the backward) over those of the machine's own product of {PRODUCT_SIZE} x {PRODUCT_SIZE} "
        "matrices in the dtype of the inputs, timed in the same rounds.", "",
        "| length | pass | contender | seconds | first call | pairs kept | efficiency | of the product |",
        "|---|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    for row in rows:
        label = f"{'causal' if row['causal'] else 'full'}, {'forward+backward' if row['backward'] else 'forward'}"
        label += f", {row['processes']} processes" if row.get("processes", 1) > 1 else ""
        dense = row["rows"]["dense"]["median_s"]
        for name, found in row["rows"].items():
            ratio = dense / found["median_s"]
            kept = found["pairs"] / found["dense_pairs"] if "pairs" in found else None
            share = of_product(row, name, HEADS * HEAD_DIM)
            lines.append(
                f"| {row['length']:,} | {label} | {row_title(name)} | {found['median_s']:.4f} ({ratio:.1f}x) "
                f"| {found['first_s']:.3f} | {'' if kept is None else f'{kept:.2%}'} "
                f"| {'' if kept is None else f'{ratio * kept:.0%}'} | {'' if share is None else f'{share:.0%}'} |"
            )
        for name, reason in row["failed"].items():
            lines.append(f"| {row['length']:,} | {label} | {row_title(name)} | failed: {reason} | | | | |")
    return lines


def _memory(rows: list[dict[str, Any]]) -> list[str]:
    if not rows:
        return []
    lines = [
        "", "## Peak memory", "", "MB of resident memory beyond the inputs, each in a process of its own.", "",
        "| length | contender | forward | forward+backward |", "|---|---|---|---|",
    ]  # fmt: skip
    for row in rows:
        name = f"dense {'causal' if row['causal'] else 'full'}" if row["label"] == "dense" else row_title(row["label"])
        lines.append(f"| {row['length']:,} | {name} | {row['forward_mb']:.0f} | {row['both_mb']:.0f} |")
    return lines


def _growth(rows: list[dict[str, Any]]) -> list[str]:
    if not rows:
        return []
    lengths = [point["length"] for point in rows[0]["points"]]
    lines = [
        "", "## Growth with the length", "",
        f"Forward and backward, n = {', '.join(f'{n:,}' for n in lengths)}; exponents fitted to the logarithms. "
        "Pairs: counted from the plan over the formula of the pattern's section, at the longest.", "",
        "| pattern | seconds | MB | exponent of time | of memory | of pairs | pairs / formula |",
        "|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    for row in rows:
        last, fits = row["points"][-1], row["exponents"]
        ratio = f"{last['pairs'] / last['formula']:.3f}" if "pairs" in last else "by data"
        pairs = f"{fits['pairs']:.2f}" if "pairs" in fits else f"{fits['formula']:.2f} (formula)"
        seconds = ", ".join(f"{point['seconds']:.3f}" for point in row["points"])
        memory = ", ".join(f"{point['mb']:.0f}" for point in row["points"])
        lines.append(
            f"| {row_title(row['label'])} | {seconds} | {memory} | {fits['seconds']:.2f} | {fits['mb']:.2f} | {pairs} "
            f"| {ratio} |"
        )
    return lines


def plot(result: dict[str, Any], path: Path) -> None:
    """Speed-up over dense by length, and seconds by length, both for forward+backward (needs matplotlib).

    One colour per pattern; causal rows have solid lines, bidirectional ones dashed; markers tell the options apart.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 5.6), dpi=DPI, layout="constrained", facecolor="white")
    left, right = figure.subplots(1, 2)
    for name, points in _speed_ups(result["speed"]).items():
        left.plot(*zip(*points, strict=True), **_style(name))
    left.axhline(1.0, color=colour_of("dense"), linewidth=1)
    left.set_title("speed-up over dense SDPA, forward+backward")
    for row in result["growth"]:
        points = [(point["length"], point["seconds"]) for point in row["points"]]
        right.plot(*zip(*points, strict=True), **_style(row["label"]))
    right.set_title("seconds, forward+backward")
    for axis in (left, right):
        axis.set_xscale("log", base=2)
        axis.set_yscale("log")
        axis.set_xlabel("tokens")
        axis.grid(alpha=0.3)
    exponents = {row["label"]: f" [{row['exponents']['seconds']:.2f}]" for row in result["growth"]}
    handles = {line.get_gid(): line for axis in (right, left) for line in axis.get_lines() if line.get_gid()}
    if handles:
        labels = [row_title(name) + exponents.get(name, "") for name in handles]
        figure.legend(
            handles.values(), labels, loc="outside lower center", ncols=2, fontsize=8, frameon=False, handlelength=4,
            title="[fitted exponent of the time in the length]", title_fontsize=8,
        )  # fmt: skip
    figure.savefig(path)


def _speed_ups(rows: list[dict[str, Any]]) -> dict[str, list[tuple[int, float]]]:
    """(length, speed-up) of every contender, forward and backward."""
    series: dict[str, list[tuple[int, float]]] = {}
    for row in rows:
        if row["backward"] and not row["dropout"]:
            dense = row["rows"]["dense"]["median_s"]
            for name, found in row["rows"].items():
                if name != "dense":
                    series.setdefault(name, []).append((row["length"], dense / found["median_s"]))
    return series


def _style(label: str) -> dict[str, Any]:
    """How the line of a contender is drawn."""
    named = NAMES.get(label.removeprefix(FLEX))
    if named is None:
        return {"color": OTHER, "gid": label}
    alike = [n for n in NAMES if (NAMES[n].pattern, NAMES[n].causal) == (named.pattern, named.causal)]
    return {
        "color": colour_of(named.pattern),
        "linestyle": "-" if named.causal else (0, (4, 2)),
        "marker": "x" if label.startswith(FLEX) else MARKERS[alike.index(label)],
        "markersize": 5,
        "gid": label,
    }
