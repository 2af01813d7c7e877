"""What the grid of scripts/recovery.py says of a pattern, beside what ``sa-hf suggest`` measures."""

from __future__ import annotations

from pathlib import Path

import sa_hf
from sa_hf.config import SparseAttentionConfig
from sa_hf.tools.recovery.grid import DENSE, PATTERNS, Part
from sa_hf.tools.recovery.pooled import NO, Entry, pooled
from sa_hf.tools.recovery.rows import Rows

# In a clone; an installed package has no results.
RESULTS = Path(sa_hf.__file__).parents[1] / "model_cards" / "results" / "recovery.jsonl"


def recovered(causal: bool, path: Path = RESULTS) -> dict[str, str]:
    """By pattern, after how many steps of which training the grid's model kept 98 % of dense attention's quality.

    Args:
        causal: the grid's decoder, else its encoder.
        path: the grid's rows; empty where there is no such file.
    """
    if not path.is_file():
        return {}
    part: Part = "decoder" if causal else "encoder"
    by_name: dict[str, list[Entry]] = {}
    for entry in pooled(Rows(path), part):
        config = PATTERNS[part].get(entry.pattern)
        if isinstance(config, SparseAttentionConfig) and entry.pattern != DENSE:
            by_name.setdefault(config.name, []).append(entry)
    return {name: _said(entries) for name, entries in by_name.items()}


def _said(entries: list[Entry]) -> str:
    """The entry that got there first, or how far training went without."""
    there = [entry for entry in entries if entry.reached != NO]
    if not there:
        last = max(entry.step for entry in entries)
        return f"not within {last} steps" if last else "not untrained; its training is not measured yet"
    best = min(there, key=lambda entry: entry.step)
    trained = "untrained" if best.step == 0 else f"after {best.step} steps ({best.method})"
    return f"{trained}, at {best.density:.0%} of the pairs" + (", by the mean alone" if best.reached != "yes" else "")
