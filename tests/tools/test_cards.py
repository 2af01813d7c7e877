"""The model cards: generated parts are up to date, and filling them is what they say."""

from __future__ import annotations

import dataclasses
import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

from sa_hf.config import pattern_class
from sa_hf.tools.describe import argument_docs

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def cards() -> ModuleType:
    spec = importlib.util.spec_from_file_location("cards", ROOT / "scripts" / "cards.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_page_is_up_to_date(cards: ModuleType) -> None:
    stale = [path.name for path, text in cards.pages().items() if path.read_text() != text]
    assert not stale, f"run python scripts/cards.py: {stale}"


def test_every_field_of_every_system_has_a_meaning(cards: ModuleType) -> None:
    for name in cards.SYSTEMS:
        config = pattern_class(name)
        assert set(argument_docs(config)) == {f.name for f in dataclasses.fields(config)}, name
        assert (ROOT / "model_cards" / "pictures" / f"{name}.png").exists()


def test_filling_replaces_only_what_stands_between_the_markers(cards: ModuleType) -> None:
    text = "a\n<!-- begin: x -->\nold\n<!-- end: x -->\nb"
    assert cards.filled(text, "x", "new") == "a\n<!-- begin: x -->\nnew\n<!-- end: x -->\nb"
    with pytest.raises(SystemExit, match="'y' are missing"):
        cards.filled(text, "y", "new")
