"""What a loaded checkpoint must hold: an assignment of patterns, and their learned state."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from transformers import PreTrainedConfig, PreTrainedModel

from sa_hf.errors import SparseAttentionError
from sa_hf.hf.checkpoints.auto import CONFIG_KEY, REMEDY
from sa_hf.hf.state.activity import IMPLEMENTATION
from sa_hf.hf.state.assignment import Assignment, assignment_from_dict


def saved_assignment(config: PreTrainedConfig) -> Assignment:
    """The assignment in a loaded config.

    Raises:
        SparseAttentionError: there is none, it is not valid, or an ``attn_implementation`` was asked for.
        ConfigVersionError: a newer sa_hf wrote it.
    """
    if getattr(config, CONFIG_KEY, None) is None:
        raise SparseAttentionError(
            f"the {type(config).__name__} has no {CONFIG_KEY!r} key, which says where which pattern runs; load the "
            "folder without `config=`, or start from its own: AutoConfig.from_pretrained(folder)"
        )
    asked = config._attn_implementation
    if asked not in (None, IMPLEMENTATION) and not str(asked).startswith(REMEDY):
        raise SparseAttentionError(
            f"attn_implementation={asked!r} would replace the sparse attention of this checkpoint; leave it out. For "
            "dense attention, load and call `sa_hf.unpatch_model(model)`"
        )
    return assignment_from_dict(config.sa_hf)


def check_sparse_state(model: PreTrainedModel, info: Mapping[str, Any]) -> None:
    """Learned sparse state that is missing, of another shape, or without a place must not pass in silence."""
    present = {name for name, _ in model.named_modules()}
    missing = [name for name in sorted_names(info.get("missing_keys", ())) if _is_sparse_state(name)]
    shaped = [name for name in sorted_names(info.get("mismatched_keys", ())) if _is_sparse_state(name)]
    extra = [
        name
        for name in sorted_names(info.get("unexpected_keys", ()))
        # The other half of an encoder-decoder, or the layers of another architecture, are reported by Transformers.
        if _is_sparse_state(name) and any(owner in present for owner in _owners(model, name))
    ]
    if missing or shaped or extra:
        raise SparseAttentionError(
            f"the weights do not fit the patterns in config.json: missing {missing}, of another shape {shaped}, "
            f"unexpected {extra}; both must come from one save_pretrained of a patched model"
        )


def sorted_names(keys: Iterable[Any]) -> list[str]:
    return sorted(key if isinstance(key, str) else key[0] for key in keys)


def _is_sparse_state(name: str) -> bool:
    return ".sparse." in f".{name}"


def _owners(model: PreTrainedModel, name: str) -> tuple[str, str, str]:
    """The attention module that a key belongs to: as named, and with the base model's prefix removed or added."""
    owner = f".{name}".partition(".sparse.")[0].removeprefix(".")
    prefix = f"{model.base_model_prefix}."
    return owner, owner.removeprefix(prefix), prefix + owner
