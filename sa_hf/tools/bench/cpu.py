"""CPU measurements of one process: times side by side, peak memory of one implementation, growth with the length.

``scripts/benchmark.py`` starts one process per case, so that no case inherits another's caches or heap.
"""

from __future__ import annotations

import math
import resource
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sa_hf.config import SparseAttention, SparseAttentionConfig, pattern_class
from sa_hf.layer import AttentionInputs, Geometry, LayerSpec
from sa_hf.ops.counts import kept_pairs
from sa_hf.ops.parts import BlockPart, ScoreOptions
from sa_hf.ops.reference import dense_attention
from sa_hf.ops.sequences import Sequences
from sa_hf.patterns.base import StaticPatternConfig, dense_multiplicity, finished_plan
from sa_hf.patterns.block_topk import BlockTopKAttentionConfig
from sa_hf.patterns.sparsebert import SparseBertAttention
from sa_hf.tools.bench.data_oracle import data_oracle
from sa_hf.tools.bench.parity import relative_rms
from sa_hf.tools.bench.product import product_rate

HEADS, HEAD_DIM = 8, 64
WARM_LENGTH = 48
# Dense attention with dropout has no fused form on the CPU: fp32 matrices n x n per head, forward and backward.
DROPOUT_COPIES = 6
Run = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class CpuCase:
    """A pattern as it is measured. ``formula``: its cost by the paper, pairs per head at a length; ``prepare``: what
    stands for its training."""

    label: str
    config: SparseAttentionConfig
    causal: bool
    formula: Callable[[int], float]
    prepare: Callable[[SparseAttention], None] | None = None


def frozen_at_every_32nd_distance(module: SparseAttention) -> None:
    """A SparseBERT mask as if it had learned the 16 nearest distances and every 32nd one, frozen."""
    keep_every_32nd_distance(module).freeze()


def keep_every_32nd_distance(module: SparseAttention) -> SparseBertAttention:
    """The same, not frozen; the module."""
    if not isinstance(module, SparseBertAttention) or module.logits is None:
        raise TypeError(f"{type(module).__name__} has no mask to freeze")
    distance = torch.arange(module.logits.shape[1])
    with torch.no_grad():
        module.logits.copy_(torch.where((distance < 16) | (distance % 32 == 0), 1.0, -1.0))
    return module


