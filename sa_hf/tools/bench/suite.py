"""The sections of the GPU suite, in order of priority; each row is saved as it comes."""

from __future__ import annotations

import os
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
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
from sa_hf.tools.bench.baselines import dense_runs, flex_run, hugging_face_bigbird
from sa_hf.tools.bench.cases import parity_configs, timing_cases
from sa_hf.tools.bench.parity import PARITY_DTYPES, PARITY_SHAPES, Shape, option_parity, parity
from sa_hf.tools.bench.report import Report
from sa_hf.tools.bench.roofline import Ceilings, work
from sa_hf.tools.bench.timing import captured, measure

TOY_SHAPE = Shape(1, 2, 1, 40, 16)


def ending(causal: bool, head_dim: int, length: int, backward: bool) -> str:
    return f"/{'causal' if causal else 'full'}/D{head_dim}/n{length}/{'fwd+bwd' if backward else 'fwd'}"


@dataclass
class Suite:
    """State of one run."""

    device: torch.device
    dry: bool
    deadline: float
    report: Report
    ceilings: Ceilings

    def time_left(self) -> bool:
        return time.monotonic() < self.deadline

    @property
    def engine(self) -> str:
        return "triton"

    def row(self, section: str, key: str, measured: Callable[[], dict[str, Any]]) -> None:
        """Measure one row unless it is there or time is up; an error becomes the row."""
        if self.report.done(section, key) or not self.time_left():
            return
        try:
            result = measured()
        except Exception as error:
            result = {"error": f"{type(error).__name__}: {error}".splitlines()[0][:300]}
            if os.environ.get("SA_HF_TRACE"):
                traceback.print_exc()
            if self.device.type == "cuda":
                # Where the device itself failed, this raises: all that followed would fail with it. A new run goes on.
                torch.cuda.synchronize(self.device)
        self.report.add(section, key, result)
        print(f"{section:>10} {key}: {result}", flush=True)


def parity_section(suite: Suite) -> None:
    dtypes, shapes = ((torch.float32,), (TOY_SHAPE,)) if suite.dry else (PARITY_DTYPES, PARITY_SHAPES)
    for number, shape in enumerate(shapes):
        for dtype in dtypes:
            for label, config in parity_configs():
                for causal in (True, False):
                    key = f"{label}/{'causal' if causal else 'full'}/{str(dtype)[6:]}/D{shape.head_dim}/n{shape.length}"

                    def measured(
                        c: Any = config, s: Any = shape, d: Any = dtype, k: bool = causal, p: bool = number == 0
                    ) -> dict[str, Any]:
                        r = parity(c, d, suite.device, causal=k, engine=suite.engine, shape=s, padded=p)
                        names = ("out", "dq", "dk", "dv")
                        row: dict[str, Any] = {"pass": r.passed, "deterministic": r.deterministic}
                        row |= dict(zip(names, r.errors, strict=True))
                        return row | {f"dense {n}": e for n, e in zip(names, r.dense_errors, strict=True)}

                    suite.row("parity", key, measured)


def option_parity_section(suite: Suite) -> None:
    """Soft cap, distance table, spans and dropout, with the gradients of the table and the spans."""
    dtypes, shape = ((torch.float32,), TOY_SHAPE) if suite.dry else (PARITY_DTYPES, PARITY_SHAPES[0])
    for dtype in dtypes:
        for option in ("softcap", "bias", "spans", "dropout"):

            def measured(o: str = option, d: torch.dtype = dtype) -> dict[str, Any]:
                r = option_parity(o, d, suite.device, engine=suite.engine, shape=shape)
                names = ("out", "dq", "dk", "dv", f"d {o}")
                row: dict[str, Any] = {"pass": r.passed, "deterministic": r.deterministic}
                return row | dict(zip(names, r.errors, strict=False))

            suite.row("parity", f"{option}/causal/{str(dtype)[6:]}/D{shape.head_dim}/n{shape.length}", measured)


