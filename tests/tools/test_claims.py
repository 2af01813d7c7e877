"""Claims: a run goes on where it was stopped, counts every seed, and each claim's data is what it says."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from sa_hf import SparseAttentionError, available_patterns, freeze_masks
from sa_hf.patterns.sparsebert import SparseBertAttention, SparseBertAttentionConfig
from sa_hf.tools.claims import CLAIMS, Claim, logsparse_piecewise, longnet_context, small
from sa_hf.tools.claims.claim import claim_section, run_claim
from sa_hf.tools.claims.masked_bytes import small_encoder
from sa_hf.tools.claims.sparsebert_masks import LENGTH, keep_likeliest, learned_density, with_masks_of
from sa_hf.tools.claims.strided_periods import PERIOD, REACH, REPEATS, periodic

ROOT = Path(__file__).parents[2]


def claim(measure: Any) -> Claim:
    return Claim(
        name="toy", system="star", statement="One is more than two.", setting="none", variants={"one": 1, "two": 2},
        measure=measure, steps=5, holds=lambda f: f["one"]["x"] > f["two"]["x"], rule="x of one is larger",
    )  # fmt: skip


def test_a_claim_must_hold_for_every_seed_and_a_stopped_run_goes_on(tmp_path: Path) -> None:
    calls: list[tuple[int, int, int]] = []

    def measure(variant: int, seed: int, steps: int) -> dict[str, float]:
        calls.append((variant, seed, steps))
        if len(calls) == 4:
            raise KeyboardInterrupt
        return {"x": 1.0 / variant if seed < 2 else float(variant)}

    with pytest.raises(KeyboardInterrupt):
        run_claim(claim(measure), tmp_path / "toy.json")
    result = run_claim(claim(measure), tmp_path / "toy.json")
    assert calls == [(1, 0, 5), (2, 0, 5), (1, 1, 5), (2, 1, 5), (2, 1, 5), (1, 2, 5), (2, 2, 5)]
    assert (result["held"], result["verdict"]) == ([True, True, False], "not reproduced")
    assert json.loads((tmp_path / "toy.json").read_text()) == result
    section = claim_section(result)
    assert "Not reproduced (2 of 3 seeds; it counts where x of one is larger)" in section
    assert "| one | 1 (1 to 1) |" in section
    assert "| two | 1 (0.5 to 2) |" in section
    assert run_claim(claim(measure), tmp_path / "toy.json", seeds=(0, 1))["verdict"] == "reproduced"
    with pytest.raises(SparseAttentionError, match="steps=5, not 6"):
        run_claim(claim(measure), tmp_path / "toy.json", steps=6)


@pytest.mark.parametrize("name", CLAIMS)
def test_every_claim_runs_repeats_itself_and_can_fail(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    found = CLAIMS[name]
    assert found.system in available_patterns()
    label, variant = next(iter(found.variants.items()))
    # Fewer of what is held out: the claim's own numbers are for its runs.
    monkeypatch.setattr(longnet_context, "ROWS_HELD_OUT", 2)
    monkeypatch.setattr(logsparse_piecewise, "SERIES_HELD_OUT", 2)
    figures = found.measure(variant, 0, 1)
    assert figures == found.measure(variant, 0, 1)
    assert not found.holds(dict.fromkeys(found.variants, figures)), label


def test_periodic_rows_repeat_as_often_as_they_say() -> None:
    rows = periodic(200, 1)
    same = (rows[:, PERIOD:] == rows[:, :-PERIOD]).float().mean()
    assert rows.shape == (200, REACH)
    # A fresh token is the old one by chance, too: one of 16.
    assert float(same) == pytest.approx(REPEATS + (1 - REPEATS) / 16, abs=0.01)


def test_figures_of_the_small_models_are_their_definitions() -> None:
    model = small.small_decoder(8, 16, "dense", seed=0).eval()
    ids = torch.randint(8, (5, 16), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        chances = model(input_ids=ids).logits[:, :-1].log_softmax(-1)
    nats = -chances.gather(-1, ids[:, 1:, None])[..., 0]
    assert small.loss(model, ids, at_once=2) == pytest.approx(float(nats[:, 7:].mean()), rel=1e-5)
    assert small.loss(model, ids, at_once=2, scored=3) == pytest.approx(float(nats[:, 12:].mean()), rel=1e-5)
    labels = torch.full_like(ids, -100)
    labels[:, 15] = ids[:, 15]
    hits = (chances[:, -1].argmax(-1) == ids[:, 15]).float().mean()
    assert small.right(model, ids, labels, at_once=2) == pytest.approx(float(hits))


def test_the_likeliest_pairs_of_a_search_are_frozen_up_to_a_density_and_new_weights_get_them() -> None:
    config = SparseBertAttentionConfig(mask_length=LENGTH, share_layers=False)
    searched, masks = small_encoder(LENGTH, config, seed=0), []
    for layer, mask in enumerate(m for m in searched.modules() if isinstance(m, SparseBertAttention)):
        # Nearer is likelier, but for the own position; heads and layers differ, so that there are no ties.
        logits = -1.0 * torch.arange(LENGTH).repeat(4, 1) - 0.1 * torch.arange(4)[:, None] - 0.05 * layer
        logits[:, 0] = -LENGTH
        logits[3] -= 1000 * layer  # a head that keeps nothing, and so its own position
        mask.logits.data.copy_(logits)
        masks.append(mask)
    for density in (0.08, 0.085, 0.09, 0.095, 0.1):
        keep_likeliest(searched, density)
        assert density - 4 / LENGTH / 8 < learned_density(searched) <= density
    freeze_masks(searched)
    for mask in masks:
        assert set(mask.keep_table().nonzero()[:, 1].tolist()) in ({*range(1, 8)}, {*range(1, 9)})
    assert not masks[1].keep_table()[3].any()
    fresh = with_masks_of(searched, config, seed=7)
    found = [m for m in fresh.modules() if isinstance(m, SparseBertAttention)]
    assert [f.keep_table().tolist() for f in found] == [m.keep_table().tolist() for m in masks]


def test_the_cards_show_the_claims_that_were_run(cards: ModuleType) -> None:
    for path in sorted((ROOT / "model_cards" / "results" / "claims").glob("*.json")):
        result = json.loads(path.read_text())
        known = CLAIMS[result["name"]]
        assert (result["setting"], result["steps"], result["seeds"]) == (known.setting, known.steps, [0, 1, 2])
        by_seed = [{v: result["cells"][f"{v}/{seed}"] for v in known.variants} for seed in result["seeds"]]
        assert [known.holds(figures) for figures in by_seed] == result["held"]
        assert claim_section(result) in (ROOT / "model_cards" / f"{known.system}.md").read_text()
