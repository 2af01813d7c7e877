"""``torch.set_default_device`` moves the tensors that a script makes, and none of ours.

The meta device stands for a GPU: a tensor of ours that landed there could not meet the others.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from hf_cases import tiny_model, tokens

import sa_hf
from sa_hf import patch_model, sparse_attention, summary


@contextmanager
def default_device(name: str) -> Iterator[None]:
    torch.set_default_device(name)
    try:
        yield
    finally:
        torch.set_default_device(None)


FIELDS: dict[str, dict[str, Any]] = {
    "bigbird": {"block_size": 16}, "longnet": {"segment_length": (16, 128), "dilated_ratio": (1, 4)},
    "logsparse": {"conv_kernel_size": 3}, "sparse_transformer": {"stride": 16, "summary": 4}, "star": {},
    "sparsebert": {"mask_length": 64}, "expire_span": {"max_span": 64}, "routing": {}, "sliding_window": {"window": 9},
}  # fmt: skip


@pytest.mark.parametrize("name", FIELDS)
def test_a_patched_model_runs_under_any_default_device(name: str) -> None:
    ids, mask = tokens(2, 50), torch.ones(2, 50, dtype=torch.int64)
    mask[1, :9] = mask[0, 20:23] = 0
    model = tiny_model("llama").eval()
    with default_device("meta"):
        patch_model(model, name, **FIELDS[name])
        table = str(summary(model, 50))
    expected = model(ids, attention_mask=mask).logits
    with default_device("meta"):
        found = model(ids, attention_mask=mask).logits
        found.square().sum().backward()
    assert torch.equal(found, expected)
    assert table == str(summary(model, 50))


@pytest.mark.parametrize("name", ["bigbird", "longnet", "logsparse", "sparse_transformer", "star", "sliding_window"])
def test_operator_mask_and_picture_do_too(name: str) -> None:
    config = sa_hf.available_patterns()[name](**{k: v for k, v in FIELDS[name].items() if k != "conv_kernel_size"})
    q, k, v = torch.randn(3, 2, 2, 50, 16).unbind()
    mask = torch.ones(2, 50, dtype=torch.int64)
    mask[1, :9] = 0

    def everything() -> list[Any]:
        found = [sparse_attention(q[:, :, -new:], k, v, config, causal=True, attention_mask=mask) for new in (50, 1)]
        return [*(x.tolist() for x in found), config.density(50), config.preview(50), config.mask(50).tolist()]

    with default_device("meta"):
        found = everything()
    assert found == everything()
