"""``extend_positions``: longer inputs, for good."""

from __future__ import annotations

import copy
from typing import Any, TypeVar

from torch import nn

from sa_hf.hf.state.extension import Extension, no_length, own_configs, plan_extension
from sa_hf.hf.state.patch import Patch, patch_of
from sa_hf.hf.state.positions import LIMIT, position_limit
from sa_hf.hf.state.sites import root_model

Model = TypeVar("Model", bound=nn.Module)


def keep_extension(patch: Patch, extension: Extension) -> None:
    """Make a lengthening outlast the patch: the configs that ``unpatch_model`` puts back get the new limits."""
    memo: dict[int, Any] = {}
    for place, (name, attribute, original) in enumerate(patch.originals):
        kept = copy.deepcopy(original, memo)
        for key, value in extension.changed.items():
            if key != LIMIT and getattr(kept, key, None) is not None:
                setattr(kept, key, value)
        limit = getattr(kept, LIMIT, None)
        before = patch.extension.limits if patch.extension is not None else {}
        if isinstance(limit, int) and before.get(limit, limit) in extension.limits:
            setattr(kept, LIMIT, extension.limits[before.get(limit, limit)])
        patch.originals[place] = name, attribute, kept


def extend_positions(
    model: Model, max_length: int, tokenizer: Any = None, rope_parameters: dict[str, Any] | None = None
) -> Model:
    """Let a model take inputs of ``max_length`` tokens, for good (``unpatch_model`` does not undo it).

    Args:
        tokenizer: gets the new limit. Without one a warning says, once for a model, that the tokenizer still cuts at
            its own.
        rope_parameters: RoPE scaling, as in Transformers' configs, e.g. ``{"rope_type": "yarn", "factor": 4.0}``.

    Returns:
        The model itself.

    Raises:
        UnsupportedModelError: the model's positions cannot be lengthened.
        SparseAttentionError: a length below the model's own.
    """
    root = root_model(model)
    if max_length is None:
        raise no_length(None, position_limit(root))
    plan = plan_extension(root, max_length, tokenizer, rope_parameters)
    patch = patch_of(root)
    if patch is None:
        own_configs(root)
    extension = plan.apply(root, before=None)
    if patch is not None:
        keep_extension(patch, extension)
    return model