def data_parity_section(suite: Suite) -> None:
    """Lists that depend on data (spans, clusters): parity, and CUDA graphs replayed with other data."""
    dtypes, shape = ((torch.float32,), TOY_SHAPE) if suite.dry else (PARITY_DTYPES, PARITY_SHAPES[0])
    for case in learned.CASES:
        for dtype in dtypes:

            def measured(c: learned.DataCase = case, d: torch.dtype = dtype) -> dict[str, Any]:
                r = learned.data_parity(c, d, suite.device, engine=suite.engine, shape=shape)
                names = ("out", "dq", "dk", "dv", "d spans")
                row: dict[str, Any] = {"pass": r.passed, "deterministic": r.deterministic}
                return row | dict(zip(names, r.errors, strict=False))

            def replayed(c: learned.DataCase = case, d: torch.dtype = dtype) -> dict[str, Any]:
                return {"pass": learned.replay_equals_a_new_run(c, d, suite.device, engine=suite.engine, shape=shape)}

            direction = "full" if case.label == "routing" else "causal"
            key = f"{case.label}/{direction}/{str(dtype)[6:]}/D{shape.head_dim}/n{shape.length}"
            suite.row("parity", key, measured)
            if not suite.dry or case is learned.CASES[0]:  # nothing is captured there
                suite.row("parity", f"{key}/replay", replayed)


def parity_of(suite: Suite, label: str, causal: bool) -> bool:
    """Whether every parity row of a pattern's kernels passed; the label's first word names the pattern."""
    stem = label.split("-")[0]
    rows = {k: r for k, r in suite.report.rows("parity").items() if k.split("/")[0].split("-")[0] == stem}
    rows = {k: r for k, r in rows.items() if k.split("/")[1] == ("causal" if causal else "full")}
    return bool(rows) and all(r.get("pass") is True for r in rows.values())


def inputs(suite: Suite, length: int, head_dim: int, sets: int) -> list[tuple[Any, ...]]:
    heads, kv_heads = (2, 1) if suite.dry else (16, 16)
    dtype = torch.float32 if suite.dry else torch.bfloat16

    def draw(h: int) -> Any:
        return torch.randn(1, h, length, head_dim, device=suite.device, dtype=dtype, requires_grad=True)

    return [(draw(heads), draw(kv_heads), draw(kv_heads)) for _ in range(sets)]


def timed(suite: Suite, run: Callable[..., Any], sets: list[tuple[Any, ...]], backward: bool) -> Any:
    """Time a forward, or forward and backward together."""

    if not backward:

        def forward(qkv: tuple[Any, ...]) -> None:
            with torch.no_grad():
                run(*qkv)

        calls = [partial(forward, s) for s in sets]
    else:

        def both(qkv: tuple[Any, ...], grad: Tensor) -> None:
            torch.autograd.grad(run(*qkv), qkv, grad)

        calls = [partial(both, s, torch.randn_like(s[0])) for s in sets]
    few = {"warm_up": 0, "repeats": 1} if suite.dry else {}
    return measure(calls, suite.device, **few)


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
                        key = label + ending(causal, head_dim, length, backward)

                        def measured(
                            run: Any = run, n: int = length, d: int = head_dim, b: bool = backward
                        ) -> dict[str, Any]:
                            t = timed(suite, run, inputs(suite, n, d, 2), b)
                            return {"ms": t.median_ms, "min": t.minimum_ms, "max": t.maximum_ms, "peak MiB": t.peak_mib}

                        suite.row("dense", key, measured)


def fastest_dense(suite: Suite, causal: bool, head_dim: int, length: int, backward: bool) -> tuple[str, float] | None:
    tail = ending(causal, head_dim, length, backward)
    rows = suite.report.rows("dense").items()
    found = [(key.split("/")[0], row["ms"]) for key, row in rows if key.endswith(tail) and "ms" in row]
    return min(found, key=lambda x: x[1]) if found else None


def speed_section(suite: Suite, lengths: list[int], head_dims: list[int]) -> None:
    for length in lengths:
        for case in timing_cases(toy=suite.dry):
            for head_dim in head_dims:
                for backward in (False, True):
                    key = f"{case.key}/D{head_dim}/n{length}/{'fwd+bwd' if backward else 'fwd'}"
                    suite.row("ours", key, partial(ours, suite, case, length, head_dim, backward))


