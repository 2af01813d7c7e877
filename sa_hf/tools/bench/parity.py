"""Parity with the fp64 oracle: the gate in front of every timing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from sa_hf.functional import sparse_attention
from sa_hf.layer import Geometry
from sa_hf.ops.attend import attend
from sa_hf.ops.choice import choose_engine
from sa_hf.ops.parts import Part, ScoreOptions
from sa_hf.ops.reference import dense_attention
from sa_hf.ops.sequences import Sequences
from sa_hf.patterns.base import StaticPatternConfig, dense_multiplicity
from sa_hf.patterns.custom_op import cached_plan
from sa_hf.patterns.sliding_window import SlidingWindowAttentionConfig

# Bounds of the project: RMS error over the oracle's RMS, and at most this many times the error of the dense PyTorch
# computation in the same precision on the same inputs.
ABSOLUTE_BOUND = 0.005
FORWARD_TIMES = 2.0
GRADIENT_TIMES = 3.0
# fp32 dense errors are near 1e-7, where a ratio of two roundings says nothing: below this floor no ratio is asked.
RATIO_FLOOR = 2e-6


@dataclass(frozen=True)
class Shape:
    """Batch, query heads, key/value heads, length, head dimension."""

    batch: int = 2
    num_heads: int = 4
    num_key_value_heads: int = 2
    length: int = 321
    head_dim: int = 64


# Stands for the dense error where no dense computation runs beside: fp32 stays at the rounding of fp32.
EXACT_ERROR = 3e-6
PARITY_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
PARITY_SHAPES = (Shape(), Shape(1, 4, 4, 1000, 128), Shape(2, 6, 2, 257, 80))


@dataclass(frozen=True)
class ParityResult:
    """Relative RMS errors of output, dQ, dK, dV: ours and the same-precision dense PyTorch computation's."""

    errors: tuple[float, ...]
    dense_errors: tuple[float, ...]
    deterministic: bool

    @property
    def passed(self) -> bool:
        for index, (ours, dense) in enumerate(zip(self.errors, self.dense_errors, strict=True)):
            times = GRADIENT_TIMES if index else FORWARD_TIMES
            if not ours < ABSOLUTE_BOUND or ours > max(RATIO_FLOOR, times * dense):
                return False
        return self.deterministic


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def row_key(label: str, causal: bool, dtype: torch.dtype, shape: Shape) -> str:
    """The key of a parity row; a kind of row appends its name."""
    return f"{label}/{'causal' if causal else 'full'}/{dtype_name(dtype)}/D{shape.head_dim}/n{shape.length}"


def parity_held(rows: Mapping[str, Mapping[str, Any]], label: str, causal: bool, dtype: torch.dtype) -> bool:
    """Whether there are parity rows of a pattern's kernels in this dtype, and all passed; the first word of the label
    names the pattern. Kernels of another dtype are other kernels."""
    wanted = [label.split("-")[0], "causal" if causal else "full", dtype_name(dtype)]
    passed = []
    for key, row in rows.items():
        name, *rest = key.split("/")[:3]
        if [name.split("-")[0], *rest] == wanted:
            passed.append(row.get("pass") is True)
    return bool(passed) and all(passed)


def relative_rms(x: Tensor, oracle: Tensor) -> float:
    """RMS of the difference over RMS of the oracle; NaN counts as infinite."""
    difference = (x.double() - oracle.double()).square().mean().sqrt()
    ratio = float(difference / oracle.double().square().mean().sqrt().clamp(min=1e-300))
    return ratio if ratio == ratio else float("inf")


