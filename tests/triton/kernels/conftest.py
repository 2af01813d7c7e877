"""These tests need triton imported with TRITON_INTERPRET=1, which a process decides once.

``test_interpreter.py`` in the folder above runs them in processes of their own, and
``TRITON_INTERPRET=1 pytest tests/triton/kernels`` runs them directly.
"""

import os
from typing import Any

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") != "1":
    collect_ignore_glob = ["test_*.py"]
else:
    from triton.runtime import interpreter

    # The interpreter checks every integer sum for overflow, which is a third of its time.
    object.__setattr__(interpreter.interpreter_builder.options, "sanitize_overflow", False)


@pytest.fixture
def nan_filled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every uninitialised tensor starts as NaN: an element that a kernel forgets to write shows."""

    def filled(make: Any) -> Any:
        def wrapper(*args: Any, **kwargs: Any) -> torch.Tensor:
            x: torch.Tensor = make(*args, **kwargs)
            return x.fill_(float("nan")) if x.is_floating_point() else x

        return wrapper

    monkeypatch.setattr(torch, "empty", filled(torch.empty))
    monkeypatch.setattr(torch, "empty_like", filled(torch.empty_like))
