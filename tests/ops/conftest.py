"""Both ways in which attention runs on the CPU."""

from __future__ import annotations

import pytest

from sa_hf.ops.native import kernels


@pytest.fixture(params=["kernels", "torch"])
def cpu_path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The compiled kernels, or torch's operators in their place."""
    if request.param == "torch":
        monkeypatch.setattr(kernels, "serves", lambda query: False)
    elif kernels.library() is None:
        pytest.skip(str(kernels.why_not()))
    return str(request.param)
