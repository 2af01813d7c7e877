"""Flags shared by the scripts: a YAML file under the command line, and the choice of task and data."""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from sa_hf.config import did_you_mean, shown
from sa_hf.errors import SparseAttentionError
from sa_hf.tasks.data import load_source
from sa_hf.tasks.homes import spare_caches
from sa_hf.tasks.made import MADE_NAMES
from sa_hf.tasks.models import AUTO_CLASSES
from sa_hf.tasks.ranks import is_main
from sa_hf.tasks.source import DEFAULT_EVALUATION_ROWS, DEFAULT_TRAIN_ROWS, Source

SWITCHES = {"true": True, "false": False}


def add_data_flags(parser: argparse.ArgumentParser) -> None:
    """The flags that name task and data, the same in every script."""
    data = parser.add_argument_group("task and data")
    data.add_argument("--task", default="masked-lm", choices=sorted(AUTO_CLASSES))
    data.add_argument(
        "--dataset",
        "--dataset_name",
        default="stdlib",
        help=f"a file or folder, a hub name, or one that is made: {', '.join(MADE_NAMES)}",
    )
    data.add_argument(
        "--dataset_set", action="append", default=[], metavar="FIELD=VALUE", help="a field of a data set that is made"
    )
    data.add_argument("--dataset_config", "--dataset_config_name", help="configuration of a hub data set")
    data.add_argument("--text_column", "--text_column_name", help="default: text, content, ...")
    data.add_argument("--label_column", "--label_column_name", help="default: label, labels, ...")
    data.add_argument("--encoding", help="of local text, json and csv files (default: UTF-8)")
    data.add_argument(
        "--eval_split", choices=("validation", "test", "all"),
        help="what to evaluate on (default: validation, else test, else a tenth held out; all: for a single file)",
    )  # fmt: skip
    rows = "at most so many rows or chunks for {}, >= 1 (default: all; {} of the embedded corpus)"
    data.add_argument(
        "--train_rows", "--max_train_samples", type=whole(1), help=rows.format("training", DEFAULT_TRAIN_ROWS)
    )
    data.add_argument(
        "--eval_rows", "--max_eval_samples", type=whole(1), help=rows.format("evaluation", DEFAULT_EVALUATION_ROWS)
    )
    data.add_argument("--seed", type=whole(0), default=0)
    data.add_argument(
        "--max_length", "--max_seq_length", "--max_seq_len", type=whole(2), default=512, help="tokens per row"
    )


def source_of(
    args: argparse.Namespace,
    *,
    fields: Mapping[str, Any],
    evaluate_only: bool = False,
    label2id: Mapping[str, int] | None = None,
) -> Source:
    """The rows that the data flags name, as :func:`sa_hf.tasks.data.load_source` gives them.

    Args:
        fields: what ``--dataset_set`` says.
    """
    return load_source(
        args.task, args.dataset, max_length=args.max_length, dataset_config=args.dataset_config,
        text_column=args.text_column, label_column=args.label_column, train_rows=args.train_rows,
        evaluation_rows=args.eval_rows, seed=args.seed, eval_split=args.eval_split, encoding=args.encoding,
        evaluate_only=evaluate_only, label2id=label2id, fields=fields,
    )  # fmt: skip


def devices(cpu: bool) -> dict[str, bool]:
    """The fields of ``TrainingArguments`` that say where to run."""
    import torch

    on_cpu = cpu or not torch.accelerator.is_available()
    # Said aloud: left to find out, ranks that a launcher starts on CPUs would each train alone.
    return {"use_cpu": on_cpu, "dataloader_pin_memory": not on_cpu}


class FlagParser(argparse.ArgumentParser):
    """A parser whose errors are ``SparseAttentionError``; flags may be written with "-" for "_"."""

    def error(self, message: str) -> NoReturn:
        raise SparseAttentionError(f"{message}; --help lists all flags")

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        words = self._switched([_underscored(word) for word in (sys.argv[1:] if args is None else args)])
        found, unknown = self.parse_known_args(words, namespace)
        if unknown:
            name = unknown[0].partition("=")[0]
            raise SparseAttentionError(
                f"unknown flag {name}{did_you_mean(name, self._option_string_actions)}; --help lists all flags"
            )
        return found

    def _switched(self, words: list[str]) -> list[str]:
        """``--bf16 true``, as Transformers' scripts take it, as ``--bf16``; with ``false`` the flag is left out."""
        kept: list[str] = []
        for word in words:
            name, separator, value = word.partition("=")
            before = kept[-1] if kept else ""
            if separator and self._is_switch(name) and value.lower() in SWITCHES:
                kept += [name] if SWITCHES[value.lower()] else []
            elif self._is_switch(before) and word.lower() in SWITCHES:
                kept = kept if SWITCHES[word.lower()] else kept[:-1]
            else:
                kept.append(word)
        return kept

    def _is_switch(self, word: str) -> bool:
        action = self._option_string_actions.get(word)
        return action is not None and action.nargs == 0 and action.dest != "help"


def _underscored(word: str) -> str:
    if not word.startswith("--"):
        return word
    name, separator, value = word[2:].partition("=")
    return f"--{name.replace('-', '_')}{separator}{value}"


