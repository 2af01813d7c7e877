"""What the GPU suite compares with what: speed-ups, the cache, break-even."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from bench_cases import Graphed, called_at_once, cannot_capture, sum_of_values, toy_suite
from torch import Tensor

from sa_hf.tools.bench import compare, rows_speed, timing
from sa_hf.tools.bench import suite as suite_module
from sa_hf.tools.bench.baselines import Dense, dense_runs, fresh_compiler
from sa_hf.tools.bench.cases import Case, timing_cases
from sa_hf.tools.bench.parity import parity_held
from sa_hf.tools.bench.suite import Suite
from sa_hf.tools.bench.timing import Timing


def compared(suite: Suite) -> dict[str, Any]:
    case = next(c for c in timing_cases(toy=True) if c.key == "sliding_window/causal")
    return rows_speed.ours(suite, case, 64, 16, False)


def test_graphs_are_compared_with_graphs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    suite = toy_suite(tmp_path, kind=Graphed)
    monkeypatch.setattr(timing, "captured", called_at_once)
    suite.report.add("parity", "sliding_window/causal/float32/D64/n321", {"pass": True})
    tail = "/causal/D16/n64/fwd"
    # Launches make one backend slow to call that is the faster on the device.
    suite.report.add("dense", f"sdpa-flash{tail}", {"ms": 30.0, "ms in a graph": 20.0})
    suite.report.add("dense", f"sdpa-cudnn{tail}", {"ms": 40.0, "ms in a graph": 10.0})
    suite.report.add("dense", f"sdpa-flash{tail}+bwd", {"ms": 1e-9, "ms in a graph": 1e-9})
    row = compared(suite)
    assert (row["over"], row["speed-up"]) == ("sdpa-flash", pytest.approx(30.0 / row["ms"]))
    assert (row["over in a graph"], row["speed-up in a graph"]) == (
        "sdpa-cudnn", pytest.approx(10.0 / row["ms in a graph"]),
    )  # fmt: skip
    # Without graphs of ours, or of the dense ones, there is nothing to compare them with.
    monkeypatch.setattr(timing, "captured", cannot_capture)
    row = compared(suite)
    assert "speed-up" in row
    assert "speed-up in a graph" not in row
    assert row["no graph"].startswith("ValueError")


def test_a_dtype_is_gated_on_its_own_parity(tmp_path: Path) -> None:
    def rows(**passed: Any) -> dict[str, dict[str, Any]]:
        return {f"bigbird-first/causal/{dtype}/D64/n321": {"pass": value} for dtype, value in passed.items()}

    bf16, half = torch.bfloat16, torch.float16
    assert parity_held(rows(bfloat16=True, float16=False, float32=False), "bigbird-128", True, bf16)
    assert not parity_held(rows(bfloat16=False, float16=True), "bigbird", True, bf16)
    assert not parity_held(rows(bfloat16=True), "bigbird", True, half)
    assert not parity_held(rows(bfloat16=True), "bigbird", False, bf16)
    assert not parity_held(rows(bfloat16=True), "longnet", True, bf16)
    assert not parity_held({"bigbird/causal/bfloat16/D64/n321": {"error": "why"}}, "bigbird", True, bf16)
    held = rows(bfloat16=True) | {"bigbird/causal/bfloat16/D128/n1000": {"pass": False}}
    assert not parity_held(held, "bigbird", True, bf16)

    suite = toy_suite(tmp_path)  # times in fp32
    suite.report.add("dense", "sdpa/causal/D16/n64/fwd", {"ms": 8.0})
    for dtype, passed in (("bfloat16", True), ("float32", False)):
        suite.report.add("parity", f"longnet/causal/{dtype}/D16/n40", {"pass": passed})
    row = {"ms": 2.0}
    assert "not shown" in compare.speed_ups(suite, row, "/causal/D16/n64/fwd", "longnet")["speed-up"]
    suite.report.add("parity", "longnet/causal/float32/D16/n40", {"pass": True})
    assert compare.speed_ups(suite, row, "/causal/D16/n64/fwd", "longnet") == {"speed-up": 4.0, "over": "sdpa"}
    # An option's kernels are others.
    options = compare.speed_ups(suite, row, "/causal/D16/n64/fwd", "longnet", "dropout")
    assert "not shown" in options["speed-up"]


def test_a_resumed_run_compares_again(tmp_path: Path) -> None:
    suite = toy_suite(tmp_path)
    before = {"ms": 2.0, "speed-up": "not shown: parity failed or not run", "over in a graph": "of an earlier run"}
    suite.report.add("ours", "longnet/causal/D16/n64/fwd", before)
    suite.report.add("ours", "longnet/causal/D16/n64/fwd+bwd", {"error": "out of memory"})
    suite.report.add("parity", "longnet/causal/float32/D16/n40", {"pass": True})
    suite.report.add("dense", "sdpa/causal/D16/n64/fwd", {"ms": 8.0})
    compare.renew_speed_ups(suite)
    assert suite.report.rows("ours") == {
        "longnet/causal/D16/n64/fwd": {"ms": 2.0, "speed-up": 4.0, "over": "sdpa"},
        "longnet/causal/D16/n64/fwd+bwd": {"error": "out of memory"},
    }


def test_the_break_even_is_the_smallest_length_that_is_as_fast(tmp_path: Path) -> None:
    suite = toy_suite(tmp_path)
    suite.report.add("parity", "longnet/causal/float32/D16/n40", {"pass": True})
    for n, mine in ((8192, 2.0), (2048, 8.0), (4096, 4.0)):  # dense takes 4: equal at 4096
        tail = f"/causal/D64/n{n}/fwd"
        suite.report.add("dense", f"sdpa{tail}", {"ms": 4.0, "ms in a graph": 4.0})
        for label in ("longnet", "bigbird"):  # bigbird has no parity here
            suite.report.add("ours", f"{label}{tail}", {"ms": mine, "ms in a graph": 5.0})
    suite.report.add("ours", "longnet/causal/D64/n64/fwd", {"error": "out of memory"})
    compare.renew_speed_ups(suite)
    row = {"from n": 4096, "from n in a graph": "none", "measured at": "2048, 4096, 8192"}
    assert suite.report.rows("break-even") == {"longnet/causal/D64/fwd": row}
    assert "| longnet/causal/D64/fwd | 4096 | none | 2048, 4096, 8192 |" in suite.report.markdown()


class Entered:
    """A scope that tells how often it was entered."""

    times = 0

    def __enter__(self) -> None:
        Entered.times += 1

    def __exit__(self, *_: object) -> None: ...


def test_the_backend_is_chosen_once_for_all_calls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    suite = toy_suite(tmp_path)
    monkeypatch.setattr(Suite, "few", {"warm_up": 2, "repeats": 3})
    monkeypatch.setattr(rows_speed, "dense_runs", lambda *_: [Dense("sdpa", sum_of_values, Entered)])
    rows_speed.dense_section(suite, [32], [16])
    assert Entered.times == len(suite.report.rows("dense")) == 4
    assert all("ms" in row for row in suite.report.rows("dense").values())
    (flash, cudnn) = list(dense_runs(True, torch.device("cuda")))[:2]
    q = torch.randn(1, 2, 8, 16)
    with cudnn.scope(), pytest.raises(RuntimeError):  # there is no such backend on a CPU
        flash.run(q, q, q)
    assert flash.run(q, q, q).shape == q.shape


def test_a_cold_compiler_finds_nothing() -> None:
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    before = cache_dir()
    with fresh_compiler():
        assert cache_dir() != before
        assert not os.listdir(cache_dir())
    assert cache_dir() == before


class Cached(Suite):
    """With a cache of 64 KiB, like that of a GPU."""

    @property
    def cache_bytes(self) -> int:
        return 2**16


def test_inputs_in_turn_pass_the_cache(tmp_path: Path) -> None:
    suite = toy_suite(tmp_path, kind=Cached)
    sets = suite_module.inputs(suite, 64, 16)  # two heads and one of keys, fp32
    assert len(sets) == -(-2 * 2**16 // (2 * 3 * 64 * 16 * 4))
    assert len(suite_module.inputs(suite, 4096, 16)) == 2
    assert len(suite_module.inputs(suite, 64, 16, 1)) == 1


@pytest.mark.parametrize("case", [c for c in timing_cases(toy=True) if c.causal], ids=lambda c: c.label)
def test_decoding_reads_other_keys_at_each_call(case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    suite = toy_suite(tmp_path, kind=Cached)
    length, seen = 1024, []

    def attend(query: Tensor, key: Tensor, value: Tensor, index: Tensor, *_: Any) -> None:
        assert int(index.max()) < length
        seen.append(index)

    def all_in_turn(calls: list[Callable[[], object]], *_: Any, **__: Any) -> Timing:
        for call in calls:
            call()
        return Timing(1.0, 1.0, 1.0, 1, None)

    monkeypatch.setattr("sa_hf.ops.decode.decode_attention", attend)
    monkeypatch.setattr(rows_speed, "measure", all_in_turn)
    row = rows_speed.decoded(suite, case, length)
    assert all(torch.equal(x >= 0, seen[0] >= 0) for x in seen)  # as many in each
    named = {(head, int(j)) for x in seen for head in range(2) for j in x[0, head, 0] if j >= 0}
    assert row["MiB in rotation"] == len(named) * 2 * 16 * 4 / 2**20
    # Two heads of 1024 keys are four of these caches: each pattern gets past one with the lists that it takes.
    assert row["of memory bandwidth"] > 0


def test_a_rate_of_the_cache_is_none_of_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    suite = toy_suite(tmp_path, kind=Cached)
    monkeypatch.setattr(rows_speed, "MOST_LISTS", 2)
    monkeypatch.setattr(rows_speed, "measure", lambda *_, **__: Timing(1.0, 1.0, 1.0, 1, None))
    case = next(c for c in timing_cases(toy=True) if c.label == "star")
    row = rows_speed.decoded(suite, case, 256)
    assert row["GB/s"] > 0
    assert "of memory bandwidth" not in row
