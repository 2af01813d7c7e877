"""The benchmark's own arithmetic: work counted from plans, reports that resume, parity that can fail."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from sa_hf import SlidingWindowAttentionConfig
from sa_hf.config import pattern_class
from sa_hf.tools.bench import parity as parity_module
from sa_hf.tools.bench.parity import Shape, parity, relative_rms
from sa_hf.tools.bench.report import Report, code_digest
from sa_hf.tools.bench.roofline import H200_DATASHEET, work


def test_work_of_a_causal_window_by_hand() -> None:
    n, window, heads, head_dim = 100, 10, 2, 16
    counted = work(
        SlidingWindowAttentionConfig(window=window), n, causal=True, batch=3, num_heads=heads, num_key_value_heads=1,
        head_dim=head_dim,
    )  # fmt: skip
    pairs = 3 * heads * sum(min(i + 1, window) for i in range(n))
    assert counted.pairs == pairs
    assert counted.flops_forward == 4 * head_dim * pairs
    assert counted.flops_backward == 10 * head_dim * pairs
    # Two tiles of 64 on the diagonal and the one below it; q and out, k and v (one head), log-sum-exp in fp32.
    assert counted.executed_pairs == 3 * heads * 3 * 64 * 64
    assert counted.bytes_forward == 2 * 3 * heads * n * head_dim * 2 + 2 * 3 * n * head_dim * 2 + 3 * heads * n * 4


@pytest.mark.parametrize("name", ["bigbird", "longnet", "logsparse", "sparse_transformer", "star"])
def test_floors_grow_with_the_length_and_stay_below_the_tiles(name: str) -> None:
    config: Any = pattern_class(name)()
    shape = {"causal": False, "batch": 1, "num_heads": 2, "num_key_value_heads": 2, "head_dim": 64}
    short, long = (work(config, n, **shape) for n in (1024, 4096))
    assert short.floor_ms(H200_DATASHEET) < long.floor_ms(H200_DATASHEET)
    assert long.executed_pairs >= long.pairs


def test_parity_fails_where_a_key_is_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    config, shape = SlidingWindowAttentionConfig(window=9), Shape(1, 2, 1, 40, 16)
    device = torch.device("cpu")
    assert parity(config, torch.float32, device, causal=True, engine="native", shape=shape).passed
    real = parity_module.sparse_attention

    def narrower(q: Any, k: Any, v: Any, c: Any, **kwargs: Any) -> Any:
        wrong = SlidingWindowAttentionConfig(window=8) if kwargs["engine"] == "native" else c
        return real(q, k, v, wrong, **kwargs)

    monkeypatch.setattr(parity_module, "sparse_attention", narrower)
    assert not parity(config, torch.float32, device, causal=True, engine="native", shape=shape).passed


def test_nan_never_passes() -> None:
    oracle = torch.ones(4)
    assert relative_rms(torch.tensor([1.0, float("nan"), 1.0, 1.0]), oracle) == float("inf")


def test_report_resumes_only_for_the_same_machine_and_code(tmp_path: Path) -> None:
    header = {"title": "t", "device": "d", "commit": "c", "code": "x", "torch": "1", "triton": "1"}
    first = Report(tmp_path / "r.json", header)
    first.add("parity", "a", {"pass": True, "out": 1.5e-7})
    assert Report(tmp_path / "r.json", header).done("parity", "a")
    # The lent machine's checkout has no commit.
    moved = Report(tmp_path / "other" / "r.json", {**header, "commit": "unknown"}, resume=tmp_path / "r.json")
    assert moved.done("parity", "a")
    assert moved.data["header"]["commit"] == "unknown"
    for field in ("code", "device", "torch", "triton", "launches"):
        assert not Report(tmp_path / "r.json", {**header, field: "other"}).done("parity", "a")
    assert not Report(tmp_path / "r.json", header, fresh=True).done("parity", "a")
    assert "| a | yes | 1.5e-07 |" in (tmp_path / "r.md").read_text()


def test_rows_that_failed_are_measured_again(tmp_path: Path) -> None:
    report = Report(tmp_path / "r.json", {})
    rows = {
        "timed": ({"ms": 1.0}, True),
        "not captured": ({"ms": 1.0, "no graph": "why"}, True),
        "passed": ({"pass": True}, True),
        "failed": ({"pass": False}, False),
        "no number": ({"pass": None}, False),
        "raised": ({"error": "out of memory"}, False),
    }
    for key, (row, _) in rows.items():
        report.add("s", key, row)
    resumed = Report(tmp_path / "r.json", {})
    assert {key: resumed.done("s", key) for key in [*rows, "new"]} == {k: d for k, (_, d) in rows.items()} | {
        "new": False
    }


def test_the_code_of_a_report_is_the_content_of_its_files(tmp_path: Path) -> None:
    (tmp_path / "scripts").mkdir()
    (tmp_path / "sa_hf" / "ops").mkdir(parents=True)
    kernel, script, notes = (tmp_path / p for p in ("sa_hf/ops/k.py", "scripts/gpu_suite.py", "sa_hf/notes.md"))
    seen = []
    for path, text in ((kernel, "a"), (script, "a"), (kernel, "b"), (script, "b")):
        path.write_text(text)
        seen.append(code_digest(tmp_path))
    notes.write_text("no code")
    assert code_digest(tmp_path) == seen[-1]
    kernel.rename(kernel.with_name("renamed.py"))
    seen.append(code_digest(tmp_path))
    assert len(set(seen)) == len(seen)