def parity(
    config: StaticPatternConfig, dtype: torch.dtype, device: torch.device, *, causal: bool, engine: str, shape: Shape,
    padded: bool = False, seed: int = 0,
) -> ParityResult:  # fmt: skip
    """Output and gradients of one pattern against the oracle, and the backward run twice."""
    generator = torch.Generator().manual_seed(seed)

    def draw(heads: int) -> Tensor:
        sizes = (shape.batch, heads, shape.length, shape.head_dim)
        return torch.randn(sizes, generator=generator).to(device=device, dtype=dtype)

    query, grad = draw(shape.num_heads), draw(shape.num_heads)
    key, value = draw(shape.num_key_value_heads), draw(shape.num_key_value_heads)
    mask = None
    if padded:
        mask = torch.ones(shape.batch, shape.length, dtype=torch.int64, device=device)
        mask[0, : shape.length // 4] = 0
        grad = grad * mask[:, None, :, None].to(dtype)

    def run(name: str, *tensors: Tensor) -> tuple[Tensor, ...]:
        leaves = [t.detach().requires_grad_() for t in tensors]
        q, k, v = leaves
        out = sparse_attention(q, k, v, config, causal=causal, attention_mask=mask, engine=name)
        return out.detach(), *torch.autograd.grad(out, leaves, grad.to(out.dtype))

    oracle = run("reference", query.double(), key.double(), value.double())
    first, second = run(engine, query, key, value), run(engine, query, key, value)
    dense = _dense(config, query, key, value, grad, causal, mask)
    return ParityResult(
        tuple(relative_rms(a, b) for a, b in zip(first, oracle, strict=True)),
        tuple(relative_rms(a, b) for a, b in zip(dense, oracle, strict=True)),
        all(torch.equal(a, b) for a, b in zip(first, second, strict=True)),
    )


def option_case(option: str, shape: Shape, device: torch.device) -> tuple[SlidingWindowAttentionConfig, ScoreOptions]:
    """A causal window with one score option set."""
    config = SlidingWindowAttentionConfig(window=max(8, shape.length // 4))
    generator = torch.Generator().manual_seed(0)
    bias = torch.randn(shape.num_heads, 2 * shape.length - 1, generator=generator).to(device)
    spans = torch.rand(shape.batch, 1, shape.length, generator=generator).to(device) * config.window
    return config, ScoreOptions(
        shape.head_dim**-0.5,
        softcap=2.0 if option == "softcap" else None,
        distance_bias=bias if option == "bias" else None,
        spans=spans if option == "spans" else None,
        ramp=config.window / 4,
        dropout=0.2 if option == "dropout" else 0.0,
        seed=torch.tensor(7, device=device),
    )


def option_parity(option: str, dtype: torch.dtype, device: torch.device, *, engine: str, shape: Shape) -> ParityResult:
    """The score options, which no bare call reaches: ``softcap``, ``bias`` (T5's distance table), ``spans`` (the soft
    gate) and ``dropout`` on a causal window; gradients of the table and of the spans too. The oracle applies the same
    option in fp64, so the errors are held against a fixed bound (``dense_errors`` repeats it)."""
    config, options = option_case(option, shape, device)
    generator = torch.Generator().manual_seed(1)
    length, heads = shape.length, shape.num_heads

    def draw(heads: int) -> Tensor:
        return torch.randn(shape.batch, heads, length, shape.head_dim, generator=generator).to(device, dtype)

    qkv = [draw(heads), draw(shape.num_key_value_heads), draw(shape.num_key_value_heads)]
    grad = draw(heads)
    field = {"bias": "distance_bias"}.get(option, option)
    learned = getattr(options, field) if option in ("bias", "spans") else None
    geometry = Geometry(length, length, tuple(range(heads)), heads, 0, True)
    counts = dense_multiplicity(config, geometry).to(device)

    def run(name: str) -> tuple[Tensor, ...]:
        exact = name == "reference"
        leaves = [(t.double() if exact else t).detach().requires_grad_() for t in qkv]
        extra = [] if learned is None else [(learned.double() if exact else learned).detach().requires_grad_()]
        own = options.with_tensors(**{field: extra[0]}) if extra else options
        q, k, v = leaves
        if exact:
            out, _ = dense_attention(q, k, v, counts, own)
        else:
            plan = partial(_plan_of, config, heads, device)
            whole = Sequences.full(shape.batch, length, length)
            out = attend(q, k, v, whole, plan, own, choose_engine(name, q, own))
        return out.detach(), *torch.autograd.grad(out, [*leaves, *extra], grad.to(out.dtype))

    oracle, first, second = run("reference"), run(engine), run(engine)
    errors = tuple(relative_rms(a, b) for a, b in zip(first, oracle, strict=True))
    same = all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    return ParityResult(errors, (bound_of(dtype),) * len(errors), same)


def bound_of(dtype: torch.dtype) -> float:
    """What stands for the dense error in a parity against the oracle alone."""
    return EXACT_ERROR if dtype == torch.float32 else ABSOLUTE_BOUND


def _plan_of(
    config: StaticPatternConfig, heads: int, device: torch.device, query_length: int, key_length: int
) -> tuple[Part, ...]:
    geometry = Geometry(key_length, query_length, tuple(range(heads)), heads, 0, True)
    return cached_plan(config, geometry, device)


def _dense(
    config: StaticPatternConfig, query: Tensor, key: Tensor, value: Tensor, grad: Tensor, causal: bool,
    mask: Tensor | None,
) -> tuple[Tensor, ...]:  # fmt: skip
    """The same set as a dense PyTorch computation in the inputs' precision, row by row of the batch."""
    outputs = []
    heads = query.shape[1]
    group = heads // key.shape[1]
    for row in range(query.shape[0]):
        kept = slice(0, query.shape[2]) if mask is None else mask[row].bool()
        leaves = [t[row : row + 1, :, kept].detach().requires_grad_() for t in (query, key, value)]
        length = leaves[0].shape[2]
        counts = config.multiplicity(length, heads, 0, causal).to(query.device)
        scores = leaves[0] @ leaves[1].repeat_interleave(group, 1).transpose(-1, -2) * query.shape[-1] ** -0.5
        weights = torch.log(counts.to(torch.float32)).to(query.dtype)
        empty = (counts == 0).all(-1, keepdim=True)
        probability = torch.softmax((scores + weights).masked_fill(empty, 0.0), dim=-1).masked_fill(empty, 0.0)
        out = probability @ leaves[2].repeat_interleave(group, 1)
        grads = torch.autograd.grad(out, leaves, grad[row : row + 1, :, kept])
        whole = []
        for part, like in zip((out.detach(), *grads), (query, query, key, value), strict=True):
            full = torch.zeros_like(like[row : row + 1])
            full[:, :, kept] = part
            whole.append(full)
        outputs.append(whole)
    return tuple(torch.cat(parts) for parts in zip(*outputs, strict=True))
