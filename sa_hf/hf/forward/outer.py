"""What happens around a forward of a patched model, whoever calls it: ``model(...)``, ``model.forward(...)``, a model
inside it.

Every Transformers model of a patched one has hooks, and a class whose ``forward`` does what they do where they are
skipped. The outermost that is reached begins and ends the forward (:class:`ModelForward`).
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from sa_hf.config import SparseAttention
from sa_hf.errors import SparseAttentionError
from sa_hf.hf.caches.layer import cache_in
from sa_hf.hf.forward.centroids import follow_optimizers
from sa_hf.hf.forward.checkpointing import CarryHandle, carry_inputs, checkpointed
from sa_hf.hf.forward.convolution import refuse_convolved_keys
from sa_hf.hf.forward.extra_tokens import trimmed
from sa_hf.hf.forward.keywords import refuse_attentions
from sa_hf.hf.forward.losses import add_to_loss, carrying, check_live, loss_of, total_losses
from sa_hf.hf.forward.pooled import pooled_position, warn_of_padding
from sa_hf.hf.state.activity import PACKED, Activity
from sa_hf.hf.state.inputs import ForwardInputs, hand_over, handed_over
from sa_hf.hf.state.layers import learned_leaves, noted, sparse_children, tie_layers
from sa_hf.hf.state.recomputation import in_backward
from sa_hf.hf.state.step import Delivery
from sa_hf.hf.state.threads import Running
from sa_hf.ops.transforms import refuse_recorded, transformed

# On each Transformers model inside a patched one.
FORWARD = "sa_hf_forward"


@dataclass(eq=False)
class _Begun:
    """A running forward of one model. Of the outermost: what a forward around it was given and what this one is, its
    children that act, what those had noted before a transform, and the implementations that a packed call inside
    ``dense(model)`` replaces."""

    around: ForwardInputs | None = None
    given: ForwardInputs | None = None
    children: list[SparseAttention] | None = None
    noted_before: list[tuple[SparseAttention, dict[str, Any]]] = field(default_factory=list)
    before_packed: list[str] = field(default_factory=list)


class ModelForward:
    """Of one Transformers model: reads what it is given about its sequences, for the masks built inside; counts
    training steps once per forward; joins the auxiliary losses to the model's own, and has what else it returns carry
    them.

    Args: configs: the patched model's, each with its original implementation; names: the attention modules inside this
    model; own: those of them that no model inside it holds.
    """

    def __init__(
        self, model: PreTrainedModel, activity: Activity, names: list[str], own: list[str],
        configs: list[tuple[PreTrainedConfig, str]],
    ) -> None:  # fmt: skip
        self.activity = activity
        self.names = names
        self.own = own
        self.configs = configs
        self.parameters = list(inspect.signature(model.forward).parameters)
        self.pooled = pooled_position(model)  # None once it was warned about
        self.tied: tuple[int, ...] = ()
        self.begun = Running()  # a _Begun

    def register(self, model: PreTrainedModel) -> list[Any]:
        setattr(model, FORWARD, self)
        return [
            model.register_forward_pre_hook(self.before, with_kwargs=True),
            model.register_forward_hook(self.after, with_kwargs=True, always_call=True),
            _Attribute(model),
        ]

    def run(self, forward: Callable[..., Any], model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """``forward`` of the model, with what its hooks do where they were skipped."""
        hooked = self.begun.get() is not None
        if not hooked:
            args, kwargs = self.before(model, args, kwargs) or (args, kwargs)
        try:
            output = forward(model, *args, **kwargs)
        except BaseException:  # an interrupt, too, after which torch calls no hook
            self.after(model, args, kwargs, None)
            raise
        return output if hooked else self.after(model, args, kwargs, output)

    def _named(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        return {**dict(zip(self.parameters, args, strict=False)), **kwargs}

    # -- before ----------------------------------------------------------------------------------------------------

    def before(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        within, begun = self.activity.within.get(), _Begun()
        if within is not None and within is not self:
            self.begun.set(begun)
            return None
        changed = self._begin(begun, model, args, kwargs)
        self.begun.set(begun)
        self.activity.within.set(self)
        return changed

    def _begin(self, begun: _Begun, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        begun.around = handed_over()
        hand_over(None)
        named = self._named(args, kwargs)
        if not self.activity.on:
            return self._before_dense(begun, model, args, kwargs, named)
        if getattr(model, "_is_replica", False):
            raise SparseAttentionError(
                f"nn.DataParallel runs replicas of {type(model).__name__}, which lose what sparse attention learns "
                "(convolutions, centroids, steps); start one process per GPU with `accelerate launch` or `torchrun` "
                "(DDP), or show this process one GPU (CUDA_VISIBLE_DEVICES=0)"
            )
        if named.get("output_attentions") or getattr(model.config, "output_attentions", False):
            refuse_attentions()
        _check_not_crossed(model, named)
        if self.pooled is not None and not torch.compiler.is_compiling() and warn_of_padding(model, self.pooled, named):
            self.pooled = None
        children = begun.children = sparse_children(model, self.names)
        if children:
            refuse_recorded()
        if transformed():
            begun.noted_before = noted(children)
        self._tie(children)
        given = ForwardInputs(named.get("sequence_ids"), named.get("position_ids"), named.get("cu_seq_lens_q"))
        if _train(children):
            self._count(model, children, named, given)
            if not torch.compiler.is_compiling():  # modules and functions that are set
                carry_inputs(model)
        begun.given = given
        hand_over(given)
        if torch.compiler.is_compiling():
            self.activity.traced = given
        return self._without_ids(args, kwargs)

    def _count(
        self, model: nn.Module, children: list[SparseAttention], named: dict[str, Any], given: ForwardInputs
    ) -> None:
        """Count a forward in training, or find the one that is repeated."""
        if torch.compiler.is_compiling():  # what is noted outside of tensors would have it compile anew
            for child in children:
                child.advance_step()
            return
        learned = learned_leaves(children)
        if learned and transformed():
            raise SparseAttentionError(
                f"{learned[0].config.name!r} in training counts its forwards and moves its state in place, which "
                "torch.func (grad, vjp, vmap) does not allow; call model.eval() for it (auxiliary losses then join no "
                "loss), or backward() in training"
            )
        if learned and in_backward():
            started = self.activity.forwards.repeated(learned, named.values())
            given.numbers, given.delivery = started.numbers, Delivery(model, self.activity, step=started.delivery.step)
            for child in children:
                child.repeat_step()
            return
        for child in children:
            child.advance_step()
        if learned:
            follow_optimizers(model, self.names, self.activity)
            delivery = Delivery(model, self.activity)
            delivery.count()
            given.numbers = self.activity.forwards.note(learned, named.values(), delivery).numbers
            given.delivery = delivery

    def _without_ids(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if "sequence_ids" in self.parameters:
            return None
        return args, {key: value for key, value in kwargs.items() if key != "sequence_ids"}

    def _before_dense(
        self, begun: _Begun, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], named: dict[str, Any]
    ) -> Any:
        """A call inside ``dense(model)``: where it names its sequences, its masks are made within them."""
        ids = named.get("sequence_ids")
        if not torch.compiler.is_compiling():
            refuse_convolved_keys(cache_in(args, kwargs))
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
        begun.before_packed = [config._attn_implementation for config, _ in self.configs]
        for config, _ in self.configs:
            config._attn_implementation_internal = PACKED
        return self._without_ids(args, kwargs)

    def _tie(self, children: list[SparseAttention]) -> None:
        """Tie the layers again where other modules act than before: PEFT copies each of them on its own."""
        acting = tuple(id(child) for child in children)
        if acting != self.tied:
            tie_layers(children)
            self.tied = acting

    # -- after -----------------------------------------------------------------------------------------------------

    def after(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        """``output`` is None where the forward has raised."""
        outermost, begun = self.activity.within.get() is self, self.begun.get() or _Begun()
        try:
            if output is None:
                return None
            output = trimmed(output)
            if not self.activity.on:
                if outermost:
                    self._guard_recomputation(model, output)
                return output
            return self._with_losses(begun, model, args, kwargs, output, outermost)
        finally:
            self.begun.set(None)
            if outermost:
                self._leave(begun, model)

    def _leave(self, begun: _Begun, model: nn.Module) -> None:
        self.activity.within.set(None)
        for (config, _), before in zip(self.configs, begun.before_packed, strict=False):
            config._attn_implementation_internal = before
        hand_over(begun.around)
        for child in sparse_children(model, self.names) if begun.children is None else begun.children:
            child.drop_graph()
        for leaf, attributes in begun.noted_before:  # a transform's tensors are none outside of it
            vars(leaf).update(attributes)

    def _with_losses(
        self, begun: _Begun, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any,
        outermost: bool,
    ) -> Any:  # fmt: skip
        compiling, collected = torch.compiler.is_compiling(), self.activity.collected
        if collected is None and not compiling and self.own and torch.is_grad_enabled():
            outer = self.activity.within.get()
            around = None if outer is None else outer.begun.get()
            delivery = None if around is None or around.given is None else around.given.delivery
            own = [child for child in sparse_children(model, self.own) if _train([child])]
            if own and delivery is not None:
                output = carrying(own, delivery, output)
        children = begun.children if outermost else None
        if children is None or not _train(children):
            return output
        if collected is not None:
            check_live(children)
            collected += total_losses(children).values()
            return output
        named = self._named(args, kwargs)
        if compiling and loss_of(output, named) is None:
            _refuse_lost_losses(model, children)
        delivery = None if begun.given is None else begun.given.delivery
        return add_to_loss(model, children, named, output, delivery)

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


class _Attribute:
    """Undoes what :meth:`ModelForward.register` sets, as a hook's handle undoes the hook."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def remove(self) -> None:
        vars(self.model).pop(FORWARD, None)


