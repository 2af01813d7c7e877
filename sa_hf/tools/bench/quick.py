"""One pattern against dense attention on this machine: what ``sa-hf bench`` prints."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from sa_hf.config import SparseAttention, SparseAttentionConfig
from sa_hf.errors import SparseAttentionError
from sa_hf.functional import sparse_attention
from sa_hf.layer import AttentionInputs, LayerSpec
from sa_hf.ops.sequences import Sequences
from sa_hf.patterns.base import StaticPatternConfig, default_scale
from sa_hf.patterns.expire_span import ExpireSpanAttentionConfig
from sa_hf.patterns.sparsebert import SparseBertAttentionConfig
from sa_hf.tools.bench.baselines import dense_runs
from sa_hf.tools.bench.cpu import frozen_at_every_32nd_distance
from sa_hf.tools.bench.data_oracle import data_oracle
from sa_hf.tools.bench.parity import ParityResult, Shape, bound_of, dtype_name, parity, relative_rms
from sa_hf.tools.bench.report import machine
from sa_hf.tools.bench.timing import measure

PARITY_LENGTH = 200
Run = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Comparison:
    """``rows``: (pass, dense ms, sparse ms, first call ms, speed-up), medians, dense and sparse side by side.

    ``machine``: what they were measured on; ``note``: in what state a pattern that learns was measured.
    """

    rows: list[list[str]]
    machine: str
    note: str


def compare(config: SparseAttentionConfig, length: int, *, causal: bool, num_heads: int, head_dim: int) -> Comparison:
    """Time a pattern: static ones by the bare operator, those that learn by their module, untrained.

    Raises:
        SparseAttentionError: the pattern does not serve such a layer.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    layer = _Layer(config, causal, num_heads, head_dim, device, dtype)
    about, note = _described(device, dtype, num_heads, head_dim), state_of(config)
    if not layer.parity().passed:
        return Comparison([["parity failed", "", "", "", "not shown"]], about, note)
    qkv = [
        torch.randn(1, num_heads, length, head_dim, device=device, dtype=dtype, requires_grad=True) for _ in range(3)
    ]
    dense, sparse = next(iter(dense_runs(causal, device))), layer.run(length, dtype)
    begin = time.perf_counter()
    sparse(*qkv)
    first = (time.perf_counter() - begin) * 1e3
    rows = []
    for label, backward in (("forward", False), ("forward+backward", True)):
        ours = _time(sparse, qkv, backward, device)
        with dense.scope():
            theirs = _time(dense.run, qkv, backward, device)
        rows.append([label, f"{theirs:.1f}", f"{ours:.1f}", f"{first:.1f}", f"{theirs / ours:.2f}x"])
    return Comparison(rows, about, note)


def state_of(config: SparseAttentionConfig) -> str:
    """In what state a pattern that learns is measured; empty for the static ones."""
    if isinstance(config, StaticPatternConfig):
        return ""
    if isinstance(config, SparseBertAttentionConfig):
        if config.frozen:
            return "frozen, with a mask set by hand: the 16 nearest distances and every 32nd one"
        return "untrained: every pair is kept, and the search is dense, as in the paper; --set frozen=true runs sparse"
    if isinstance(config, ExpireSpanAttentionConfig):
        return "untrained: every key has the initial span; training shortens spans, and the time with them"
    return "untrained: its state is as patch_model makes it, and the inputs are random"


