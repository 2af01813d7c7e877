"""``finetune --distill_teacher``: the teacher is kept once, and trained by as by the live one."""

from __future__ import annotations

from pathlib import Path

import pytest
from finetune_cases import FEW_STEPS

import sa_hf
from sa_hf.tools import finetune

SMALL = [
    *("--model", "tiny-llama", "--task", "causal-lm", "--max_length", "48", "--pattern", "sliding_window"),
    *("--set", "window=4", "--lr", "1e-2", "--verify", "none", "--distill", "logits", "--distill_weight", "3"),
]


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("cache")))


def test_it_is_kept_once_and_trains_as_the_live_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    kept = ["--distill_teacher", str(tmp_path / "kept"), "--distill_top_k", "384"]
    runs = {"live": [], "kept": kept, "again": kept}
    found = {}
    for name, flags in runs.items():
        metrics = finetune.main([*FEW_STEPS, *SMALL, *flags, "--output_dir", str(tmp_path / name)])
        found[name] = [record["distill_logits"] for record in metrics["log"] if "distill_logits" in record]
    captured = capsys.readouterr()
    said = captured.out + captured.err
    assert "teacher: 4 of 4 training rows run dense" in said
    assert "teacher: 0 of 4 training rows run dense" in said
    assert len(found["live"]) == 2
    assert found["kept"] == found["again"] == pytest.approx(found["live"], rel=1e-3)
    assert found["live"][0] > 1e-5


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--distill", "both"], "--distill is both; nearest: --distill logits"),
        (["--task", "masked-lm", "--model", "tiny-bert"], "masks other tokens at every step"),
        (["--distill_top_k", "9999"], r"top_k=9999 must lie in \[1, 384\]; nearest: 384"),
    ],
)
def test_what_it_cannot_serve_is_one_line(flags: list[str], said: str, tmp_path: Path) -> None:
    with pytest.raises(sa_hf.SparseAttentionError, match=said):
        finetune.main([*FEW_STEPS, *SMALL, "--distill_teacher", str(tmp_path), *flags, "--output_dir", str(tmp_path)])
