"""The command of scripts/recovery.py."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import torch
import typer

from sa_hf.tools.bench.report import ROOT
from sa_hf.tools.recovery import decoder, encoder, grid
from sa_hf.tools.recovery.report import write
from sa_hf.tools.recovery.rows import Rows
from sa_hf.tools.recovery.run import Run

CARDS = ROOT / "model_cards"
CACHE = ROOT / "runs" / "recovery"
COMMITTED = CARDS / "recovery_base"  # the decoder that the committed rows are of


def main(
    part: Annotated[str, typer.Option(help=f"one of {', '.join(grid.PARTS)}")] = "decoder",
    patterns: Annotated[
        list[str] | None, typer.Option(help="a row of the grid, again and again; default all of the part")
    ] = None,
    methods: Annotated[list[str] | None, typer.Option(help="plain, distill, lora, 'lora distill'; default all")] = None,
    seeds: Annotated[list[int] | None, typer.Option(help="default 0, 1 and 2")] = None,
    steps: Annotated[list[int] | None, typer.Option(help="default 0, 30, 100 and 300")] = None,
    split: Annotated[
        str, typer.Option(help="'report', or 'tuning' to choose settings on; its rows are in no table")
    ] = "report",
    out: Annotated[
        Path,
        typer.Option(
            help="folder of the decoder's base and of what runs keep; the base that is committed serves where none is "
            "given"
        ),
    ] = CACHE,
    cards: Annotated[
        Path | None,
        typer.Option(
            help="folder of recovery.md; its results/ has the rows", show_default="model_cards; --out with --quick"
        ),
    ] = None,
    device: Annotated[str, typer.Option(help="where models run after the base, e.g. cuda")] = "cpu",
    threads: Annotated[int, typer.Option(help="torch threads; 0 leaves torch's choice")] = 0,
    base: Annotated[bool, typer.Option("--base", help="train a base of the decoder in --out, and stop")] = False,
    report: Annotated[bool, typer.Option("--report", help="run nothing; write the card anew from the rows")] = False,
    quick: Annotated[bool, typer.Option(help="toy sizes: shows that it runs, not what a pattern reaches")] = False,
) -> None:
    """Measure what each pattern keeps of dense attention's quality, and after how many steps; resumable, many hours in
    all. Rows go to model_cards/results/recovery.jsonl as they come."""
    if threads:
        torch.set_num_threads(threads)
    name = grid.chosen([part], grid.PARTS, "--part")[0]
    of_part: grid.Part = "encoder" if name == "encoder" else "decoder"
    folder = cards or (out if quick else CARDS)
    rows = Rows(folder / "results" / "recovery.jsonl")
    if not report:
        task: encoder.Encoder | decoder.Decoder
        if of_part == "encoder":
            task = encoder.Encoder(encoder.QUICK if quick else encoder.Sizes())
        else:
            committed = out == CACHE and not (quick or base) and (COMMITTED / "base.json").exists()
            home = COMMITTED if committed else out
            task = decoder.Decoder(home, decoder.QUICK if quick else decoder.Sizes())
            task.train_base()
            if base:
                return
        wanted = grid.chains(
            of_part,
            grid.chosen(patterns, grid.PATTERNS[of_part], "--patterns"),
            grid.chosen(methods, grid.METHODS[of_part], "--methods"),
            seeds or grid.SEEDS,
            steps or grid.STEPS,
            split,
        )
        Run(of_part, task, rows, out, split, device).run(wanted)
    write(rows, folder)
