"""Tables and names of the command line: as wide as the terminal at most, 80 columns where the output is piped."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from sa_hf.config import available_patterns
from sa_hf.patterns.palette import colour_of
from sa_hf.tools.suggest import Suggestion

console = Console(highlight=False)

Cell = str | Text
NAMES = {"name", "pattern", "field", "figure"}  # columns of names
NAME_WIDTH, FULL_WIDTH = 20, 80


def table(title: str, columns: Sequence[str], rows: Iterable[Sequence[Cell]]) -> None:
    """Print a table; cells fold, so that no line is wider than the terminal and nothing is lost."""
    drawn = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False)
    rows = list(rows)
    for column, cells in zip(columns, zip(*rows, strict=True) if rows else [()] * len(columns), strict=True):
        # Names of one word stay whole where there is room for the others beside them.
        longest = max((len(cell) for cell in cells), default=0)
        whole = column in NAMES and longest <= NAME_WIDTH and console.width >= FULL_WIDTH
        drawn.add_column(column, overflow="fold", no_wrap=whole)
    for row in rows:
        # As text: a "[...]" in a value is no markup.
        drawn.add_row(*(Text(cell) if isinstance(cell, str) else cell for cell in row))
    console.print(drawn)


def say(text: str) -> None:
    """Print a line, folded at words, as it is."""
    console.print(text, markup=False)


def pattern_name(name: str) -> Text:
    """A pattern's name in its colour (plain where the output is piped); of a mixture, each name in its own."""
    return Text(" + ").join(Text(part, style=colour_of(part)) for part in name.split(" + "))


def shown_fields(fields: Mapping[str, Any]) -> str:
    """``field=value, ...`` of a config's dict, as ``--set`` takes them, without its name and version."""
    return ", ".join(f"{k}={_value(v)}" for k, v in fields.items() if k not in {"name", "version"})


def _value(value: Any) -> str:
    return ",".join(str(v) for v in value) if isinstance(value, list | tuple) else str(value)


# -- rows -------------------------------------------------------------------------------------------------------


def grouped_summary(layers: list[Any]) -> tuple[list[list[Cell]], list[str]]:
    """Rows of a summary, equal layers in one; and why each engine serves, once each."""
    from sa_hf.hf.state.assignment import format_indices

    groups: dict[tuple[str, ...], list[int]] = {}
    for layer in layers:
        density = "by data" if layer.density is None else f"{layer.density:.2%}"
        key = (layer.stack, layer.pattern, density, layer.engine, f"{layer.memory / 2**20:.1f} MB")
        groups.setdefault(key, []).append(layer.index)
    rows: list[list[Cell]] = [
        [stack, format_indices(indices), pattern_name(name), *rest] for (stack, name, *rest), indices in groups.items()
    ]
    return rows, list(dict.fromkeys(f"{layer.engine}: {layer.reason}" for layer in layers))


def suggestion_rows(found: list[Suggestion], length: int) -> tuple[list[str], list[list[Cell]]]:
    """Columns and rows of the table of suggestions; each share says at which length it was taken."""
    defaults = {name: cls().to_dict() for name, cls in available_patterns().items()}
    rows: list[list[Cell]] = []
    at = None
    for s in found:
        changed = {k: v for k, v in s.config.to_dict().items() if v != defaults[s.config.name].get(k)}
        row: list[Cell] = [pattern_name(s.config.name), shown_fields(changed), f"{s.density:.3f}"]
        if s.measured is None:
            rows.append([*row, s.purpose])
            continue
        at, gain = s.measured.length, s.measured.gain
        figures = [f"{s.measured.density:.3f}", f"{s.measured.mass:.3f}", "-" if gain is None else f"{gain:.3f}"]
        rows.append([*row, *figures])
    columns = ["pattern", "set", f"pairs of dense at {length}"]
    return columns + (["made for"] if at is None else [f"at {at}: pairs", "mass", "gain"]), rows


def shown_figure(value: Any) -> str:
    """A figure in a table; one that needs a forward says so."""
    if value is None:
        return "needs a forward"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