def cpu_cases(length: int, toy: bool = False) -> dict[str, CpuCase]:
    """Every pattern that computes sparsely on its own, in its published shape (``toy``: small, for a dry run).

    The Sparse Transformer's stride is the square root of the length, as in the paper: a fixed one grows like n * n. So
    does "fixed", whose summary keeps its share of the stride; with a constant one the pairs grow like n ** 1.5.
    """
    window, block, stride = (32, 16, 32) if toy else (512, 64, 2 ** round(math.log2(length) / 2))
    segments, ratios = (
        ((32, 64), (1, 2)) if toy else (tuple(512 << i for i in range(7)), tuple(1 << i for i in range(7)))
    )
    summary, constant = max(1, stride // 16), 2 if toy else 8
    clusters = 4 if toy else max(1, round(math.sqrt(length)))

    def config(name: str, **fields: Any) -> SparseAttentionConfig:
        return pattern_class(name)(**fields)

    top_k = 2 if toy else 8
    chosen = BlockTopKAttentionConfig(block_size=block, top_k=top_k)

    def longnet(n: int) -> float:
        branches = ((min(w, n), r) for w, r in zip(segments, ratios, strict=True))
        return sum(n * w / (2 * r * r) for w, r in branches)

    cases = [
        CpuCase("bigbird", config("bigbird", block_size=block), False, lambda n: n * block * (8 + 2)),
        CpuCase("bigbird causal", config("bigbird", block_size=block), True, lambda n: n * block * 5.5),
        CpuCase("window causal", config("sliding_window", window=window), True, lambda n: n * window),
        CpuCase("window", config("sliding_window", window=window // 2), False, lambda n: n * (window - 1)),
        CpuCase("longnet", config("longnet", segment_length=segments, dilated_ratio=ratios), True, longnet),
        CpuCase("logsparse", config("logsparse"), True, lambda n: n * math.log2(n)),
        CpuCase(
            "fixed", config("sparse_transformer", kind="fixed", stride=stride, summary=summary), True,
            lambda n: n * (stride + summary * n / stride) / 2,
        ),
        CpuCase(
            "fixed, constant summary",
            config("sparse_transformer", kind="fixed", stride=stride, summary=constant), True,
            lambda n: n * (stride + constant * n / stride) / 2,
        ),
        CpuCase(
            "strided", config("sparse_transformer", kind="strided", stride=stride), True,
            lambda n: n * (stride + n / stride / 2),
        ),
        CpuCase("star", config("star"), False, lambda n: 5 * n),
        CpuCase(
            "sparsebert frozen", config("sparsebert", mask_length=window, share_layers=False), True,
            lambda n: n * (16 + window // 32 - 1), frozen_at_every_32nd_distance,
        ),
        CpuCase("expire_span", config("expire_span", max_span=window, ramp=32), True, lambda n: n * window),
        CpuCase(
            "routing", config("routing", num_clusters=clusters, local_window=window // 4), False,
            lambda n: n * n / clusters,
        ),
        CpuCase(
            "routing causal", config("routing", num_clusters=clusters, window=-(-length // clusters)), True,
            lambda n: n * n / clusters,
        ),
        CpuCase("block_topk", chosen, True, lambda n: n * block * (top_k + 2.5)),
        CpuCase("block_topk query", replace(chosen, selection="query"), True, lambda n: n * block * (top_k + 2.5)),
    ]  # fmt: skip
    return {case.label: case for case in cases}


# -- what is run ---------------------------------------------------------------------------------------------------


def pattern_module(case: CpuCase, heads: int = HEADS) -> SparseAttention:
    """The pattern's own module in evaluation mode, its plan not yet built."""
    spec = LayerSpec(0, 1, heads, heads, HEAD_DIM, heads * HEAD_DIM, case.causal)
    module = case.config.build(spec).eval()
    if case.prepare is not None:
        case.prepare(module)
    return module


def layer_input(length: int, heads: int = HEADS) -> Tensor:
    return torch.randn(1, length, heads * HEAD_DIM, generator=torch.Generator().manual_seed(1))


def pattern_run(case: CpuCase, length: int, dropout: float = 0.0, heads: int = HEADS) -> Run:
    return module_run(pattern_module(case, heads), case, length, dropout, heads)


def module_run(module: SparseAttention, case: CpuCase, length: int, dropout: float = 0.0, heads: int = HEADS) -> Run:
    sequences, hidden = Sequences.full(1, length, length), layer_input(length, heads)

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        inputs = AttentionInputs(q, k, v, sequences, case.causal, HEAD_DIM**-0.5, dropout=dropout, hidden_states=hidden)
        out: Tensor = module(inputs)
        return out

    return run


def dense_run(causal: bool, dropout: float = 0.0) -> Run:
    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=causal)

    return run


def flex_run(case: CpuCase, length: int, heads: int = HEADS) -> Run | None:
    """Compiled FlexAttention on the blocks of the pattern's plan; None where the plan is no single list of blocks that
    are whole within a band.

    Its CPU code cannot be built from a mask with lists of full blocks: all blocks go to the ordinary list.
    """
    from torch.nn.attention.flex_attention import BlockMask, flex_attention

    if not isinstance(case.config, StaticPatternConfig):
        return None
    geometry = Geometry(length, length, tuple(range(heads)), heads, 0, case.causal)
    plan = finished_plan(case.config, geometry, torch.device("cpu"))
    if len(plan) != 1 or not isinstance(plan[0], BlockPart):
        return None
    layout = plan[0].layout
    if bool((layout.kind >= 0).any()):  # tiles of element masks
        return None
    counts = layout.row_count.int()
    shape = (1, layout.heads, layout.num_query_blocks, layout.num_key_blocks)
    indices = torch.zeros(shape, dtype=torch.int32)
    listed = torch.arange(shape[-1]) < counts[..., None]
    indices[listed] = layout.columns
    left, right = layout.band

    def keep(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        kept = i >= 0
        if left is not None:
            kept = kept & (i - j <= left)
        return kept if right is None else kept & (j - i <= right)

    mask = BlockMask.from_kv_blocks(
        counts, indices, BLOCK_SIZE=layout.block_q, mask_mod=keep, seq_lengths=(length, length)
    )
    # Whole or not at all: what dynamo cannot trace would run uncompiled, n x n in memory.
    compiled: Callable[..., Any] = torch.compile(flex_attention, dynamic=False, fullgraph=True)

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out: Tensor = compiled(q, k, v, block_mask=mask)
        return out

    return run


# -- measuring -----------------------------------------------------------------------------------------------------


def inputs(length: int, heads: int = HEADS, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    shape = (1, heads, length, HEAD_DIM)
    return [torch.randn(shape, generator=generator, dtype=dtype).requires_grad_() for _ in range(3)]


def gradient(length: int, dtype: torch.dtype) -> Tensor:
    """Of the output."""
    return torch.randn(1, HEADS, length, HEAD_DIM, generator=torch.Generator().manual_seed(2), dtype=dtype)


def call(run: Run, qkv: list[Tensor], upstream: Tensor | None) -> float:
    """Seconds of one forward, or of one forward and backward with ``upstream`` as the gradient of the output."""
    begin = time.perf_counter()
    if upstream is None:
        with torch.no_grad():
            run(*qkv)
    else:
        torch.autograd.grad(run(*qkv), qkv, upstream)
    return time.perf_counter() - begin


def time_side_by_side(
    labels: list[str],
    length: int,
    *,
    causal: bool,
    backward: bool,
    dropout: float,
    seconds: float,
    toy: bool,
    dtype: torch.dtype = torch.float32,
) -> dict[str, Any]:
    """First call and steady median of dense, FlexAttention where it runs, and patterns, one call of each in turn.

    Rounds go on until ``seconds`` have passed, at least 3 (2 above 16,384 tokens) and at most 15. Every contender has
    run at another length before its first call here, which is to show the cost of a plan and not of imports.
    FlexAttention, which takes seconds to compile, is left out of a dry run (``toy``). Dense attention runs without
    dropout where it has no memory for it.
    """
    cases = cpu_cases(length, toy)
    failed: dict[str, str] = {}
    dense_dropout = dropout
    if dropout and (needed := DROPOUT_COPIES * HEADS * length * length * 4) > _available():
        dense_dropout = 0.0
        failed["dense with dropout"] = f"needs {needed / 2**30:.0f} GB; the row above is without dropout"
    runs: dict[str, Run] = {"dense": dense_run(causal, dense_dropout)}
    for label in labels:
        runs[label] = pattern_run(cases[label], length, dropout)
        flex = None if backward or dropout or toy else flex_run(cases[label], length)
        if flex is not None:
            runs[f"flex: {label}"] = flex
    qkv = inputs(length, dtype=dtype)
    upstream = gradient(length, dtype) if backward else None
    if not backward:  # FlexAttention refuses inputs that ask for a gradient
        qkv = [x.detach() for x in qkv]
    for warm in (dense_run(causal, dropout), *(pattern_run(cases[label], WARM_LENGTH, dropout) for label in labels)):
        call(warm, inputs(WARM_LENGTH, dtype=dtype), gradient(WARM_LENGTH, dtype))
    first: dict[str, float] = {}
    for label, run in runs.items():
        try:
            first[label] = call(run, qkv, upstream)
        except Exception as error:  # a compiler's failure is a result of the comparison, not of ours
            if not label.startswith("flex"):
                raise
            failed[label] = f"{type(error).__name__}: {str(error).splitlines()[0][:200]}"
    times: dict[str, list[float]] = {label: [] for label in first}
    products: list[float] = []
    begin, rounds = time.perf_counter(), 0
    least = 3 if length <= 16384 else 2
    while rounds < least or (time.perf_counter() - begin < seconds and rounds < 15):
        for label, known in times.items():
            known.append(call(runs[label], qkv, upstream))
        products.append(product_rate(dtype, toy))
        rounds += 1
    rows = {
        label: {"first_s": first[label], "median_s": statistics.median(known), "min_s": min(known)}
        for label, known in times.items()
    }
    for label in labels:
        rows[label] |= pair_counts(cases[label], length)
    return {"rounds": rounds, "rows": rows, "failed": failed, "product": statistics.median(products)}


def pair_counts(case: CpuCase, length: int, heads: int = HEADS) -> dict[str, float]:
    """Kept pairs per head, counted from the plan, and dense attention's; nothing where the pattern depends on data."""
    if not isinstance(case.config, StaticPatternConfig):
        return {}
    geometry = Geometry(length, length, tuple(range(heads)), heads, 0, case.causal)
    plan = finished_plan(case.config, geometry, torch.device("cpu"))
    dense = length * (length + 1) / 2 if case.causal else length * length
    return {"pairs": kept_pairs(plan, length, heads) / heads, "dense_pairs": dense, "formula": case.formula(length)}


def parity_error(label: str, length: int, *, toy: bool, dtype: torch.dtype = torch.float32) -> float | None:
    """The worst RMS ratio to a dense fp64 oracle over output and gradients of query, key and value; None where a
    pattern has no oracle, so that nothing is measured."""
    case = cpu_cases(length, toy)[label]
    module, qkv = pattern_module(case), inputs(length, dtype=dtype)
    q, k, v = qkv
    upstream = gradient(length, dtype)
    if isinstance(case.config, StaticPatternConfig):
        geometry = Geometry(length, length, tuple(range(HEADS)), HEADS, 0, case.causal)
        counts = dense_multiplicity(case.config, geometry)
        oracle: Tensor | None = dense_attention(q, k, v, counts, ScoreOptions(scale=HEAD_DIM**-0.5))[0]
    else:
        oracle = data_oracle(module, q, k, v, layer_input(length), case.causal)
    if oracle is None:
        return None
    ours = module_run(module, case, length)(*qkv)
    exact = torch.autograd.grad(oracle, qkv, upstream.to(oracle.dtype))
    pairs = [(ours, oracle), *zip(torch.autograd.grad(ours, qkv, upstream), exact, strict=True)]
    return max(relative_rms(a.detach(), b.detach()) for a, b in pairs)


def peak_memory(
    label: str, length: int, *, causal: bool, toy: bool, dtype: torch.dtype = torch.float32
) -> dict[str, float]:
    """MB of resident memory beyond inputs and gradient, at the peak of a forward and of a forward and backward."""
    case = cpu_cases(length, toy).get(label)
    run = dense_run(causal) if case is None else pattern_run(case, length)
    qkv, upstream = inputs(length, dtype=dtype), gradient(length, dtype)
    warm = dense_run(causal) if case is None else pattern_run(case, WARM_LENGTH)
    call(warm, inputs(WARM_LENGTH, dtype=dtype), gradient(WARM_LENGTH, dtype))
    before = _reset_peak()
    call(run, qkv, None)
    forward = _peak() - before
    _reset_peak()
    call(run, qkv, upstream)
    return {"forward_mb": forward / 2**20, "both_mb": (_peak() - before) / 2**20}


def growth(label: str, length: int, *, toy: bool, dtype: torch.dtype = torch.float32) -> dict[str, float]:
    """Steady seconds of a forward and backward, its peak memory, and the pairs, counted and by the formula."""
    case = cpu_cases(length, toy)[label]
    run, qkv, upstream = pattern_run(case, length), inputs(length, dtype=dtype), gradient(length, dtype)
    first = call(run, qkv, upstream)
    before = _reset_peak()
    seconds = min(call(run, qkv, upstream) for _ in range(2))
    return {
        "first_s": first, "seconds": seconds, "mb": (_peak() - before) / 2**20, "formula": case.formula(length),
        **pair_counts(case, length),
    }  # fmt: skip


def _reset_peak() -> float:
    """Start the peak anew where the system can; returns the resident bytes."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return _peak()
    return _status("VmRSS")


def _peak() -> float:
    if Path("/proc/self/status").exists():
        return _status("VmHWM")
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024.0


def _available() -> float:
    """Bytes that may still be used; where the system does not say, 8 GB."""
    try:
        return _field(Path("/proc/meminfo"), "MemAvailable")
    except OSError:
        return 2.0**33


def _status(field: str) -> float:
    return _field(Path("/proc/self/status"), field)


def _field(path: Path, name: str) -> float:
    return next(float(line.split()[1]) * 1024 for line in path.read_text().splitlines() if line.startswith(name))
