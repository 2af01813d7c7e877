"""The mixture under a budget is the best of all, and its file loads in patch_model and in fine-tuning."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest
import torch
import yaml
from older_releases import REFUSED_THERE, older_releases_may
from transformers import AutoModelForMaskedLM, T5Config, T5ForConditionalGeneration
from typer.testing import CliRunner

import sa_hf
from sa_hf import SparseAttentionError
from sa_hf.config import SparseAttentionConfig
from sa_hf.patterns.sliding_window import SlidingWindowAttentionConfig
from sa_hf.tasks.load import minilm_path
from sa_hf.tools import finetune
from sa_hf.tools.attention_rows import Measured
from sa_hf.tools.commands import app
from sa_hf.tools.mixture import DENSE, best_mixture, ladder, mixture_mapping, write_mixture
from sa_hf.tools.recovered import recovered
from sa_hf.tools.recovery.grid import Cell
from sa_hf.tools.recovery.rows import Rows, packed
from sa_hf.tools.suggest import Stack, density_of, stacks_of

LENGTH = 1024
WINDOWS = [SlidingWindowAttentionConfig(window=w) for w in (8, 64, 256)]


def stack_of(masses: list[list[float]]) -> Stack:
    layers: list[dict[SparseAttentionConfig, Measured]] = [
        {w: Measured(512, 0.1, mass, 0.1) for w, mass in zip(WINDOWS, row, strict=True)} for row in masses
    ]
    return Stack("encoder", 2, False, layers)


@pytest.mark.parametrize("budget", [0.05, 0.2, 0.3, 0.5, 0.9, 1.0])
def test_no_other_mixture_within_the_budget_keeps_more(budget: float) -> None:
    masses = [[0.2, 0.5, 0.9], [0.6, 0.65, 0.7], [0.1, 0.8, 0.85], [0.3, 0.31, 0.95]]
    found = best_mixture(stack_of(masses), LENGTH, budget)
    costs = [*(density_of(w, 2, False, LENGTH) for w in WINDOWS), 1.0]
    best = 0.0
    for choice in itertools.product(range(4), repeat=4):
        # Densities are rounded up to 0.05 %.
        if sum(costs[c] for c in choice) / 4 <= budget - 0.0005:
            best = max(best, sum([*masses[layer], 1.0][c] for layer, c in enumerate(choice)) / 4)
    assert found.mass >= best - 1e-9
    assert found.density <= budget
    names = [*WINDOWS, DENSE]
    assert found.density == pytest.approx(sum(costs[names.index(c)] for c in found.layers) / 4)  # type: ignore[arg-type]
    if budget == 1.0:
        assert set(found.layers) == {DENSE}


def test_what_keeps_nearly_all_measured_pairs_is_no_choice() -> None:
    layers: list[dict[SparseAttentionConfig, Measured]] = [
        {WINDOWS[0]: Measured(64, 0.2, 0.4, 0.2), WINDOWS[1]: Measured(64, 1.0, 1.0, 1.0)}
    ]
    assert best_mixture(Stack("encoder", 2, False, layers), LENGTH, 0.5).layers == (WINDOWS[0],)


@pytest.mark.parametrize(
    ("budget", "message"), [(0.0, "budget=0.0"), (1.5, "nearest: 1.0"), (0.001, r"nearest: 0\.01")]
)
def test_impossible_budgets_name_the_nearest(budget: float, message: str) -> None:
    with pytest.raises(SparseAttentionError, match=message):
        best_mixture(stack_of([[0.2, 0.5, 0.9]] * 2), LENGTH, budget)


def test_the_file_loads_in_patch_model_and_in_fine_tuning(tmp_path: Path) -> None:
    path = tmp_path / "mixture.yaml"
    words = ["suggest", "minilm", "--length", "512", "--text", json.__file__, "--tokens", "256", "--budget", "0.3"]
    result = CliRunner().invoke(app, [*words, "--mixture", str(path)], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    assert "of the attention mass" in result.output
    content = yaml.safe_load(path.read_text())
    model = sa_hf.patch_model(AutoModelForMaskedLM.from_pretrained(minilm_path()), content["pattern"])
    summary = sa_hf.summary(model, 512).to_dict()["layers"]
    densities = [layer["density"] for layer in summary if layer["density"] is not None]
    assert len(summary) == 6
    assert sum(densities) / 6 <= 0.3 + 1e-6
    out = tmp_path / "run"
    flags = [
        "--config",
        str(path),
        "--task",
        "masked-lm",
        "--max_length",
        "64",
        "--train_rows",
        "1",
        "--eval_rows",
        "1",
    ]
    finetune.main([*flags, "--max_steps", "1", "--cpu", "--verify", "same", "--output_dir", str(out)])
    assert json.loads((out / "config.json").read_text())["sa_hf"] == model.config.sa_hf


def test_stacks_of_an_encoder_decoder_get_a_mixture_each(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = T5Config(vocab_size=32, d_model=16, d_kv=8, d_ff=16, num_layers=2, num_decoder_layers=3, num_heads=2)
    model = T5ForConditionalGeneration(config).eval()
    configs = list(dict.fromkeys(c for causal in (True, False) for c in ladder(causal)))
    with older_releases_may(REFUSED_THERE):
        stacks = stacks_of(model, torch.arange(3, 263)[None] % 32, configs)
    mixtures = [best_mixture(stack, 2048, 0.4) for stack in stacks]
    assert [len(m.layers) for m in mixtures] == [2, 3]
    write_mixture(tmp_path / "m.yaml", mixtures, model="t5", length=2048, measured=260, budget=0.4)
    pattern = yaml.safe_load((tmp_path / "m.yaml").read_text())["pattern"]
    assert pattern == mixture_mapping(mixtures)
    assert set(pattern) == {"encoder", "decoder"}
    sa_hf.patch_model(model, pattern)
    assert set(model.config.sa_hf["layers"]) == {"encoder", "decoder"}


def test_the_grids_steps_are_joined_where_there_are_any(tmp_path: Path) -> None:
    assert recovered(False, tmp_path / "nowhere.jsonl") == {}
    rows = Rows(tmp_path / "recovery.jsonl")

    def add(pattern: str, method: str, step: int, hits: int, density: float = 0.2) -> None:
        items = {"recall@10": packed([n < hits for n in range(400)])}
        cell = Cell("encoder", pattern, method, 0, step, "report")
        rows.add(cell, {"density": density, "figures": {"recall@10": [hits / 400] * 3}, "items": items})

    add("dense", "none", 0, 390, 1.0)
    for pattern, found in {"bigbird": (200, 385, 390), "star": (10, 20, 30), "longnet": (390, 390, 390)}.items():
        add(pattern, "none", 0, found[0])
        add(pattern, "plain", 30, found[1])
        add(pattern, "distill", 100, found[2])
    for step, found in ((0, 300), (30, 390)):
        add("sliding_window, one layer dense", "none" if step == 0 else "distill", step, found)
    add("sliding_window", "none", 0, 40)
    add("logsparse", "none", 0, 40)
    assert recovered(False, rows.path) == {
        "bigbird": "after 30 steps (plain), at 20% of the pairs, by the mean alone",
        "star": "not within 100 steps",
        "longnet": "untrained, at 20% of the pairs",
        "sliding_window": "not untrained; its training is not measured yet; with one layer dense after 30 steps "
        "(distill), at 20% of the pairs",
        "logsparse": "not untrained; its training is not measured yet",
    }
    assert recovered(True, rows.path) == {}
