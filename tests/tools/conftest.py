"""The script that writes the cards and the README's tables, for the tests of what it wrote."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

SCRIPT = Path(__file__).parents[2] / "scripts" / "cards.py"


@pytest.fixture(scope="session")
def cards() -> ModuleType:
    """``scripts/cards.py`` as a module."""
    spec = importlib.util.spec_from_file_location("cards", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
