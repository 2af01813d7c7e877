"""The CPU benchmark at toy sizes: every section runs and writes its tables; a pattern that fails parity has no row."""

from __future__ import annotations

import json
import math
from mmap import mmap
from pathlib import Path
from types import ModuleType

import pytest
import torch
from script_modules import script_module
from typer.testing import CliRunner

from sa_hf.tools.bench import cpu
from sa_hf.tools.bench.product import of_product


@pytest.fixture(scope="module")
def benchmark() -> ModuleType:
    return script_module("benchmark")


def test_a_dry_run_writes_every_section(benchmark: ModuleType, tmp_path: Path) -> None:
    options = ["--quick", "--output", str(tmp_path), "--length", "64", "--length", "96", "--threads", "1"]
    done = CliRunner().invoke(benchmark.app, [*options, "--pattern", "logsparse", "--pattern", "bigbird"])
    assert done.exit_code == 0, done.output
    result = json.loads((tmp_path / "benchmark_cpu_quick.json").read_text())
    assert set(result["parity"]) == {"logsparse", "bigbird"}
    assert max(result["parity"].values()) < 1e-5
    plain = [row for row in result["speed"] if not row["dropout"]]
    assert len(plain) == 2 * 2 * 2  # two lengths, two directions, two passes
    assert {row["dropout"] for row in result["speed"]} == {0.0, 0.1}
    assert {row["label"] for row in result["memory"]} == {"dense", "logsparse", "bigbird"}
    assert [row["label"] for row in result["growth"]] == ["bigbird", "logsparse"]
    assert [(row["label"], row["length"]) for row in result["decode"]] == [("logsparse", 64), ("logsparse", 96)]
    steps = {"dense static", "dense dynamic", "zero static", "static", "sparse", "dynamic"}
    assert all(row[name] > 0 for row in result["decode"] for name in steps)
    assert all(row["product"] > 0 and of_product(row, "dense", 512) > 0 for row in result["speed"])
    trained = {(row["length"], row["model"]): row for row in result["training"]}
    assert set(trained) == {(n, model) for n in (64, 96) for model in ("bert", "llama")}
    assert (
        set(trained[96, "bert"]["seconds"])
        == {"dense", "dense, no dropout", "bigbird"}
        == set(trained[96, "bert"]["memory"])
    )
    table = (tmp_path / "benchmark_cpu_quick.md").read_text()
    for part in (
        "## Speed",
        "## With dropout 0.1",
        "## Training whole models",
        "## Peak memory",
        "## Growth",
        "## Decoding",
        "### 96 tokens in the cache",
        "| 96 | causal, forward | logsparse, causal |",
    ):
        assert part in table
    assert (tmp_path / "benchmark_cpu_quick.png").stat().st_size > 5000


def test_16_bit_rows_go_into_files_of_their_own(benchmark: ModuleType, tmp_path: Path) -> None:
    options = ["--quick", "--output", str(tmp_path), "--length", "64", "--section", "speed", "--threads", "1"]
    done = CliRunner().invoke(benchmark.app, [*options, "--dtype", "bfloat16", "--pattern", "logsparse"])
    assert done.exit_code == 0, done.output
    result = json.loads((tmp_path / "benchmark_cpu_bfloat16_quick.json").read_text())
    assert 1e-4 < result["parity"]["logsparse"] < benchmark.LIMITS["bfloat16"]
    assert "logsparse" in result["speed"][0]["rows"]
    assert "head_dim 64, bf16" in (tmp_path / "benchmark_cpu_bfloat16_quick.md").read_text()
    assert not (tmp_path / "benchmark_cpu_quick.json").exists()


