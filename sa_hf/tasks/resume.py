"""Whether a run can go on from a checkpoint: looked at before anything is trained or written."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sa_hf.config import shown
from sa_hf.errors import SparseAttentionError
from sa_hf.hf.checkpoints.files import dense_name

_ADAPTER = "adapter_config.json"
# What must be equal beside the pattern for the weights to fit and to mean the same.
_FIELDS = (
    "model_type", "architectures", "vocab_size", "hidden_size", "num_hidden_layers", "max_position_embeddings",
    "label2id", "attention", "sa_hf",
)  # fmt: skip


def check_checkpoint(folder: Path, model: Any, lora_rank: int) -> None:
    """Raise ``SparseAttentionError`` where a checkpoint is of another model or pattern than ``model``, as patched."""
    adapter = _read(folder / _ADAPTER)
    saved_rank = 0 if adapter is None else adapter.get("r", 0)
    if saved_rank != lora_rank:
        raise SparseAttentionError(
            f"--resume {folder} was trained with --lora_rank {saved_rank}, not {lora_rank}; nearest: {saved_rank}"
        )
    source = folder if adapter is None else Path(str(adapter.get("base_model_name_or_path")))
    saved = _read(source / "config.json")
    if saved is None:
        raise SparseAttentionError(f"--resume {folder}: {source} holds no config.json, so its pattern is not known")
    now = json.loads(model.config.to_json_string(use_diff=False))
    now["architectures"] = [dense_name(type(model).__name__)]
    saved["architectures"] = [dense_name(name) for name in saved.get("architectures") or now["architectures"]]
    now["sa_hf"] = json.loads(json.dumps(getattr(model.config, "sa_hf", None)))
    for name in _FIELDS:
        before, after = saved.get(name), now.get(name)
        # A field that the file leaves out has its default.
        if before == after or (name not in saved and name != "sa_hf"):
            continue
        if name == "sa_hf":
            was, wanted = _difference(before, after)
            raise SparseAttentionError(
                f"--resume {folder} was trained with another pattern: {was}, not {wanted}; give the run's own pattern "
                "and options, or begin anew in another --output_dir"
            )
        raise SparseAttentionError(
            f"--resume {folder} was trained with {name}={shown(before)}, not {shown(after)}; give the run's own flags, "
            "or begin anew in another --output_dir"
        )


def _read(path: Path) -> dict[str, Any] | None:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise SparseAttentionError(f"{path} is no readable JSON: {error}") from error
    return found if isinstance(found, dict) else {}


def _difference(before: Any, after: Any) -> tuple[str, str]:
    """The first layer in which two assignments differ, in words."""
    one, other = _layers(before), _layers(after)
    for place in dict.fromkeys([*one, *other]):
        a, b = one.get(place), other.get(place)
        if a == b:
            continue
        return f"{_described(a, b)} in {place}", _described(b, a)
    return shown(before), shown(after)


def _layers(assignment: Any) -> dict[str, Any]:
    stacks = (assignment or {}).get("layers", {})
    return {f"{stack} layer {layer}": entry for stack, entries in stacks.items() for layer, entry in entries.items()}


def _described(entry: Mapping[str, Any] | None, other: Mapping[str, Any] | None) -> str:
    if entry is None:
        return "dense"
    if "name" not in entry or other is None or entry.get("name") != other.get("name"):
        return shown(entry.get("name", dict(entry)))
    fields = [f"{k}={v}" for k, v in entry.items() if other.get(k) != v]
    return f"{entry['name']} with {', '.join(fields)}"
