"""What ``sa-hf evaluate --lengths`` found, as tables and pictures."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sa_hf.patterns.palette import COLOURS, OTHER

DPI = 150
INTERVALS = (
    "Intervals: 95 %; of perplexity by bootstrap over texts, of retrieval by Wilson where a row has one answer, else "
    "by bootstrap over rows."
)


def curves_page(header: Mapping[str, Any], settings: Mapping[str, Any], cells: Mapping[str, Mapping[str, Any]]) -> str:
    """Markdown: a table of perplexity and one for each kind of retrieval, a row for each attention."""
    labels = list(dict.fromkeys(key.rsplit("/", 3 if "/retrieval/" in key else 2)[0] for key in cells))
    lengths = settings["lengths"]
    head = ["| attention | " + " | ".join(f"{n:,} tokens" for n in lengths) + " |", "|---|" + "---|" * len(lengths)]
    lines = ["# Perplexity against context length", "", *head]
    lines += [_line(label, [cells.get(f"{label}/perplexity/{n}") for n in lengths], _perplexity) for label in labels]
    for kind in settings["retrieval"]:
        lines += ["", f"# Retrieval, {kind}: answers found", "", *head]
        lines += [
            _line(label, [cells.get(f"{label}/retrieval/{kind}/{n}") for n in lengths], _found) for label in labels
        ]
        for n in lengths:
            depths = settings["depths"]
            columns = " | ".join(f"{100 * i // depths}-{100 * (i + 1) // depths} %" for i in range(depths))
            lines += ["", f"By depth at {n:,} tokens:", "", f"| attention | {columns} |", "|---|" + "---|" * depths]
            found = {label: cells.get(f"{label}/retrieval/{kind}/{n}") for label in labels}
            lines += [_line(label, c["by depth"], _found) for label, c in found.items() if c is not None]
    machine = ", ".join(f"{key} {value}" for key, value in header.items())
    return "\n".join([*lines, "", INTERVALS, "", f"{settings['model']}, {settings['dataset']}; {machine}", ""])


def _line(label: str, cells: list[Any], show: Any) -> str:
    return f"| {label} | " + " | ".join("" if cell is None else show(cell) for cell in cells) + " |"


def _perplexity(cell: Mapping[str, float]) -> str:
    return f"{cell['perplexity']:.3f} ({cell['perplexity_low']:.3f} to {cell['perplexity_high']:.3f})"


def _found(cell: Mapping[str, float]) -> str:
    if not cell["answers"]:
        return "none asked"
    return f"{cell['accuracy']:.1%} ({cell['low']:.1%} to {cell['high']:.1%}, n = {cell['answers']})"


def draw_curves(cells: Mapping[str, Mapping[str, Any]], path: Path) -> None:
    """Perplexity against context length with its intervals, a line for each attention (needs matplotlib)."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), dpi=DPI, layout="constrained", facecolor="white")
    axis = figure.subplots()
    by_label: dict[str, list[tuple[int, Mapping[str, Any]]]] = {}
    for key, cell in cells.items():
        if "/perplexity/" in key:
            label, _, length = key.rsplit("/", 2)
            by_label.setdefault(label, []).append((int(length), cell))
    for label, found in by_label.items():
        lengths = [n for n, _ in sorted(found, key=lambda f: f[0])]
        rows = [cell for _, cell in sorted(found, key=lambda f: f[0])]
        middle = [row["perplexity"] for row in rows]
        spread = [[abs(row["perplexity"] - row[f"perplexity_{end}"]) for row in rows] for end in ("low", "high")]
        axis.errorbar(lengths, middle, yerr=spread, label=label, marker="o", capsize=3, color=COLOURS.get(label))
    axis.set_xscale("log", base=2)
    axis.set_xlabel("tokens of context at most")
    axis.set_ylabel("perplexity")
    axis.legend()
    axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path)


def draw_heat_maps(grids: Mapping[str, Mapping[int, list[float]]], path: Path, title: str = "answers found") -> None:
    """Retrieval by length and depth, a panel for each attention (needs matplotlib).

    Args:
        grids: label -> length -> share found by depth, the text's beginning first; NaN where none was asked.
    """
    from matplotlib.figure import Figure

    columns = min(4, len(grids))
    rows = math.ceil(len(grids) / columns)
    figure = Figure(figsize=(3.2 * columns + 1, 2.8 * rows), dpi=DPI, layout="constrained", facecolor="white")
    axes = figure.subplots(rows, columns, squeeze=False)
    for axis in axes.flat:
        axis.set_visible(False)
    for axis, (label, grid) in zip(axes.flat, grids.items(), strict=False):
        axis.set_visible(True)
        lengths = sorted(grid)
        depths = len(grid[lengths[0]])
        table = [[grid[n][depth] for n in lengths] for depth in range(depths)]
        image = axis.imshow(table, vmin=0, vmax=1, cmap="RdYlGn", aspect="auto")
        for y, line in enumerate(table):
            for x, share in enumerate(line):
                if not math.isnan(share):
                    axis.text(x, y, f"{share:.0%}", ha="center", va="center", fontsize=7)
        axis.set_xticks(range(len(lengths)), [f"{n:,}" for n in lengths])
        axis.set_yticks(range(depths), [f"{(100 * d + 50) // depths} %" for d in range(depths)])
        axis.set_title(label, color=COLOURS.get(label, OTHER), fontsize=9)
        axis.set_xlabel("tokens")
        axis.set_ylabel("depth")
    figure.colorbar(image, ax=axes, label=title)
    figure.savefig(path)


def write_report(
    folder: Path, header: Mapping[str, Any], settings: Mapping[str, Any], cells: Mapping[str, Any]
) -> None:
    """The page and the pictures beside the results."""
    (folder / "curves.md").write_text(curves_page(header, settings, cells), encoding="utf-8")
    draw_curves(cells, folder / "perplexity.png")
    for kind in settings["retrieval"]:
        grids: dict[str, dict[int, list[float]]] = {}
        for key, cell in cells.items():
            if f"/retrieval/{kind}/" in key:
                label, _, _, length = key.rsplit("/", 3)
                grids.setdefault(label, {})[int(length)] = [part["accuracy"] for part in cell["by depth"]]
        if grids:
            draw_heat_maps(grids, folder / f"retrieval_{kind}.png", f"{kind}: answers found")
