"""The decode section of the CPU benchmark as Markdown tables."""

from __future__ import annotations

import statistics
from typing import Any

from sa_hf.tools.bench.decoding import CACHES, LAYERS, SHAPE
from sa_hf.tools.bench.names import row_title


def decode_tables(rows: list[dict[str, Any]]) -> list[str]:
    """A table for each number of cached tokens."""
    lines: list[str] = []
    for length in dict.fromkeys(row["length"] for row in rows):
        lines += _table(length, [row for row in rows if row["length"] == length])
    if not lines:
        return []
    return [
        "", "## Decoding", "",
        f"Median milliseconds of a token, {SHAPE}, each row measured in a process of its own with dense attention and "
        "a window of 1 beside it. Attention: a step's time less that of the window of 1 (static cache), over the same "
        "of dense attention with a static cache (dynamic: with a dynamic cache). A layer: milliseconds that a patched "
        "layer takes more than a dense one, static cache.", *lines,
    ]  # fmt: skip


def _table(length: int, rows: list[dict[str, Any]]) -> list[str]:
    dense = {name: statistics.median(row[name] for row in rows) for name in ("dense static", "dense dynamic")}
    zero = statistics.median(row["zero static"] for row in rows)
    lines = [
        "", f"### {length:,} tokens in the cache", "",
        f"Dense: {dense['dense static']:.2f} ms static, {dense['dense dynamic']:.2f} ms dynamic; window of 1: "
        f"{zero:.2f} ms (medians over the rows).", "",
        f"| pattern | {' | '.join(f'{kind} cache, ms (attention)' for kind in CACHES)} | sparse / static | a layer |",
        "|---|" + "---|" * (len(CACHES) + 2),
    ]  # fmt: skip
    for row in rows:
        cells = [f"{row[kind]:.2f} ({_times(attention_ratio(row, kind))})" for kind in CACHES]
        more = (row["static"] - row["dense static"]) / LAYERS
        lines.append(
            f"| {row_title(row['label'])} | {' | '.join(cells)} | {row['sparse'] / row['static']:.2f} | {more:+.3f} |"
        )
    return lines


def attention_ratio(row: dict[str, Any], kind: str) -> float | None:
    """A pattern's attention time over dense attention's; None where that one's is too short to be told."""
    dense = row["dense dynamic" if kind == "dynamic" else "dense static"] - row["zero static"]
    return (row[kind] - row["zero static"]) / dense if dense > 0 else None


def _times(ratio: float | None) -> str:
    return "-" if ratio is None else f"{ratio:.2f}x"
