"""Draw the model cards' pictures and fill their generated sections from the configs and the result files.

    python scripts/cards.py             # pictures, configuration and measured tables, the README's gallery
    python scripts/cards.py --check     # exit 1 where a generated section is not up to date (pictures are not compared)

The prose of a card is written by hand; between ``<!-- begin: x -->`` and ``<!-- end: x -->`` this script writes. The
numbers come from model_cards/results/, which scripts/benchmark.py, scripts/quality.py, scripts/claims.py and
scripts/families.py write.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sa_hf.config import SparseAttentionConfig, pattern_class
from sa_hf.patterns.block_topk import BlockTopKAttentionConfig, read_pairs
from sa_hf.patterns.drawing import plot_mask
from sa_hf.tools.bench import cpu_report, gpu_report, quickstart_report
from sa_hf.tools.bench.decoding import SHAPE as DECODING_SHAPE
from sa_hf.tools.bench.gpu_report import table
from sa_hf.tools.bench.names import LEGEND, row_title
from sa_hf.tools.claims.claim import claim_section
from sa_hf.tools.describe import fields_of
from sa_hf.tools.families import report as families
from sa_hf.tools.recovery import report as recovery
from sa_hf.tools.recovery.rows import Rows

ROOT = Path(__file__).resolve().parent.parent
CARDS = ROOT / "model_cards"
RESULTS = CARDS / "results"
FAMILIES = RESULTS / "families.json"
SYSTEMS = (
    "longnet", "logsparse", "sparse_transformer", "sparsebert", "expire_span", "routing", "bigbird", "star",
    "block_topk",
)  # fmt: skip

HEADLINE_KIND = "_amx"  # of the benchmark's result files
DECODE_LENGTH = 8192
HEADLINE_LENGTH = 16384  # tokens of the README's first table

# What each picture shows: small enough that single pairs are visible.
DRAWN: dict[str, tuple[dict[str, Any], int, bool]] = {
    "longnet": ({"segment_length": (16, 32, 64), "dilated_ratio": (1, 2, 4)}, 64, False),
    "logsparse": ({"local_window": 3}, 64, True),
    "sparse_transformer": ({"kind": "fixed", "stride": 8, "summary": 2}, 64, True),
    "bigbird": ({"block_size": 16}, 512, False),
    "star": ({"relay": "token"}, 32, False),
}


def pictures() -> None:
    """One picture per system; learned patterns are drawn from a planted state, as their titles say."""
    folder = CARDS / "pictures"
    folder.mkdir(exist_ok=True)
    for name, (fields, length, causal) in DRAWN.items():
        pattern_class(name)(**fields).plot(folder / f"{name}.png", length, causal)
    for name, (gate, heading, causal) in planted().items():
        plot_mask(gate[None], folder / f"{name}.png", heading, causal=causal, pattern=name)
    for path in sorted(RESULTS.glob("benchmark_cpu*.json")):
        cpu_report.plot(json.loads(path.read_text()), path.with_suffix(".png"))
    rows = quickstart_rows()
    if rows:
        quickstart_report.draw_results(rows, RESULTS / "quickstart.png")


def planted() -> dict[str, tuple[Tensor, str, bool]]:
    """Masks of the learned patterns for a state chosen by hand, straight from their definitions."""
    n = 64
    i, j = torch.arange(n)[:, None], torch.arange(n)[None, :]
    distance = (i - j).abs()
    kept_distances = torch.tensor([0, 1, 2, 3, 8, 16, 17, 32])
    generator = torch.Generator().manual_seed(0)
    spans = torch.where(torch.arange(n) % 11 == 3, 60.0, 4.0 + 6.0 * torch.rand(n, generator=generator))
    gate = torch.clamp(1 + (spans[None, :] - (i - j)) / 8, 0, 1) * (j <= i)
    clusters = torch.randint(0, 4, (n // 4,), generator=generator).repeat_interleave(4)
    same = (clusters[:, None] == clusters[None, :]) & (j <= i)
    topics = torch.nn.functional.one_hot(clusters).double()[None, None]
    chosen = read_pairs(BlockTopKAttentionConfig(block_size=4, top_k=2, num_window_blocks=1), topics, topics)
    return {
        "sparsebert": (
            torch.isin(distance, kept_distances).float(),
            f"sparsebert, a frozen structured mask, n = {n}, bidirectional",
            False,
        ),
        "expire_span": (gate, f"expire_span, planted spans with a ramp of 8, n = {n}, causal", True),
        "routing": (same.float(), f"routing, four planted clusters, n = {n}, causal", True),
        "block_topk": (
            chosen[0, 0].float(),
            f"block_topk, blocks of 4 on four planted topics, top 2, n = {n}, causal",
            True,
        ),
    }


def configuration(config: type[SparseAttentionConfig]) -> str:
    """The table of fields and defaults, with what the class's docstring says of each."""
    lines = ["| field | type | default | meaning |", "| --- | --- | --- | --- |"]
    for field in fields_of(config):
        cells = (f"`{field.name}`", f"`{field.type}`", f"`{field.default}`", field.meaning)
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    presets = config.presets()
    if presets:
        lines += ["", "Presets: " + "; ".join(f"`{name}` ({_shown(fields)})" for name, fields in presets.items()) + "."]
    return "\n".join(lines)


