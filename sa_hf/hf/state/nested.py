"""A part of a model and the model around it, of which one is patched.

A patch belongs to one model. A part that is patched alone (``patch_model(model.bert, ...)``) runs sparse inside the
model around it, but that one knows nothing of it: it would save a dense checkpoint. A part cannot see what is around
it, so the check stands where such a model saves.
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn
from transformers import PreTrainedModel

from sa_hf.errors import SparseAttentionError
from sa_hf.hf.state.activity import PATCH, PLACE, Activity


def patched_parts(model: nn.Module) -> list[str]:
    """The names of the models inside a model that are patched by themselves."""
    # By name, not by class: of a checkpoint's carried code and the installed package each has its own.
    return [name for name, module in model.named_modules() if name and PATCH in vars(module)]


def check_not_nested(root: PreTrainedModel, names: Iterable[str], own: Activity | None) -> None:
    """That a patch of ``root`` (which ``own`` belongs to, where it has one) meets no other.

    Args: names: its attention modules.

    Raises:
        SparseAttentionError: a part of it is patched by itself, or it is itself a part of a patched model.
    """
    name = type(root).__name__
    parts = patched_parts(root)
    if parts:
        raise SparseAttentionError(
            f"the part {parts[0]!r} of this {name} is patched by itself; "
            f"unpatch_model(model.get_submodule({parts[0]!r})) comes first"
        )
    other = _other_patch(root, names, own)
    if other is not None:
        raise SparseAttentionError(
            f"this {name} is a part of a {other.owner} that is patched already; patch that one again, which replaces "
            "all of its patterns (a mapping says what each layer gets), or unpatch it first"
        )


def _other_patch(root: nn.Module, names: Iterable[str], own: Activity | None) -> Activity | None:
    for name in names:
        place = getattr(root.get_submodule(name), PLACE, None)
        if place is not None and place.activity is not own:
            activity: Activity = place.activity
            return activity
    return None


def not_patched(root: PreTrainedModel, function: str) -> SparseAttentionError:
    """The error of a function that needs a patched model."""
    parts = patched_parts(root)
    other = _other_patch(root, (name for name, _ in root.named_modules()), None)
    if parts:
        remedy = f"its part {parts[0]!r} is: give {function}(model.get_submodule({parts[0]!r}))"
    elif other is not None:
        remedy = f"the {other.owner} that it is a part of is: give that one"
    else:
        remedy = "patch_model(model, ...) comes first"
    return SparseAttentionError(f"{function}: this {type(root).__name__} is not patched; {remedy}")