class _Layer:
    """One layer's pattern, by whichever call serves it."""

    def __init__(
        self, config: SparseAttentionConfig, causal: bool, num_heads: int, head_dim: int, device: torch.device,
        dtype: torch.dtype,
    ) -> None:  # fmt: skip
        self.config, self.causal, self.device, self.dtype = config, causal, device, dtype
        self.spec = LayerSpec(
            0, 1, num_heads, num_heads, head_dim, num_heads * head_dim, causal, device=device, dtype=torch.float32
        )  # fmt: skip
        try:
            config.check_layer(self.spec)
        except SparseAttentionError as error:
            other = "--bidirectional" if causal else "--causal"
            raise SparseAttentionError(f"{error}. Here: {other}") from error

    def parity(self) -> ParityResult:
        """Output and gradients against the dense oracle in fp64; of a state that has none, by torch's tiles in fp64."""
        dtype, heads, head_dim = self.dtype, self.spec.num_heads, self.spec.head_dim
        if isinstance(self.config, StaticPatternConfig):
            shape = Shape(1, heads, heads, PARITY_LENGTH, head_dim)
            return parity(self.config, dtype, self.device, causal=self.causal, engine="auto", shape=shape)
        generator = torch.Generator().manual_seed(0)
        drawn = torch.randn(4, 1, heads, PARITY_LENGTH, head_dim, generator=generator).to(self.device, dtype)
        oracle = self._oracle(drawn.double())
        first, second = self._results(drawn, "auto"), self._results(drawn, "auto")
        errors = tuple(relative_rms(a, b) for a, b in zip(first, oracle, strict=True))
        same = all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
        return ParityResult(errors, (bound_of(dtype),) * len(errors), same)

    def _oracle(self, drawn: Tensor) -> tuple[Tensor, ...]:
        hidden = self._hidden(PARITY_LENGTH, drawn.dtype)
        module = _untrained(self.config, self.spec)

        def dense(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            exact = data_oracle(module, q, k, v, hidden, self.causal)
            return self.run(PARITY_LENGTH, drawn.dtype, "torch")(q, k, v) if exact is None else exact

        return _with_gradients(dense, drawn)

    def _results(self, drawn: Tensor, engine: str) -> tuple[Tensor, ...]:
        return _with_gradients(self.run(PARITY_LENGTH, drawn.dtype, engine), drawn)

    def _hidden(self, length: int, dtype: torch.dtype) -> Tensor:
        """The layer's input ``[1, length, hidden]``, rounded as the layer has it."""
        hidden = torch.randn(1, length, self.spec.hidden_size, generator=torch.Generator().manual_seed(1))
        return hidden.to(self.device, self.dtype).to(dtype)

    def run(self, length: int, dtype: torch.dtype, engine: str = "auto") -> Run:
        """The call that is timed, its plan not yet built."""
        if isinstance(self.config, StaticPatternConfig):
            return lambda q, k, v: sparse_attention(q, k, v, self.config, causal=self.causal, engine=engine)
        module = _untrained(self.config, self.spec)
        sequences = Sequences.full(1, length, length)
        scale, seen = default_scale(self.spec.head_dim), self._hidden(length, dtype)

        def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            inputs = AttentionInputs(q, k, v, sequences, self.causal, scale, engine=engine, hidden_states=seen)
            out: Tensor = module(inputs)
            return out

        return run


def _with_gradients(run: Run, drawn: Tensor) -> tuple[Tensor, ...]:
    """Output and gradients of query, key and value ``[4, 1, H, n, d]``, the fourth being the output's gradient."""
    *qkv, grad = drawn.unbind(0)
    leaves = [x.detach().requires_grad_() for x in qkv]
    out = run(*leaves)
    return out.detach(), *torch.autograd.grad(out, leaves, grad.to(out.dtype))


def _untrained(config: SparseAttentionConfig, spec: LayerSpec) -> SparseAttention:
    if isinstance(config, SparseBertAttentionConfig) and config.frozen:
        module: SparseAttention = replace(config, frozen=False).build(spec)
        frozen_at_every_32nd_distance(module)
        return module.eval()
    return config.build(spec).eval()


def _described(device: torch.device, dtype: torch.dtype, num_heads: int, head_dim: int) -> str:
    from sa_hf import __version__

    about = machine(device)
    versions = f"python {about['python']}, torch {about['torch']}, triton {about['triton']}, sa_hf {__version__}"
    shape = f"batch 1, {num_heads} heads, head_dim {head_dim}"
    return f"{about['device']}, {about['threads']} threads, {dtype_name(dtype)}, {shape}; {versions}"


def _time(run: Run, qkv: list[Tensor], backward: bool, device: torch.device) -> float:
    def call() -> Any:
        if backward:
            return torch.autograd.grad(run(*qkv).sum(), qkv)
        with torch.no_grad():
            return run(*qkv)

    return measure([call], device, warm_up=1, repeats=7, seconds=3.0).median_ms
