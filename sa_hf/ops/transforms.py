"""Operators of ours under autograd and torch's function transforms.

Reverse mode once (``backward``, ``torch.func.grad``, ``vjp``, ``jacrev``), and ``vmap`` over it; forward mode and a
second derivative are refused, never left out.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NoReturn, Protocol, Self

import torch
from torch import Tensor
from torch.autograd import forward_ad

from sa_hf.errors import SparseAttentionError
from sa_hf.ops.graphs import eager

_ELSEWHERE = (
    "Eager dense attention has it: `with sa_hf.dense(model)` around a model with attn_implementation='eager', or "
    "sparse_attention(engine='reference')"
)
FORWARD_MODE = (
    "sparse attention has no forward-mode derivative (torch.func.jvp, jacfwd, hessian, linearize, "
    f"torch.autograd.forward_ad); nearest: reverse mode (torch.func.grad, vjp, jacrev). {_ELSEWHERE}"
)
SECOND_DERIVATIVE = (
    "sparse attention cannot be differentiated twice (create_graph=True, gradient penalties, a hessian); nearest: a "
    f"first derivative. {_ELSEWHERE}"
)
COMPILED_TRANSFORM = (
    "torch.compile does not trace sparse attention under a function transform (torch.func.grad, vjp, vmap, jvp); "
    "nearest: the same transform uncompiled"
)

MAPPED = (
    "is mapped by torch.func.vmap, but which tokens are real decides what is computed, the same for every sample; "
    "give one mask to all (in_dims None for it), group samples of one mask, or call sample by sample"
)

JIT_TRACE = (
    "torch.jit.trace (and torch.onnx.export by it) records sparse attention for one length alone; trace the dense "
    "model inside `with sa_hf.dense(model)`"
)
JIT_SCRIPT = (
    "torch.jit.script compiles the source of a model, and knows no sparse attention (nor Transformers' own models); "
    "nearest: torch.jit.trace of the dense model inside `with sa_hf.dense(model)`, or torch.export of the sparse one"
)
ONNX = (
    "torch.onnx.export: ONNX has no operator for sparse attention; export the dense model inside "
    "`with sa_hf.dense(model)`, or the sparse one by torch.export"
)


class Call(Protocol):
    """One call of an operator: what is no tensor of it, and how it is run and differentiated.

    ``differentiable``: so many of its leading tensors have a gradient, each where it is not None; ``outputs``: so many
    tensors it gives, the result first.
    """

    @property
    def differentiable(self) -> int: ...

    @property
    def outputs(self) -> int: ...

    def run(self, *tensors: Tensor | None) -> tuple[Tensor, ...]:
        """The result, and what the backward needs beside it."""
        ...

    def gradients(
        self, grad: Tensor, outputs: Sequence[Tensor], tensors: Sequence[Tensor | None]
    ) -> tuple[Tensor, ...]:
        """The gradients of the differentiable tensors that are not None."""
        ...

    def widened(self, copies: int, batch: int, mapped: Sequence[bool | None]) -> Self | None:
        """The call over ``copies`` batches of ``batch`` rows one after the other; None where those cannot be one call.

        Args: mapped: of each tensor of the call, whether it differs from copy to copy (None: it is None).
        """
        ...


@dataclass(frozen=True, eq=False)
class OperatorCall:
    """A :class:`Call` of a registered operator, by the function behind it where nothing has to see an operator.

    Args: rest: the arguments behind the tensors.
    """

    differentiable: ClassVar[int]
    outputs: ClassVar[int]
    # Forward and backward, as functions and as operators.
    functions: ClassVar[tuple[Callable[..., tuple[Tensor, ...]], Callable[..., tuple[Tensor, ...]]]]
    operators: ClassVar[tuple[Callable[..., tuple[Tensor, ...]], Callable[..., tuple[Tensor, ...]]]]

    rest: tuple[Any, ...]

    def run(self, *tensors: Tensor | None) -> tuple[Tensor, ...]:
        forward, _ = self.functions if eager(*tensors) else self.operators
        return forward(*tensors, *self.rest)

    def gradients(
        self, grad: Tensor, outputs: Sequence[Tensor], tensors: Sequence[Tensor | None]
    ) -> tuple[Tensor, ...]:
        _, backward = self.functions if eager(grad, *tensors) else self.operators
        grads = backward(grad, *outputs, *tensors, *self.rest)
        return tuple(g for x, g in zip(tensors[: self.differentiable], grads, strict=True) if x is not None)


def given(tensors: Sequence[Tensor | None]) -> list[Tensor]:
    """The tensors that are there."""
    return [x for x in tensors if x is not None]


def has_tangent(*tensors: Tensor | None) -> bool:
    """Whether one of the tensors carries a tangent of forward mode."""
    if forward_ad._current_level < 0:  # where there is no level, there is none; as torch's own reader finds
        return False
    read = forward_ad.unpack_dual
    return any(x is not None and x.is_floating_point() and read(x).tangent is not None for x in tensors)


def needs_derivative(*tensors: Tensor | None) -> str | None:
    """What a kernel without derivatives and without batching rules lacks to take these tensors, or None."""
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors):
        return "has no backward"
    if has_tangent(*tensors):
        return "has no forward-mode derivative"
    return "has no rules for torch.func" if transformed() else None


def transformed() -> bool:
    """Whether torch.func transforms what runs (``grad``, ``vjp``, ``vmap``, ...), uncompiled."""
    return not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active()


def is_mapped(x: Tensor) -> bool:
    """Whether ``vmap`` holds a tensor with another value for each sample."""
    functorch = torch._C._functorch
    while functorch.is_functorch_wrapped_tensor(x):
        if functorch.is_batchedtensor(x):
            return True
        x = functorch.get_unwrapped(x)
    return False


def _for_onnx() -> bool:
    return bool(torch.onnx.is_in_onnx_export())


# torch.export(strict=True), which the exporter to ONNX tries last, takes torch's function for False without calling it;
# it calls what torch.compiler.assume_constant_result has marked so (and that imports its compiler, seconds long).
_for_onnx._dynamo_marked_constant = True  # type: ignore[attr-defined]  # as the decorator sets it


def refuse_for_onnx() -> None:
    """Raise inside the exporter to ONNX, which runs the fakes alone of a program's operators."""
    if _for_onnx():
        raise SparseAttentionError(ONNX)


