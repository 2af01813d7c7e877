"""Models whose tokens are codes of sound, several at a place: their own attention under the pattern's pairs."""

from __future__ import annotations

import pytest
import transformers as tf
from older_releases import OLDER

from sa_hf.tools.families.check import FIRST, check
from sa_hf.tools.families.compare import REFUSED, RIGHT
from sa_hf.tools.families.registry import entries

ENTRIES = {entry.name: entry for entry in entries()}


@pytest.mark.parametrize("name", ["MusicgenModel", "KyutaiSpeechToTextModel", "DiaModel"])
def test_outputs_gradients_and_padding(name: str) -> None:
    """As rows of a batch, beside each other with the text's in front, and without."""
    if name not in ENTRIES:
        pytest.skip(f"transformers {tf.__version__} has no {name}")
    found = check(ENTRIES[name])
    if found.status == REFUSED and OLDER:
        pytest.skip(f"transformers {tf.__version__}: {found.reason}")
    assert found.status == RIGHT, found.reason
    assert {FIRST.name, f"{FIRST.name} gradients"} <= found.figures.keys()