def whole(least: int) -> Callable[[str], int]:
    """The type of a flag that takes integers of at least ``least``."""

    def integer(text: str) -> int:
        value = int(text)
        if value < least:
            raise argparse.ArgumentTypeError(f"{value} must be at least {least}; nearest: {least}")
        return value

    return integer


def real(least: float, above: bool = False) -> Callable[[str], float]:
    """The type of a flag that takes finite numbers of at least ``least``, or ``above`` it."""

    def number(text: str) -> float:
        value = float(text)
        if not math.isfinite(value) or value < least or (above and value == least):
            raise argparse.ArgumentTypeError(f"{value} must be finite and {'above' if above else 'at least'} {least}")
        return value

    return number


def json_text(text: str) -> Any:
    """The type of a flag that takes JSON."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise argparse.ArgumentTypeError(f"{shown(text)} is no JSON ({error})") from error


def steps(text: str) -> int:
    """The type of --max_steps: at least 1, or -1 for none."""
    return -1 if text == "-1" else whole(1)(text)


def parse_flags(
    parser: argparse.ArgumentParser, argv: Sequence[str] | None, pairs: Sequence[str] = (), mappings: Sequence[str] = ()
) -> argparse.Namespace:
    """Flags over the values of the YAML file ``--config`` over the defaults.

    Args:
        pairs: names of repeated ``FIELD=VALUE`` flags; in the file they may be mappings. A field on the command
            line takes the place of the file's.
        mappings: names of flags that may be mappings in the file, kept as they are.

    Raises:
        SparseAttentionError: a flag or its value is wrong; the file cannot be read, is no mapping, or has a key that is
            no flag, a value that the flag would not take, or one flag under two names.
    """
    import yaml

    argv = sys.argv[1:] if argv is None else argv
    given = parser.parse_args(argv)
    if given.config is None:
        return given
    try:
        values = yaml.safe_load(Path(given.config).read_text(encoding="utf-8")) or {}
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise SparseAttentionError(
            f"--config {given.config} must be a readable YAML file of flags: {' '.join(str(error).split())}"
        ) from error
    if not isinstance(values, dict):
        raise SparseAttentionError(f"{given.config} must hold a mapping of flags to values, not {shown(values)}")
    actions = {
        option.lstrip("-"): action
        for action in parser._actions
        for option in action.option_strings
        if action.dest not in ("help", "config")
    }
    defaults: dict[str, Any] = {}
    spelled: dict[str, str] = {}
    for name, value in values.items():
        action = actions.get(str(name).replace("-", "_"))
        if action is None:
            raise SparseAttentionError(
                f"{given.config}: unknown flag {shown(name)}{did_you_mean(name, actions)}; flags: "
                f"{sorted({a.dest for a in actions.values()})}"
            )
        if action.dest in spelled:
            raise SparseAttentionError(f"{given.config}: {spelled[action.dest]} and {name} are one flag; give one")
        spelled[action.dest] = str(name)
        if value is None:
            continue  # the flag's default
        if action.dest in pairs:
            defaults[action.dest] = _as_pairs(value, f"{given.config}: {name}")
        elif action.dest in mappings and isinstance(value, dict):
            defaults[action.dest] = value
        else:
            defaults[action.dest] = _as_flag(parser, action, value, f"{given.config}: {name}={shown(value)}")
    from_file = {name: defaults.pop(name, []) for name in pairs}
    parser.set_defaults(**defaults)
    args: argparse.Namespace = parser.parse_args(argv)
    for name, before in from_file.items():
        given_fields = {pair.partition("=")[0] for pair in getattr(args, name)}
        kept = [pair for pair in before if pair.partition("=")[0] not in given_fields]
        setattr(args, name, [*kept, *getattr(args, name)])
    return args


def _as_flag(parser: argparse.ArgumentParser, action: argparse.Action, value: Any, where: str) -> Any:
    """A value of the file, checked as the same flag's on the command line is."""
    if action.nargs == 0:  # a switch
        if not isinstance(value, bool):
            raise SparseAttentionError(f"{where} must be true or false")
        return value
    if isinstance(value, bool | list | dict):
        if action.type is not json_text or isinstance(value, bool):
            raise SparseAttentionError(f"{where} must be one text or number")
        return value
    try:
        converted = parser._get_value(action, str(value))
        parser._check_value(action, converted)
    except argparse.ArgumentError as error:
        near = did_you_mean(str(value), action.choices or ())
        raise SparseAttentionError(f"{where}: {error.message}{near}") from error
    return converted


def _as_pairs(value: Any, where: str) -> list[str]:
    if isinstance(value, dict):
        return [f"{field}={json.dumps(v)}" for field, v in value.items()]
    if isinstance(value, list) and all(isinstance(item, str) for item in value):
        return value
    raise SparseAttentionError(f"{where} must be a mapping of fields to values, or a list of field=value texts")


def run_script(main: Callable[[], object]) -> None:
    """Call a script's ``main``; what a user can mend ends as one message on stderr and exit code 1."""
    spare_caches()
    try:
        main()
    except (SparseAttentionError, OSError) as error:
        # All processes of a launch find the same mistake; the system's errors may be of one alone.
        sys.exit(f"error: {error}" if is_main() or isinstance(error, OSError) else 1)
    except KeyboardInterrupt:
        print("stopped by Ctrl-C", file=sys.stderr)
        sys.exit(130)