def refuse_recorded() -> None:
    """Raise where torch.jit or the exporter to ONNX records what runs."""
    refuse_for_onnx()
    if not torch.compiler.is_compiling() and torch._C._is_tracing():  # which torch.compile could not trace
        raise SparseAttentionError(JIT_TRACE)


def refuse_traced_transforms(*tensors: Tensor | None) -> None:
    """Raise where a graph is traced by torch.jit or for ONNX, inside a function transform, or with tangents."""
    refuse_recorded()
    if torch._C._are_functorch_transforms_active():
        raise SparseAttentionError(COMPILED_TRANSFORM)
    if has_tangent(*tensors):
        raise SparseAttentionError(FORWARD_MODE)


def refuse_second_derivative(ctx: object, *grads: Tensor) -> NoReturn:
    """The backward of a registered operator that gives gradients."""
    raise SparseAttentionError(SECOND_DERIVATIVE)


def differentiable(call: Call, *tensors: Tensor | None) -> Tensor:
    """Run a call; its result is differentiable once, in reverse mode, also under ``vmap``."""
    return _apply(_Run, call, *tensors)[0]


def _apply(function: type[torch.autograd.Function], *inputs: Any) -> tuple[Tensor, ...]:
    """``function.apply`` without what it does first: it binds the inputs to a signature, slowly."""
    if torch._C._are_functorch_transforms_active() or torch.compiler.is_compiling():
        result: tuple[Tensor, ...] = function.apply(*inputs)
    else:
        result = super(torch.autograd.Function, function).apply(*inputs)  # type: ignore[misc]
    return result


