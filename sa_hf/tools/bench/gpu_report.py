"""The README's section on GPUs, from what scripts/gpu_suite.py has measured."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def section(results: Path, length: int) -> str:
    """What the GPU suite found: parity, the speed rows at one length, and the kernels' own times.

    Args: results: the folder of the result files.
    """
    found = sorted(results.glob("gpu_*.json"))
    if not found:
        return "Not measured yet: `python scripts/gpu_suite.py`."
    data, name = json.loads(found[-1].read_text()), found[-1].stem
    head, sections = data["header"], data["sections"]
    rate = sections.get("ceilings", {}).get("measured", {}).get("TFLOP/s", 0.0)
    parity = sections.get("parity", {})
    text = (
        f"{head['device']}, torch {head['torch']}, triton {head['triton']}, {head['date']}, commit {head['commit']} "
        f"(`python scripts/gpu_suite.py`): {sum(row.get('pass') is True for row in parity.values())} of {len(parity)} "
        "rows of parity with the fp64 oracle passed, output and gradients, each backward bit-identical twice; bf16 "
        f"matrix products ran at {rate:.0f} TFLOP/s. All rows: [{name}.md](model_cards/results/{name}.md)."
    )
    rows = _speeds(sections.get("ours", {}), length)
    if rows:
        text += f"\n\nbf16, batch 1, 16 heads, head_dim 128, {length:,} tokens:\n\n{table(rows)}"
    else:
        text += " **Its timings against dense attention, FlexAttention and training are not measured yet.**"
    return text + _kernel_times(results / "kernels_h100.json", rate)


def _speeds(ours: dict[str, Any], wanted: int) -> list[dict[str, Any]]:
    shown: dict[str, dict[str, Any]] = {}
    for key, row in ours.items():
        label, direction, head_dim, length, passes = key.split("/")
        if (head_dim, length) != ("D128", f"n{wanted}") or "ms" not in row:
            continue
        cells = shown.setdefault(f"{label} {direction}", {"pattern": f"{label}, {direction}"})
        name = "forward" if passes == "fwd" else "forward+backward"
        cells[name] = _graph_cell(row)
        cells[f"{name}, of the matmul rate"] = f"{row['of matmul rate']:.0%}"
        cells[f"{name} as calls"] = f"{row['ms']:.2f} ms ({_times(row.get('speed-up'))})"
    return list(shown.values())


def _kernel_times(path: Path, rate: float) -> str:
    """Time on the device of the tuned kernels, and of the same before they were tuned on a GPU."""
    if not path.exists():
        return ""
    sections = json.loads(path.read_text())["sections"]
    before, after = (next(rows for name, rows in sections.items() if word in name) for word in ("(before)", "(tuned)"))
    rows = []
    for key, row in after.items():
        label, direction, head_dim, _ = key.split("/")
        rows.append(
            {
                "pattern": f"{label}, {direction}",
                "head_dim": head_dim[1:],
                "forward+backward": f"{row['us on the device'] / 1e3:.2f} ms",
                "before tuning": f"{before[key]['us on the device'] / 1e3:.2f} ms",
                "kept pairs": f"{row['kept TFLOP/s']:.0f} TFLOP/s"
                + (f" ({row['kept TFLOP/s'] / rate:.0%})" if rate else ""),
            }
        )
    dense = next(rows for name, rows in sections.items() if name.startswith("dense"))["sdpa-cudnn/causal/D64/n16384"]
    return (
        "\n\nThe kernels' own time at 16,384 tokens, batch 1, 16 heads, bf16, by torch's profiler (of the tuned code "
        "the time on the lent card sufficed for these patterns), with the rate on kept pairs and its share of the "
        f"matrix products' rate:\n\n{table(rows)}\n\nDense causal attention by cuDNN took "
        f"{dense['forward+backward'] / 1e3:.2f} ms on the same kind of card at head_dim 64. Every kernel, and the "
        "launches that were tried: [kernels_h100.md](model_cards/results/kernels_h100.md)."
    )


def _graph_cell(row: dict[str, Any]) -> str:
    if "ms in a graph" not in row:
        return "not captured"
    return f"{row['ms in a graph']:.2f} ms ({_times(row.get('speed-up in a graph'))})"


def _times(ratio: Any) -> str:
    return f"{ratio:.1f}x" if isinstance(ratio, float) else "-"


def table(rows: list[dict[str, Any]]) -> str:
    """Rows as a table in Markdown; a column for each key."""
    columns = list(dict.fromkeys(c for row in rows for c in row))
    lines = ["| " + " | ".join(columns) + " |", "|" + " --- |" * len(columns)]
    lines += ["| " + " | ".join(_cell(row.get(c)) for c in columns) + " |" for row in rows]
    return "\n".join(lines)


def _cell(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else "" if value is None else str(value)
