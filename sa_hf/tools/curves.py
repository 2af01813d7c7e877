"""Curves of causal language models: perplexity against context length, retrieval by depth and length.

Several patterns and dense attention on the same weights, in one file of results that a stopped run goes on from.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm  # type: ignore[import-untyped]

import sa_hf
from sa_hf.config import available_patterns, did_you_mean
from sa_hf.errors import SparseAttentionError
from sa_hf.hf.state.assignment import with_configs
from sa_hf.hf.state.patch import patch_of
from sa_hf.hf.state.positions import lengthening
from sa_hf.tasks.context import sliding_loss
from sa_hf.tasks.flags import whole
from sa_hf.tasks.metrics import bootstrap, perplexity, share_interval
from sa_hf.tasks.ranks import say
from sa_hf.tasks.retrieval import (
    KINDS,
    Haystack,
    RetrievalTask,
    Sample,
    found_answers,
    haystack_files,
    haystack_texts,
)
from sa_hf.tools.bench.report import machine
from sa_hf.tools.curves_report import write_report
from sa_hf.tools.options import described_pattern

RESULTS = "curves.json"
SAVED, DENSE = "as saved", "dense"
PERPLEXITY, RETRIEVAL = "perplexity", "retrieval"
# What must be equal for results of a stopped run to be gone on from.
SETTINGS = (
    "model", "task", "dataset", "dataset_config", "text_column", "eval_split", "eval_rows", "seed", "lengths",
    "retrieval", "needles", "wording", "haystack", "depths", "samples",
)  # fmt: skip


def numbers(text: str) -> list[int]:
    """The type of a flag of lengths, ``512,1024``, in rising order.

    Raises:
        argparse.ArgumentTypeError: one of them is below 4, or no integer.
    """
    try:
        found = sorted({int(part) for part in text.split(",")})
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text} must be integers such as 512,1024") from error
    if found[0] < 4:
        raise argparse.ArgumentTypeError(f"{found[0]} must be at least 4; nearest: 4")
    return found


def kinds(text: str) -> list[str]:
    """The type of a flag of kinds of retrieval, ``single,variables``, or ``none``."""
    found = [] if text == "none" else text.split(",")
    for kind in found:
        if kind not in KINDS:
            raise argparse.ArgumentTypeError(f"{kind} is unknown{did_you_mean(kind, KINDS)}; none, or some of {KINDS}")
    return found


def add_curve_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of curves; with ``--lengths`` there are curves in place of a task's figures."""
    curves = parser.add_argument_group("curves, of causal language models (with --lengths)")
    curves.add_argument("--lengths", type=numbers, help="context lengths, e.g. 512,1024,2048")
    curves.add_argument(
        "--patterns", default="", help="besides dense and as saved: names, and .yaml files of label: pattern; commas"
    )
    curves.add_argument("--retrieval", type=kinds, default=["single"], help=f"none, or some of {','.join(KINDS)}")
    curves.add_argument("--needles", type=whole(1), default=4, help="of kinds with several")
    curves.add_argument("--wording", default="ruler", choices=("ruler", "short"), help="short: for small models")
    curves.add_argument("--haystack", default="stdlib", help="stdlib, noise, or a file or folder of texts of your own")
    curves.add_argument("--depths", type=whole(1), default=5, help="places of a needle, evenly apart")
    curves.add_argument("--samples", type=whole(1), default=20, help="rows for each depth and length")
    curves.add_argument("--out", default="runs/curves", help="folder of results, tables and pictures")


def patterns_of(words: Sequence[str], patched: bool) -> dict[str, Any]:
    """The attention to measure, by label: ``None`` is the model as it was saved, "dense" its original attention.

    Args:
        words: names of patterns in their default shape, or YAML files of ``label: pattern``, a pattern as
            ``patch_model`` takes it, configs as mappings with a ``name``.
        patched: whether the model is; only then is there "as saved".

    Raises:
        SparseAttentionError: a word is neither, or a file holds no mapping.
    """
    found: dict[str, Any] = ({SAVED: None} if patched else {}) | {DENSE: DENSE}
    for word in filter(None, words):
        if Path(word).suffix in (".yaml", ".yml"):
            found |= {str(label): with_configs(pattern) for label, pattern in _mapping(word).items()}
        elif word in available_patterns():
            found[word] = word
        else:
            raise SparseAttentionError(
                f"--patterns {word!r} is no pattern{did_you_mean(word, available_patterns())}, and no .yaml file "
                "of them"
            )
    for label in found:
        if "/" in label:
            raise SparseAttentionError(f"label {label!r} holds a '/', which parts a result's key; leave it out")
    return found


