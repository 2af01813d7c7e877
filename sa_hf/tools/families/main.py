"""The command: which entries to go through, and what becomes of them."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer

from sa_hf.tools.bench.report import ROOT
from sa_hf.tools.families import pool
from sa_hf.tools.families.registry import Entry, entries
from sa_hf.tools.families.report import Table, markdown

RESULTS = ROOT / "model_cards" / "results" / "families.json"
CARD = ROOT / "model_cards" / "families.md"
SAVE_EVERY = 20


def main(
    only: Annotated[
        list[str] | None, typer.Option(help="a class or model_type, again and again; shown, written with --write")
    ] = None,
    jobs: Annotated[int, typer.Option(min=1, help="processes side by side")] = 2,
    quick: Annotated[bool, typer.Option(help="outputs and gradients under one pattern alone")] = False,
    again: Annotated[
        list[str] | None,
        typer.Option(help="try only those with this status (refused, wrong, untried, ...) in the results so far"),
    ] = None,
    bases: Annotated[bool, typer.Option(help="bodies alone, no heads")] = False,
    write: Annotated[bool, typer.Option(help="keep what --only finds in the results, too")] = False,
    results: Annotated[Path, typer.Option(help="the JSON file to go on with")] = RESULTS,
    card: Annotated[Path, typer.Option(help="where the table goes")] = CARD,
) -> None:
    """Go through every architecture of the installed Transformers (under an hour on 2 cores) and write the table.

    A run that was stopped goes on where it was. ``python scripts/cards.py`` then writes the README's counts.
    """
    table = Table(results)
    todo = [entry for entry in entries() if _asked(entry, table, only, again, bases)]
    keeps = (only is None or write) and not quick
    print(f"{len(todo)} of {len(entries())} classes to go through, {jobs} at a time", flush=True)
    started = time.monotonic()
    for count, (entry, found) in enumerate(pool.run(todo, jobs=jobs, quick=quick), 1):
        shown = "; ".join([found.get("reason", ""), *found.get("notes", [])]).strip("; ")
        worst = max(found.get("figures", {}).values(), default=0.0)
        print(f"{count:5d} {entry.name}: {found['status']} ({worst:.1e}, {found['seconds']} s) {shown}", flush=True)
        table.add(entry, found)
        if keeps and count % SAVE_EVERY == 0:
            table.save()
    if keeps:
        table.save()
        card.write_text(markdown(results), "utf-8")
    else:
        table.results = {entry.name: table.results[entry.name] for entry in todo}
    counted = ", ".join(f"{number} {status}" for status, number in table.counts().most_common())
    print(f"{counted}; {time.monotonic() - started:.0f} s")


def _asked(entry: Entry, table: Table, only: list[str] | None, again: list[str] | None, bases: bool) -> bool:
    if bases and not entry.is_base:
        return False
    if only is not None:
        return entry.name in only or entry.model_type in only
    if again is not None:
        return (table.status(entry) or "untried") in again
    return not table.is_current(entry)
