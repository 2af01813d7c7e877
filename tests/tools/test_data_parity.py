"""The parity of data-dependent lists is held against a dense oracle that runs no engine."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from sa_hf.tools.bench import learned
from sa_hf.tools.bench.parity import Shape

SHAPE = Shape(1, 2, 1, 128, 16)


@pytest.mark.parametrize("shape", [SHAPE, Shape(2, 2, 2, 75, 24)], ids=["grouped", "batch"])
@pytest.mark.parametrize("case", learned.CASES, ids=lambda case: case.label)
def test_the_engine_of_torch_equals_the_oracle(case: learned.DataCase, shape: Shape) -> None:
    result = learned.data_parity(case, torch.float32, torch.device("cpu"), engine="torch", shape=shape)
    assert result.passed, result


@pytest.mark.parametrize("case", learned.CASES, ids=lambda case: case.label)
def test_an_error_that_all_engines_make_is_seen(case: learned.DataCase, monkeypatch: pytest.MonkeyPatch) -> None:
    """A rule of plans that gives other pairs is wrong in each of them, in fp64, too."""
    right = learned.planned_attention

    def wrong(query: Any, key: Any, value: Any, rule: Any, options: Any, *rest: Any, **more: Any) -> Any:
        if options.spans is not None:
            options = options.with_tensors(spans=options.spans * 0.9)
        else:
            at = int(rule == learned.BLOCK_TOPK)  # the window: of that rule its second number
            more["numbers"] = [number + 1 if place == at else number for place, number in enumerate(more["numbers"])]
        return right(query, key, value, rule, options, *rest, **more)

    monkeypatch.setattr(learned, "planned_attention", wrong)
    assert not learned.data_parity(case, torch.float32, torch.device("cpu"), engine="torch", shape=SHAPE).passed
