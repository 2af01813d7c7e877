"""Extra tokens of an encoder (BigBird's ETC, Star-Transformer's virtual relay).

Each layer's pre-hook puts them in front of its input, and its hook takes them off its output again, so that whatever
is outside the layers (recorded hidden states, pooler, heads, the loss, cross-attention) sees the sequence alone. From
layer to layer they travel on the hidden states themselves, which gradient checkpointing hands back unchanged.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.utils import ModelOutput

from sa_hf.config import SparseAttentionConfig
from sa_hf.errors import SparseAttentionError
from sa_hf.hf.forward.masks import MaskRequest
from sa_hf.hf.state.activity import Activity
from sa_hf.hf.state.layers import active_child
from sa_hf.layer import LayerSpec

ATTRIBUTE = "sa_hf_extra_tokens"
# Marks a layer's input with its extra tokens: Transformers records the first layer's as a hidden state.
JOINED = "sa_hf_joined"
# The standard deviation that BERT and its kin initialise embeddings with.
INITIAL_STD = 0.02


class ExtraTokens(nn.Module):
    """The learned tokens ``[count, hidden]`` of a stack; they live under the first layer that asks for them."""

    def __init__(self, config: SparseAttentionConfig, spec: LayerSpec) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(config.seed)
        values = torch.randn(config.extra_tokens, spec.hidden_size, generator=generator) * INITIAL_STD
        self.tokens = nn.Parameter(values.to(device=spec.device, dtype=spec.dtype))

    def forward(self) -> Tensor:
        return self.tokens


def starts_as_mean(config: SparseAttentionConfig) -> bool:
    """Whether the tokens start as the mean of the sequence's embeddings (the virtual relay), not as parameters."""
    return getattr(config, "relay", None) == "virtual"


def extra_tokens_of_stack(configs: list[SparseAttentionConfig], stack: str) -> int:
    """How many extra tokens join a stack.

    Raises:
        SparseAttentionError: its layers ask for different ones.
    """
    asked = {(c.extra_tokens, starts_as_mean(c)): c for c in configs if c.extra_tokens}
    if len(asked) > 1:
        names = [f"{c.extra_tokens} of {c.name!r}" for c in asked.values()]
        raise SparseAttentionError(
            f"the {stack}'s layers ask for different extra tokens ({', '.join(names)}), but they run through all of "
            "them; give its layers the same"
        )
    return next(iter(asked))[0] if asked else 0


class ExtraTokenHooks:
    """The hooks of one stack."""

    def __init__(self, count: int, owner: nn.Module, first: nn.Module, activity: Activity) -> None:
        self.count = count
        self.owner = owner  # the attention module whose pattern asks for the tokens
        self.first = first
        self.activity = activity

    def register(self, blocks: list[nn.Module]) -> list[Any]:
        """Hook the layers of the stack. (What was recorded in them is :func:`trimmed` by the models around them.)"""
        handles: list[Any] = []
        for block in blocks:
            handles.append(block.register_forward_pre_hook(self.before, with_kwargs=True))
            # First, so that a layer's output is recorded without them.
            handles.append(block.register_forward_hook(self.after, prepend=True))
        return handles

    def before(self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if not self.activity.on:
            return None
        hidden: Tensor = args[0] if args else kwargs["hidden_states"]
        extra = getattr(hidden, ATTRIBUTE, None)
        if extra is None:
            if block is not self.first:
                raise SparseAttentionError(
                    "the extra tokens were lost between two layers: something replaced the hidden states on the way "
                    "(reentrant gradient checkpointing does, use {'use_reentrant': False}; so does FSDP2 around single "
                    "layers, shard the whole model or use DDP)"
                )
            extra = self._initial(hidden, [*args, *kwargs.values()])
        joined = torch.cat([extra.to(hidden.device), hidden], dim=1)
        setattr(joined, JOINED, self.count)
        kwargs = dict(kwargs)
        if args:
            args = (joined, *args[1:])
        else:
            kwargs["hidden_states"] = joined
        if kwargs.get("position_embeddings") is not None:
            kwargs["position_embeddings"] = self._at_angle_zero(*kwargs["position_embeddings"])
        return args, kwargs

    def after(self, block: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        if not self.activity.on:
            return None
        hidden: Tensor = output[0] if isinstance(output, tuple) else output
        rest = hidden[:, self.count :].contiguous()
        setattr(rest, ATTRIBUTE, hidden[:, : self.count])
        return (rest, *output[1:]) if isinstance(output, tuple) else rest

    def _initial(self, hidden: Tensor, given: list[Any]) -> Tensor:
        child = active_child(self.owner)
        if not starts_as_mean(child.config):
            tokens: Tensor = child.extra()
            return tokens.to(hidden.dtype).expand(hidden.shape[0], -1, -1)
        request = next((x for x in given if isinstance(x, MaskRequest)), None)
        if request is None or request.padding is None:
            return hidden.mean(1, keepdim=True)
        real = request.padding[:, : hidden.shape[1], None].to(hidden.dtype)
        return (hidden * real).sum(1, keepdim=True) / real.sum(1, keepdim=True).clamp(min=1)

    def _at_angle_zero(self, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        pad = 0, 0, self.count, 0
        return nn.functional.pad(cos, pad, value=1.0), nn.functional.pad(sin, pad)


class EmptyTokenHooks(ExtraTokenHooks):
    """Tokens of zeros, by which a model is tried."""

    def _initial(self, hidden: Tensor, given: list[Any]) -> Tensor:
        return hidden.new_zeros(hidden.shape[0], self.count, hidden.shape[2])


def trimmed(output: Any) -> Any:
    """A model's output without the extra tokens of recorded inputs of a layer."""
    if isinstance(output, Tensor):
        return output[:, getattr(output, JOINED) :] if hasattr(output, JOINED) else output
    if type(output) is tuple:
        return tuple(trimmed(item) for item in output)
    if isinstance(output, ModelOutput):
        for key in ("hidden_states", "encoder_hidden_states"):
            if output.get(key) is not None:
                output[key] = trimmed(output[key])
    return output
