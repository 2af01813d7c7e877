"""The sections of the GPU suite; each row is saved as it comes."""

from __future__ import annotations

import os
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor

from sa_hf.functional import sparse_attention
from sa_hf.ops.attend import attend
from sa_hf.ops.engine import choose_engine
from sa_hf.ops.parts import ScoreOptions
from sa_hf.ops.sequences import Sequences
from sa_hf.patterns.base import Geometry
from sa_hf.patterns.custom_op import cached_plan
from sa_hf.tools.bench import learned
from sa_hf.tools.bench.baselines import FIGURES, Run, dense_runs, flex_run, hugging_face_bigbird, over_dense
from sa_hf.tools.bench.cases import FLEX_CASES, Case, decode_lists, parity_configs, timing_cases
from sa_hf.tools.bench.parity import (
    PARITY_DTYPES,
    PARITY_SHAPES,
    ParityResult,
    Shape,
    option_parity,
    parity,
    parity_held,
    row_key,
)
from sa_hf.tools.bench.report import Report
from sa_hf.tools.bench.roofline import Ceilings, work
from sa_hf.tools.bench.timing import attention_calls, graph_figure, measure

# Seconds that a row may take, compilation included, by section; a row starts only where so many are left.
ROW_SECONDS = {"parity": 10.0, "training": 45.0, "flex": 75.0, "hf-bigbird": 45.0}
USUAL_SECONDS = 25.0
TOY_SHAPE = Shape(1, 2, 1, 40, 16)


def ending(causal: bool, head_dim: int, length: int, backward: bool) -> str:
    return f"/{'causal' if causal else 'full'}/D{head_dim}/n{length}/{'fwd+bwd' if backward else 'fwd'}"


@dataclass
class Suite:
    """State of one run; ``deadline`` (of ``time.monotonic``) is when the last row has to be there."""

    device: torch.device
    dry: bool
    deadline: float
    report: Report
    ceilings: Ceilings
    longest: dict[str, float] = field(default_factory=dict)
    left_out: int = 0

    def time_for(self, section: str) -> bool:
        """Whether a row of the section ends in time: by our guess, and by the longest of its rows so far."""
        needed = max(ROW_SECONDS.get(section, USUAL_SECONDS), self.longest.get(section, 0.0))
        return time.monotonic() + needed <= self.deadline

    @property
    def engine(self) -> str:
        return "triton"

    @property
    def dtype(self) -> torch.dtype:
        return torch.float32 if self.dry else torch.bfloat16

    @property
    def few(self) -> dict[str, int]:
        return {"warm_up": 0, "repeats": 1} if self.dry else {}

    @property
    def graphs(self) -> bool:
        return self.device.type == "cuda"

    def row(self, section: str, key: str, measured: Callable[[], dict[str, Any]]) -> None:
        """Measure one row unless it is there or time is short; an error becomes the row."""
        if self.report.done(section, key):
            return
        if not self.time_for(section):
            self.left_out += 1
            return
        begin = time.monotonic()
        try:
            result = measured()
        except Exception as error:
            result = {"error": f"{type(error).__name__}: {error}".splitlines()[0][:300]}
            if os.environ.get("SA_HF_TRACE"):
                traceback.print_exc()
        self.report.add(section, key, result)
        self.longest[section] = max(self.longest.get(section, 0.0), time.monotonic() - begin)
        print(f"{section:>10} {key}: {result}", flush=True)
        if "error" in result and self.device.type == "cuda":
            # Where the device itself failed, this raises: all that followed would fail with it. A new run goes on.
            torch.cuda.synchronize(self.device)
            torch.cuda.empty_cache()


def parity_row(result: ParityResult, names: tuple[str, ...]) -> dict[str, Any]:
    row: dict[str, Any] = {"pass": result.passed, "deterministic": result.deterministic}
    return row | dict(zip(names, result.errors, strict=False))


def parity_section(suite: Suite) -> None:
    dtypes, shapes = ((torch.float32,), (TOY_SHAPE,)) if suite.dry else (PARITY_DTYPES, PARITY_SHAPES)
    for number, shape in enumerate(shapes):
        for dtype in dtypes:
            for label, config in parity_configs():
                for causal in (True, False):

                    def measured(
                        c: Any = config, s: Any = shape, d: Any = dtype, k: bool = causal, p: bool = number == 0
                    ) -> dict[str, Any]:
                        r = parity(c, d, suite.device, causal=k, engine=suite.engine, shape=s, padded=p)
                        names = ("out", "dq", "dk", "dv")
                        dense = {f"dense {n}": e for n, e in zip(names, r.dense_errors, strict=True)}
                        return parity_row(r, names) | dense

                    suite.row("parity", row_key(label, causal, dtype, shape), measured)