def test_no_speed_without_parity(benchmark: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(self: object, **task: object) -> dict[str, float]:
        assert task["kind"] == "parity", "a pattern that failed parity was timed"
        return {"logsparse": 0.5}

    monkeypatch.setattr(benchmark.Bench, "run", run)
    bench = benchmark.Bench(
        tmp_path, {"threads": 1, "toy": True, "seconds": 0.0, "huge_pages": False, "dtype": "float32"}, ["logsparse"]
    )
    bench.speed([64], dropout=0.0)
    assert bench.result["speed"] == []


def test_a_resumed_run_measures_only_what_is_missing(
    benchmark: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured: list[int] = []

    def run(self: object, **task: object) -> dict[str, object]:
        if task["kind"] == "parity":
            return {"star": 0.0}
        measured.append(int(str(task["length"])))
        return {"rounds": 3, "failed": {}, "rows": {"dense": {"median_s": 1.0, "first_s": 1.0}}}

    monkeypatch.setattr(benchmark.Bench, "run", run)
    shared = {"threads": 1, "toy": True, "seconds": 0.0, "huge_pages": False, "dtype": "float32"}
    benchmark.Bench(tmp_path, shared, ["star"]).speed([64], dropout=0.0)
    resumed = benchmark.Bench(tmp_path, shared, ["star"], resume=True)
    resumed.speed([64, 96], dropout=0.0)
    assert measured == [64, 64, 96, 96]  # forward, forward and backward
    assert [row["length"] for row in resumed.result["speed"]] == measured


def test_a_resumed_run_of_other_rows_keeps_what_is_said_of_the_rows_that_stay(
    benchmark: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(self: object, **task: object) -> dict[str, object]:
        if task["kind"] == "parity":
            return dict.fromkeys(task["labels"], 1e-7)  # type: ignore[call-overload, no-any-return]
        return {"rounds": 3, "failed": {}, "rows": {"dense": {"median_s": 1.0, "first_s": 1.0}}}

    monkeypatch.setattr(benchmark.Bench, "run", run)
    shared = {"threads": 1, "toy": True, "seconds": 0.0, "huge_pages": False, "dtype": "float32"}
    benchmark.Bench(tmp_path, shared, ["star"]).speed([64], dropout=0.0)
    resumed = benchmark.Bench(tmp_path, shared, ["longnet"], resume=True).result
    assert set(resumed["parity"]) == set(resumed["configs"]) == {"star", "longnet"}


def test_several_processes_give_the_median_of_each_contender(
    benchmark: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn = iter([3.0, 1.0, 2.0] * 2)

    def run(self: object, **task: object) -> dict[str, object]:
        if task["kind"] == "parity":
            return {"star": 0.0}
        seconds = next(drawn)
        rows = {
            "dense": {"median_s": seconds, "first_s": -seconds},
            "star": {"median_s": 5.0, "first_s": 1.0, "pairs": 7.0, "dense_pairs": 9.0},
        }
        return {"rounds": 4, "failed": {}, "rows": rows}

    monkeypatch.setattr(benchmark.Bench, "run", run)
    bench = benchmark.Bench(
        tmp_path,
        {"threads": 1, "toy": True, "seconds": 0.0, "huge_pages": False, "dtype": "float32"},
        ["star"],
        processes=3,
    )
    bench.speed([64], dropout=0.0)
    for row in bench.result["speed"]:
        assert row["rows"]["dense"] == {"median_s": 2.0, "first_s": -2.0}
        assert row["rows"]["star"]["pairs"] == 7.0
        assert (row["rounds"], row["processes"]) == (12, 3)


def test_unknown_rows_are_refused(benchmark: ModuleType) -> None:
    done = CliRunner().invoke(benchmark.app, ["--pattern", "nothing"])
    assert done.exit_code == 2
    assert "logsparse" in done.output


def test_fitted_exponent(benchmark: ModuleType) -> None:
    points = [{"length": n, "seconds": 3 * n**1.5} for n in (100, 200, 400)]
    assert benchmark.exponent(points, "seconds") == pytest.approx(1.5)
    assert math.isnan(benchmark.exponent(points[:1], "seconds"))


def test_pairs_are_near_the_formulas() -> None:
    """At 16,384 tokens the plans compute what the papers' formulas say, to the edges of the pattern."""
    for case in cpu.cpu_cases(16384).values():
        counts = cpu.pair_counts(case, 16384, heads=2)
        if counts:
            assert counts["pairs"] == pytest.approx(counts["formula"], rel=0.06), case.label


def test_a_frozen_mask_is_measured_as_it_runs() -> None:
    case = cpu.cpu_cases(1024)["sparsebert frozen"]
    q, k, v = (torch.randn(1, 8, 96, 64) for _ in range(3))
    i, j = torch.arange(96)[:, None], torch.arange(96)
    kept = (j <= i) & ((i - j < 16) | ((i - j) % 32 == 0))
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=kept)
    assert torch.allclose(cpu.pattern_run(case, 96)(q, k, v), expected, atol=1e-5)


def test_peak_memory_sees_a_large_tensor() -> None:
    before = cpu._reset_peak()
    # New memory, whatever earlier tests have left in the heap.
    torch.frombuffer(mmap(-1, 2**26), dtype=torch.float32).fill_(1)
    assert cpu._peak() - before > 50 * 2**20


@pytest.mark.parametrize("label", cpu.cpu_cases(96, toy=True))
def test_parity_is_measured_for_every_case(label: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Near the rounding of fp32, never an exact 0; and another result than the pattern's is seen."""
    error = cpu.parity_error(label, 96, toy=True)
    assert error is not None
    assert 1e-9 < error < 1e-5
    run = cpu.module_run

    def one_key_less(*args: object, **options: object) -> cpu.Run:
        inner = run(*args, **options)  # type: ignore[arg-type]
        return lambda q, k, v: inner(q, k, torch.cat([v[:, :, :1] * 0, v[:, :, 1:]], 2))

    monkeypatch.setattr(cpu, "module_run", one_key_less)
    assert (cpu.parity_error(label, 96, toy=True) or 0) > 1e-3


def test_what_has_no_oracle_is_not_measured_and_not_timed(
    benchmark: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cpu, "data_oracle", lambda *_: None)
    options = ["--quick", "--output", str(tmp_path), "--length", "64", "--section", "speed", "--threads", "1"]
    monkeypatch.setattr(benchmark.Bench, "run", lambda self, **task: benchmark.measure({**self.shared, **task}))
    done = CliRunner().invoke(benchmark.app, [*options, "--pattern", "routing", "--pattern", "star"])
    assert done.exit_code == 0, done.output
    result = json.loads((tmp_path / "benchmark_cpu_quick.json").read_text())
    assert result["parity"]["routing"] is None
    assert all("routing" not in row["rows"] for row in result["speed"])
    assert "routing num_clusters=√n, bidirectional not measured" in (tmp_path / "benchmark_cpu_quick.md").read_text()


def test_parity_alone_leaves_the_other_figures(
    benchmark: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(benchmark.Bench, "run", lambda self, **task: benchmark.measure({**self.shared, **task}))
    options = ["--quick", "--output", str(tmp_path), "--threads", "1", "--pattern", "star", "--pattern", "routing"]
    CliRunner().invoke(benchmark.app, [*options, "--length", "64", "--section", "speed"])
    path = tmp_path / "benchmark_cpu_quick.json"
    known = json.loads(path.read_text())
    known["machine"]["commit"], known["parity"] = "a day before", {"star": 0.0, "routing": 0.0, "another": 1e-7}
    path.write_text(json.dumps(known))
    done = CliRunner().invoke(benchmark.app, [*options, "--section", "parity"])
    assert done.exit_code == 0, done.output
    found = json.loads(path.read_text())
    assert {k: found[k] for k in found if not k.startswith("parity")} == {k: known[k] for k in known if k != "parity"}
    assert min(found["parity"].values()) > 1e-9
    assert found["parity"]["another"] == 1e-7
    assert found["parity_by"]["commit"] != "a day before"
    refused = CliRunner().invoke(benchmark.app, [*options, "--section", "parity", "--section", "speed"])
    assert refused.exit_code != 0
