"""``block_topk`` in models: identity where it covers everything, mixtures by heads, saving, gradients, what is told."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from hf_cases import tiny_model, tokens

import sa_hf
from sa_hf import BlockTopKAttentionConfig, SparseAttentionError

SMALL = {"block_size": 4, "top_k": 1, "num_window_blocks": 1}


@pytest.mark.parametrize("family", ["bert", "llama", "t5"])
@pytest.mark.parametrize("selection", ["query", "query_block"])
def test_a_model_is_unchanged_where_everything_is_read(family: str, selection: str) -> None:
    model = tiny_model(family)
    ids = tokens(2, 30)
    call = {"input_ids": ids} | ({"decoder_input_ids": ids} if family == "t5" else {})
    with torch.no_grad():
        before = model(**call)[0]
        sa_hf.patch_model(model, "block_topk", selection=selection, **{**SMALL, "top_k": 8})
        covered = model(**call)[0]
        sa_hf.patch_model(model, "block_topk", selection=selection, **SMALL)
        sparse = model(**call)[0]
    torch.testing.assert_close(covered, before, rtol=0, atol=1e-4)
    assert (sparse - before).abs().max() > 1e-2


def test_the_defaults_are_for_decoders() -> None:
    model = tiny_model("bert")
    with pytest.raises(SparseAttentionError, match=r"num_window_blocks=2 must be odd .* nearest: 1 or 3"):
        sa_hf.patch_model(model, "block_topk")
    assert not any("sparse" in name for name, _ in model.named_modules())


def test_heads_of_one_group_choose_together_or_alone() -> None:
    """4 query heads on 2 key heads: a part of one head is no whole group."""
    model = tiny_model("llama")
    config = BlockTopKAttentionConfig(**SMALL)
    with pytest.raises(SparseAttentionError, match="whole groups"):
        sa_hf.patch_model(model, {"heads": {"0": config, "1-3": "dense"}})
    alone = BlockTopKAttentionConfig(**SMALL, shared_by_group=False)
    ids = tokens(2, 30)
    for mixture in ({"0-1": config, "2-3": "star"}, {"0": alone, "1-2": "star", "3": alone}):
        sa_hf.patch_model(model, {"heads": mixture})
        with torch.no_grad():
            whole = model(ids, use_cache=False).logits
            first = model(ids[:, :17])
            steps = [first.logits]
            for at in range(17, 30):
                steps.append(model(ids[:, at : at + 1], past_key_values=first.past_key_values).logits)
        torch.testing.assert_close(torch.cat(steps, 1), whole, rtol=0, atol=1e-4)


def test_saved_summed_up_and_told(tmp_path: Path) -> None:
    model = sa_hf.patch_model(tiny_model("llama"), "block_topk", **SMALL)
    ids = tokens(2, 30)
    assert sa_hf.figures(model)[0]["blocks_chosen"] is None
    with torch.no_grad():
        expected = model(ids).logits
    assert 0 < sa_hf.figures(model)[0]["blocks_chosen"] <= 1
    assert "by data" in str(sa_hf.summary(model, 64))
    model.save_pretrained(tmp_path)
    reloaded = type(model).from_pretrained(tmp_path, trust_remote_code=True).eval()
    with torch.no_grad():
        assert torch.equal(reloaded(ids).logits, expected)
    assert not any("sparse" in name for name in model.state_dict())


def test_checkpointed_gradients_and_copies() -> None:
    model = sa_hf.patch_model(tiny_model("llama"), "block_topk", **SMALL).train()
    ids = tokens(2, 30)
    grads = []
    for checkpointed in (False, True):
        one = copy.deepcopy(model)
        if checkpointed:
            one.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        one(input_ids=ids, labels=ids).loss.backward()
        grads.append([p.grad for p in one.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))
    assert all(float(g.abs().sum()) > 0 for g in grads[0])
