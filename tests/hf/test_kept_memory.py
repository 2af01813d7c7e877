"""What a forward in training keeps for its backward: no more than the model's own attention keeps."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hf_cases import tiny_model, tokens
from torch import Tensor

import sa_hf

PATTERNS: dict[str, dict[str, Any]] = {
    "bigbird": {"block_size": 8},
    "sliding_window": {"window": 9},
    "longnet": {"segment_length": [16, 64], "dilated_ratio": [1, 2]},
    "sparse_transformer": {"stride": 8, "summary": 2},
}


@pytest.mark.parametrize("name", PATTERNS)
@pytest.mark.parametrize("family", ["bert", "llama"])
def test_a_forward_keeps_no_more_than_dense_attention(family: str, name: str) -> None:
    model = tiny_model(family).train()
    inputs = {"input_ids": tokens(1, 64)}
    dense = _kept(model, inputs)
    sa_hf.patch_model(model, name, **PATTERNS[name])
    assert _kept(model, inputs) <= dense


def _kept(model: Any, inputs: dict[str, Tensor]) -> int:
    """Bytes of all memory that the forward's graph holds, parameters left out."""
    own = {p.untyped_storage().data_ptr() for p in (*model.parameters(), *model.buffers())}
    kept: dict[int, int] = {}
    held = []

    def pack(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
            held.append(x)  # so that its address is not given out again
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        model(**inputs)
    return sum(kept.values())
