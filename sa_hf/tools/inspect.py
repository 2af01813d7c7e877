"""Look into a checkpoint folder without loading its weights: patterns per layer, learned state, carried code."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sa_hf.config import SparseAttentionConfig
from sa_hf.errors import SparseAttentionError


@dataclass
class Inspection:
    """What a checkpoint says of itself.

    ``layers``: (stack, layer, pattern or "dense", the config's dict); ``state``: tensor name to (dtype, shape) of the
    learned sparse state; ``problems``: what would stop it from loading as it was saved.
    """

    folder: Path
    architecture: str
    version: Any
    layers: list[tuple[str, str, str, dict[str, Any]]] = field(default_factory=list)
    state: dict[str, tuple[str, tuple[int, ...]]] = field(default_factory=dict)
    code_files: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


def inspect_checkpoint(folder: str | Path) -> Inspection:
    """Read config.json and the safetensors headers of a saved model.

    Raises:
        SparseAttentionError: the folder has no readable config.json.
    """
    folder = Path(folder)
    try:
        config = json.loads((folder / "config.json").read_text())
    except (OSError, json.JSONDecodeError) as error:
        raise SparseAttentionError(
            f"{folder} has no readable config.json ({error}); give a folder of save_pretrained"
        ) from error
    section = config.get("sa_hf")
    found = Inspection(folder, ", ".join(config.get("architectures") or ["unknown"]), None)
    found.code_files = sorted(p.name for p in folder.glob("*.py"))
    if not isinstance(section, dict):
        found.problems.append("no 'sa_hf' section: an ordinary dense checkpoint")
        return found
    found.version = section.get("version")
    for stack, layers in (section.get("layers") or {}).items():
        for index, entry in layers.items():
            found.layers += _entries(stack, index, entry, found.problems)
    if not config.get("auto_map"):
        found.problems.append("no auto_map: AutoModel cannot find the code that makes the model sparse")
    found.state = _sparse_state(folder)
    return found


def _entries(
    stack: str, index: str, entry: dict[str, Any], problems: list[str]
) -> list[tuple[str, str, str, dict[str, Any]]]:
    by_head = entry.get("heads", {"": entry})
    result = []
    for heads, fields in by_head.items():
        try:
            name = SparseAttentionConfig.from_dict(fields).name
        except SparseAttentionError as error:
            problems.append(f"{stack} layer {index}: {error}")
            name = str(fields.get("name"))
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
