"""The GPU suite's dry run: every section at toy sizes under Triton's interpreter, as a GPU session would start it."""

from __future__ import annotations

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from sa_hf.ops.triton.device import why_not

pytestmark = pytest.mark.skipif(why_not() is not None, reason=str(why_not()))
SUITE = Path(__file__).parents[2] / "scripts" / "gpu_suite.py"


def dry_run(*arguments: str, environment: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(SUITE), "--dry-run", *arguments]
    return subprocess.run(
        command, capture_output=True, text=True, check=False, timeout=540, env=os.environ | (environment or {})
    )


def test_dry_run_measures_every_section(tmp_path: Path) -> None:
    done = dry_run("--out", str(tmp_path), "--tune")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    sections = json.loads((tmp_path / "dry_run.json").read_text())["sections"]
    assert set(sections) == {
        "tuning",
        "ceilings",
        "parity",
        "dense",
        "ours",
        "decode",
        "training",
        "options",
        "break-even",
    }
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
        "block_topk",
        "block_topk-query",
    } <= tested
    # A speed-up is printed because parity held, and for no pattern that parity did not cover.
    assert all(isinstance(row["speed-up"], float) for row in sections["ours"].values())
    assert "| bigbird/causal" in (tmp_path / "dry_run.md").read_text()
    # Only what lies in the folder comes back from a lent machine.
    tuned = json.loads((tmp_path / "tuned.json").read_text())
    assert set(tuned) == {"forward|128|32|0", "key|128|32|0"}
    assert all(set(launch) == {"rows", "columns", "warps", "stages"} for launch in tuned.values())


def test_a_run_goes_on_in_another_folder(tmp_path: Path) -> None:
    """As on a lent machine: a first run's folder came back, a second run starts with an empty one."""
    names = ("first", "second", "fresh")
    for name, extra in zip(names, ([], ["--resume", str(tmp_path / "first")], ["--fresh"]), strict=True):
        done = dry_run("--out", str(tmp_path / name), "--only", "decode", *extra)
        assert done.returncode == 0, done.stderr[-3000:]
        assert sorted(p.name for p in (tmp_path / name).iterdir()) == ["dry_run.json", "dry_run.md"]
    rows = [json.loads((tmp_path / name / "dry_run.json").read_text())["sections"]["decode"] for name in names]
    assert rows[0] == rows[1]
    assert rows[0] != rows[2]


def installed(folder: Path, **versions: str) -> dict[str, str]:
    """The environment of a process that finds packages of these versions."""
    for name, number in versions.items():
        metadata = folder / f"{name}-{number}.dist-info" / "METADATA"
        metadata.parent.mkdir()
        metadata.write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {number}\n")
    return {"PYTHONPATH": str(folder)}


def test_the_dry_run_refuses_an_interpreter_that_fails(tmp_path: Path) -> None:
    """Triton 3.6 reads a number out of an array of one element, which numpy 2.4 refuses."""
    out = tmp_path / "out"
    done = dry_run("--out", str(out), environment=installed(tmp_path, triton="3.6.0", numpy="2.5.2"))
    assert done.returncode == 2
    assert "triton 3.6.0" in done.stderr
    assert "numpy<2.4" in done.stderr
    assert "triton>=3.7" in done.stderr
    assert not out.exists()


@pytest.mark.parametrize(("triton", "numpy"), [("3.6.0", "2.3.5"), ("3.7.0", "2.5.2"), ("3.10.0", "2.4.6")])
def test_other_interpreters_are_let_through(triton: str, numpy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    suite = runpy.run_path(str(SUITE))
    monkeypatch.setitem(
        suite["interpreter_problem"].__globals__, "version", {"triton": triton, "numpy": numpy}.__getitem__
    )
    assert suite["interpreter_problem"]() is None


def test_the_bigbird_of_transformers_runs_as_a_baseline() -> None:
    import torch

    from sa_hf.tools.bench.baselines import hugging_face_bigbird
    from sa_hf.tools.bench.timing import attention_calls

    q, k, v = (torch.randn(1, 2, 768, 16, requires_grad=True) for _ in range(3))
    run = hugging_face_bigbird(2, 16, 64, torch.device("cpu"), torch.float32)
    out = run(q, k, v)
    assert out.shape == q.shape
    # The first row of blocks is dense.
    weights = torch.softmax(q[:, :, :64] @ k.transpose(-1, -2) / 4, dim=-1)
    torch.testing.assert_close(out[:, :, :64], weights @ v, rtol=1e-4, atol=1e-5)
    gradients = torch.autograd.grad(out, (q, k, v), torch.randn_like(q))
    assert [g.shape for g in gradients] == [q.shape] * 3
    assert all(g.abs().sum() > 0 for g in gradients)
    for backward in (False, True):  # as the suite times it
        attention_calls(run, [(q, k, v)], backward)[0]()


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
