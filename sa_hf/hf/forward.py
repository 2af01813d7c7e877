"""Hooks around the outer forward of a patched model."""

from __future__ import annotations

import inspect
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from sa_hf.hf.attention import Activity, refuse_attentions
from sa_hf.hf.masks import FORWARD, ForwardInputs


class OuterForward:
    """Reads what the model is given about its sequences, for the masks that are built inside."""

    def __init__(self, root: PreTrainedModel, activity: Activity) -> None:
        self.activity = activity
        self.names = list(inspect.signature(root.forward).parameters)

    def register(self, root: PreTrainedModel) -> list[Any]:
        return [
            root.register_forward_pre_hook(self.before, with_kwargs=True),
            root.register_forward_hook(self.after, with_kwargs=True, always_call=True),
        ]

    def before(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        FORWARD.set(None)
        if not self.activity.on:
            return None
        named = {**dict(zip(self.names, args, strict=False)), **kwargs}
        if named.get("output_attentions") or getattr(model.config, "output_attentions", False):
            refuse_attentions()
        FORWARD.set(
            ForwardInputs(named.get("sequence_ids"), named.get("position_ids"), named.get("cu_seq_lens_q"))
        )  # fmt: skip
        if "sequence_ids" in self.names:
            return None
        return args, {key: value for key, value in kwargs.items() if key != "sequence_ids"}

    def after(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        FORWARD.set(None)
        return output
