"""What a claim is, how it is run over seeds, and when it counts as reproduced."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from sa_hf.errors import SparseAttentionError
from sa_hf.tools.bench.report import machine

SEEDS = (0, 1, 2)
REPRODUCED, NOT_REPRODUCED = "reproduced", "not reproduced"

# A variant's figures by name, of one seed.
Figures = dict[str, float]


@dataclass(frozen=True)
class Claim:
    """One claim of a paper, at a size of minutes.

    Args:
        name: as ``scripts/claims.py`` takes it.
        system: the pattern whose card shows it.
        statement: the claim in a sentence, with its place in the paper.
        setting: model, data, length and steps, in words.
        variants: what is compared, by label.
        measure: (variant, seed, steps) -> its figures; deterministic.
        steps: of training, of each variant.
        holds: whether one seed's figures, by variant, show the claim; it must hold for every seed.
        rule: ``holds`` in words.
        tried: what was tried where it does not hold.
    """

    name: str
    system: str
    statement: str
    setting: str
    variants: Mapping[str, Any]
    measure: Callable[[Any, int, int], Figures]
    steps: int
    holds: Callable[[Mapping[str, Figures]], bool]
    rule: str
    tried: str = ""


def run_claim(claim: Claim, path: Path, seeds: Sequence[int] = SEEDS, steps: int | None = None) -> dict[str, Any]:
    """Measure what the file does not hold yet, and write it after each figure.

    Args:
        path: the JSON of the claim's results.
        steps: in place of the claim's own, for tests.

    Raises:
        SparseAttentionError: the file holds another number of steps or another setting.
    """
    steps = steps or claim.steps
    wanted = {"name": claim.name, "setting": claim.setting, "steps": steps}
    cells: dict[str, Figures] = {}
    if path.exists():
        before = json.loads(path.read_text(encoding="utf-8"))
        for key, value in wanted.items():
            if before[key] != value:
                raise SparseAttentionError(f"{path} holds {key}={before[key]!r}, not {value!r}; remove it, or --out")
        cells = before["cells"]
    result: dict[str, Any] = {**wanted, "header": machine(torch.device("cpu")), "cells": cells}
    path.parent.mkdir(parents=True, exist_ok=True)
    for seed in seeds:
        for label, variant in claim.variants.items():
            key = f"{label}/{seed}"
            if key not in cells:
                cells[key] = claim.measure(variant, seed, steps)
                print(f"{claim.name}: {key}: {cells[key]}", flush=True)
                path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    by_seed = [{label: cells[f"{label}/{seed}"] for label in claim.variants} for seed in seeds]
    held = [claim.holds(figures) for figures in by_seed]
    result |= {
        "system": claim.system, "statement": claim.statement, "rule": claim.rule, "tried": claim.tried,
        "seeds": list(seeds), "held": held, "verdict": REPRODUCED if all(held) else NOT_REPRODUCED,
    }  # fmt: skip
    path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return result


def claim_section(result: Mapping[str, Any]) -> str:
    """The Markdown of one claim's results: the verdict, and a row a variant with the spread over seeds."""
    cells: dict[str, dict[int, Figures]] = {}
    for key, figures in result["cells"].items():
        label, _, seed = key.rpartition("/")
        if int(seed) in result["seeds"]:
            cells.setdefault(label, {})[int(seed)] = figures
    names = list(dict.fromkeys(name for of in cells.values() for f in of.values() for name in f))
    lines = [f"| variant | {' | '.join(names)} |", "|" + " --- |" * (1 + len(names))]
    for label, of in cells.items():
        shown = [_spread([f[name] for f in of.values() if name in f]) for name in names]
        lines.append(f"| {label} | {' | '.join(shown)} |")
    header = result["header"]
    held = f"{sum(result['held'])} of {len(result['held'])} seeds"
    tried = f" Tried: {result['tried']}." if result["tried"] else ""
    verdict = result["verdict"].capitalize()
    return (
        f"**{result['statement']}** {verdict} ({held}; it counts where {result['rule']}).{tried} "
        f"{result['setting']}; {result['steps']} steps; mean over seeds, and their range. torch {header['torch']}, "
        f"transformers {header['transformers']}, {header['date']}; `python scripts/claims.py {result['name']}`\n\n"
        + "\n".join(lines)
    )


def _spread(values: Sequence[float]) -> str:
    if not values:
        return ""
    return f"{sum(values) / len(values):.3g} ({min(values):.3g} to {max(values):.3g})"