def _shown(fields: dict[str, Any]) -> str:
    return ", ".join(f"`{k}={v}`" for k, v in fields.items())


# Labels of scripts/benchmark.py, by system.
BENCHMARK_LABELS = {
    "longnet": ("longnet",), "logsparse": ("logsparse",),
    "sparse_transformer": ("fixed", "fixed, constant summary", "strided"),
    "expire_span": ("expire_span",), "routing": ("routing", "routing causal"),
    "block_topk": ("block_topk", "block_topk query"),
    "bigbird": ("bigbird", "bigbird causal"), "star": ("star",), "sparsebert": ("sparsebert frozen",),
}  # fmt: skip


def measured(name: str) -> str:
    """The rows of the result files that speak of a system."""
    blocks = []
    quality = RESULTS / "quality.json"
    if quality.exists():
        data = json.loads(quality.read_text())
        blocks += [f"{label}:\n\n{table(rows)}" for label, rows in quality_rows(data, name).items()]
    claims = [json.loads(path.read_text()) for path in sorted((RESULTS / "claims").glob("*.json"))]
    blocks += [f"A claim of the paper, small. {claim_section(c)}" for c in claims if c.get("system") == name]
    speed: list[dict[str, Any]] = []
    for kind in ("", HEADLINE_KIND, f"{HEADLINE_KIND}_bfloat16"):
        rows = speed_rows(BENCHMARK_LABELS.get(name, ()), kind)
        if rows:
            speed += rows
            about = benchmark_header(kind)
            blocks.append(f"Speed on the CPU against dense SDPA of the same causality ({about}):\n\n{table(rows)}")
    growth = growth_rows(BENCHMARK_LABELS.get(name, ()))
    if growth:
        blocks.append(f"Growth with the length, forward and backward (same machine and command):\n\n{table(growth)}")
    if speed or growth:
        blocks.append(LEGEND)
    return "\n\n".join(blocks) or "Not measured yet."


def growth_rows(labels: tuple[str, ...]) -> list[dict[str, Any]]:
    """Seconds at every length of the benchmark's growth section, and the fitted exponents."""
    rows = []
    for row in (benchmark() or {}).get("growth", []):
        if row["label"] in labels:
            seconds = {f"{point['length']:,} tokens, s": point["seconds"] for point in row["points"]}
            fits = {
                f"exponent of {what}": row["exponents"][key] for what, key in (("time", "seconds"), ("memory", "mb"))
            }
            rows.append({"pattern": row_title(row["label"]), **seconds, **fits})
    return rows


def quality_rows(data: dict[str, Any], name: str) -> dict[str, list[dict[str, Any]]]:
    """The quality rows of a system by measurement."""
    found: dict[str, list[dict[str, Any]]] = {}
    for row in data["rows"]:
        if row["system"] == name:
            rest = {k: v for k, v in row.items() if k not in {"system", "measurement", "run"}}
            label = f"{row['measurement'][0].upper()}{row['measurement'][1:]} ({row.get('run', data['header'])})"
            found.setdefault(label, []).append(rest)
    return found


def benchmark(kind: str = "") -> dict[str, Any] | None:
    """The result file of scripts/benchmark.py with this behind its name."""
    path = RESULTS / f"benchmark_cpu{kind}.json"
    return json.loads(path.read_text()) if path.exists() else None


