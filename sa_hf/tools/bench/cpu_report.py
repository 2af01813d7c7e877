"""The CPU benchmark's result as Markdown tables and as a picture."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def markdown(result: dict[str, Any]) -> str:
    """All tables of ``scripts/benchmark.py``'s result."""
    machine = ", ".join(f"{key} {value}" for key, value in result["machine"].items())
    lines = [
        "# CPU benchmark",
        "",
        f"`{result['command']}`; {result['shape']}; {machine}.",
        "",
        "Parity with the fp64 oracle (outputs and gradients, RMS ratio): "
        + ", ".join(f"{label} {error:.0e}" for label, error in result.get("parity", {}).items())
        + ".",
        "",
        "Configurations at 16,384 tokens: "
        + "; ".join(f"*{label}* {fields}" for label, fields in result.get("configs", {}).items())
        + ".",
    ]
    plain = [row for row in result["speed"] if not row["dropout"]]
    trained = [row for row in result["speed"] if row["dropout"]]
    lines += _speed("Speed", plain) + _speed("Training mode: dropout 0.1", trained)
    lines += _memory(result["memory"]) + _growth(result["growth"])
    return "\n".join(lines) + "\n"


def _speed(title: str, rows: list[dict[str, Any]]) -> list[str]:
    if not rows:
        return []
    lines = [
        "", f"## {title}", "",
        "Medians in seconds, called in turn in one process (where it says n processes, the median of their medians); "
        "in brackets the speed-up over dense SDPA of the same row. First call: plan and layout included. Efficiency: "
        "time per kept pair of dense over ours.", "",
        "| length | pass | contender | seconds | first call | pairs kept | efficiency |",
        "|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    for row in rows:
        label = f"{'causal' if row['causal'] else 'full'}, {'forward+backward' if row['backward'] else 'forward'}"
        label += f", {row['processes']} processes" if row.get("processes", 1) > 1 else ""
        dense = row["rows"]["dense"]["median_s"]
        for name, found in row["rows"].items():
            ratio = dense / found["median_s"]
            kept = found["pairs"] / found["dense_pairs"] if "pairs" in found else None
            lines.append(
                f"| {row['length']:,} | {label} | {name} | {found['median_s']:.4f} ({ratio:.1f}x) "
                f"| {found['first_s']:.3f} | {'' if kept is None else f'{kept:.2%}'} "
                f"| {'' if kept is None else f'{ratio * kept:.0%}'} |"
            )
        for name, reason in row["failed"].items():
            lines.append(f"| {row['length']:,} | {label} | {name} | failed: {reason} | | | |")
    return lines


def _memory(rows: list[dict[str, Any]]) -> list[str]:
    if not rows:
        return []
    lines = [
        "", "## Peak memory", "", "MB of resident memory beyond the inputs, each in a process of its own.", "",
        "| length | contender | forward | forward+backward |", "|---|---|---|---|",
    ]  # fmt: skip
    for row in rows:
        name = f"dense {'causal' if row['causal'] else 'full'}" if row["label"] == "dense" else row["label"]
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
            f"| {row['label']} | {seconds} | {memory} | {fits['seconds']:.2f} | {fits['mb']:.2f} | {pairs} | {ratio} |"
        )
    return lines


def plot(result: dict[str, Any], path: Path) -> None:
    """Speed-up over dense by length, and seconds by length, both for forward+backward (needs matplotlib)."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 4.5))
    series: dict[str, list[tuple[int, float]]] = {}
    for row in result["speed"]:
        if row["backward"] and not row["dropout"]:
            dense = row["rows"]["dense"]["median_s"]
            for name, found in row["rows"].items():
                if name != "dense":
                    series.setdefault(name, []).append((row["length"], dense / found["median_s"]))
    for axis in (left, right):
        axis.set_prop_cycle(color=matplotlib.color_sequences["tab20"])  # as many colours as patterns
    for name, points in series.items():
        left.plot(*zip(*points, strict=True), marker="o", label=name)
    left.axhline(1.0, color="grey", linewidth=1)
    left.set_title("speed-up over dense SDPA, forward+backward")
    for row in result["growth"]:
        points = [(point["length"], point["seconds"]) for point in row["points"]]
        right.plot(*zip(*points, strict=True), marker="o", label=f"{row['label']} ({row['exponents']['seconds']:.2f})")
    right.set_title("seconds, forward+backward (fitted exponent)")
    for axis in (left, right):
        axis.set_xscale("log", base=2)
        axis.set_yscale("log")
        axis.set_xlabel("tokens")
        axis.grid(alpha=0.3)
        if axis.get_legend_handles_labels()[0]:
            axis.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)