def ours(suite: Suite, case: Any, length: int, head_dim: int, backward: bool, **extra: Any) -> dict[str, Any]:
    """Our time, the achieved rates, and the speed-up where parity holds."""

    sets = inputs(suite, length, head_dim, 2)
    heads, kv_heads = sets[0][0].shape[1], sets[0][1].shape[1]
    engine = suite.engine

    def run(q: Any, k: Any, v: Any) -> Any:
        return sparse_attention(q, k, v, case.config, causal=case.causal, engine=engine, **extra)

    cold = first_call(suite, lambda: run(*sets[0]))
    t = timed(suite, run, sets, backward)
    w = work(
        case.config, length, causal=case.causal, batch=1, num_heads=heads, num_key_value_heads=kv_heads,
        head_dim=head_dim, bytes_per_element=sets[0][0].element_size(),
    )  # fmt: skip
    flops = w.flops_forward + (w.flops_backward if backward else 0.0)
    moved = w.bytes_forward + (w.bytes_backward if backward else 0.0)
    kept_rate = flops / t.median_ms / 1e9
    row: dict[str, Any] = {
        "ms": t.median_ms,
        "min": t.minimum_ms,
        "max": t.maximum_ms,
        "cold ms": cold,
        "peak MiB": t.peak_mib,
    }
    row["TFLOP/s kept"] = kept_rate
    row["TFLOP/s executed"] = kept_rate * w.executed_pairs / max(w.pairs, 1)
    row["of matmul rate"] = kept_rate / suite.ceilings.tflops
    row["of memory bandwidth"] = moved / t.median_ms / 1e6 / suite.ceilings.memory_gbs
    # The backward goes over the tiles twice more: for dQ (K and V again), and for dK and dV (Q and the gradient).
    row["of L2 bandwidth"] = (3 if backward else 1) * w.tile_bytes / t.median_ms / 1e6 / suite.ceilings.l2_gbs
    if not parity_of(suite, case.label, case.causal):
        row["speed-up"] = "not shown: parity failed or not run"
    elif (dense := fastest_dense(suite, case.causal, head_dim, length, backward)) is not None:
        row["speed-up"], row["over"] = dense[1] / t.median_ms, dense[0]
    return row


def flex_section(suite: Suite, lengths: list[int]) -> None:
    head_dim = 16 if suite.dry else 64
    blocks = (128,) if suite.dry else (128, 64)
    for length in lengths:
        for case in timing_cases(toy=suite.dry):
            for block in blocks:
                for backward in (False, True):
                    if backward and suite.device.type == "cpu":
                        continue  # compiled FlexAttention has no backward on CPU
                    key = f"{case.key}/D{head_dim}/n{length}/{'fwd+bwd' if backward else 'fwd'}/block{block}"

                    def measured(c: Any = case, n: int = length, b: bool = backward, bs: int = block) -> dict[str, Any]:
                        sets = inputs(suite, n, head_dim, 2)
                        heads = sets[0][0].shape[1]
                        runs: list[Any] = []

                        def cold_run() -> None:
                            runs.append(flex_run(c.config, n, heads, c.causal, suite.device, bs))
                            runs[0](*sets[0])

                        cold = first_call(suite, cold_run)
                        run = runs[0]
                        t = timed(suite, run, sets, b)
                        row: dict[str, Any] = {"ms": t.median_ms, "cold ms": cold, "peak MiB": t.peak_mib}
                        mine = suite.report.rows("ours").get(
                            f"{c.key}/D{head_dim}/n{n}/{'fwd+bwd' if b else 'fwd'}", {}
                        )
                        if "ms" in mine and parity_of(suite, c.label, c.causal):
                            row["ours is faster by"] = t.median_ms / mine["ms"]
                        return row

                    suite.row("flex", key, measured)
        if not suite.dry:

            def bigbird(n: int = length) -> dict[str, Any]:
                sets = inputs(suite, n, head_dim, 2)
                q = sets[0][0]
                run = hugging_face_bigbird(q.shape[1], head_dim, 64, suite.device, q.dtype)
                t = timed(suite, run, sets, True)
                return {"ms": t.median_ms, "peak MiB": t.peak_mib}

            suite.row("hf-bigbird", f"n{length}/fwd+bwd", bigbird)


