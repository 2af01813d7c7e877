"""What the patterns with learned state share: the step counter, noise drawn from it, and the keeping of live losses."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from sa_hf.config import SparseAttention, SparseAttentionConfig
from sa_hf.errors import SparseAttentionError
from sa_hf.layer import LayerSpec
from sa_hf.ops.random import splitmix64, splitmix64_tensor


def refuse_drop_diagonal(config: SparseAttentionConfig, reason: str) -> None:
    """``drop_diagonal`` belongs to patterns whose own position is one key among others."""
    if config.drop_diagonal:
        raise SparseAttentionError(
            f"{config.name}.drop_diagonal=True contradicts the pattern: {reason}. Use drop_diagonal=False"
        )


class LearnedAttention(SparseAttention):
    """A ``sparse`` child with state.

    ``step`` (int64 buffer, saved) counts the micro-batches of training: :meth:`advance_step` is called once per outer
    training forward, never in a recomputation, so noise drawn from it is the same in both.
    """

    step: Tensor
    # A loss of the last forward was made without a graph although the layer trains: a region run under no_grad.
    lost_graph: bool = False
    # Forwards in training that this process has counted; of ``step`` the difference alone is meant.
    forwards: int = 0

    def __init__(self, config: SparseAttentionConfig, spec: LayerSpec) -> None:
        super().__init__(config, spec)
        self.register_buffer("step", torch.zeros((), dtype=torch.int64, device=spec.device))
        self._live: dict[str, Tensor] = {}
        self._unscaled: dict[str, Tensor] = {}
        self._may_keep_graph = True

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> LearnedAttention:
        # State stays fp32 in a 16-bit model: at a logit of 4 bfloat16 steps by 0.03, and updates of 0.01 vanish.
        def moved(x: Tensor) -> Tensor:
            y = fn(x)
            return x.to(y.device) if x.is_floating_point() and y.dtype.itemsize < x.dtype.itemsize else y

        super()._apply(moved, recurse)
        return self

    @property
    def draws_by_forward(self) -> bool:
        """Whether what this layer does depends on which forward it is in: noise, or what it gathers."""
        return True

    def advance_step(self) -> None:
        """Count one micro-batch: once per outer training forward, before it."""
        self.step += 1
        if not torch.compiler.is_compiling():  # a number that changes would have it compile anew
            self.forwards += 1
        self.repeat_step()

    def repeat_step(self) -> None:
        self._may_keep_graph = True
        self.lost_graph = False

    def drop_graph(self) -> None:
        self._live = {name: loss.detach() for name, loss in self._live.items()}
        # A recomputation under gradient checkpointing must not bring a graph back.
        self._may_keep_graph = False

    def aux_losses(self) -> dict[str, Tensor]:
        return dict(self._live)

    def unscaled_losses(self) -> dict[str, Tensor]:
        return dict(self._unscaled)

    def _keep_loss(self, name: str, loss: Tensor, coefficient: float) -> None:
        """Keep a loss, to join the model's own times its coefficient."""
        if self._may_keep_graph or not self.training:
            scaled = coefficient * (loss if coefficient else loss.detach())
            if coefficient and self.training and not torch.is_grad_enabled():
                self.lost_graph = True
            self._live[name] = scaled if self._may_keep_graph else scaled.detach()
            self._unscaled[name] = loss.detach()

    def uniform(self, count: int, *, layer: int, stream: int = 0, steps_back: int = 0) -> Tensor:
        """``count`` draws in the open interval (0, 1), fp64: a function of (seed, step, layer, element) alone."""
        step = self.step - steps_back
        word = splitmix64_tensor(splitmix64_tensor(step ^ signed64(splitmix64(self.config.seed))) ^ layer)
        element = torch.arange(count, device=self.step.device)
        return unit_interval(splitmix64_tensor(splitmix64_tensor(word ^ stream) ^ element))

    def __getstate__(self) -> dict[str, Any]:
        # Losses of the last forward may hold a graph, which neither copies nor pickles.
        return {**self.__dict__, "_live": {name: loss.detach() for name, loss in self._live.items()}}


def signed64(x: int) -> int:
    """The int64 with the bits of an unsigned 64-bit number."""
    return x - (1 << 64) if x >= 1 << 63 else x


def unit_interval(bits: Tensor) -> Tensor:
    """The top 53 bits of int64 words as fp64 in the open interval (0, 1)."""
    return (((bits >> 11) & ((1 << 53) - 1)).double() + 0.5) * 2.0**-53


def seeded_uniform(seed: int, words: Sequence[int], count: int, device: torch.device) -> Tensor:
    """``count`` draws in (0, 1), fp64, that are a function of the seed, the words and the element alone."""
    state = splitmix64(seed)
    for word in words:
        state = splitmix64(state ^ word)
    return unit_interval(splitmix64_tensor(torch.arange(count, device=device) ^ signed64(state)))


def gathered(parameter: Any) -> Tensor:
    """A parameter, gathered where FSDP2 has sharded it: a shared one is read, and its loss made, while the layer that
    holds it does not run. All ranks come here together."""
    if hasattr(parameter, "full_tensor"):
        from torch.distributed.tensor import Partial

        # FSDP averages the gradients of the ranks; so does this one.
        parameter = parameter.full_tensor(grad_placements=[Partial("avg")] * parameter.device_mesh.ndim)
    whole: Tensor = parameter
    return whole
