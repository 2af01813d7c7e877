"""Run one part through the Triton engine and through the dense fp64 oracle, outputs and all gradients."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from sa_hf.ops.parts import Part, ScoreOptions
from sa_hf.ops.reference import dense_attention, part_multiplicity
from sa_hf.ops.triton import TritonEngine

GUARD = 8


def guarded(x: Tensor) -> Tensor:
    """The same values as a view with NaN around them on every side: a read out of bounds shows in the result."""
    batch, heads, n, d = x.shape
    room = torch.full((batch, heads, n + 2 * GUARD, d + 2 * GUARD), float("nan"), dtype=x.dtype)
    view = room[:, :, GUARD:-GUARD, GUARD:-GUARD]
    view.copy_(x)
    return view


def rms(x: Tensor) -> float:
    return float(x.double().pow(2).mean().sqrt())


def error(ours: Tensor, oracle: Tensor) -> float:
    """Root mean square of the difference over that of the oracle; absolute where the oracle is 0."""
    assert ours.shape == oracle.shape
    return rms(ours.double() - oracle.double()) / (rms(oracle) or 1.0)


def make(
    batch: int, heads: int, kv_heads: int, n_q: int, n_k: int, d: int, dtype: torch.dtype, seed: int
) -> list[Tensor]:
    g = torch.Generator().manual_seed(seed)
    shapes = ((heads, n_q), (kv_heads, n_k), (kv_heads, n_k), (heads, n_q))
    return [torch.randn(batch, h, n, d, generator=g).to(dtype) for h, n in shapes]


def oracle(
    parts: Part | list[Part], inputs: list[Tensor], options: ScoreOptions, n_q: int, n_k: int
) -> dict[str, Tensor]:
    leaves = [x.double().requires_grad_() for x in inputs[:3]]
    extra = {
        name: getattr(options, name).double().requires_grad_()
        for name in ("distance_bias", "spans", "sinks")
        if getattr(options, name) is not None
    }
    every = parts if isinstance(parts, list) else [parts]
    multiplicity = sum(part_multiplicity(part, n_q, n_k).expand(*inputs[0].shape[:2], -1, -1) for part in every)
    out, lse = dense_attention(*leaves, multiplicity, options.with_tensors(**extra))
    out.backward(inputs[3].double())
    grads = dict(zip(("query", "key", "value"), leaves, strict=True)) | extra
    return {"out": out.detach(), "lse": lse.detach()} | {
        name: torch.zeros_like(x) if x.grad is None else x.grad for name, x in grads.items()
    }


def errors(
    parts: Part | list[Part], *, batch: int = 1, heads: int = 2, kv_heads: int = 1, n_q: int, n_k: int | None = None,
    d: int = 16, options: ScoreOptions | None = None, dtype: torch.dtype = torch.float32, seed: int = 0,
) -> dict[str, float]:  # fmt: skip
    """RMS errors of output, log-sum-exp and every gradient over positions; the parts go through gathering and back."""
    from sa_hf.ops.run import plan_backward, plan_forward

    n_k = n_q if n_k is None else n_k
    options = ScoreOptions(scale=d**-0.5) if options is None else options
    options = replace(options, query_offset=n_k - n_q)
    inputs = make(batch, heads, kv_heads, n_q, n_k, d, dtype, seed)
    q, k, v, grad = (guarded(x) for x in inputs)
    engine = TritonEngine()
    assert engine.unsupported(q, options) is None
    plan = parts if isinstance(parts, list) else [parts]
    out, lse = plan_forward(plan, q, k, v, options, engine)
    grads = plan_backward(plan, q, k, v, out, lse, grad, options, engine)
    expected = oracle(parts, inputs, options, n_q, n_k)
    empty = torch.isinf(expected["lse"])
    assert torch.equal(torch.isinf(lse), empty)
    assert not out[empty].any()
    assert not grads.query[empty].any()
    ours = {"out": out, "lse": lse.masked_fill(empty, 0.0)} | {
        name: getattr(grads, name) for name in expected if name not in ("out", "lse")
    }
    expected["lse"] = expected["lse"].masked_fill(empty, 0.0)
    return {name: error(ours[name], x) for name, x in expected.items()}


def assert_exact(parts: Part | list[Part], **kwargs: object) -> None:
    """fp32 accuracy: the bound is a hundred times the rounding of fp32."""
    found = errors(parts, **kwargs)  # type: ignore[arg-type]
    assert all(e < 6e-6 for e in found.values()), found
