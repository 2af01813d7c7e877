"""The mark of a test that the table "used inside" (scripts/used_inside.py) is written from."""

from __future__ import annotations

from typing import Any

import pytest


def checks(library: str, what: str) -> Any:
    """Args: library: the distribution's name; what: what the test checks, as the table says it."""
    return pytest.mark.used_inside(library=library, what=what)
