"""What the grid of scripts/recovery.py says of a pattern, beside what ``sa-hf suggest`` measures."""

from __future__ import annotations

from pathlib import Path

import sa_hf
from sa_hf.config import SparseAttentionConfig
from sa_hf.tools.recovery.grid import DENSE, ONE_LAYER_DENSE, PATTERNS, Part, system_of
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
    alone: dict[str, list[Entry]] = {}
    mixed: dict[str, list[Entry]] = {}
    for entry in pooled(Rows(path), part):
        config = PATTERNS[part].get(entry.pattern)
        if isinstance(config, SparseAttentionConfig) and entry.pattern != DENSE:
            alone.setdefault(config.name, []).append(entry)
        elif entry.pattern.endswith(ONE_LAYER_DENSE):
            mixed.setdefault(system_of(entry.pattern), []).append(entry)
    return {name: _joined(alone.get(name, []), mixed.get(name, [])) for name in {**alone, **mixed}}


def _joined(alone: list[Entry], mixed: list[Entry]) -> str:
    """The pattern in every layer, and, where that has not been enough, beside one dense layer."""
    said = [_said(alone)] if alone else []
    if mixed and not any(entry.reached != NO for entry in alone):
        said.append(f"with one layer dense {_said(mixed)}")
    return "; ".join(said)


def _said(entries: list[Entry]) -> str:
    """The entry that got there first, or how far training went without."""
    there = [entry for entry in entries if entry.reached != NO]
    if not there:
        last = max(entry.step for entry in entries)
        return f"not within {last} steps" if last else "not untrained; its training is not measured yet"
    best = min(there, key=lambda entry: entry.step)
    trained = "untrained" if best.step == 0 else f"after {best.step} steps ({best.method})"
    return f"{trained}, at {best.density:.0%} of the pairs" + (", by the mean alone" if best.reached != "yes" else "")
