"""A decoding step's later layers: what the first one of a kind has settled serves those that are alike.

On the CPU a layer of a step costs more Python than attention. What that decides is the same for every layer that runs
the same pattern on tensors of the same layout, so that it is decided once a forward: kept on the forward's mask
request, and gone with it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sa_hf.config import SparseAttention, SparseAttentionConfig
from sa_hf.hf.caches.layer import LayerMemory
from sa_hf.hf.forward.masks import MaskRequest
from sa_hf.hf.state.activity import Place
from sa_hf.layer import AttentionInputs
from sa_hf.ops.cpp.steps import PreparedStep
from sa_hf.ops.graphs import eager
from sa_hf.ops.transforms import needs_derivative
from sa_hf.patterns.static import StaticSparseAttention


@dataclass(frozen=True, eq=False)
class SettledStep:
    """A step of decoding as one layer ran it: the pattern, the heads and the layer it is planned for, what the model
    said beside queries, keys and values, and the call of the kernel."""

    config: SparseAttentionConfig
    heads: tuple[int, ...]
    layer: int
    engine: str
    said: tuple[Any, ...]
    length: int
    step: PreparedStep

    def serves(self, child: StaticSparseAttention, place: Place, said: tuple[Any, ...]) -> bool:
        return (
            self.config is child.config and self.said == said and self.engine == place.engine
            and self.heads == child.heads and self.layer == child.config.layer_of_plan(child.spec.layer_idx)
        )  # fmt: skip


def settle_step(
    child: SparseAttention, place: Place, inputs: AttentionInputs, request: MaskRequest | None, said: tuple[Any, ...]
) -> None:
    """Keep what a layer's call has settled, if later layers may use it."""
    step = inputs.step
    if step is None or request is None or type(child) is not StaticSparseAttention or request.key_offset:
        return
    if inputs.blocks is not None or inputs.sinks is not None or inputs.distance_bias is not None or place.extra_tokens:
        return
    layer, length = child.config.layer_of_plan(child.spec.layer_idx), inputs.sequences.key_length
    request.settled.append(SettledStep(child.config, child.heads, layer, place.engine, said, length, step))


def repeated_step(
    child: SparseAttention, place: Place, memory: LayerMemory | None, tensors: tuple[Tensor, Tensor, Tensor],
    request: Any, said: tuple[Any, ...],
) -> Tensor | None:  # fmt: skip
    """The layer's output ``[batch, queries, heads, head_dim]`` by what an earlier layer of the same forward has
    settled; None where none has that is alike."""
    if not isinstance(request, MaskRequest) or not request.settled or type(child) is not StaticSparseAttention:
        return None
    if memory is None or memory.pending or not _undisturbed(child, tensors):
        return None
    query, key, value = tensors
    settled: list[SettledStep] = request.settled
    for known in settled:
        if not known.serves(child, place, said) or not known.step.serves(query, key, value):
            continue
        if memory.evicts(query.shape[2]):
            return None
        kept = memory.kept_slots(known.length)
        held = known.length if kept is None else len(kept)
        if key.shape[2] < held:
            return None
        return known.step.run(query, key, value, kept, held)
    return None


def _undisturbed(child: nn.Module, tensors: tuple[Tensor, ...]) -> bool:
    """Whether nothing but the numbers can differ from the call before: no hook, mode, transform or gradient."""
    if child._forward_hooks or child._forward_pre_hooks or child._modules:
        return False
    if torch.is_autocast_enabled("cpu") or torch._C._len_torch_function_stack() or not eager(*tensors):
        return False
    return needs_derivative(*tensors) is None
