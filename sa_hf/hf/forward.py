"""Hooks around the outer forward of a patched model."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from sa_hf.config import SparseAttention
from sa_hf.errors import SparseAttentionError
from sa_hf.hf.attention import PACKED, Activity, refuse_attentions
from sa_hf.hf.centroids import follow_optimizers
from sa_hf.hf.checkpointing import CarryHandle, carry_inputs, checkpointed
from sa_hf.hf.layers import sparse_children, tie_layers
from sa_hf.hf.losses import LABELS, add_to_loss, check_live, loss_of, total_losses
from sa_hf.hf.masks import ForwardInputs, hand_over


class OuterForward:
    """Reads what the model is given about its sequences, for the masks built inside; counts training steps once per
    outer forward; joins the auxiliary losses to the model's own.

    Args: configs: the model's own, each with its original implementation; names: the attention modules.
    """

    def __init__(
        self, root: PreTrainedModel, activity: Activity, names: list[str], configs: list[tuple[PreTrainedConfig, str]]
    ) -> None:
        self.activity = activity
        self.names = names
        self.configs = configs
        self.parameters = list(inspect.signature(root.forward).parameters)
        self.tied: tuple[int, ...] = ()
        self.warned = False  # of losses that join none
        self.before_packed: list[str] = []  # the implementations that a packed call inside dense(model) replaces

    def register(self, root: PreTrainedModel) -> list[Any]:
        return [
            root.register_forward_pre_hook(self.before, with_kwargs=True),
            root.register_forward_hook(self.after, with_kwargs=True, always_call=True),
            CarryHandle(root),
        ]

    def _named(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        return {**dict(zip(self.parameters, args, strict=False)), **kwargs}

    def before(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        hand_over(None)
        named = self._named(args, kwargs)
        if not self.activity.on:
            return self._before_dense(model, args, kwargs, named)
        if getattr(model, "_is_replica", False):
            raise SparseAttentionError(
                f"nn.DataParallel runs replicas of {type(model).__name__}, which lose what sparse attention learns "
                "(convolutions, centroids, steps); start one process per GPU with `accelerate launch` or `torchrun` "
                "(DDP), or show this process one GPU (CUDA_VISIBLE_DEVICES=0)"
            )
        if named.get("output_attentions") or getattr(model.config, "output_attentions", False):
            refuse_attentions()
        _check_not_crossed(model, named)
        children = sparse_children(model, self.names)
        self._tie(children)
        if model.training:
            for child in children:
                child.advance_step()
            follow_optimizers(model, children)
            if not torch.compiler.is_compiling():  # a number that changes would have it compile anew
                self.activity.forwards += 1
                carry_inputs(model)
        given = ForwardInputs(
            named.get("sequence_ids"), named.get("position_ids"), named.get("cu_seq_lens_q"), self.activity.forwards
        )
        hand_over(given)
        if torch.compiler.is_compiling():
            self.activity.traced = given
        return self._without_ids(args, kwargs)

    def _without_ids(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if "sequence_ids" in self.parameters:
            return None
        return args, {key: value for key, value in kwargs.items() if key != "sequence_ids"}

    def _before_dense(
        self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], named: dict[str, Any]
    ) -> Any:
        """A call inside ``dense(model)``: where it names its sequences, its masks are made within them."""
        ids = named.get("sequence_ids")
        if ids is None:
            return None
        _check_not_crossed(model, named)
        mask = named.get("attention_mask")
        if torch.compiler.is_compiling() or (isinstance(mask, Tensor) and mask.dim() != 2):
            raise SparseAttentionError(
                "sequence_ids inside dense(model) join the 2-D attention_mask [batch, length] of an uncompiled model; "
                "call the model itself, or give one sequence per row"
            )
        originals = {id(config): original for config, original in self.configs}
        hand_over(ForwardInputs(ids, originals=originals))
        self.before_packed = [config._attn_implementation for config, _ in self.configs]
        for config, _ in self.configs:
            config._attn_implementation_internal = PACKED
        return self._without_ids(args, kwargs)

    def _after_dense(self) -> None:
        for (config, _), before in zip(self.configs, self.before_packed, strict=False):
            config._attn_implementation_internal = before
        self.before_packed = []

    def _guard_recomputation(self, model: nn.Module, output: Any) -> None:
        """A layer that is recomputed after the ``dense`` block would run its pattern: its gradients would be wrong."""
        if torch.compiler.is_compiling() or not (model.training and torch.is_grad_enabled()):
            return
        if next(checkpointed(model), None) is None:
            return

        def check(_: Tensor) -> None:
            if self.activity.on:
                raise SparseAttentionError(
                    "backward() of a forward made inside dense(model) came after the block, where gradient "
                    "checkpointing would recompute the layers sparse; call it inside the block, or in another "
                    "`with sa_hf.dense(model):`"
                )

        for tensor in _tensors(output):
            if tensor.requires_grad:
                tensor.register_hook(check)

    def _tie(self, children: list[SparseAttention]) -> None:
        """Tie the layers again where other modules act than before: PEFT copies each of them on its own."""
        acting = tuple(id(child) for child in children)
        if acting != self.tied:
            tie_layers(children)
            self.tied = acting

    def after(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        hand_over(None)
        self._after_dense()
        if not self.activity.on:
            self._guard_recomputation(model, output)
            return output
        if output is None:
            return output
        children = sparse_children(model, self.names)
        try:
            if not model.training:
                return output
            named = self._named(args, kwargs)
            if self.activity.collected is not None:
                check_live(children)
                self.activity.collected += total_losses(children).values()
                return output
            if loss_of(output, named) is None:
                self._warn_of_lost_losses(model, children)
                return output
            return add_to_loss(model, children, named, output)
        finally:
            for child in children:
                child.drop_graph()

    def _warn_of_lost_losses(self, model: nn.Module, children: list[SparseAttention]) -> None:
        """Once: the output has no loss that the auxiliary ones could join, so nothing trains on them."""
        if self.warned or torch.compiler.is_compiling() or not torch.is_grad_enabled():
            return
        # Looked at once: a number that is read waits for the device.
        self.warned = True
        # A coefficient of 0 asks for the figure alone.
        lost = [name for name, loss in total_losses(children).items() if loss.requires_grad and loss.item() != 0]
        if not lost:
            return
        name = type(model).__name__
        if LABELS.isdisjoint(self.parameters):
            reason = f"{name} computes no loss"
            advice = f"patch the model that computes it (the one around this {name}), not this part of it"
        else:
            reason = f"no labels reached {name}, so it computed no loss"
            advice = (
                "give it labels; a Trainer keeps them back under label_smoothing_factor and compute_loss_func: use "
                "sa_hf.hf.trainer.SparseTrainer there, which adds the losses"
            )
        warnings.warn(
            f"{reason}: the auxiliary losses {lost} are not trained on. To train on them, {advice}", stacklevel=2
        )


def _tensors(output: Any) -> Iterator[Tensor]:
    """The tensors in a model's output: a tuple or mapping, perhaps of tuples (hidden states)."""
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, Mapping | tuple | list):
        for value in output.values() if isinstance(output, Mapping) else output:
            yield from _tensors(value)


def _check_not_crossed(model: nn.Module, named: dict[str, Any]) -> None:
    crossed = getattr(model.config, "is_encoder_decoder", False) or named.get("encoder_hidden_states") is not None
    if crossed and named.get("sequence_ids") is not None:
        raise SparseAttentionError(
            f"sequence_ids cannot say which sequences of encoder and decoder belong together in a "
            f"{type(model).__name__}, whose cross-attention would mix them; pad the batch instead"
        )
