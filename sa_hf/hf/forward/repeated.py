"""A decoding step's later layers: what the first one of a kind has settled serves those that are alike.

On the CPU a layer of a step costs more Python than attention. What that decides is the same for every layer that runs
the same pattern on tensors of the same layout, and but for the lists of what is read for other patterns, too, so that
it is decided once a forward: kept on the forward's mask request, and gone with it.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from sa_hf.config import SparseAttention
from sa_hf.hf.forward.layer_input import LayerCall
from sa_hf.hf.forward.masks import MaskRequest
from sa_hf.hf.forward.rotary import before_rotary, turned_halves
from sa_hf.hf.state.activity import Place
from sa_hf.layer import AttentionInputs
from sa_hf.ops.cpp.steps import PreparedStep
from sa_hf.ops.graphs import eager
from sa_hf.ops.transforms import needs_derivative
from sa_hf.patterns.static import StaticSparseAttention


@dataclass(frozen=True, eq=False)
class SettledStep:
    """A step of decoding as one layer ran it: its pattern, what the model said beside queries, keys and values, its
    call, and that of the kernel."""

    child: SparseAttention
    engine: str
    said: tuple[Any, ...]
    inputs: AttentionInputs
    step: PreparedStep

    def serves(self, place: Place, said: tuple[Any, ...], tensors: tuple[Tensor, Tensor, Tensor]) -> bool:
        """Whether a layer's call is the same but for what its pattern reads."""
        return self.said == said and self.engine == place.engine and self.step.serves(*tensors)

    def reads_as(self, child: SparseAttention) -> bool:
        """Whether another layer's static pattern reads the same."""
        mine = self.child
        return (
            type(child) is StaticSparseAttention and child.config is mine.config and child.heads == mine.heads
            and child.config.layer_of_plan(child.spec.layer_idx) == child.config.layer_of_plan(mine.spec.layer_idx)
        )  # fmt: skip

    def call_of(self, module: nn.Module, call: LayerCall, tensors: tuple[Tensor, ...]) -> AttentionInputs:
        """Another layer's call of the same step."""
        inputs = object.__new__(AttentionInputs)
        vars(inputs).update(vars(self.inputs))
        inputs.query, inputs.key, inputs.value = tensors
        inputs.hidden_states, inputs.step, inputs.noted = call.hidden_states, None, None
        inputs.before_rotary = partial(before_rotary, module, call.rotary)
        inputs.turned_halves = partial(turned_halves, module, call.rotary)
        if call.memory is not None:
            inputs.remember, inputs.beside = call.memory.remember, call.memory.beside
        return inputs


def settle_step(
    child: SparseAttention, place: Place, inputs: AttentionInputs, request: MaskRequest | None, said: tuple[Any, ...]
) -> None:
    """Keep what a layer's call has settled, if later layers may use it."""
    step = inputs.step
    if step is None or request is None or request.key_offset or child._modules:
        return
    if inputs.blocks is not None or inputs.sinks is not None or inputs.distance_bias is not None or place.extra_tokens:
        return
    request.settled.append(SettledStep(child, place.engine, said, inputs, step))


def repeated_step(
    module: nn.Module, child: SparseAttention, place: Place, call: LayerCall, tensors: tuple[Tensor, Tensor, Tensor],
    request: Any, said: tuple[Any, ...],
) -> Tensor | None:  # fmt: skip
    """The layer's output ``[batch, queries, heads, head_dim]`` by what an earlier layer of the same forward has
    settled; None where none has that is alike."""
    if not isinstance(request, MaskRequest) or not request.settled:
        return None
    memory = call.memory
    if memory is None or memory.pending or not _undisturbed(child, tensors):
        return None
    query, key, value = tensors
    if memory.evicts(query.shape[2]):
        return None
    for known in request.settled:
        if not known.serves(place, said, tensors):
            continue
        length = known.inputs.sequences.key_length
        kept = memory.kept_slots(length)
        held = length if kept is None else len(kept)
        if key.shape[2] < held:
            return None
        step: PreparedStep | None = known.step
        if not known.reads_as(child):
            inputs = known.call_of(module, call, (query, key[:, :, :held], value[:, :, :held]))
            inputs.key_slots = kept
            step = child.repeated(known.child, known.step, inputs)
        if step is not None:
            return step.run(query, key, value, kept, held)
    return None


def _undisturbed(child: nn.Module, tensors: tuple[Tensor, ...]) -> bool:
    """Whether nothing but the numbers can differ from the call before: no hook, mode, transform or gradient."""
    if child._forward_hooks or child._forward_pre_hooks or child._modules:
        return False
    if torch.is_autocast_enabled("cpu") or torch._C._len_torch_function_stack() or not eager(*tensors):
        return False
    return needs_derivative(*tensors) is None
