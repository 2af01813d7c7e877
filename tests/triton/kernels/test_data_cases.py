"""Spans, clusters and chosen blocks: parity with the dense fp64 oracle as the GPU suite asks for, outputs too."""

from __future__ import annotations

import pytest
import torch

from sa_hf.tools.bench import learned
from sa_hf.tools.bench.parity import Shape

pytestmark = pytest.mark.usefixtures("nan_filled")


@pytest.mark.parametrize("shape", [Shape(1, 2, 1, 40, 16), Shape(2, 2, 2, 33, 24)], ids=["grouped", "batch"])
@pytest.mark.parametrize("case", learned.CASES, ids=lambda case: case.label)
def test_data_dependent_attention(case: learned.DataCase, shape: Shape) -> None:
    """Bidirectional routing: a query's own mean stays where no other part attends it."""
    result = learned.data_parity(case, torch.float32, torch.device("cpu"), engine="triton", shape=shape)
    assert result.passed, result
