"""Offloaded, pickled and half-precision models."""

from __future__ import annotations

import io
import pickle
from typing import Any

import pytest
import torch
from hf_cases import case, error
from transformers.masking_utils import AttentionMaskInterface
from transformers.modeling_utils import AttentionInterface

import sa_hf
from sa_hf.hf.state.activity import IMPLEMENTATION

CASES: dict[str, tuple[str, Any]] = {
    "static": ("llama", sa_hf.SlidingWindowAttentionConfig(window=3)),
    "bias table": ("t5", sa_hf.StarAttentionConfig()),
    "spans": ("llama", sa_hf.ExpireSpanAttentionConfig(max_span=8, ramp=3, initial_span=4)),
    "extra tokens": ("bert", sa_hf.BigBirdAttentionConfig(block_size=16, num_extra_tokens=2)),
    "convolution": ("gpt2", sa_hf.LogSparseAttentionConfig(conv_kernel_size=3)),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("patched_first", [True, False])
def test_offloaded_models(name: str, patched_first: bool) -> None:
    accelerate = pytest.importorskip("accelerate")
    family, pattern = CASES[name]
    c = case(family)
    dense = c.output()
    sa_hf.patch_model(c.model, pattern)
    expected = c.output()
    if not patched_first:
        c = case(family)
    accelerate.cpu_offload(c.model, execution_device=torch.device("cpu"))
    if not patched_first:
        sa_hf.patch_model(c.model, pattern)
    assert torch.equal(c.output(), expected)
    if not patched_first:
        sa_hf.unpatch_model(c.model)
        assert torch.equal(c.output(), dense)


@pytest.mark.parametrize("name", CASES)
def test_a_pickled_model_runs_the_same(name: str) -> None:
    family, pattern = CASES[name]
    c = case(family)
    sa_hf.patch_model(c.model, pattern)
    expected = c.output()
    file = io.BytesIO()
    torch.save(c.model, file)
    file.seek(0)
    c.model = torch.load(file, weights_only=False)
    assert torch.equal(c.output(), expected)


def test_a_pickled_model_runs_in_a_process_that_has_patched_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    c = case("llama")
    sa_hf.patch_model(c.model, "sliding_window", window=3)
    expected, written = c.output(), pickle.dumps(c.model)
    monkeypatch.delitem(AttentionInterface._global_mapping, IMPLEMENTATION)
    monkeypatch.delitem(AttentionMaskInterface._global_mapping, IMPLEMENTATION)
    c.model = pickle.loads(written)
    assert torch.equal(c.output(), expected)


@pytest.mark.parametrize("name", CASES)
def test_bfloat16_and_autocast(name: str) -> None:
    family, pattern = CASES[name]
    c = case(family)
    dense = c.output()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        dense_error = error(c.output().float(), dense)
    sa_hf.patch_model(c.model, pattern)
    expected = c.output()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert error(c.output().float(), expected) < 3 * dense_error
    c.model.to(torch.bfloat16)
    assert c.output().dtype == torch.bfloat16
    assert error(c.output().float(), expected) < 6 * dense_error
