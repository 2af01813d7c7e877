"""``block_topk`` in models: identity where it covers everything, mixtures by heads, saving, gradients, what is told."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

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


def learned_model(family: str, **fields: Any) -> Any:
    """A tiny model whose indexers are as if they had learned."""
    model = sa_hf.patch_model(tiny_model(family), "block_topk", **{**SMALL, "indexer": True, **fields})
    generator = torch.Generator().manual_seed(3)
    for name, parameter in model.named_parameters():
        if name.endswith("sparse.index_query"):
            parameter.data = 4 * torch.randn(parameter.shape, generator=generator)
    return model


@pytest.mark.parametrize("selection", ["query", "query_block"])
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_an_indexer_decodes_as_the_whole_forward(family: str, selection: str) -> None:
    model = learned_model(family, selection=selection)
    ids = tokens(2, 40)
    mask = torch.ones_like(ids)
    mask[0, :6] = 0
    with torch.no_grad():
        for given in ({}, {"attention_mask": mask}):
            whole = model(ids, use_cache=False, **given).logits
            for cache in (None, sa_hf.sparse_cache(model)):
                named = {} if cache is None else {"past_key_values": cache}
                first = model(ids[:, :23], use_cache=True, **named, **{k: v[:, :23] for k, v in given.items()})
                steps = [first.logits]
                for at in range(23, 40):
                    past = {k: v[:, : at + 1] for k, v in given.items()}
                    out = model(ids[:, at : at + 1], past_key_values=first.past_key_values, **past)
                    steps.append(out.logits)
                joined = torch.cat(steps, 1)
                real = mask.bool() if given else torch.ones_like(mask, dtype=torch.bool)
                torch.testing.assert_close(joined[real], whole[real], rtol=0, atol=1e-4)


def test_an_indexer_trains_by_the_models_loss_alone_and_is_saved(tmp_path: Path) -> None:
    model = learned_model("llama").train()
    ids = tokens(2, 40)
    loss = model(input_ids=ids, labels=ids).loss
    (name, divergence), *others = sa_hf.auxiliary_losses(model).items()
    assert name == "block_topk_indexer"
    assert not others
    with torch.no_grad():
        own = model.eval()(input_ids=ids, labels=ids).loss
    assert float(loss.detach()) == pytest.approx(float(own) + float(divergence), rel=1e-5)
    loss.backward()
    moved = {n: p.grad for n, p in model.named_parameters() if ".sparse." in n}
    assert len(moved) == 2 * model.config.num_hidden_layers
    assert all(float(grad.abs().sum()) > 0 for grad in moved.values())
    model.save_pretrained(tmp_path)
    reloaded = type(model).from_pretrained(tmp_path, trust_remote_code=True).eval()
    with torch.no_grad():
        assert torch.equal(reloaded(ids).logits, model(ids).logits)
    again = {n: p for n, p in reloaded.named_parameters() if ".sparse." in n}
    assert all(torch.equal(p, dict(model.named_parameters())[n]) for n, p in again.items())
    assert len(again) == len(moved)


def test_an_indexers_gradient_reaches_nothing_but_itself() -> None:
    """With everything read, the choice changes no output: the model's own gradients are those without an indexer."""
    ids = tokens(2, 40)
    grads = []
    for indexer in (False, True):
        model = sa_hf.patch_model(tiny_model("llama"), "block_topk", **{**SMALL, "top_k": 12}, indexer=indexer).train()
        model(input_ids=ids, labels=ids).loss.backward()
        grads.append({n: p.grad for n, p in model.named_parameters() if ".sparse." not in n})
    assert all(torch.equal(grads[0][n], grads[1][n]) for n in grads[0])
