"""Flags shared by the scripts: a YAML file under the command line, and the choice of task and data."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from sa_hf.config import did_you_mean
from sa_hf.errors import SparseAttentionError
from sa_hf.tasks.data import DEFAULT_EVALUATION_ROWS, DEFAULT_TRAIN_ROWS, Source, load_source
from sa_hf.tasks.models import AUTO_CLASSES


def add_data_flags(parser: argparse.ArgumentParser) -> None:
    """The flags that name task and data, the same in every script."""
    data = parser.add_argument_group("task and data")
    data.add_argument("--task", default="masked-lm", choices=sorted(AUTO_CLASSES))
    data.add_argument(
        "--dataset",
        default="stdlib",
        help="stdlib, stdlib-short, stdlib-docstrings, corridor, summation, series, a file or folder, or a hub name",
    )
    data.add_argument("--dataset_config", help="configuration of a hub data set")
    data.add_argument("--text_column", help="default: text, content, ...")
    data.add_argument("--label_column", help="default: label, labels, ...")
    data.add_argument("--encoding", help="of local text, json and csv files (default: UTF-8)")
    data.add_argument(
        "--eval_split", choices=("validation", "test", "all"),
        help="what to evaluate on (default: validation, else test, else a tenth held out; all: for a single file)",
    )  # fmt: skip
    rows = "at most so many rows or chunks for {}, >= 1 (default: all; {} of the embedded corpus)"
    data.add_argument("--train_rows", type=int, help=rows.format("training", DEFAULT_TRAIN_ROWS))
    data.add_argument("--eval_rows", type=int, help=rows.format("evaluation", DEFAULT_EVALUATION_ROWS))
    data.add_argument("--seed", type=int, default=0)
    data.add_argument("--max_length", type=int, default=512, help="tokens per row")


def source_of(
    args: argparse.Namespace, *, evaluate_only: bool = False, label2id: Mapping[str, int] | None = None
) -> Source:
    """The rows that the data flags name, as :func:`sa_hf.tasks.data.load_source` gives them."""
    return load_source(
        args.task,
        args.dataset,
        max_length=args.max_length,
        dataset_config=args.dataset_config,
        text_column=args.text_column,
        label_column=args.label_column,
        train_rows=args.train_rows,
        evaluation_rows=args.eval_rows,
        seed=args.seed,
        eval_split=args.eval_split,
        encoding=args.encoding,
        evaluate_only=evaluate_only,
        label2id=label2id,
    )


def devices(cpu: bool) -> dict[str, bool]:
    """The fields of ``TrainingArguments`` that say where to run."""
    import torch

    on_cpu = cpu or not torch.accelerator.is_available()
    # Said aloud: left to find out, ranks that a launcher starts on CPUs would each train alone.
    return {"use_cpu": on_cpu, "dataloader_pin_memory": not on_cpu}


def parse_flags(
    parser: argparse.ArgumentParser, argv: Sequence[str] | None, pairs: Sequence[str] = ()
) -> argparse.Namespace:
    """Flags over the values of the YAML file ``--config`` over the defaults.

    Args:
        pairs: names of repeated ``FIELD=VALUE`` flags; in the file they may be mappings. Those of the command line
            come behind the file's, and so win.

    Raises:
        SparseAttentionError: the file cannot be read, is no mapping, or has a key that is no flag.
    """
    import yaml

    argv = sys.argv[1:] if argv is None else argv
    given = parser.parse_args(argv)
    if given.config is None:
        return given
    try:
        values = yaml.safe_load(Path(given.config).read_text()) or {}
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise SparseAttentionError(f"--config {given.config} must be a readable YAML file of flags: {error}") from error
    known = {action.dest for action in parser._actions} - {"help", "config"}
    if not isinstance(values, dict):
        raise SparseAttentionError(f"{given.config} must hold a mapping of flags to values, not {values!r}")
    for name in values:
        if name not in known:
            raise SparseAttentionError(
                f"{given.config}: unknown flag {name!r}{did_you_mean(name, known)}; flags: {sorted(known)}"
            )
    from_file = {name: _as_pairs(values.pop(name, [])) for name in pairs}
    parser.set_defaults(**values)
    args = parser.parse_args(argv)
    for name, before in from_file.items():
        setattr(args, name, [*before, *getattr(args, name)])
    return args


def _as_pairs(value: Any) -> list[str]:
    return [f"{field}={json.dumps(v)}" for field, v in value.items()] if isinstance(value, dict) else list(value)


def run_script(main: Callable[[], object]) -> None:
    """Call a script's ``main``; what a user can mend ends as one message on stderr and exit code 1."""
    try:
        main()
    except (SparseAttentionError, OSError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        print("stopped by Ctrl-C", file=sys.stderr)
        sys.exit(130)