def option_parity_section(suite: Suite) -> None:
    """Soft cap, distance table, spans and dropout, with the gradients of the table and the spans."""
    dtypes, shape = ((torch.float32,), TOY_SHAPE) if suite.dry else (PARITY_DTYPES, PARITY_SHAPES[0])
    for dtype in dtypes:
        for option in ("softcap", "bias", "spans", "dropout"):

            def measured(o: str = option, d: torch.dtype = dtype) -> dict[str, Any]:
                r = option_parity(o, d, suite.device, engine=suite.engine, shape=shape)
                return parity_row(r, ("out", "dq", "dk", "dv", f"d {o}"))

            suite.row("parity", row_key(option, True, dtype, shape), measured)


def data_parity_section(suite: Suite) -> None:
    """Lists that depend on data (spans, clusters): parity, and CUDA graphs replayed with other data."""
    dtypes, shape = ((torch.float32,), TOY_SHAPE) if suite.dry else (PARITY_DTYPES, PARITY_SHAPES[0])
    for case in learned.CASES:
        for dtype in dtypes:

            def measured(c: learned.DataCase = case, d: torch.dtype = dtype) -> dict[str, Any]:
                r = learned.data_parity(c, d, suite.device, engine=suite.engine, shape=shape)
                return parity_row(r, ("out", "dq", "dk", "dv", "d spans"))

            def replayed(c: learned.DataCase = case, d: torch.dtype = dtype) -> dict[str, Any]:
                return {"pass": learned.replay_equals_a_new_run(c, d, suite.device, engine=suite.engine, shape=shape)}

            key = row_key(case.label, case.label != "routing", dtype, shape)
            suite.row("parity", key, measured)
            if not suite.dry or case is learned.CASES[0]:  # nothing is captured there
                suite.row("parity", f"{key}/replay", replayed)


def inputs(suite: Suite, length: int, head_dim: int, sets: int) -> list[tuple[Tensor, ...]]:
    heads, kv_heads = (2, 1) if suite.dry else (16, 16)

    def draw(h: int) -> Tensor:
        return torch.randn(1, h, length, head_dim, device=suite.device, dtype=suite.dtype, requires_grad=True)

    return [(draw(heads), draw(kv_heads), draw(kv_heads)) for _ in range(sets)]


def timed(
    suite: Suite, run: Run, sets: list[tuple[Tensor, ...]], backward: bool, *, graph: bool = True
) -> dict[str, Any]:  # fmt: skip
    """A forward, or forward and backward together: as calls, and in a graph where the device has those."""
    t = measure(attention_calls(run, sets, backward), suite.device, **suite.few)
    row: dict[str, Any] = {"ms": t.median_ms, "min": t.minimum_ms, "max": t.maximum_ms, "peak MiB": t.peak_mib}
    if not (graph and suite.graphs):
        return row
    # Leaves of their own: what autograd keeps for a leaf stays on the stream that first saw it.
    leaves = [tuple(x.detach().requires_grad_() for x in s) for s in sets]
    return row | graph_figure(attention_calls(run, leaves, backward), suite.device, t.median_ms)


def first_call(suite: Suite, call: Callable[[], object]) -> float:
    """Milliseconds of a call up to its end on the device, compilation and plans included."""
    begin = time.perf_counter()
    call()
    if suite.device.type == "cuda":
        torch.cuda.synchronize(suite.device)
    return (time.perf_counter() - begin) * 1e3


def dense_section(suite: Suite, lengths: list[int], head_dims: list[int]) -> None:
    for head_dim in head_dims:
        for length in lengths:
            for causal in (True, False):
                for label, run in dense_runs(causal, suite.device):
                    for backward in (False, True):

                        def measured(
                            run: Run = run, n: int = length, d: int = head_dim, b: bool = backward
                        ) -> dict[str, Any]:
                            return timed(suite, run, inputs(suite, n, d, 2), b)

                        suite.row("dense", label + ending(causal, head_dim, length, backward), measured)


def speed_ups(suite: Suite, row: dict[str, Any], tail: str, *labels: str) -> dict[str, Any]:
    """Speed-ups of a row over the fastest dense attention, where the parity of all the kernels named holds in the dtype
    of the timing."""
    rows, causal = suite.report.rows("parity"), tail.startswith("/causal/")
    if not all(parity_held(rows, label, causal, suite.dtype) for label in labels):
        return {"speed-up": "not shown: parity failed or not run"}
    return over_dense(suite.report.rows("dense"), row, tail)


def renew_speed_ups(suite: Suite) -> None:
    """Compare again: a run that was resumed may have got the dense or the parity rows after ours."""
    for key, row in suite.report.rows("ours").items():
        if "ms" in row:
            for name in [n for n in row if n.startswith(("speed-up", "over"))]:
                del row[name]
            label, tail = key.split("/", 1)
            row.update(speed_ups(suite, row, f"/{tail}", label))