def _mapping(path: str) -> dict[str, Any]:
    import yaml

    try:
        found = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise SparseAttentionError(f"{path} must be a readable YAML file: {' '.join(str(error).split())}") from error
    if not isinstance(found, dict) or not found:
        raise SparseAttentionError(f"{path} must hold a mapping of labels to patterns")
    return found


class Results:
    """Cells of a run by their key, kept in a file after each.

    Args:
        settings: what all cells share.
        patterns: what each label stands for.

    Raises:
        SparseAttentionError: the folder holds results of other settings, or a label stood for another pattern.
    """

    def __init__(
        self, folder: Path, settings: Mapping[str, Any], patterns: Mapping[str, Any], device: torch.device
    ) -> None:
        self.path, self.settings = folder / RESULTS, json.loads(json.dumps(settings))
        self.patterns = json.loads(json.dumps({label: described_pattern(p) for label, p in patterns.items()}))
        self.cells: dict[str, dict[str, Any]] = {}
        self.header = machine(device)
        folder.mkdir(parents=True, exist_ok=True)
        if not self.path.exists():
            return
        before = json.loads(self.path.read_text(encoding="utf-8"))
        for name, value in self.settings.items():
            if before["settings"].get(name) != value:
                raise SparseAttentionError(
                    f"{self.path} holds results of {name}={before['settings'].get(name)!r}, not {value!r}; give the "
                    "run's own flags, or another --out"
                )
        for label, pattern in before["patterns"].items():
            if self.patterns.setdefault(label, pattern) != pattern:
                raise SparseAttentionError(
                    f"in {self.path} {label!r} stands for {pattern!r}, not {self.patterns[label]!r}; give another "
                    "label, or another --out"
                )
        self.cells = before["cells"]
        say(f"going on from {len(self.cells)} cells in {self.path}")

    def keep(self, key: str, cell: dict[str, Any]) -> None:
        """Add a cell, and write the file whole: a stop in between leaves the one before."""
        self.cells[key] = cell
        whole_file = {"header": self.header, "settings": self.settings, "patterns": self.patterns, "cells": self.cells}
        text = json.dumps(whole_file, indent=1)
        new = self.path.with_suffix(".new")
        new.write_text(text + "\n", encoding="utf-8")
        new.replace(self.path)


def measure_curves(
    model: Any,
    tokenizer: Any,
    chunks: Sequence[Mapping[str, Any]],
    patterns: Mapping[str, Any],
    args: argparse.Namespace,
) -> Results:
    """Measure what is not in the results yet, and return all of them.

    Args:
        chunks: held-out rows of the longest length, for perplexity.
        patterns: of :func:`patterns_of`.
        args: the flags of ``sa-hf evaluate``.
    """
    settings = {name: getattr(args, name) for name in SETTINGS}
    settings |= {"weights": _stamps(Path(args.model).glob("*.safetensors"))}
    if haystack_files(args.haystack):
        settings["haystack files"] = _stamps(haystack_files(args.haystack))
    results = Results(Path(args.out), settings, patterns, next(model.parameters()).device)
    haystack = Haystack(tokenizer, haystack_texts(args.haystack))
    model.eval()
    wanted = [(label, key, work) for label in patterns for key, work in _cells(model, haystack, chunks, args)]
    left = [(label, f"{label}/{key}", work) for label, key, work in wanted if f"{label}/{key}" not in results.cells]
    with tqdm(total=len(left), desc="cells", unit="cell") as bar:
        for label, pattern in patterns.items():
            own = [(key, work) for of, key, work in left if of == label]
            if not own:
                continue
            with attention(model, pattern):
                for key, work in own:
                    bar.set_postfix_str(key)
                    results.keep(key, work())
                    bar.update()
    write_report(Path(args.out), results.header, results.settings, results.cells)
    return results


