"""The model cards: generated parts are up to date, and filling them is what they say."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from types import ModuleType

import pytest

from sa_hf.config import pattern_class
from sa_hf.patterns.palette import colour_of
from sa_hf.tools.bench import cpu_report
from sa_hf.tools.bench.cpu import cpu_cases
from sa_hf.tools.bench.decoding import decode_cases
from sa_hf.tools.bench.names import NAMES, row_title
from sa_hf.tools.describe import argument_docs

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "model_cards" / "results"


def test_every_page_is_up_to_date(cards: ModuleType) -> None:
    stale = [path.name for path, text in cards.pages().items() if path.read_text() != text]
    assert not stale, f"run python scripts/cards.py: {stale}"


def test_every_field_of_every_system_has_a_meaning(cards: ModuleType) -> None:
    for name in cards.SYSTEMS:
        config = pattern_class(name)
        assert set(argument_docs(config)) == {f.name for f in dataclasses.fields(config)}, name
        assert (ROOT / "model_cards" / "pictures" / f"{name}.png").exists()


def test_rows_have_names_of_patterns_with_options() -> None:
    """Every label of the committed results, and of the benchmark, has a name that begins with its pattern's."""
    cases = cpu_cases(16384) | decode_cases(16384)
    assert set(NAMES) == set(cases)
    for label, named in NAMES.items():
        case = cases[label]
        assert (named.pattern, named.causal) == (case.config.name, case.causal)
        assert row_title(label).startswith(case.config.name)
        for option in filter(None, named.options.partition(" (")[0].split(", ")):
            field, _, value = option.partition("=")
            assert field in case.config.__dataclass_fields__
            if value.isdecimal():
                assert getattr(case.config, field) == int(value), label
    assert row_title("flex: bigbird causal") == "FlexAttention: bigbird, causal"
    for page in (*(ROOT / "model_cards").glob("*.md"), ROOT / "README.md", *RESULTS.glob("benchmark_cpu*.md")):
        assert not re.search(r"\| (fixed|sparsebert frozen|window|window causal|strided)[ ,|]", page.read_text()), page
    assert "mask is learned; this one is set by hand" in (ROOT / "README.md").read_text()


def test_the_benchmark_is_drawn_in_the_patterns_colours_with_the_legend_beside(tmp_path: Path) -> None:
    image = pytest.importorskip("matplotlib.image")
    path = RESULTS / "benchmark_cpu.json"
    cpu_report.plot(json.loads(path.read_text()), tmp_path / "drawn.png")
    drawn = image.imread(tmp_path / "drawn.png")[..., :3]
    assert drawn.shape[1] >= 2 * 880  # a page is 880 points wide
    for name in ("bigbird", "star", "routing", "expire_span", "logsparse"):
        wanted = [int(colour_of(name)[at : at + 2], 16) / 255 for at in (1, 3, 5)]
        near = (abs(drawn - wanted) < 0.02).all(-1)
        assert near[:-300].any(), name  # a line
        assert near[-300:].any(), name  # its entry in the legend, below the axes
    committed = image.imread(path.with_suffix(".png"))
    assert committed.shape[1] == drawn.shape[1]


def test_filling_replaces_only_what_stands_between_the_markers(cards: ModuleType) -> None:
    text = "a\n<!-- begin: x -->\nold\n<!-- end: x -->\nb"
    assert cards.filled(text, "x", "new") == "a\n<!-- begin: x -->\nnew\n<!-- end: x -->\nb"
    with pytest.raises(SystemExit, match="'y' are missing"):
        cards.filled(text, "y", "new")


def test_the_quickstarts_table_is_read_with_and_without_intervals(
    cards: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = ["| variant | accuracy | loss | time per step | peak memory |", "|---|---|---|---|---|"]
    lines += ["| dense at 512 | 53.1% | 1.354 | 0.75 s | 1,145 MB |"]
    lines += ["| sparse | 68.8% (57.9% to 77.9%) | 0.766 | 4.67 s | 2,373 MB |", "", "80 documents to evaluate."]
    monkeypatch.setattr(cards, "quickstart", lambda: "\n".join(lines))
    rows = cards.quickstart_rows()
    assert list(rows) == ["dense at 512", "sparse"]
    assert rows["dense at 512"] == {
        "eval_accuracy": pytest.approx(0.531), "step_seconds": 0.75, "train_peak_memory_mb": 1145.0
    }  # fmt: skip
    assert rows["sparse"]["eval_accuracy_low"] == pytest.approx(0.579)
    assert rows["sparse"]["eval_accuracy_high"] == pytest.approx(0.779)
