"""Quality of every system against dense attention, on embedded data: what the model cards show.

    python scripts/quality.py
    python scripts/quality.py --only block_topk   # a language model's rows anew, dense attention in the same run
    python scripts/quality.py --quick    # a few steps, to see that it runs

Two measurements. *Language model*: a small byte-level decoder is trained from scratch on the standard library's source
through scripts/finetune.py, with each pattern for the same steps and seed; the figure is the loss on held-out files,
in bits per byte. *Unchanged encoder*: the pretrained MiniLM is patched and not trained; the figure is the mean cosine
similarity of its sentence embeddings to those of the dense model, on texts of 512 tokens. Lower similarity means more
fine-tuning is needed; it says nothing of what fine-tuning reaches.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from sa_hf.config import pattern_class  # noqa: E402  (the repository is put on the path first)
from sa_hf.tools.bench.report import machine  # noqa: E402

LENGTH = 1024
# (system, options): shapes that keep clearly less than dense at 1,024 positions.
DECODERS: list[tuple[str, list[str]]] = [
    ("dense", []),
    ("sliding_window", ["window=128"]),
    ("longnet", ["segment_length=[128,256,512,1024]", "dilated_ratio=[1,2,4,8]"]),
    ("logsparse", ["local_window=16"]),
    ("logsparse", ["local_window=16", "conv_kernel_size=3"]),
    ("sparse_transformer", ["kind=fixed", "stride=64", "summary=8"]),
    ("sparse_transformer", ["kind=strided", "stride=32"]),
    ("sparsebert", ["structure=structured", "mask_length=1024"]),
    ("expire_span", ["max_span=512", "ramp=32", "span_loss_coef=1e-4"]),
    ("routing", ["num_clusters=8", "window=128", "num_local_heads=2", "local_window=128"]),
    ("bigbird", ["block_size=32"]),
    ("block_topk", ["block_size=32", "top_k=4"]),
    ("star", ["ring=false"]),
]
ENCODERS: list[tuple[str, dict[str, Any]]] = [
    ("sliding_window", {"window": 64}),
    ("longnet", {"segment_length": (64, 128, 256, 512), "dilated_ratio": (1, 2, 4, 8)}),
    ("logsparse", {"local_window": 16}),
    ("sparse_transformer", {"kind": "fixed", "stride": 64, "summary": 8}),
    ("bigbird", {"block_size": 32, "num_random_blocks": 2}),
    ("star", {"ring": False}),
]


def language_model(system: str, options: list[str], steps: int, evaluated: int, folder: Path) -> dict[str, Any]:
    """Train one decoder through the fine-tuning script; its held-out loss in bits per byte."""
    flags = ["--pattern", "none" if system == "dense" else system]
    flags += [word for option in options for word in ("--set", option)]
    flags += ["--model", "tiny-llama", "--model_set", "hidden_size=128", "--model_set", "intermediate_size=256"]
    flags += ["--task", "causal-lm", "--dataset", "stdlib", "--max_length", str(LENGTH), "--max_steps", str(steps)]
    flags += ["--train_rows", str(4 * steps), "--eval_rows", str(evaluated), "--batch_size", "4", "--lr", "2e-3"]
    flags += ["--verify", "none", "--output_dir", str(folder), "--cpu", "--logging_steps", str(max(1, steps // 4))]
    command = [sys.executable, str(ROOT / "scripts" / "finetune.py"), *flags]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{system} {options} failed:\n{done.stdout[-1000:]}\n{done.stderr[-2000:]}")
    metrics = json.loads((folder / "metrics.json").read_text())
    return {"bits per byte": metrics["eval_loss"] / math.log(2)}


def texts(count: int, length: int, tokenizer: Any) -> torch.Tensor:
    """Token ids of held-out excerpts of the standard library, ``[count, length]``."""
    from sa_hf.tasks.language import stdlib_texts, token_chunks

    chunks = token_chunks(stdlib_texts("evaluation"), tokenizer, length, count)
    return torch.stack([chunk["input_ids"] for chunk in chunks])


def embeddings(model: Any, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return torch.cat([model(input_ids=row[None]).last_hidden_state.mean(1) for row in ids])


def unchanged_encoder(count: int) -> list[dict[str, Any]]:
    """Similarity of the patched, untrained MiniLM to the dense one."""
    from transformers import AutoModel, AutoTokenizer

    from sa_hf import patch_model, unpatch_model
    from sa_hf.tasks.load import minilm_path

    folder = str(minilm_path())
    model, tokenizer = AutoModel.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    ids = texts(count, 512, tokenizer)
    dense = embeddings(model, ids)
    rows = []
    for system, fields in ENCODERS:
        config = pattern_class(system)(**fields)
        patch_model(model, config)
        similarity = torch.nn.functional.cosine_similarity(embeddings(model, ids), dense).mean()
        unpatch_model(model)
        rows.append(
            {
                "system": system,
                "measurement": "MiniLM, patched, not trained, 512 tokens",
                "config": ", ".join(f"{k}={v}" for k, v in fields.items()),
                "kept pairs of dense": config.density(512, 12),
                "cosine similarity to dense": float(similarity),
            }
        )
    return rows


def joined(
    known: dict[str, Any], header: str, rows: list[dict[str, Any]], system: str
) -> tuple[str, list[dict[str, Any]]]:  # fmt: skip
    """The rows of a file with those of a system measured anew, which say in what run; dense attention's figure of that
    run stands in them."""
    measured = {row["measurement"] for row in rows}
    kept = [row for row in known["rows"] if row["system"] != system or row["measurement"] not in measured]
    fresh = [{**row, "run": f"{header} --only {system}"} for row in rows if row["system"] == system]
    return known["header"], [*kept, *fresh]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a few steps of each")
    parser.add_argument("--steps", type=int, default=150, help="training steps of each decoder")
    parser.add_argument("--out", type=Path, default=ROOT / "model_cards" / "results" / "quality.json")
    parser.add_argument("--only", help="one system's decoders, and dense; the other rows of the file stay")
    args = parser.parse_args()
    steps, evaluated, count = (3, 4, 2) if args.quick else (args.steps, 64, 16)
    about = machine(torch.device("cpu"))
    header = (
        f"{about['device']}, torch {about['torch']}, transformers {about['transformers']}, {about['date']}; "
        f"python scripts/quality.py --steps {steps}"
    )
    rows: list[dict[str, Any]] = []
    if not args.only:
        rows += unchanged_encoder(count)
    for system, options in DECODERS:
        if args.only in (None, system) or system == "dense":
            with tempfile.TemporaryDirectory() as folder:
                figures = language_model(system, options, steps, evaluated, Path(folder))
            about_run = f"byte-level decoder, {steps} steps, {LENGTH} bytes"
            row = {"system": system, "measurement": about_run, "config": ", ".join(options)}
            rows.append(row | figures)
            print(rows[-1], flush=True)
    dense = next((r["bits per byte"] for r in rows if r["system"] == "dense"), None)
    for row in rows:
        if dense is not None and "bits per byte" in row:
            row["dense, same run"] = dense
    if args.only and args.out.exists():
        header, rows = joined(json.loads(args.out.read_text()), header, rows, args.only)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps({"header": header, "rows": rows}, indent=1) + "\n")
    print(f"wrote {args.out}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
