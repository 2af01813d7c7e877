#!/usr/bin/env python
"""The main job on embedded input: take a model of 512 tokens to 4,096 with sparse attention, and compare.

1. Fine-tune the real pretrained MiniLM, dense and at its own 512 tokens, on short texts of the standard library.
2. Three variants start from it and are fine-tuned on the same long documents, each in a process of its own: dense at
   512 tokens (truncated), dense at 4,096, and sparse (BigBird) at 4,096. The sparse one is saved, loaded again through
   AutoModel in a fresh process, and its outputs compared bit for bit.
3. A table with a 95 % interval beside each accuracy (Wilson's, over documents), and two pictures:
   runs/quickstart/{results.md,results.json,pattern.png,result.png}.

The task: which package do most sections of a document come from? (sa_hf/tasks/topic.py)
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from sa_hf import BigBirdAttentionConfig
from sa_hf.tools.bench.quickstart_report import draw_results
from sa_hf.tools.bench.report import machine

FINETUNE = Path(__file__).with_name("finetune.py")
KEPT = (
    "eval_accuracy", "eval_accuracy_low", "eval_accuracy_high", "eval_loss", "step_seconds", "train_peak_memory_mb",
    "reload_verified",
)  # fmt: skip
PATTERN = {"block_size": 64, "num_window_blocks": 3, "num_random_blocks": 3, "num_global_blocks": 2}


@dataclass(frozen=True)
class Sizes:
    """How much is trained and evaluated: the full run is minutes on 2 cores, ``--quick`` is for tests.

    As many documents to evaluate as keep it below ten: each costs one forward in each of the three variants.
    """

    short: int = 512
    long: int = 4096
    texts: int = 256
    documents: int = 16
    evaluation: int = 60
    text_evaluation: int = 8  # its figure is in no table
    text_batch: int = 8
    document_batch: int = 2


QUICK = Sizes(short=32, long=256, texts=8, documents=2, evaluation=2, text_evaluation=1, text_batch=4, document_batch=1)


@dataclass(frozen=True)
class Variant:
    label: str
    folder: str
    pattern: str
    length: int


def main(argv: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", default="runs/quickstart")
    parser.add_argument("--seed", type=int, default=7, help="draws the documents, and the order of training")
    parser.add_argument("--quick", action="store_true", help="toy sizes: shows that it runs, not what it reaches")
    args = parser.parse_args(argv)
    started = time.perf_counter()
    results = run(QUICK if args.quick else Sizes(), Path(args.output_dir), args.seed)
    results["total_seconds"] = time.perf_counter() - started
    report(results, Path(args.output_dir))
    return results


def run(sizes: Sizes, output: Path, seed: int) -> dict[str, Any]:
    start = output / "start"
    print(f"1. MiniLM, dense, {sizes.short} tokens: {sizes.texts} short texts of the standard library", flush=True)
    finetune(
        start,
        model="minilm",
        pattern="none",
        dataset="stdlib-short",
        max_length=sizes.short,
        train_rows=sizes.texts,
        eval_rows=sizes.text_evaluation,
        batch_size=sizes.text_batch,
        eval_batch_size=sizes.text_batch,
        lr=3e-4,
        # Attention dropout keeps dense attention off its fused kernel (n x n in memory); all variants go without.
        model_set="attention_probs_dropout_prob=0.0",
        verify="none",
        seed=seed,
    )
    variants = (
        Variant(f"dense at {sizes.short}", "dense_short", "none", sizes.short),
        Variant(f"dense at {sizes.long}", "dense_long", "dense", sizes.long),
        Variant(f"sparse (BigBird) at {sizes.long}", "sparse_long", "bigbird", sizes.long),
    )
    rows = {}
    for number, variant in enumerate(variants, start=2):
        print(f"{number}. {variant.label} tokens: {sizes.documents} documents", flush=True)
        options = [f"{k}={v}" for k, v in PATTERN.items()] if variant.pattern == "bigbird" else []
        rows[variant.label] = finetune(
            output / variant.folder,
            model=str(start),
            pattern=variant.pattern,
            set=options,
            dataset="stdlib",
            max_length=variant.length,
            train_rows=sizes.documents,
            eval_rows=sizes.evaluation,
            batch_size=1,
            gradient_accumulation=sizes.document_batch,
            lr=1e-4,
            verify="fresh" if variant.pattern == "bigbird" else "none",
            seed=seed,
        )
    about = machine(torch.device("cpu"))
    return {"sizes": vars(sizes), "pattern": PATTERN, "seed": seed, "machine": about, "rows": rows}


def finetune(output: Path, **flags: Any) -> dict[str, Any]:
    """Run scripts/finetune.py in a process of its own, so that its peak memory is its own; returns its metrics."""
    command = [sys.executable, str(FINETUNE), "--task", "sequence-classification", "--output_dir", str(output)]
    for name, value in flags.items():
        for item in value if isinstance(value, list) else [value]:
            command += [f"--{name}", str(item)]
    result = subprocess.run(command, check=False)
    if result.returncode:
        sys.exit(f"the step above failed: {' '.join(command)}")
    metrics: dict[str, Any] = json.loads((output / "metrics.json").read_text())
    return {key: metrics[key] for key in KEPT if key in metrics}


def report(results: dict[str, Any], output: Path) -> None:
    """Print the table, and write it, the figures and the pictures."""
    lines = [
        "| variant | accuracy (95 % interval) | loss | time per step | peak memory |",
        "|---|---|---|---|---|",
    ]
    for label, row in results["rows"].items():
        interval = f"{row['eval_accuracy_low']:.1%} to {row['eval_accuracy_high']:.1%}"
        lines.append(
            f"| {label} | {row['eval_accuracy']:.1%} ({interval}) | {row['eval_loss']:.3f} "
            f"| {row['step_seconds']:.2f} s | {row['train_peak_memory_mb']:,.0f} MB |"
        )
    lines += ["", measured_on(results)]
    (output / "results.md").write_text("\n".join(lines) + "\n")
    (output / "results.json").write_text(json.dumps(results, indent=2) + "\n")
    pattern = BigBirdAttentionConfig(**results["pattern"])
    pattern.plot(output / "pattern.png", results["sizes"]["long"])
    draw_results(results["rows"], output / "result.png")
    print("\n" + "\n".join(lines))
    print(f"\nsaved, loaded again through AutoModel, outputs equal bit for bit: {output / 'sparse_long'}")
    print(f"pictures: {output / 'pattern.png'}, {output / 'result.png'}; {results['total_seconds']:.0f} s in all")


def measured_on(results: dict[str, Any]) -> str:
    """What was measured, on what, when."""
    sizes, about = results["sizes"], results["machine"]
    return (
        f"{sizes['documents']} documents to train on, {sizes['evaluation']} to evaluate, seed {results['seed']}; "
        f"{results['total_seconds']:.0f} s in all. {about['device']}, {about['threads']} threads, "
        f"torch {about['torch']}, transformers {about['transformers']}, {about['date']}, commit {about['commit']}; "
        "`bash scripts/quickstart.sh`."
    )


if __name__ == "__main__":
    main()