def benchmark_header(kind: str = "") -> str:
    data = benchmark(kind) or {}
    machine = ", ".join(f"{key} {value}" for key, value in data.get("machine", {}).items())
    return f"{data.get('shape')}; {machine}; `{data.get('command')}`"


def speed_rows(labels: tuple[str, ...], kind: str = "") -> list[dict[str, Any]]:
    """Seconds and speed-up over dense, of contenders of the benchmark's speed section, at every length."""
    rows = []
    for row in (benchmark(kind) or {}).get("speed", []):
        dense = row["rows"]["dense"]["median_s"]
        for label in labels:
            found = row["rows"].get(label)
            if found is not None and not row["dropout"]:
                rows.append(
                    {
                        "pattern": row_title(label),
                        "tokens": f"{row['length']:,}",
                        "pass": "forward+backward" if row["backward"] else "forward",
                        "dense, s": dense,
                        "sparse, s": found["median_s"],
                        "speed-up": f"{dense / found['median_s']:.1f}x",
                        "pairs kept": f"{found['pairs'] / found['dense_pairs']:.2%}" if "pairs" in found else "by data",
                    }
                )
    return rows


def headline() -> str:
    """The README's first table: every pattern at one length, a row each, in fp32 and bf16; and a token of decoding."""
    kinds = {"fp32": HEADLINE_KIND, "bf16": f"{HEADLINE_KIND}_bfloat16"}
    decode = [row for row in (benchmark(HEADLINE_KIND) or {}).get("decode", []) if row["length"] == DECODE_LENGTH]
    tokens = {row_title(row["label"]): row for row in decode}
    windows = ("window causal", "window")
    labels = (*windows, *(label for system in BENCHMARK_LABELS.values() for label in system))
    shown: dict[str, dict[str, str]] = {}
    for short, kind in kinds.items():
        for row in speed_rows(labels, kind):
            if row["tokens"] == f"{HEADLINE_LENGTH:,}":
                cells = shown.setdefault(row["pattern"], {"pattern": row["pattern"], "pairs kept": row["pairs kept"]})
                cells[f"{short}, {row['pass']}"] = f"{row['sparse, s']:.3f} s ({row['speed-up']})"
    if not shown:
        return "Not measured yet."
    column = f"a token, {DECODE_LENGTH:,} cached"
    for title, cells in shown.items():
        row = tokens.get(title)
        cells[column] = f"{row['static']:.1f} ms ({row['dense static'] / row['static']:.1f}x)" if row else ""
    whole = "\n".join(f"{benchmark_header(kind)}." for kind in kinds.values() if benchmark(kind))
    files = " and ".join(f"[{name}](model_cards/results/{name})" for name in files_of(kinds.values()))
    return (
        f"Attention at {HEADLINE_LENGTH:,} tokens on the CPU, and the speed-up over dense SDPA of the same causality "
        f"and dtype, called in turn; and a whole token of {DECODING_SHAPE} with a static cache:\n\n"
        f"{table(list(shown.values()))}\n\n{LEGEND}\n\n{whole} FlexAttention, training and other caches beside them: "
        f"{files}. All lengths, memory and growth, on another machine and by an earlier build: "
        "[benchmark_cpu.md](model_cards/results/benchmark_cpu.md)."
    )


def torch_engine() -> str:
    """What torch's own operators reach where the C++ does not serve, the worst row beside one that is common."""
    data = benchmark("_torch")
    if data is None:
        return "Not measured yet."
    labels = ("window causal", *(label for system in BENCHMARK_LABELS.values() for label in system))
    causal = [row for row in speed_rows(labels, "_torch") if row["tokens"] == f"{HEADLINE_LENGTH:,}"]
    said, common = [], row_title("bigbird causal")
    for name in ("forward", "forward+backward"):
        speeds = {row["pattern"]: float(row["speed-up"].removesuffix("x")) for row in causal if row["pass"] == name}
        worst = min(speeds, key=lambda pattern: speeds[pattern])
        said.append(f"{name} {speeds[common]}x of dense SDPA for {common}, {speeds[worst]}x for {worst}")
    machine = data["machine"]
    return (
        f"Their table is [benchmark_cpu_torch.md](model_cards/results/benchmark_cpu_torch.md): at {HEADLINE_LENGTH:,} "
        f"tokens {'; '.join(said)} ({machine['device']}, {machine['date']}, {machine['commit']})."
    )