class _Run(torch.autograd.Function):
    @staticmethod
    def forward(call: Call, *tensors: Tensor | None) -> tuple[Tensor, ...]:
        return call.run(*tensors)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        call, *tensors = inputs
        ctx.call = call
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*output, *tensors)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, *unused: Tensor | None) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors
        tensors = saved[ctx.call.outputs :]
        found: list[Tensor | None] = [None] * (1 + len(tensors))
        if grad is not None:
            grads = _apply(_Gradients, ctx.call, grad, *saved)
            for at, one in zip(_present(ctx.call, tensors), grads, strict=True):
                found[1 + at] = one
        return tuple(found)

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> NoReturn:
        raise SparseAttentionError(FORWARD_MODE)

    @staticmethod
    def vmap(info: Any, in_dims: Sequence[int | None], call: Call, *tensors: Tensor | None) -> Any:
        batch = _Mapped(info.batch_size, in_dims[1:], tensors)
        wide = call.widened(batch.copies, batch.rows, batch.mapped)
        if wide is None:
            return batch.stacked([_apply(_Run, call, *one) for one in batch.each()])
        return batch.parted(_apply(_Run, wide, *batch.joined()))


class _Gradients(torch.autograd.Function):
    """The gradients as a function of their own, tied to all that they depend on: one that is not tied to it would be
    missing from a second derivative without a word."""

    @staticmethod
    def forward(call: Call, grad: Tensor, *saved: Tensor | None) -> tuple[Tensor, ...]:
        return call.gradients(grad, given(saved[: call.outputs]), saved[call.outputs :])

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        """Nothing is kept: there is no further derivative."""

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> NoReturn:
        raise SparseAttentionError(SECOND_DERIVATIVE)

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> NoReturn:
        raise SparseAttentionError(FORWARD_MODE)

    @staticmethod
    def vmap(info: Any, in_dims: Sequence[int | None], call: Call, *inputs: Tensor | None) -> Any:
        batch = _Mapped(info.batch_size, in_dims[1:], inputs)
        wide = call.widened(batch.copies, batch.rows, batch.mapped[1 + call.outputs :])
        if wide is None:
            return batch.stacked([_apply(_Gradients, call, *one) for one in batch.each()])
        return batch.parted(_apply(_Gradients, wide, *batch.joined()))


def _present(call: Call, tensors: Sequence[Tensor | None]) -> list[int]:
    return [at for at, x in enumerate(tensors[: call.differentiable]) if x is not None]


class _Mapped:
    """The tensors of a call under ``vmap``, each with the dimension that is mapped (None: it is shared)."""

    def __init__(self, copies: int, dims: Sequence[int | None], tensors: Sequence[Tensor | None]) -> None:
        self.copies = copies
        self.tensors, self.dims = tensors, dims
        self.mapped = [None if x is None else dim is not None for x, dim in zip(tensors, dims, strict=True)]

    @property
    def rows(self) -> int:
        """The batch of one copy, from the first tensor, ``[batch, ...]``."""
        first, dim = self.tensors[0], self.dims[0]
        assert first is not None
        return first.shape[0] if dim is None else first.select(dim, 0).shape[0]

    def each(self) -> list[list[Tensor | None]]:
        """The tensors of each copy."""
        pairs = list(zip(self.tensors, self.dims, strict=True))
        return [
            [x if x is None or dim is None else x.select(dim, copy) for x, dim in pairs] for copy in range(self.copies)
        ]

    def joined(self) -> list[Tensor | None]:
        """The tensors ``[batch, ...]`` of all copies one after the other, ``[copies * batch, ...]``."""
        joined: list[Tensor | None] = []
        for x, dim in zip(self.tensors, self.dims, strict=True):
            if x is None:
                joined.append(None)
            elif dim is None:
                joined.append(x.expand(self.copies, *x.shape).flatten(0, 1))
            else:
                joined.append(x.movedim(dim, 0).flatten(0, 1))
        return joined

    def stacked(self, results: list[tuple[Tensor, ...]]) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
        outputs = tuple(torch.stack(one) for one in zip(*results, strict=True))
        return outputs, (0,) * len(outputs)

    def parted(self, results: tuple[Tensor, ...]) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
        outputs = tuple(x.reshape(self.copies, x.shape[0] // self.copies, *x.shape[1:]) for x in results)
        return outputs, (0,) * len(outputs)
