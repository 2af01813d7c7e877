"""Both ways in which attention runs on the CPU."""

from __future__ import annotations

import pytest
import torch

from sa_hf.ops.choice import CPP
from sa_hf.ops.cpp import CppEngine
from sa_hf.ops.parts import ScoreOptions


@pytest.fixture(params=["kernels", "torch"])
def cpu_path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The compiled kernels, or torch's operators in their place."""
    if request.param == "torch":
        monkeypatch.setattr(CppEngine, "unsupported", lambda *_: "left out by the test")
        return "torch"
    reason = CPP.unsupported(torch.zeros(1, 1, 1, 16), ScoreOptions(scale=1.0))
    if reason is not None:
        pytest.skip(reason)
    return "kernels"
