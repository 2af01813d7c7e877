"""Tables and names of the command line: as wide as the terminal at most, 80 columns where the output is piped."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from sa_hf.patterns.palette import colour_of

console = Console(highlight=False)

Cell = str | Text


def table(title: str, columns: Sequence[str], rows: Iterable[Sequence[Cell]]) -> None:
    """Print a table; cells fold, so that no line is wider than the terminal and nothing is lost."""
    drawn = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False)
    for column in columns:
        drawn.add_column(column, overflow="fold")
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