def option_section(suite: Suite, length: int) -> None:
    """Dropout and the soft gate as rows of their own."""

    case = next(c for c in timing_cases(toy=suite.dry) if c.label == "sliding_window" and c.causal)
    head_dim = 16 if suite.dry else 64
    for backward in (False, True):
        tail = f"n{length}/{'fwd+bwd' if backward else 'fwd'}"
        suite.row("options", f"plain/{tail}", partial(ours, suite, case, length, head_dim, backward))
        suite.row("options", f"dropout 0.1/{tail}", partial(ours, suite, case, length, head_dim, backward, dropout=0.1))
        suite.row("options", f"spans/{tail}", partial(gated, suite, case, length, head_dim, backward))


def gated(suite: Suite, case: Any, length: int, head_dim: int, backward: bool) -> dict[str, Any]:
    """The same window with expire-spans: the soft gate and its gradient."""

    sets = inputs(suite, length, head_dim, 2)
    heads = sets[0][0].shape[1]
    span = float(case.config.window)
    spans = torch.full((1, 1, length), 0.7 * span, device=suite.device, requires_grad=True)

    def run(q: Any, k: Any, v: Any) -> Any:
        options = ScoreOptions(head_dim**-0.5, spans=spans, ramp=0.2 * span)

        def plan_for(query_length: int, key_length: int) -> Any:
            geometry = Geometry(key_length, query_length, tuple(range(heads)), heads, 0, True)
            return cached_plan(case.config, geometry, suite.device)

        engine = choose_engine(suite.engine, q, options)
        return attend(q, k, v, Sequences.full(1, length, length), plan_for, options, engine)

    t = timed(suite, run, sets, backward)
    return {"ms": t.median_ms, "min": t.minimum_ms, "max": t.maximum_ms, "peak MiB": t.peak_mib}


def decode_section(suite: Suite, lengths: list[int]) -> None:
    """One new query against a long cache: time and the bandwidth on the keys that the pattern reads."""
    from sa_hf.ops.decode import decode_attention

    head_dim = 16 if suite.dry else 128
    for length in lengths:
        for case in (c for c in timing_cases(toy=suite.dry) if c.causal):

            def measured(c: Any = case, n: int = length) -> dict[str, Any]:
                sets = inputs(suite, n, head_dim, 2)
                q = [s[0].detach()[:, :, -1:].contiguous() for s in sets]
                heads = q[0].shape[1]
                rows = c.config.decode_keys(n - 1, Geometry(n, 1, tuple(range(heads)), heads, 0, True))
                width = max(len(r) for r in rows)
                index = torch.full((1, heads, 1, width), -1, dtype=torch.int64)
                for h, r in enumerate(rows):
                    index[0, h, 0, : len(r)] = r
                index = index.to(suite.device)
                options = ScoreOptions(head_dim**-0.5)
                calls = [
                    lambda a=a, s=s: decode_attention(a, s[1].detach(), s[2].detach(), index, options)
                    for a, s in zip(q, sets, strict=True)
                ]
                called = device_ms = measure(calls, suite.device).median_ms
                if suite.device.type == "cuda":  # as a graph, where the host's launches do not count
                    times = 10
                    replay = measure([captured(calls, times)], suite.device)
                    device_ms = replay.median_ms / (times * len(calls))
                moved = 2 * int((index >= 0).sum()) * head_dim * q[0].element_size()
                return {"us called": called * 1e3, "us in a graph": device_ms * 1e3, "keys per head": width,
                        "GB/s": moved / device_ms / 1e6,
                        "of memory bandwidth": moved / device_ms / 1e6 / suite.ceilings.memory_gbs}  # fmt: skip

            suite.row("decode", f"{case.label}/n{length}", measured)


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
            dtype = torch.float32 if suite.dry else torch.bfloat16
            config = LlamaConfig(vocab_size=1024, max_position_embeddings=length, **shape)
            with torch.device(suite.device):
                model = LlamaForCausalLM(config).to(dtype)
            model.gradient_checkpointing_enable()
            model.train()
            if label != "dense":
                patch_model(model, label)
            ids = torch.randint(1024, (1, length), device=suite.device)

            def step() -> None:
                model(input_ids=ids, labels=ids).loss.backward()
                model.zero_grad(set_to_none=True)

            t = measure([step], suite.device, warm_up=0 if suite.dry else 1, repeats=1 if suite.dry else 5)
            return {"tokens/s": length / t.median_ms * 1e3, "ms": t.median_ms, "peak MiB": t.peak_mib}

        suite.row("training", f"llama-1b-shape/{label}/n{length}", measured)
