"""Evaluate a saved model, sparse or dense, and print its figures as JSON.

    sa-hf evaluate --model runs/finetune --task masked-lm --max_length 1024
    sa-hf evaluate --model runs/finetune --task masked-lm --max_length 1024 --attention dense

Curves of a causal language model, several patterns and dense attention in one table, perplexity against context length
and retrieval by depth and length, with intervals, as JSON, Markdown and pictures; a stopped run goes on:

    sa-hf evaluate --model runs/finetune --task causal-lm --lengths 512,1024,2048 --patterns bigbird,own.yaml

The model is loaded through the task's Auto class with trust_remote_code=True: name only folders and hub models whose
code you trust. Flags can stand in a YAML file (--config); flags on the command line win.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from sa_hf.errors import SparseAttentionError
from sa_hf.hf.state.patch import patch_of
from sa_hf.tasks.data import tokenize
from sa_hf.tasks.flags import FlagParser, add_data_flags, devices, parse_flags, source_of, whole
from sa_hf.tasks.forecast import forecast_figures
from sa_hf.tasks.load import tokenizer_of
from sa_hf.tasks.metrics import perplexity
from sa_hf.tasks.models import check_length
from sa_hf.tasks.retrieval import haystack_texts
from sa_hf.tasks.source import CAUSAL, CLASSIFICATION, QUESTIONS, SUMMARIES, Rows
from sa_hf.tasks.summaries import summary_figures
from sa_hf.tasks.verify import load_saved, saved_config
from sa_hf.tools.curves import add_curve_flags, lengthened, measure_curves, patterns_of
from sa_hf.tools.options import parse_options


def build_parser(prog: str | None = None) -> argparse.ArgumentParser:
    parser = FlagParser(prog, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", help="YAML file of flags")
    parser.add_argument(
        "--model", "--model_name_or_path", default="runs/finetune", help="a folder or hub name of a trained model"
    )
    add_data_flags(parser)
    parser.add_argument("--batch_size", "--per_device_eval_batch_size", "--eval_batch_size", type=whole(1), default=1)
    parser.add_argument(
        "--attention", default="sparse", choices=("sparse", "dense"), help="dense: the original attention"
    )
    parser.add_argument("--bf16", action="store_true", help="as fine-tuning with --bf16 evaluates")
    parser.add_argument("--cpu", "--use_cpu", action="store_true", help="stay on the CPU")
    parser.add_argument("--output", help="write the figures to this JSON file, too")
    add_curve_flags(parser)
    return parser


def evaluate(model: Any, tokenizer: Any, rows: Rows, args: argparse.Namespace) -> dict[str, Any]:
    """Mean loss over the labelled positions, its perplexity, accuracy with its interval, and seconds per row; of
    questions also ``f1``, of summaries ``rouge_l``."""
    from transformers import TrainingArguments

    from sa_hf.tasks.trainer import task_trainer

    with tempfile.TemporaryDirectory() as scratch:
        arguments = TrainingArguments(
            output_dir=scratch,
            per_device_eval_batch_size=args.batch_size,
            remove_unused_columns=False,
            report_to="none",
            bf16=args.bf16,
            **devices(args.cpu),
        )
        found = task_trainer(args.task, model, arguments, tokenizer, None, rows).evaluate()
    one_each = args.task in (CLASSIFICATION, QUESTIONS)
    figures = {
        "loss": found["eval_loss"],
        "perplexity": perplexity(found["eval_loss"]),
        "accuracy": found["eval_accuracy"],
        "accuracy_low": found["eval_accuracy_low"],
        "accuracy_high": found["eval_accuracy_high"],
        "interval": "95 %, Wilson" if one_each else "95 %, bootstrap over rows",
        "rows": len(rows),
        "seconds_per_row": found["eval_runtime"] / max(1, len(rows)),
    }
    if "eval_f1" in found:
        figures["f1"] = found["eval_f1"]
    return figures | (summary_figures(model, tokenizer, rows) if args.task == SUMMARIES else {})


def curves(args: argparse.Namespace) -> dict[str, Any]:
    """Measure curves as the flags say; print their page and return their cells.

    Raises:
        SparseAttentionError: the task is another than causal-lm, or a flag, the data or the model does not fit.
    """
    if args.task != CAUSAL:
        raise SparseAttentionError(
            f"--lengths is for --task {CAUSAL}, not {args.task!r}; leave it out, or name that task"
        )
    saved_config(args.model, args.task)
    words = args.patterns.split(",")
    patterns_of(words, patched=True)
    haystack_texts(args.haystack)
    args.max_length = args.lengths[-1]
    tokenizer = tokenizer_of(args.model)
    source = source_of(args, fields=parse_options(args.dataset_set), evaluate_only=True)
    _, chunks = tokenize(source, args.task, tokenizer, args.max_length, 1, args.eval_rows)
    model = load_saved(args.model, args.task)
    lengthened(model, tokenizer, args.max_length)
    model.to("cpu" if args.cpu else torch.accelerator.current_accelerator() or "cpu")
    results = measure_curves(model, tokenizer, chunks, patterns_of(words, patch_of(model) is not None), args)
    print((Path(args.out) / "curves.md").read_text(encoding="utf-8"))
    return results.cells


def known_classes(config: Any, task: str) -> dict[str, int] | None:
    """The numbers of a classifier's classes by name; raises ``SparseAttentionError`` for a regression."""
    if task != CLASSIFICATION:
        return None
    label2id: dict[str, int] = config.label2id
    if len(label2id) < 2:
        raise SparseAttentionError(f"the model has {len(label2id)} class, so it is no classifier; classes: {label2id}")
    return label2id


def show(figures: dict[str, Any], args: argparse.Namespace) -> dict[str, Any]:
    """Print the figures, and write them where --output says."""
    print(json.dumps(figures, indent=2))
    if args.output:
        Path(args.output).write_text(json.dumps({"arguments": vars(args), **figures}, indent=2) + "\n")
    return figures


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> dict[str, Any]:
    """Evaluate as the flags say; print the figures and return them.

    Args:
        argv: the flags; None takes those of the command line.
        prog: the command's name in its help.

    Raises:
        SparseAttentionError: a flag, the data or the model does not fit.
        OSError: a file or folder cannot be read or written.
    """
    import sa_hf

    args = parse_flags(build_parser(prog), argv, pairs=("dataset_set",))
    if args.output is not None and not Path(args.output).absolute().parent.is_dir():
        raise SparseAttentionError(f"--output {args.output}: {Path(args.output).parent} is no folder")
    if args.lengths is not None:
        return curves(args)
    # The config alone, so that what is wrong with the data comes before the model is loaded.
    config = saved_config(args.model, args.task)
    fields = parse_options(args.dataset_set)
    source = source_of(args, fields=fields, evaluate_only=True, label2id=known_classes(config, args.task))
    if args.task == "forecasting":
        model = load_saved(args.model, args.task)
        model.to("cpu" if args.cpu else torch.accelerator.current_accelerator() or "cpu")
        return show(forecast_figures(model, source.evaluation), args)
    tokenizer = tokenizer_of(args.model)
    _, rows = tokenize(source, args.task, tokenizer, args.max_length, 1, args.eval_rows)
    model = load_saved(args.model, args.task)
    check_length(model, args.max_length)
    with sa_hf.dense(model) if args.attention == "dense" else contextlib.nullcontext():
        figures = evaluate(model, tokenizer, rows, args)
    return show(figures, args)
