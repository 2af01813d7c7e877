"""Look into a checkpoint folder without loading its weights: patterns per layer, learned state, carried code."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sa_hf.config import SparseAttentionConfig, shown
from sa_hf.errors import SparseAttentionError
from sa_hf.tasks.load import ADAPTER_CONFIG, CONFIG, adapter_fields, check_place, near


@dataclass
class Inspection:
    """What a checkpoint says of itself.

    ``layers``: (stack, layer, pattern or "dense", the config's dict); ``state``: tensor name to (dtype, shape) of the
    learned sparse state; ``problems``: what would stop it from loading as it was saved; ``base``: of an adapter the
    model that it names, whose architecture, version, layers and code these are.
    """

    folder: Path
    architecture: str
    version: Any
    layers: list[tuple[str, str, str, dict[str, Any]]] = field(default_factory=list)
    state: dict[str, tuple[str, tuple[int, ...]]] = field(default_factory=dict)
    code_files: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    base: str | None = None

    def grouped(self) -> list[tuple[str, str, str, dict[str, Any]]]:
        """``layers`` with equal ones in one entry, their numbers as "0-3,6"; numbers that are none stay apart."""
        groups: dict[tuple[str, ...], list[str]] = {}
        for stack, place, name, fields in self.layers:
            index, _, heads = str(place).partition(" ")
            key = (stack, heads, name, json.dumps(fields, sort_keys=True))
            groups.setdefault(key, []).append(index)
        rows = []
        for (stack, heads, name, fields_text), indices in groups.items():
            for numbers in _numbers(indices):
                rows.append((stack, f"{numbers} {heads}".rstrip(), name, json.loads(fields_text)))
        return rows

    def grouped_state(self) -> list[tuple[str, str, str]]:
        """``state`` as (name, dtype, shape), the tensors that differ in their layer's number in one entry."""
        groups: dict[tuple[str, str, str, str], list[str]] = {}
        for name, (dtype, shape) in self.state.items():
            before, number, after = _split_at_number(name)
            groups.setdefault((before, after, dtype, str(list(shape))), []).append(number)
        rows = []
        for (before, after, dtype, dimensions), numbers in groups.items():
            rows += [(f"{before}{n}{after}", dtype, dimensions) for n in _numbers(numbers)]
        return rows


def _numbers(indices: list[str]) -> list[str]:
    """Numbers as one entry "0-3,6"; what is no number as it is."""
    from sa_hf.hf.state.assignment import format_indices

    numbers = sorted(int(index) for index in indices if index.isdecimal())
    others = [index for index in indices if not index.isdecimal()]
    return ([format_indices(numbers)] if numbers else []) + others


def _split_at_number(name: str) -> tuple[str, str, str]:
    """A tensor's name around its first whole number, the layer's: "a.", "3", ".b"."""
    match = re.search(r"(?<=\.)\d+(?=\.)", name)
    return (name, "", "") if match is None else (name[: match.start()], match[0], name[match.end() :])


def inspect_checkpoint(folder: str | Path) -> Inspection:
    """Read config.json and the safetensors headers of a saved model, of an adapter those of its base, too.

    Raises:
        SparseAttentionError: the folder has no readable config.json.
    """
    folder = Path(folder)
    adapter = adapter_fields(folder)
    if adapter and not (folder / CONFIG).exists():
        return _inspect_adapter(folder, adapter)
    try:
        config = json.loads((folder / CONFIG).read_text("utf-8"))
    except FileNotFoundError as error:
        what = f"has no {CONFIG}" if folder.is_dir() else "is no folder"
        raise SparseAttentionError(f"{folder} {what}{near(str(folder))}; give a folder of save_pretrained") from error
    except (OSError, ValueError) as error:
        raise SparseAttentionError(
            f"{folder} has no readable {CONFIG} ({error}); give a folder of save_pretrained"
        ) from error
    if not isinstance(config, dict):
        raise SparseAttentionError(f"{folder}/config.json holds {type(config).__name__}, not the fields of a model")
    from sa_hf.hf.checkpoints.files import dense_name

    section = config.get("sa_hf")
    found = Inspection(folder, ", ".join(map(dense_name, config.get("architectures") or ["unknown"])), None)
    found.code_files = sorted(p.name for p in folder.glob("*.py"))
    if not isinstance(section, dict):
        found.problems.append("no 'sa_hf' section: an ordinary dense checkpoint")
        return found
    found.version = section.get("version")
    layers = section.get("layers")
    if not isinstance(layers, dict) or not all(isinstance(entries, dict) for entries in layers.values()):
        found.problems.append("the 'sa_hf' section names no layers: {stack: {layer: config}} is expected")
        layers = {}
    for stack, entries in layers.items():
        for index, entry in entries.items():
            found.layers += _entries(stack, index, entry, found.problems)
    found.problems += _code_problems(config.get("auto_map"), found.code_files)
    found.state = _sparse_state(folder)
    return found


def _inspect_adapter(folder: Path, fields: dict[str, Any]) -> Inspection:
    """An adapter's own learned state, and all else of its base, where that is a folder and not on the hub."""
    base = str(fields.get("base_model_name_or_path"))
    try:
        check_place(base)
        found = inspect_checkpoint(base) if Path(base).is_dir() else Inspection(folder, "unknown", None)
    except SparseAttentionError as error:
        found = Inspection(folder, "unknown", None)
        found.problems.append(f"its base: {error}. It is base_model_name_or_path in {ADAPTER_CONFIG}")
    found.folder, found.base, found.state = folder, base, {**found.state, **_sparse_state(folder)}
    return found


def _code_problems(auto_map: Any, files: list[str]) -> list[str]:
    """What is wrong with the code that ``auto_map`` names."""
    if not isinstance(auto_map, dict) or not auto_map:
        return ["no auto_map: AutoModel cannot find the code that makes the model sparse"]
    problems = []
    for name in sorted({str(value).rpartition(".")[0] for value in auto_map.values()}):
        if "--" in name:
            problems.append(f"auto_map takes code from another repository, {name!r}: look at it before you trust it")
        elif f"{name}.py" not in files:
            problems.append(f"auto_map names {name}.py, which is not in the folder")
    return problems


def _entries(stack: str, index: str, entry: Any, problems: list[str]) -> list[tuple[str, str, str, dict[str, Any]]]:
    by_head = entry.get("heads", {"": entry}) if isinstance(entry, dict) else {"": entry}
    if not isinstance(by_head, dict):
        by_head = {"": by_head}
    result = []
    for heads, fields in by_head.items():
        try:
            name = SparseAttentionConfig.from_dict(fields).name
        except SparseAttentionError as error:
            problems.append(f"{stack} layer {index}: {error}")
            fields = fields if isinstance(fields, dict) else {}
            name = shown(fields.get("name"))
        result.append((stack, f"{index} heads {heads}" if heads else index, name, fields))
    return result


def _sparse_state(folder: Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    from safetensors import safe_open

    state = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as weights:
            for name in weights.keys():  # noqa: SIM118  (safe_open is no mapping)
                if ".sparse." in name:
                    piece = weights.get_slice(name)
                    state[name] = (piece.get_dtype(), tuple(piece.get_shape()))
    return state
