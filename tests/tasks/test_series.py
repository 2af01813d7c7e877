"""Series: the piecewise sinusoids by their formula, and windows of a user's table, none of which looks ahead."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from sa_hf import SparseAttentionError
from sa_hf.tasks.data import load_source
from sa_hf.tasks.synthetic import PiecewiseTask

TASK = "forecasting"


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("cache")))


@pytest.mark.parametrize("t0", [24, 96, 192])
def test_the_last_amplitude_is_the_larger_of_the_first_two(t0: int) -> None:
    values, covariates = PiecewiseTask(t0=t0).series(300, seed=2)
    assert values.shape == (300, t0 + 24)
    assert covariates.shape == (300, t0 + 24, 4)
    x = torch.arange(t0 + 24)

    def amplitude(begin: int, end: int, period: int) -> torch.Tensor:
        wave = torch.sin(2 * math.pi * x[begin:end] / period)
        return ((values[:, begin:end] - 72) * wave).sum(1) / wave.square().sum()

    a1, a2, a4 = amplitude(0, 12, 12), amplitude(12, 24, 12), amplitude(t0, t0 + 24, 24)
    assert (torch.maximum(a1, a2) - a4).abs().quantile(0.99) < 2.0
    assert (0 < a1.median() < 60, 0.25 < float((a1 < 30).float().mean()) < 0.75) == (True, True)
    if t0 > 24:
        a3 = amplitude(24, t0, 12)
        assert abs(float(torch.corrcoef(torch.stack([a3, a4]))[0, 1])) < 0.2
        assert float((values[:, 24:t0] - 72 - a3[:, None] * torch.sin(math.pi * x[24:t0] / 6)).std()) == pytest.approx(
            1.0, abs=0.05
        )


def test_the_piecewise_source_forecasts_behind_t0() -> None:
    source = load_source(TASK, "piecewise", max_length=120, train_rows=3, evaluation_rows=2)
    assert source.model_options == {"context_length": 96, "num_covariates": 4}
    assert [len(source.train), len(source.evaluation), len(source.train[0]["values"])] == [3, 2, 120]
    shorter = load_source(TASK, "piecewise", max_length=120, train_rows=1, evaluation_rows=1, fields={"horizon": 12})
    assert shorter.model_options == {"context_length": 108, "num_covariates": 4}


def table(path: Path, steps: int, times: bool) -> str:
    head = ("when," if times else "") + "a,b\n"
    rows = [
        (f"2024-01-{1 + i // 24:02d}T{i % 24:02d}:00," if times else "") + f"{i},{1000 + i}\n" for i in range(steps)
    ]
    path.write_text(head + "".join(rows))
    return str(path)


@pytest.mark.parametrize("times", [True, False])
def test_no_step_that_is_forecast_in_evaluation_is_trained_on(times: bool, tmp_path: Path) -> None:
    source = load_source(TASK, table(tmp_path / "own.csv", 240, times), max_length=32)
    assert source.model_options == {"context_length": 28, "num_covariates": 4}
    trained = {int(v) % 1000 for row in source.train for v in row["values"]}
    forecast = {int(v) % 1000 for row in source.evaluation for v in row["values"][28:]}
    assert trained == set(range(216))
    assert forecast == set(range(216, 240))
    assert len(source.evaluation) == 2 * 6
    for row in source.evaluation:
        hours = row["values"] % 1000
        day = 2 * math.pi * hours / 24
        assert row["covariates"][:, 0].tolist() == pytest.approx(day.sin().tolist(), abs=1e-4)
        week = 2 * math.pi * hours / 168
        assert row["covariates"][:, 3].tolist() == pytest.approx(week.cos().tolist(), abs=1e-4)


def test_limits_spread_over_the_table(tmp_path: Path) -> None:
    path = table(tmp_path / "own.csv", 240, False)
    source = load_source(TASK, path, max_length=32, train_rows=6, evaluation_rows=3)
    firsts = [int(row["values"][0]) for row in source.train]
    assert len(firsts) == 6
    assert min(f % 1000 for f in firsts) == 0
    assert max(f % 1000 for f in firsts) > 120
    alone = load_source(TASK, path, max_length=32, evaluate_only=True, eval_split="all")
    assert {int(v) for row in alone.evaluation for v in row["values"][28:]} >= set(range(28, 240))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("a\n1\n\nx\n", "row 1|column 'a'"),
        ("a,b\n1,2\n3,\n5,6\n" * 1, r"row 2.*column 'b' is None"),
        ("name\nx\ny\nz\n", "'name' is 'x', neither a number nor a time"),
        ("a\n1\n2\n3\n", "too few steps"),
    ],
)
def test_tables_that_cannot_be_forecast_say_why(content: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "own.csv").write_text(content)
    with pytest.raises(SparseAttentionError, match=message):
        load_source(TASK, str(tmp_path / "own.csv"), max_length=16)
