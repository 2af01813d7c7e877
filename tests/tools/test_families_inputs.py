"""What the tiny models of the table of families are called with, and what is said of one that runs on none of it."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import transformers as tf

import sa_hf
from sa_hf.tools.families.check import _refusal, check
from sa_hf.tools.families.compare import REFUSED, RIGHT
from sa_hf.tools.families.needed import completed
from sa_hf.tools.families.registry import Entry, entries
from sa_hf.tools.families.sizes import BATCH

ENTRIES = {entry.name: entry for entry in entries()}


def _entry(name: str) -> Entry:
    if name not in ENTRIES:
        pytest.skip(f"transformers {tf.__version__} has no {name}")
    return ENTRIES[name]


def test_what_a_forward_asks_for_is_made_by_its_name() -> None:
    def forward(pixel_values: Any, grid_thw: Any, merge_sizes: Any = None, odd: Any = ..., *, odder: Any) -> None: ...

    taken = dict(inspect.signature(forward).parameters)
    given = completed(None, taken, {"pixel_values": 1})
    assert set(given) == {"pixel_values", "grid_thw"}  # no default of its own, and known; what is given stays
    assert given["pixel_values"] == 1
    assert given["grid_thw"].shape == (BATCH, 3)


def test_what_is_refused_is_refused_whatever_it_takes() -> None:
    found = check(_entry("BarkModel"))  # it takes nothing by itself
    assert (found.status, "computes its attention itself" in found.reason) == (REFUSED, True)


def test_a_forward_that_failed_is_no_refusal(monkeypatch: pytest.MonkeyPatch) -> None:
    said = ["X cannot be patched: a forward of its architecture without its weights failed at a.py:1", "X is odd"]

    def patch_model(*args: Any) -> None:
        raise sa_hf.UnsupportedModelError(said.pop(0))

    monkeypatch.setattr(sa_hf, "patch_model", patch_model)
    assert _refusal(object()) is None  # the tiny form may be what fails
    assert _refusal(object()) == "X is odd"
    assert _refusal(None) is None


def test_a_class_that_its_package_does_not_export() -> None:
    assert _entry("VoxtralRealtimeTextModel").cls.__name__ == "VoxtralRealtimeTextModel"


def test_a_model_with_a_cache_of_its_own_is_checked_without_ours() -> None:
    found = check(_entry("MiniMaxForCausalLM"))
    assert found.status == RIGHT, found.reason
    assert any("keeps a cache of its own kind" in note for note in found.notes)
    assert found.figures["generation, dynamic"] < 1e-3