def files_of(kinds: Iterable[str]) -> list[str]:
    return [f"benchmark_cpu{kind}.md" for kind in kinds if benchmark(kind)]


def filled(text: str, section: str, content: str) -> str:
    """``text`` with what stands between the markers of a section replaced."""
    begin, end = f"<!-- begin: {section} -->", f"<!-- end: {section} -->"
    head, found, rest = text.partition(begin)
    if not found or end not in rest:
        raise SystemExit(f"the markers of section {section!r} are missing")
    return f"{head}{begin}\n{content}\n{end}{rest.partition(end)[2]}"


def gallery() -> str:
    """Four pictures per row, each linked to its card."""
    cells = [f"[![{n}](model_cards/pictures/{n}.png)](model_cards/{n}.md)" for n in SYSTEMS]
    names = [f"[{n}](model_cards/{n}.md), {'causal' if is_causal(n) else 'bidirectional'}" for n in SYSTEMS]
    rows = []
    for at in range(0, len(cells), 4):
        rows += ["| " + " | ".join(cells[at : at + 4]) + " |", "| " + " | ".join(names[at : at + 4]) + " |"]
    return "\n".join([rows[0], "| :---: | :---: | :---: | :---: |", *rows[1:]])


def is_causal(name: str) -> bool:
    """Whether a system's picture shows it causal."""
    return DRAWN[name][2] if name in DRAWN else planted()[name][2]


def pages() -> dict[Path, str]:
    """Every page that has generated sections, as it should be."""
    result = {}
    for name in SYSTEMS:
        path = CARDS / f"{name}.md"
        text = filled(path.read_text(), "configuration", configuration(pattern_class(name)))
        result[path] = filled(text, "measured", measured(name))
    for path in sorted(RESULTS.glob("benchmark_cpu*.json")):
        result[path.with_suffix(".md")] = cpu_report.markdown(json.loads(path.read_text()))
    readme = ROOT / "README.md"
    text = filled(readme.read_text(), "gallery", gallery())
    text = filled(text, "headline", headline())
    text = filled(text, "torch engine", torch_engine())
    text = filled(text, "recovery", recovery.headline(Rows(RESULTS / "recovery.jsonl")))
    text = filled(text, "families", families.sentence(FAMILIES))
    if FAMILIES.exists():
        result[CARDS / "families.md"] = families.markdown(FAMILIES)
    text = filled(text, "gpu", gpu_report.section(RESULTS, HEADLINE_LENGTH))
    result[readme] = filled(text, "quickstart", quickstart())
    return result


def quickstart() -> str:
    """The table of the last committed run of scripts/quickstart.sh."""
    path = RESULTS / "quickstart.md"
    return path.read_text().strip() if path.exists() else "Not measured yet."


def quickstart_rows() -> dict[str, dict[str, float]]:
    """The figures of that table, as scripts/quickstart.py had them, to its digits."""
    rows = {}
    for line in quickstart().splitlines()[2:]:
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if len(cells) == 5:
            label, accuracy, _, seconds, memory = cells
            shares = [float(share) / 100 for share in re.findall(r"([\d.]+)%", accuracy)]
            names = ("eval_accuracy", "eval_accuracy_low", "eval_accuracy_high")
            rows[label] = {
                **dict(zip(names, shares, strict=False)),
                "step_seconds": float(seconds.removesuffix(" s")),
                "train_peak_memory_mb": float(memory.removesuffix(" MB").replace(",", "")),
            }
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing; exit 1 where something is out of date")
    args = parser.parse_args()
    stale = [path for path, text in pages().items() if path.read_text() != text]
    if args.check:
        missing = [n for n in SYSTEMS if not (CARDS / "pictures" / f"{n}.png").exists()]
        for path in stale:
            print(f"{path.relative_to(ROOT)} is out of date: run python scripts/cards.py")
        for name in missing:
            print(f"model_cards/pictures/{name}.png is missing: run python scripts/cards.py")
        return 1 if stale or missing else 0
    pictures()
    for path, text in pages().items():
        path.write_text(text)
    print(f"wrote {len(SYSTEMS)} pictures and {len(stale)} pages")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