def speed_section(suite: Suite, lengths: list[int], head_dims: list[int]) -> None:
    for length in lengths:
        for case in timing_cases(toy=suite.dry):
            for head_dim in head_dims:
                for backward in (False, True):
                    key = case.label + ending(case.causal, head_dim, length, backward)
                    suite.row("ours", key, partial(ours, suite, case, length, head_dim, backward))


counted_work = lru_cache(maxsize=None)(work)


def ours(
    suite: Suite, case: Case, length: int, head_dim: int, backward: bool, *options: str, dropout: float = 0.0
) -> dict[str, Any]:  # fmt: skip
    """Our time, the achieved rates (in a graph where there is one: the device's), and the speed-up where the parity of
    the pattern and of the ``options`` holds."""
    sets = inputs(suite, length, head_dim, 2)
    heads, kv_heads = sets[0][0].shape[1], sets[0][1].shape[1]

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return sparse_attention(q, k, v, case.config, causal=case.causal, engine=suite.engine, dropout=dropout)

    cold = first_call(suite, lambda: run(*sets[0]))
    row = timed(suite, run, sets, backward) | {"cold ms": cold}
    ms = row.get("ms in a graph", row["ms"])
    w = counted_work(
        case.config, length, causal=case.causal, batch=1, num_heads=heads, num_key_value_heads=kv_heads,
        head_dim=head_dim, bytes_per_element=sets[0][0].element_size(),
    )  # fmt: skip
    flops = w.flops_forward + (w.flops_backward if backward else 0.0)
    moved = w.bytes_forward + (w.bytes_backward if backward else 0.0)
    kept_rate = flops / ms / 1e9
    row["TFLOP/s kept"] = kept_rate
    row["TFLOP/s executed"] = kept_rate * w.executed_pairs / max(w.pairs, 1)
    row["of matmul rate"] = kept_rate / suite.ceilings.tflops
    row["of memory bandwidth"] = moved / ms / 1e6 / suite.ceilings.memory_gbs
    # The backward goes over the tiles twice more: for dQ (K and V again), and for dK and dV (Q and the gradient).
    row["of L2 bandwidth"] = (3 if backward else 1) * w.tile_bytes / ms / 1e6 / suite.ceilings.l2_gbs
    return row | speed_ups(suite, row, ending(case.causal, head_dim, length, backward), case.label, *options)


def faster_than(suite: Suite, row: dict[str, Any], case: str, tail: str) -> dict[str, Any]:
    """How much faster we are than the row of another sparse attention, where parity holds."""
    label, direction = case.split("/")
    if not parity_held(suite.report.rows("parity"), label, direction == "causal", suite.dtype):
        return {}
    mine = suite.report.rows("ours").get(case + tail, {})
    return {f"ours is faster by{e}": row[f] / mine[f] for f, e in FIGURES if f in row and f in mine}


def flex_section(suite: Suite, lengths: list[int]) -> None:
    """Compiled FlexAttention, on few cases: a row is mostly compilation."""
    head_dim = 16 if suite.dry else 64
    cases = {c.key: c for c in timing_cases(toy=suite.dry)}
    for length in lengths:
        for case, block in FLEX_CASES:
            for backward in (True, False):
                if backward and suite.device.type == "cpu":
                    continue  # compiled FlexAttention has no backward on CPU
                tail = f"/D{head_dim}/n{length}/{'fwd+bwd' if backward else 'fwd'}"

                def measured(
                    c: Case = cases[case], n: int = length, b: bool = backward, bs: int = block, t: str = tail
                ) -> dict[str, Any]:
                    sets = inputs(suite, n, head_dim, 2)
                    runs: list[Run] = []

                    def cold_run() -> None:
                        runs.append(flex_run(c.config, n, sets[0][0].shape[1], c.causal, suite.device, bs))
                        attention_calls(runs[0], sets[:1], b)[0]()

                    cold = first_call(suite, cold_run)
                    row = timed(suite, runs[0], sets, b) | {"cold ms": cold}
                    return row | faster_than(suite, row, c.key, t)

                suite.row("flex", f"{case}{tail}/block{block}", measured)


def bigbird_section(suite: Suite, lengths: list[int]) -> None:
    """Hugging Face's own BigBird, forward and backward; it plans on the host, so there is nothing to capture."""
    head_dim = 64
    for length in lengths:

        def measured(n: int = length) -> dict[str, Any]:
            sets = inputs(suite, n, head_dim, 2)
            q = sets[0][0]
            run = hugging_face_bigbird(q.shape[1], head_dim, 64, suite.device, q.dtype)
            row = timed(suite, run, sets, True, graph=False)
            return row | faster_than(suite, row, "bigbird/full", f"/D{head_dim}/n{n}/fwd+bwd")

        suite.row("hf-bigbird", f"n{length}/fwd+bwd", measured)


