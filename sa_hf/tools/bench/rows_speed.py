"""Rows of speed: dense attention, our patterns and their options, decoding, training."""

from __future__ import annotations

from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor

from sa_hf.functional import sparse_attention
from sa_hf.layer import Geometry
from sa_hf.ops.attend import attend
from sa_hf.ops.choice import choose_engine
from sa_hf.ops.parts import ScoreOptions
from sa_hf.ops.sequences import Sequences
from sa_hf.patterns.custom_op import cached_plan
from sa_hf.tools.bench.baselines import Dense, dense_runs
from sa_hf.tools.bench.cases import Case, decode_cases, decode_lists, timing_cases
from sa_hf.tools.bench.compare import speed_ups
from sa_hf.tools.bench.roofline import work
from sa_hf.tools.bench.suite import Suite, ending, first_call, inputs, timed
from sa_hf.tools.bench.timing import graph_figure, measure

MOST_LISTS = 1024  # of decoding, in turn: as many kernels in a graph


def dense_section(suite: Suite, lengths: list[int], head_dims: list[int]) -> None:
    for head_dim in head_dims:
        for length in lengths:
            for causal in (True, False):
                for dense in dense_runs(causal, suite.device):
                    for backward in (False, True):

                        def measured(
                            dense: Dense = dense, n: int = length, d: int = head_dim, b: bool = backward
                        ) -> dict[str, Any]:
                            with dense.scope():
                                return timed(suite, dense.run, inputs(suite, n, d), b)

                        suite.row("dense", dense.label + ending(causal, head_dim, length, backward), measured)


counted_work = lru_cache(maxsize=None)(work)


def speed_section(suite: Suite, lengths: list[int], head_dims: list[int]) -> None:
    for length in lengths:
        for case in timing_cases(toy=suite.dry):
            for head_dim in head_dims:
                for backward in (False, True):
                    key = case.label + ending(case.causal, head_dim, length, backward)
                    suite.row("ours", key, partial(ours, suite, case, length, head_dim, backward))


def ours(
    suite: Suite, case: Case, length: int, head_dim: int, backward: bool, *options: str, dropout: float = 0.0
) -> dict[str, Any]:  # fmt: skip
    """Our time, the achieved rates (in a graph where there is one: the device's), and the speed-up where the parity of
    the pattern and of the ``options`` holds."""
    sets = inputs(suite, length, head_dim)
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

    sets = inputs(suite, length, head_dim)
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
        for case in decode_cases(toy=suite.dry):
            suite.row("decode", f"{case.label}/n{length}", partial(decoded, suite, case, length))


def decoded(suite: Suite, case: Case, length: int) -> dict[str, Any]:
    from sa_hf.ops.decode import decode_attention

    head_dim = 16 if suite.dry else 128
    q, k, v = (x.detach() for x in inputs(suite, length, head_dim, 1)[0])
    query, options = q[:, :, -1:].contiguous(), ScoreOptions(head_dim**-0.5)
    index = decode_lists(case.config, length, q.shape[1])
    key_bytes = 2 * head_dim * suite.dtype.itemsize  # of K and V
    moved = int((index >= 0).sum()) * key_bytes
    lists = rotated_lists(index, length, min(MOST_LISTS, suite.sets_past_cache(moved)))
    in_rotation = distinct_keys(lists, length) * key_bytes
    calls = [partial(decode_attention, query, k, v, x.to(suite.device), options, suite.engine) for x in lists]
    called = measure(calls, suite.device, **suite.few).median_ms
    figure = graph_figure(calls, suite.device, called) if suite.graphs else {}
    ms = figure.pop("ms in a graph", None)
    rate = moved / (ms or called) / 1e6
    row = {"us called": called * 1e3} | ({} if ms is None else {"us in a graph": ms * 1e3}) | figure
    row |= {"keys per head": index.shape[3], "MiB in rotation": in_rotation / 2**20, "GB/s": rate}
    # What stays in the cache says nothing about memory.
    return row | ({"of memory bandwidth": rate / suite.ceilings.memory_gbs} if in_rotation > suite.cache_bytes else {})


def rotated_lists(index: Tensor, length: int, count: int) -> list[Tensor]:
    """The lists, and ``count - 1`` times the same further on (around the end): as much to read, but of other keys."""
    # One more each time: by whole strides the keys of a strided pattern would be the same again.
    steps = [number * (length // count + 1) for number in range(count)]
    return [torch.where(index < 0, index, (index + step) % length) for step in steps]


def distinct_keys(lists: list[Tensor], length: int) -> int:
    """Keys that lists ``[1, heads, 1, m]`` name between them, over the heads."""
    named = torch.zeros(lists[0].shape[1], length + 1, dtype=torch.bool)
    for index in lists:
        named.scatter_(1, index[0, :, 0].where(index[0, :, 0] >= 0, length), True)
    return int(named[:, :length].sum())


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
