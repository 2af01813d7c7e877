"""No model saves a dense checkpoint around a part that is patched by itself."""

from __future__ import annotations

import functools
import warnings
from typing import Any

from transformers import PreTrainedModel

from sa_hf.errors import SparseAttentionError
from sa_hf.hf.state.activity import PATCH
from sa_hf.hf.state.nested import patched_parts

_GUARD = "sa_hf_guard"


def guard_saving() -> None:
    """Have every model that saves look for parts that are patched alone; done at the first patch, never at import.

    Where the part is patched, the model around it may not exist yet, and ``save_pretrained`` writes the config before
    it asks any part for its weights: so the check is at the one place that all models share.
    """
    save = PreTrainedModel.save_pretrained
    if hasattr(save, _GUARD):
        return

    @functools.wraps(save)
    def save_pretrained(self: PreTrainedModel, *args: Any, **kwargs: Any) -> Any:
        check_saves_whole(self)
        return save(self, *args, **kwargs)

    setattr(save_pretrained, _GUARD, True)
    PreTrainedModel.save_pretrained = save_pretrained


def check_saves_whole(model: PreTrainedModel) -> None:
    """That a model which saves holds no part that is patched alone.

    Raises:
        SparseAttentionError: it does, and its class is Transformers' own, which loads dense. A class of somebody
            else's may patch its part as it is built: it is warned about.
    """
    # An adapter alone holds nothing of its base.
    if PATCH in vars(model) or getattr(model, "_hf_peft_config_loaded", False):
        return
    parts = patched_parts(model)
    if not parts:
        return
    problem = (
        f"the part {parts[0]!r} of this {type(model).__name__} is patched by itself, so save_pretrained of the whole "
        "would write a dense checkpoint"
    )
    if _is_somebodys_own(type(model)):
        warnings.warn(f"{problem}; that is right only where the class patches it as it is built", stacklevel=3)
        return
    part = f"model.get_submodule({parts[0]!r})"
    raise SparseAttentionError(
        f"{problem}. Save the part, {part}.save_pretrained(...); or unpatch_model({part}), then patch the whole: "
        "patch_model(model, ...)"
    )


def _is_somebodys_own(cls: type) -> bool:
    """Whether a model's class is no class of Transformers (FSDP2 puts one of torch's in front)."""
    models = [base for base in cls.__mro__ if issubclass(base, PreTrainedModel)]
    return any(not base.__module__.startswith(("transformers.", "torch.")) for base in models)