def register_forwards(
    root: PreTrainedModel, activity: Activity, names: list[str], configs: list[tuple[PreTrainedConfig, str]]
) -> list[Any]:
    """Set up every Transformers model inside a patched one, itself included; returns the handles that undo it.

    Args: names: the attention modules of the patched model.
    """
    handles: list[Any] = []
    taken: set[str] = set()
    models = [(path, module) for path, module in root.named_modules() if isinstance(module, PreTrainedModel)]
    for path, model in reversed(models):  # the inner ones first
        prefix = f"{path}." if path else ""
        inside = [name for name in names if name.startswith(prefix)]
        if not inside:
            continue
        own = [name.removeprefix(prefix) for name in inside if name not in taken]
        taken.update(inside)
        relative = [name.removeprefix(prefix) for name in inside]
        handles += ModelForward(model, activity, relative, own, configs).register(model)
    return [*handles, CarryHandle(root)]


def counted_forward(cls: Any) -> Any:
    """``forward`` of a Transformers class for its sparse class, where ``model.forward(...)`` skips the hooks."""

    @functools.wraps(cls.forward)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        around = getattr(self, FORWARD, None)
        return cls.forward(self, *args, **kwargs) if around is None else around.run(cls.forward, self, args, kwargs)

    return forward


def _train(children: list[SparseAttention]) -> bool:
    return any(child.training for child in children)


def _refuse_lost_losses(model: nn.Module, children: list[SparseAttention]) -> None:
    """Under torch.compile the losses join ``output.loss`` alone."""
    lost = [name for name, loss in total_losses(children).items() if loss.requires_grad]
    if lost and torch.is_grad_enabled():
        raise SparseAttentionError(
            f"under torch.compile the auxiliary losses {lost} join output.loss alone, and {type(model).__name__} "
            "computed none: give it labels, or set the coefficient to 0"
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