def option_section(suite: Suite, length: int) -> None:
    """Dropout and the soft gate as rows of their own."""

    case = next(c for c in timing_cases(toy=suite.dry) if c.label == "sliding_window" and c.causal)
    head_dim = 16 if suite.dry else 64
    for backward in (False, True):
        tail = f"n{length}/{'fwd+bwd' if backward else 'fwd'}"
        suite.row("options", f"plain/{tail}", partial(ours, suite, case, length, head_dim, backward))
        dropped = partial(ours, suite, case, length, head_dim, backward, "dropout", dropout=0.1)
        suite.row("options", f"dropout 0.1/{tail}", dropped)
        suite.row("options", f"spans/{tail}", partial(gated, suite, case, length, head_dim, backward))


def gated(suite: Suite, case: Any, length: int, head_dim: int, backward: bool) -> dict[str, Any]:
    """The same window with expire-spans: the soft gate and its gradient."""

    sets = inputs(suite, length, head_dim, 2)
    heads = sets[0][0].shape[1]
    span = float(case.config.window)
    spans = torch.full((1, 1, length), 0.7 * span, device=suite.device, requires_grad=True)

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        options = ScoreOptions(head_dim**-0.5, spans=spans, ramp=0.2 * span)

        def plan_for(query_length: int, key_length: int) -> Any:
            geometry = Geometry(key_length, query_length, tuple(range(heads)), heads, 0, True)
            return cached_plan(case.config, geometry, suite.device)

        engine = choose_engine(suite.engine, q, options)
        return attend(q, k, v, Sequences.full(1, length, length), plan_for, options, engine)

    return timed(suite, run, sets, backward)


def decode_section(suite: Suite, lengths: list[int]) -> None:
    """One new query against a long cache: time and the bandwidth on the keys that the pattern reads."""
    for length in lengths:
        for case in (c for c in timing_cases(toy=suite.dry) if c.causal):
            suite.row("decode", f"{case.label}/n{length}", partial(decoded, suite, case, length))


def decoded(suite: Suite, case: Case, length: int) -> dict[str, Any]:
    from sa_hf.ops.decode import decode_attention

    head_dim = 16 if suite.dry else 128
    sets = [tuple(x.detach() for x in s) for s in inputs(suite, length, head_dim, 2)]
    index = decode_lists(case.config, length, sets[0][0].shape[1]).to(suite.device)
    options = ScoreOptions(head_dim**-0.5)
    calls = [
        partial(decode_attention, q[:, :, -1:].contiguous(), k, v, index, options, suite.engine) for q, k, v in sets
    ]
    called = measure(calls, suite.device, **suite.few).median_ms
    figure = graph_figure(calls, suite.device, called) if suite.graphs else {}
    ms = figure.pop("ms in a graph", None)
    moved = 2 * int((index >= 0).sum()) * head_dim * suite.dtype.itemsize
    rate = moved / (ms or called) / 1e6
    row = {"us called": called * 1e3} | ({} if ms is None else {"us in a graph": ms * 1e3}) | figure
    return row | {
        "keys per head": index.shape[3],
        "GB/s": rate,
        "of memory bandwidth": rate / suite.ceilings.memory_gbs,
    }


def model_section(suite: Suite) -> None:
    """Tokens per second of training a Llama-like stack of 1B shape, dense and patched."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from sa_hf import patch_model

    length = 48 if suite.dry else 16384
    sizes = (32, 2, 2, 1, 64) if suite.dry else (2048, 16, 32, 8, 8192)
    names = ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "intermediate_size")
    shape = dict(zip(names, sizes, strict=True))
    for label in ("dense", "sliding_window", "bigbird", "longnet", "logsparse"):

        def measured(label: str = label) -> dict[str, Any]:
            config = LlamaConfig(vocab_size=1024, max_position_embeddings=length, **shape)
            with torch.device(suite.device):
                model = LlamaForCausalLM(config).to(suite.dtype)
            model.gradient_checkpointing_enable()
            model.train()
            if label != "dense":
                patch_model(model, label)
            ids = torch.randint(1024, (1, length), device=suite.device)

            def step() -> None:
                model(input_ids=ids, labels=ids).loss.backward()
                model.zero_grad(set_to_none=True)

            t = measure([step], suite.device, **({"warm_up": 1, "repeats": 5} | suite.few))
            return {"tokens/s": length / t.median_ms * 1e3, "ms": t.median_ms, "peak MiB": t.peak_mib}

        suite.row("training", f"llama-1b-shape/{label}/n{length}", measured)
