"""The reasons that a summary gives for the engine of a layer."""

from __future__ import annotations

import pytest
from hf_cases import tiny_model

import sa_hf
from sa_hf.ops import choice


def test_a_summary_says_why_each_faster_engine_does_not_serve(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("bert")
    sa_hf.patch_model(model, "star")
    monkeypatch.setattr(choice.CPP, "unsupported", lambda query, options: "no C++ compiler")
    (layer, *_) = sa_hf.summary(model).layers
    assert (layer.engine, layer.reason.partition(":")[0]) == ("torch", "triton")
    assert layer.reason.endswith("; native: no C++ compiler")
    sa_hf.unpatch_model(model)
    sa_hf.patch_model(model, "star", engine="native")
    assert sa_hf.summary(model).layers[0].reason == "native: no C++ compiler"
    monkeypatch.undo()
    assert sa_hf.summary(model).layers[0].reason == "asked for"
