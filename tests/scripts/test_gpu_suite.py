"""The GPU suite's dry run: every section at toy sizes under Triton's interpreter, as a GPU session would start it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
SUITE = Path(__file__).parents[2] / "scripts" / "gpu_suite.py"


def test_dry_run_measures_every_section(tmp_path: Path) -> None:
    command = [sys.executable, str(SUITE), "--dry-run", "--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=540)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    sections = json.loads((tmp_path / "dry_run.json").read_text())["sections"]
    assert set(sections) == {"ceilings", "parity", "dense", "ours", "options", "decode", "training"}
    parity = sections["parity"]
    assert all(row["pass"] is True for row in parity.values())
    tested = {key.split("/")[0] for key in parity}
    assert {
        "bigbird",
        "longnet",
        "logsparse",
        "strided",
        "fixed",
        "star",
        "softcap",
        "bias",
        "spans",
        "dropout",
        "expire_span",
        "routing",
        "routing-causal",
    } <= tested
    # A speed-up is printed because parity held, and for no pattern that parity did not cover.
    assert all(isinstance(row["speed-up"], float) for row in sections["ours"].values())
    assert "| bigbird/causal" in (tmp_path / "dry_run.md").read_text()


def test_a_row_that_failed_is_tried_again(tmp_path: Path) -> None:
    from sa_hf.tools.bench.report import Report

    header = {"device": "d", "commit": "c", "torch": "t", "triton": "x"}
    report = Report(tmp_path / "r.json", header)
    report.add("dense", "good", {"ms": 1.0})
    report.add("dense", "bad", {"error": "out of memory"})
    resumed = Report(tmp_path / "r.json", header)
    assert [resumed.done("dense", key) for key in ("good", "bad", "new")] == [True, False, False]


def test_the_bigbird_of_transformers_runs_as_a_baseline() -> None:
    import torch

    from sa_hf.tools.bench.baselines import hugging_face_bigbird

    q, k, v = (torch.randn(1, 2, 768, 16, requires_grad=True) for _ in range(3))
    out = hugging_face_bigbird(2, 16, 64, torch.device("cpu"), torch.float32)(q, k, v)
    # [batch, length, heads, head_dim], the first row of blocks dense
    weights = torch.softmax(q[:, :, :64] @ k.transpose(-1, -2) / 4, dim=-1)
    torch.testing.assert_close(out[:, :64].view(1, 64, 2, 16).transpose(1, 2), weights @ v, rtol=1e-4, atol=1e-5)
    assert all(g.abs().sum() > 0 for g in torch.autograd.grad(out.sum(), (q, k, v)))


def test_offsets_read_their_rows_for_each_pair() -> None:
    """The tile estimate shares a row of K and V among the queries of a tile; the offsets kernels have no tile."""
    from sa_hf import LogSparseAttentionConfig
    from sa_hf.tools.bench.roofline import work

    w = work(
        LogSparseAttentionConfig(), 64, causal=True, batch=1, num_heads=2, num_key_value_heads=2, head_dim=16,
        bytes_per_element=2,
    )  # fmt: skip
    offsets = 1 + 6  # itself, and 1 .. 32
    assert w.tile_bytes == 2 * offsets * 64 * 2 * 16 * 2


def test_without_a_gpu_the_suite_says_what_runs_here(tmp_path: Path) -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    command = [sys.executable, str(SUITE), "--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 2
    assert "--dry-run" in done.stderr
