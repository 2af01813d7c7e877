"""Hooks around the outer forward of a patched model."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from sa_hf.errors import SparseAttentionError
from sa_hf.hf.attention import Activity, refuse_attentions
from sa_hf.hf.centroids import follow_optimizers
from sa_hf.hf.layers import sparse_children, tie_layers
from sa_hf.hf.losses import add_to_loss
from sa_hf.hf.masks import ForwardInputs, hand_over
from sa_hf.patterns.base import SparseAttention


class OuterForward:
    """Reads what the model is given about its sequences, for the masks built inside; counts training steps once per
    outer forward; joins the auxiliary losses to the model's own."""

    def __init__(self, root: PreTrainedModel, activity: Activity, names: list[str]) -> None:
        self.activity = activity
        self.names = names  # of the attention modules
        self.parameters = list(inspect.signature(root.forward).parameters)
        self.tied: tuple[int, ...] = ()

    def register(self, root: PreTrainedModel) -> list[Any]:
        return [
            root.register_forward_pre_hook(self.before, with_kwargs=True),
            root.register_forward_hook(self.after, with_kwargs=True, always_call=True),
        ]

    def _named(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        return {**dict(zip(self.parameters, args, strict=False)), **kwargs}

    def before(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        hand_over(None)
        if not self.activity.on:
            return None
        named = self._named(args, kwargs)
        if named.get("output_attentions") or getattr(model.config, "output_attentions", False):
            refuse_attentions()
        crossed = getattr(model.config, "is_encoder_decoder", False) or named.get("encoder_hidden_states") is not None
        if crossed and named.get("sequence_ids") is not None:
            raise SparseAttentionError(
                f"sequence_ids cannot say which sequences of encoder and decoder belong together in a "
                f"{type(model).__name__}, whose cross-attention would mix them; pad the batch instead"
            )
        children = sparse_children(model, self.names)
        self._tie(children)
        if model.training:
            for child in children:
                child.advance_step()
            follow_optimizers(model, children)
            if not torch.compiler.is_compiling():  # a number that changes would have it compile anew
                self.activity.forwards += 1
        given = ForwardInputs(
            named.get("sequence_ids"), named.get("position_ids"), named.get("cu_seq_lens_q"), self.activity.forwards
        )
        hand_over(given)
        if torch.compiler.is_compiling():
            self.activity.traced = given
        if "sequence_ids" in self.parameters:
            return None
        return args, {key: value for key, value in kwargs.items() if key != "sequence_ids"}

    def _tie(self, children: list[SparseAttention]) -> None:
        """Tie the layers again where other modules act than before: PEFT copies each of them on its own."""
        acting = tuple(id(child) for child in children)
        if acting != self.tied:
            tie_layers(children)
            self.tied = acting

    def after(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        hand_over(None)
        if not self.activity.on or output is None:
            return output
        children = sparse_children(model, self.names)
        try:
            return add_to_loss(model, children, self._named(args, kwargs), output) if model.training else output
        finally:
            for child in children:
                child.drop_graph()
