"""The model card of a saved checkpoint: what it is, how to load it, and what is known of where it comes from.

Only what stands in the folder, or what the caller says: what is not known is not in the card.
"""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData, try_to_load_from_cache
from huggingface_hub.errors import HFValidationError

from sa_hf.hf.checkpoints.files import dense_name
from sa_hf.hf.state.assignment import format_indices

CARD_FILE = "README.md"
# A card with this line is replaced by the next save; without it, it is the user's own.
MARK = "<!-- written by sa_hf: remove this line to keep a text of your own here -->"
METRICS_FILE = "metrics.json"  # of sa-hf finetune
TASKS = {"causal-lm": "text-generation", "masked-lm": "fill-mask", "sequence-classification": "text-classification"}
OF_BASE = ("license", "license_name", "license_link", "language")  # what a derived model has from its base
CARRIED = ("base_model", "license", "license_name", "license_link", "datasets", "language")

TEMPLATE = """{mark}

# {architecture} with sparse attention

{patterns}.

## How to load

```python
from transformers import {auto}

model = {auto}.from_pretrained("path/to/this/folder", trust_remote_code=True)
```

The checkpoint carries the code that it needs; where `sa_hf` is installed in the same version (`pip install .` in a
clone of its repository), that is used instead. Load it through an Auto class: a concrete class raises.
Without `trust_remote_code=True` loading raises: the weights were trained for this attention, not for the dense one.

## What is known

{facts}

## Attention, layer by layer

{table}
"""


def card_text(folder: Path, known: Mapping[str, Any]) -> str:
    """The card of the checkpoint in a folder.

    Args:
        known: fields of the metadata that the caller knows (``base_model``, ``license``, ``datasets``, ...); those that
            are None, and any that nobody knows, are left out.
    """
    config = json.loads((folder / "config.json").read_text("utf-8"))
    layers = [
        (stack, index, part)
        for stack, entries in config["sa_hf"]["layers"].items()
        for index, entry in entries.items()
        for part in _parts(entry)
    ]
    counts = Counter(fields["name"] for _, _, (_, fields) in layers)
    architecture = dense_name((config.get("architectures") or ["A model"])[0])
    results = _results(folder, known.get("datasets"))
    data = ModelCardData(
        library_name="transformers",
        tags=["sparse-attention", *sorted(counts)],
        model_name=f"{architecture} with sparse attention" if results else None,
        eval_results=results or None,
        **{name: known[name] for name in CARRIED if known.get(name) is not None},
    )
    text = TEMPLATE.format(
        mark=MARK,
        architecture=architecture,
        auto=next(iter(re.findall(r"Auto\w+", str(config.get("attn_implementation")))), "AutoModel"),
        patterns=", ".join(f"`{name}` in {n} layer{'s' * (n != 1)}" for name, n in counts.items())
        or "All layers dense",
        facts=_facts(config, known, _metrics(folder).get("arguments", {}), results),
        table=_layer_table(layers),
    )
    return str(ModelCard(f"---\n{data.to_yaml()}\n---\n\n{text}", ignore_metadata_errors=False))


def known_of(name_or_path: str, card: Path) -> dict[str, Any]:
    """What is known of a model's origin: by the card that lies there already, if it is ours, else by the card of the
    model that it was loaded from (a folder, or a name whose card is in the local cache; nothing is fetched)."""
    found = metadata(card) if is_ours(card) else {}
    source = _source_card(name_or_path)
    if source is not None and is_ours(source):
        found = {**metadata(source), **found}
    elif name_or_path and not os.path.exists(name_or_path) and re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name_or_path):
        theirs = {} if source is None else metadata(source)
        kept: dict[str, Any] = {name: theirs[name] for name in OF_BASE if name in theirs}
        found = {"base_model": name_or_path, **kept, **found}
    return {name: found[name] for name in CARRIED if name in found}


def is_ours(card: Path) -> bool:
    return card.is_file() and MARK in card.read_text("utf-8", errors="replace")


def metadata(card: Path) -> dict[str, Any]:
    """The metadata of a card; empty where there is none that can be read."""
    try:
        return dict(ModelCard.load(card, ignore_metadata_errors=True).data.to_dict())
    except (OSError, ValueError):
        return {}


def _source_card(name_or_path: str) -> Path | None:
    if not name_or_path:
        return None
    if os.path.isdir(name_or_path):
        return Path(name_or_path) / CARD_FILE
    try:
        cached = try_to_load_from_cache(name_or_path, CARD_FILE)
    except HFValidationError:
        return None
    return Path(cached) if isinstance(cached, str) else None


def _parts(entry: Mapping[str, Any]) -> list[tuple[str, Mapping[str, Any]]]:
    return list(entry["heads"].items()) if "heads" in entry else [("", entry)]


def _results(folder: Path, datasets: Any) -> list[EvalResult]:
    """The evaluation in the metrics file of a fine-tuning run, where one lies there."""
    metrics = _metrics(folder)
    arguments = metrics.get("arguments", {})
    task, dataset = arguments.get("task"), arguments.get("dataset") or datasets
    if not task or not dataset:
        return []
    task = TASKS.get(task, task)
    names = [n for n in metrics if n.startswith("eval_") and n.split("_")[1] not in {"runtime", "samples", "steps"}]
    return [
        EvalResult(task, str(dataset), str(dataset), name.removeprefix("eval_"), metrics[name])
        for name in names
        if isinstance(metrics[name], int | float)
    ]


def _metrics(folder: Path) -> dict[str, Any]:
    """The metrics file of a fine-tuning run; empty where none lies in the folder."""
    path = folder / METRICS_FILE
    found: dict[str, Any] = json.loads(path.read_text("utf-8")) if path.is_file() else {}
    return found


def _facts(
    config: Mapping[str, Any], known: Mapping[str, Any], arguments: Mapping[str, Any], results: list[EvalResult]
) -> str:
    """``arguments``: of a fine-tuning run, whose names of model and data may be none of the hub's."""
    base, data = known.get("base_model") or arguments.get("model"), known.get("datasets") or arguments.get("dataset")
    data = ", ".join(data) if isinstance(data, list) else data
    rows = [("base model", base), ("licence", known.get("license")), ("data", data)]
    limit = next((config[n] for n in ("max_position_embeddings", "n_positions") if config.get(n)), None)
    rows += [("longest input, tokens", limit), ("dtype of the weights", config.get("dtype"))]
    rows += [(f"{r.metric_type} on {r.dataset_name}", f"{r.metric_value:.4g}") for r in results]
    return "\n".join(f"- {name}: {value}" for name, value in rows if value is not None)


def _layer_table(layers: list[tuple[str, str, tuple[str, Mapping[str, Any]]]]) -> str:
    groups: dict[tuple[str, str, str], list[int]] = {}
    for stack, index, (heads, fields) in layers:
        groups.setdefault((stack, heads, json.dumps(fields, sort_keys=True)), []).append(int(index))
    lines = ["| stack | layers | pattern | config |", "| --- | --- | --- | --- |"]
    for (stack, heads, text), indices in groups.items():
        fields = json.loads(text)
        shown = ", ".join(f"{k}={v}" for k, v in fields.items() if k not in {"name", "version"})
        where = format_indices(sorted(indices)) + (f", heads {heads}" if heads else "")
        lines.append(f"| {stack} | {where} | {fields['name']} | {shown} |")
    return "\n".join(lines)