def _stamps(paths: Iterable[Path]) -> list[Any]:
    """What tells the files of one run from others of the same names: sizes and times."""
    found = [path.stat() for path in sorted(paths)]
    return [[stat.st_size, stat.st_mtime_ns] for stat in found]


@contextlib.contextmanager
def attention(model: Any, pattern: Any) -> Iterator[None]:
    """A model with another attention inside the block; ``None`` is the model as it is."""
    if pattern is None:
        yield
    elif pattern == DENSE:
        with sa_hf.dense(model) if patch_of(model) is not None else contextlib.nullcontext():
            yield
    else:
        # After "as saved" and dense: a learned state of the checkpoint is given up here.
        if patch_of(model) is not None:
            sa_hf.unpatch_model(model)
        sa_hf.patch_model(model, pattern)
        yield
        sa_hf.unpatch_model(model)


def _cells(
    model: Any, haystack: Haystack, chunks: Sequence[Mapping[str, Any]], args: argparse.Namespace
) -> Iterator[tuple[str, Callable[[], dict[str, Any]]]]:
    """What is measured of one pattern: keys, and what measures each."""
    for length in args.lengths:
        yield f"{PERPLEXITY}/{length}", functools.partial(_perplexity, model, chunks, length, args)
    for kind in args.retrieval:
        task = RetrievalTask(kind=kind, needles=args.needles, wording=args.wording)
        for length in args.lengths:
            yield f"{RETRIEVAL}/{kind}/{length}", functools.partial(_retrieval, model, haystack, task, length, args)


def _perplexity(
    model: Any, chunks: Sequence[Mapping[str, Any]], length: int, args: argparse.Namespace
) -> dict[str, Any]:
    losses = [sliding_loss(model, torch.as_tensor(row["input_ids"]), length, args.batch_size) for row in chunks]
    low, high = bootstrap(losses)
    mean = sum(losses) / len(losses)
    return {
        "loss": mean, "loss_low": low, "loss_high": high, "perplexity": perplexity(mean),
        "perplexity_low": perplexity(low), "perplexity_high": perplexity(high), "texts": len(losses),
    }  # fmt: skip


def _retrieval(
    model: Any, haystack: Haystack, task: RetrievalTask, length: int, args: argparse.Namespace
) -> dict[str, Any]:
    """Answers found in all, and by depth: rows of a fixed depth where the kind has one, else answers by their own."""
    bins = args.depths
    if task.kind in ("single", "multi_key"):
        places = [(i + 0.5) / bins for i in range(bins)]
        samples = [s for p in places for s in task.samples(haystack, length, args.samples, args.seed, p)]
    else:
        samples = task.samples(haystack, length, args.samples * bins, args.seed)
    found = list(found_answers(model, samples, args.batch_size))
    cell = _share(found)
    cell["by depth"] = [_share(_at_depth(samples, found, i, bins)) for i in range(bins)]
    return cell


def _at_depth(
    samples: Sequence[Sample], found: Sequence[tuple[bool, ...]], number: int, bins: int
) -> list[tuple[bool, ...]]:
    return [
        tuple(r for a, r in zip(s.answers, right, strict=True) if min(bins - 1, int(a.depth * bins)) == number)
        for s, right in zip(samples, found, strict=True)
    ]


def _share(found: Sequence[tuple[bool, ...]]) -> dict[str, Any]:
    right, counted = [sum(row) for row in found], [len(row) for row in found]
    low, high = share_interval(right, counted)
    share = sum(right) / sum(counted) if sum(counted) else math.nan
    return {"accuracy": share, "low": low, "high": high, "answers": sum(counted)}


def lengthened(model: Any, tokenizer: Any, longest: int) -> None:
    """Lengthen the model's positions where it takes fewer tokens, and say so."""
    wanted = lengthening(model, longest)
    if wanted is not None:
        say(f"model: its positions are lengthened to {wanted} tokens, untrained; shorter --lengths leave them alone")
        sa_hf.extend_positions(model, wanted, tokenizer=tokenizer)
