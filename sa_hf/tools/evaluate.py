"""Evaluate a saved model, sparse or dense, and print its figures as JSON.

    sa-hf evaluate --model runs/finetune --task masked-lm --max_length 1024
    sa-hf evaluate --model runs/finetune --task masked-lm --max_length 1024 --attention dense

The model is loaded through the task's Auto class with trust_remote_code=True: name only folders and hub models whose
code you trust. Flags can stand in a YAML file (--config); flags on the command line win.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm  # type: ignore[import-untyped]

from sa_hf.errors import SparseAttentionError
from sa_hf.tasks.data import CLASSIFICATION, collator, tokenize
from sa_hf.tasks.flags import add_data_flags, parse_flags, source_of
from sa_hf.tasks.forecast import forecast_figures
from sa_hf.tasks.metrics import accuracy, perplexity
from sa_hf.tasks.synthetic import IGNORED
from sa_hf.tasks.verify import load_saved


def build_parser(prog: str | None = None) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", help="YAML file of flags")
    parser.add_argument("--model", default="runs/finetune", help="a folder or hub name of a trained model")
    add_data_flags(parser)
    parser.add_argument("--batch_size", type=int, default=1)
    parser.add_argument(
        "--attention", default="sparse", choices=("sparse", "dense"), help="dense: the original attention"
    )
    parser.add_argument("--output", help="write the figures to this JSON file, too")
    return parser


def evaluate(model: Any, rows: Any, collate: Any, task: str, batch_size: int) -> dict[str, float]:
    """Mean loss over the labelled positions, its perplexity, accuracy, and seconds per row."""
    device = next(model.parameters()).device
    losses, counts, classes, labels = [], [], [], []
    model.eval()
    started = time.perf_counter()
    for start in tqdm(range(0, len(rows), batch_size), unit="batch"):
        batch = {k: v.to(device) for k, v in collate(list(rows[start : start + batch_size])).items()}
        with torch.no_grad():
            output = model(**batch)
        wanted, predicted = batch["labels"], output.logits.argmax(-1)
        if task == "causal-lm":
            wanted, predicted = wanted[:, 1:], predicted[:, :-1]
        losses.append(float(output.loss))
        counts.append(int((wanted != IGNORED).sum()))
        classes.append(predicted.flatten().cpu())
        labels.append(wanted.flatten().cpu())
    seconds = time.perf_counter() - started
    loss = sum(x * n for x, n in zip(losses, counts, strict=True)) / max(1, sum(counts))
    return {
        "loss": loss,
        "perplexity": perplexity(loss),
        "accuracy": accuracy(torch.cat(classes), torch.cat(labels)),
        "rows": len(rows),
        "seconds_per_row": seconds / max(1, len(rows)),
    }


def known_classes(model: Any, task: str) -> dict[str, int] | None:
    """The numbers of a classifier's classes by name; raises ``SparseAttentionError`` for a regression."""
    if task != CLASSIFICATION:
        return None
    label2id: dict[str, int] = model.config.label2id
    if len(label2id) < 2:
        raise SparseAttentionError(f"the model has {len(label2id)} class, so it is no classifier; classes: {label2id}")
    return label2id


def show(figures: dict[str, float], args: argparse.Namespace) -> dict[str, float]:
    """Print the figures, and write them where --output says."""
    print(json.dumps(figures, indent=2))
    if args.output:
        Path(args.output).write_text(json.dumps({"arguments": vars(args), **figures}, indent=2) + "\n")
    return figures


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> dict[str, float]:
    """Evaluate as the flags say; print the figures and return them.

    Args:
        argv: the flags; None takes those of the command line.
        prog: the command's name in its help.

    Raises:
        SparseAttentionError: a flag, the data or the model does not fit.
        OSError: a file or folder cannot be read or written.
    """
    import transformers

    import sa_hf

    args = parse_flags(build_parser(prog), argv)
    # Masks of the masked language model come from the collator's seed, so two models see the same ones.
    model = load_saved(args.model, args.task)
    source = source_of(args, evaluate_only=True, label2id=known_classes(model, args.task))
    if args.task == "forecasting":
        return show(forecast_figures(model, source.evaluation), args)
    tokenizer = transformers.AutoTokenizer.from_pretrained(args.model)
    _, rows = tokenize(source, args.task, tokenizer, args.max_length, 1, args.eval_rows)
    collate = collator(args.task, tokenizer, args.seed)
    with sa_hf.dense(model) if args.attention == "dense" else contextlib.nullcontext():
        figures = evaluate(model, rows, collate, args.task, args.batch_size)
    return show(figures, args)
