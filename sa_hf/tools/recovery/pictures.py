"""Pictures of the grid: what is kept against steps, and retrieval by length and depth."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from sa_hf.patterns.palette import colour_of
from sa_hf.tools.recovery.grid import DENSE, ENOUGH, UNTRAINED, system_of
from sa_hf.tools.recovery.needles import DEPTHS
from sa_hf.tools.recovery.pooled import JUDGED, Entry

DPI = 150
DASHES = ("-", "--", ":", "-.")
COLUMNS = 4  # heat maps in a row


def draw_curves(entries: Sequence[Entry], path: Path) -> None:
    """A panel for each judged figure and method: its kept share against steps, a line per pattern."""
    from matplotlib.figure import Figure

    untrained = {entry.pattern: entry for entry in entries if entry.method == UNTRAINED}
    methods = list(dict.fromkeys(e.method for e in entries if e.method != UNTRAINED))
    names = JUDGED[entries[0].part]
    patterns = [pattern for pattern in dict.fromkeys(e.pattern for e in entries) if pattern != DENSE]
    size = (5 * len(methods) + 3, 3.2 * len(names))
    figure = Figure(figsize=size, dpi=DPI, layout="constrained", facecolor="white")
    axes = figure.subplots(len(names), len(methods), sharex=True, sharey="row", squeeze=False)
    for row, name in enumerate(names):
        for column, method in enumerate(methods):
            axis = axes[row][column]
            axis.axhline(ENOUGH, color=colour_of(DENSE), linewidth=0.8)
            used: dict[str, int] = {}
            for pattern in patterns:
                line = [e for e in entries if e.pattern == pattern and e.method == method and e.step]
                line = ([untrained[pattern]] if pattern in untrained else []) + sorted(line, key=lambda e: e.step)
                system = system_of(pattern)
                dash = used[system] = used.get(system, -1) + 1
                steps, values = [e.step for e in line], [e.kept[name].value for e in line]
                axis.plot(steps, values, DASHES[dash], marker="o", markersize=3, color=colour_of(system), label=pattern)
            axis.set_title(f"{name}, {method}")
            axis.set_ylabel("kept of dense" if column == 0 else "")
            axis.spines[["top", "right"]].set_visible(False)
    for axis in axes[-1]:
        axis.set_xlabel("steps")
    figure.legend(*axes[0][0].get_legend_handles_labels(), loc="outside right upper", frameon=False, fontsize=8)
    figure.savefig(path)


def draw_untrained(entries: Sequence[Entry], path: Path) -> None:
    """What is kept before any training: a panel for each judged figure, a bar with its interval for each pattern."""
    from matplotlib.figure import Figure

    names = JUDGED[entries[0].part]
    entries = [entry for entry in entries if entry.method == UNTRAINED and entry.pattern != DENSE]
    size = (3.2 * len(names) + 2.5, 0.28 * len(entries) + 1)
    figure = Figure(figsize=size, dpi=DPI, layout="constrained", facecolor="white")
    patterns = [entry.pattern for entry in entries][::-1]
    for axis, name in zip(figure.subplots(1, len(names), sharey=True, squeeze=False)[0], names, strict=True):
        kept = [entry.kept[name] for entry in entries][::-1]
        spread = [[k.value - k.low for k in kept], [k.high - k.value for k in kept]]
        colours = [colour_of(system_of(pattern)) for pattern in patterns]
        axis.barh(patterns, [k.value for k in kept], xerr=spread, color=colours, error_kw={"linewidth": 0.8})
        axis.axvline(ENOUGH, color=colour_of(DENSE), linewidth=0.8)
        axis.set_title(f"{name}: kept of dense, untrained", fontsize=9)
        axis.tick_params(labelsize=8)
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path)


def draw_heat_maps(entries: Sequence[Entry], path: Path, name: str = "multi-needle") -> None:
    """Accuracy by length and depth of each pattern's last step, the method that answers most; dense first."""
    from matplotlib.figure import Figure

    shown = [_best(entries, pattern, name) for pattern in dict.fromkeys(e.pattern for e in entries)]
    rows = -(-len(shown) // COLUMNS)
    figure = Figure(figsize=(3.4 * COLUMNS, 2.6 * rows), dpi=DPI, layout="constrained", facecolor="white")
    axes = figure.subplots(rows, COLUMNS, squeeze=False).flatten()
    for axis, entry in zip(axes, shown, strict=False):
        cells = table_of(entry.items[name], len(entry.lengths))
        axis.imshow(cells, vmin=0, vmax=1, cmap="RdYlGn", aspect="auto")
        axis.set_title(f"{entry.pattern}\n{entry.method}, step {entry.step}", fontsize=8)
        axis.set_xticks(range(len(entry.lengths)), list(map(str, entry.lengths)), fontsize=7)
        axis.set_yticks(range(len(DEPTHS)), [f"{depth:.0%}" for depth in DEPTHS], fontsize=7)
    for axis in axes[len(shown) :]:
        axis.set_visible(False)
    figure.colorbar(axes[0].images[0], ax=list(axes), label=f"{name}: share answered", shrink=0.6)
    figure.savefig(path)


def table_of(hits: Sequence[float], lengths: int) -> list[list[float]]:
    """Accuracy ``[depth][length]`` of hits in the order of :meth:`Retrieval.cells`."""
    each = len(hits) // (lengths * len(DEPTHS))
    means = [sum(hits[at : at + each]) / each for at in range(0, len(hits), each)]
    return [[means[length * len(DEPTHS) + depth] for length in range(lengths)] for depth in range(len(DEPTHS))]


def _best(entries: Sequence[Entry], pattern: str, name: str) -> Entry:
    of_pattern = [entry for entry in entries if entry.pattern == pattern]
    last = max(entry.step for entry in of_pattern)
    return max((e for e in of_pattern if e.step == last), key=lambda e: e.figures[name].value)
