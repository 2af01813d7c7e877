"""``extend_positions``: longer inputs, for good."""

from __future__ import annotations

import copy
from typing import Any, TypeVar

from torch import nn
from transformers import PreTrainedModel

from sa_hf.hf.state.extension import left_to_the_limit, no_length, own_configs, plan_extension
from sa_hf.hf.state.patch import Patch, patch_of
from sa_hf.hf.state.positions import LIMIT, position_limit
from sa_hf.hf.state.sites import root_model

Model = TypeVar("Model", bound=nn.Module)


def _keep(root: PreTrainedModel, patch: Patch, scaled: bool) -> None:
    """Make a lengthening outlast the patch: the configs that ``unpatch_model`` puts back say what the live ones do, and
    it cuts nothing back, as the length that the patch was given is no longer one.

    Args: scaled: it gave ``rope_parameters``.
    """
    memo: dict[int, Any] = {}
    for place, (name, attribute, original) in enumerate(patch.originals):
        kept, live = copy.deepcopy(original, memo), getattr(root.get_submodule(name), attribute)
        limit = getattr(live, LIMIT, None)
        if isinstance(limit, int) and limit != getattr(kept, LIMIT):
            for field, value in left_to_the_limit(kept).items():
                setattr(kept, field, value)
            setattr(kept, LIMIT, limit)
        if scaled and isinstance(getattr(kept, "rope_parameters", None), dict):
            kept.rope_parameters = copy.deepcopy(live.rope_parameters)
        patch.originals[place] = name, attribute, kept
    if patch.extension is not None:
        patch.extension.tables, patch.extension.buffers, patch.extension.limits = [], [], {}
    if patch.extension is not None and scaled:
        patch.extension.rotary = {}


def extend_positions(
    model: Model, max_length: int, tokenizer: Any = None, rope_parameters: dict[str, Any] | None = None
) -> Model:
    """Let a model take inputs of ``max_length`` tokens, for good (``unpatch_model`` does not undo it).

    Args:
        tokenizer: gets the new limit. Without one a warning says, once for a model, that the tokenizer still cuts at
            its own.
        rope_parameters: RoPE scaling, as in Transformers' configs, e.g. ``{"rope_type": "yarn", "factor": 4.0}``.
            Of "dynamic", as in ``patch_model``, the config's limit stays.

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
    plan.apply(root, before=None)
    if patch is not None:
        _keep(root, patch, scaled=rope_parameters is not None)
    return model
