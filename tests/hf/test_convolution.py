"""Convolutional queries and keys: identity at patch time, then a causal convolution within each sequence."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import transformers
from hf_cases import CONFIGS, FAMILIES, case, error, tiny_model, tokens

import sa_hf
from sa_hf import SparseAttentionError
from sa_hf.hf.forward.convolution import check_projections, earlier_slots
from sa_hf.layer import AttentionInputs
from sa_hf.ops.sequences import Sequences

FULL = 1000


def convolved(family: str, kernel: int, seed: int = 0) -> Any:
    c = case(family)
    sa_hf.patch_model(c.model, "logsparse", local_window=FULL, conv_kernel_size=kernel)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in c.model.named_parameters():
            if ".sparse.conv." in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return c


@pytest.mark.parametrize("kernel", [2, 3, 9])
@pytest.mark.parametrize("family", FAMILIES)
def test_patching_alone_changes_nothing(family: str, kernel: int) -> None:
    c = case(family)
    dense = c.output()
    sa_hf.patch_model(c.model, "logsparse", local_window=FULL, conv_kernel_size=kernel)
    assert error(c.output(), dense) < 1e-5
    taps = {n: p for n, p in c.model.named_parameters() if ".sparse.conv." in n}
    assert taps
    assert all(p.shape[0] == kernel - 1 and not p.any() for p in taps.values())


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox", "qwen3", "bert", "distilbert", "modernbert", "vit"])
def test_queries_and_keys_are_a_convolution_of_the_input(family: str) -> None:
    """The projections' outputs, written with plain loops from the layer's input."""
    c = convolved(family, 3)
    site = next(iter(c.model.sa_hf_patch.sites.stacks.values()))[0]
    attention = c.model.get_submodule(site.name)
    conv = attention.sparse.conv
    fused = {"gpt2": "c_attn", "gpt_neox": "query_key_value", "modernbert": "Wqkv"}.get(family)
    pairs = {"bert": ("query", "key"), "distilbert": ("q_lin", "k_lin")}.get(family, ("q_proj", "k_proj"))
    if family == "vit" and not hasattr(attention, "q_proj"):  # the oldest release
        pairs = ("query", "key")
    seen: dict[str, Any] = {}
    for name in [fused] if fused else pairs:
        attention.get_submodule(name).register_forward_hook(
            lambda m, a, out, name=name: seen.update({name: (m, a[0], out)})
        )
    with torch.no_grad():
        if family == "vit":
            c.model(**c.inputs)
        else:
            c.model(input_ids=c.inputs["input_ids"])

        def expected(module: Any, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
            out = torch.zeros(*x.shape[:2], weight.shape[1])
            for i in range(x.shape[1]):
                for t in range(1, 3):
                    if i - t >= 0:
                        out[:, i] += x[:, i - t] @ weight[t - 1].T
            return out

        if not fused:
            for name, weight in zip(pairs, (conv.query, conv.key), strict=True):
                module, x, out = seen[name]
                own = torch.nn.functional.linear(x, module.weight, module.bias)
                assert torch.allclose(out, own + expected(module, x, weight), atol=1e-4)
            return
        module, x, out = seen[fused]
        weight = module.weight.T if family == "gpt2" else module.weight
        own = torch.nn.functional.linear(x, weight, module.bias)
        added = [expected(module, x, w) for w in (conv.query, conv.key)]
        added.append(torch.zeros_like(added[0]))
        if family == "gpt_neox":
            added = [torch.stack([a.view(*a.shape[:2], 4, 8) for a in added], dim=3).flatten(2)]
        assert torch.allclose(out, own + torch.cat(added, dim=-1), atol=1e-4)


@pytest.mark.parametrize("multi_query", [False, True])
def test_the_taps_join_the_queries_and_keys_of_gpt_bigcode(multi_query: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its projection has GPT-2's name, and the thirds of each head or, with one key head, all queries first."""
    sizes = {"n_embd": 32, "n_layer": 1, "n_head": 4, "vocab_size": 99, "n_positions": 64}
    config = transformers.GPTBigCodeConfig(**sizes, multi_query=multi_query, bos_token_id=1, eos_token_id=1)
    model = transformers.GPTBigCodeForCausalLM(config).eval()
    sa_hf.patch_model(model, "logsparse", local_window=FULL, conv_kernel_size=2)
    attention = model.transformer.h[0].attn
    taps = attention.sparse.conv
    seen: dict[str, torch.Tensor] = {}

    def attend(inputs: AttentionInputs) -> torch.Tensor:
        seen.update(query=inputs.query, key=inputs.key, value=inputs.value)
        return inputs.query

    monkeypatch.setattr(attention.sparse, "forward", attend)
    ids = tokens(2, 6)
    with torch.no_grad():
        model(ids)
        before = dict(seen)
        for weight in (taps.query, taps.key):
            weight.normal_()
        model(ids)
        hidden = model.transformer.h[0].ln_1(model.transformer.wte(ids) + model.transformer.wpe(torch.arange(6)))
    earlier = torch.nn.functional.pad(hidden[:, :-1], (0, 0, 1, 0))
    for name, weight in (("query", taps.query), ("key", taps.key)):
        added = (earlier @ weight[0].T).unflatten(-1, (-1, 8)).transpose(1, 2)
        assert added.shape == before[name].shape
        assert torch.allclose(seen[name] - before[name], added, atol=1e-4)
    assert torch.equal(seen["value"], before["value"])


@pytest.mark.parametrize("side", ["left", "right", "inside"])
@pytest.mark.parametrize("family", ["llama", "bert"])
def test_inputs_before_the_start_are_zero(family: str, side: str) -> None:
    c = convolved(family, 6)
    n, total = 17, 22
    where = {"left": range(total - n, total), "right": range(n), "inside": [*range(7), *range(12, total)]}[side]
    row = tokens(1, n)
    ids, mask = torch.full((1, total), 5), torch.zeros(1, total, dtype=torch.long)
    ids[0, list(where)], mask[0, list(where)] = row[0], 1
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad():
        padded = c.model(input_ids=ids, attention_mask=mask, position_ids=positions)[0]
        alone = c.model(input_ids=row)[0]
    assert error(padded[:, list(where)], alone) < 1e-5


def test_packed_sequences_do_not_leak() -> None:
    c = convolved("llama", 9)
    rows = [tokens(1, n, seed=n) for n in (5, 3, 8)]
    positions = torch.cat([torch.arange(n) for n in (5, 3, 8)])[None]
    with torch.no_grad():
        packed = c.model(torch.cat(rows, 1), position_ids=positions, use_cache=False)[0]
        alone = torch.cat([c.model(row)[0] for row in rows], 1)
    assert error(packed, alone) < 1e-5


def test_a_call_that_failed_leaves_nothing_to_dense() -> None:
    c = convolved("llama", 3)
    with sa_hf.dense(c.model):
        expected = c.output()

    def fail(*_: Any) -> None:
        raise MemoryError

    handle = c.model.model.layers[1].self_attn.v_proj.register_forward_pre_hook(fail)
    with pytest.raises(MemoryError):
        c.output()
    handle.remove()
    with sa_hf.dense(c.model):
        assert torch.equal(c.output(), expected)


def test_earlier_slots_by_plain_loops() -> None:
    mask = torch.tensor([[1, 1, 0, 0, 1, 1, 1], [0, 0, 1, 1, 1, 1, 1]])
    ids = torch.tensor([[0, 0, 0, 0, 0, 1, 1], [0, 0, 2, 2, 2, 2, 0]])
    found = earlier_slots(Sequences.from_mask(2, 7, 7, mask, ids), 3)
    for b in range(2):
        real = [j for j in range(7) if mask[b, j]]
        for place, j in enumerate(real):
            for t in range(1, 4):
                earlier = real[place - t] if place >= t else -1
                same = earlier >= 0 and all(ids[b, k] == ids[b, j] for k in real[place - t : place])
                assert int(found[t - 1][b, j]) == (earlier if same else -1)


def test_a_lora_adapter_on_the_projections_keeps_the_taps() -> None:
    peft = pytest.importorskip("peft")
    c = convolved("llama", 3)
    expected = c.output()
    config = sa_hf.prepare_peft(peft.LoraConfig(target_modules="all-linear", r=2), c.model)
    c.model = peft.get_peft_model(c.model, config).eval()
    assert error(c.output(), expected) < 1e-6


@pytest.mark.parametrize("hooks_along", [False, True])
@pytest.mark.parametrize("family", ["llama", "bert", "gpt_neox"])
def test_the_taps_join_what_stands_in_a_projections_place(family: str, hooks_along: bool) -> None:
    """Quantisers put other modules there after the patterns of a checkpoint were attached: without the hooks of the old
    ones (bitsandbytes, quanto), or with them (torch.ao)."""
    c = convolved(family, 3)
    expected, copied = c.output(), copy.deepcopy(c)
    for attention in [m for m in c.model.modules() if hasattr(m, "sparse")]:
        for name in {"query", "key", "q_proj", "k_proj", "query_key_value"} & set(attention._modules):
            old = getattr(attention, name)
            new = torch.nn.Linear(old.in_features, old.out_features, bias=old.bias is not None)
            new.load_state_dict(old.state_dict())
            for hook in old._forward_hooks.values() if hooks_along else ():
                new.register_forward_hook(hook)
            setattr(attention, name, new)
    assert torch.equal(c.output(), expected)
    assert torch.equal(copied.output(), expected)  # what a copy hooks is its own
    sa_hf.unpatch_model(c.model)
    sa_hf.unpatch_model(copied.model)
    assert torch.equal(c.output(), copied.output())
    assert not any(m._forward_hooks for m in c.model.modules())


@pytest.mark.parametrize("kind", ["dora", "boft"])
def test_an_adapter_that_scales_or_leaves_out_the_projection_is_merged_as_it_ran(kind: str) -> None:
    """DoRA scales what the projection gives, BOFT multiplies with its weight without calling it: not with the taps."""
    peft = pytest.importorskip("peft")
    c = convolved("llama", 3)
    expected, targets = c.output(), ["q_proj", "k_proj"]
    dora = peft.LoraConfig(target_modules=targets, r=2, use_dora=True)
    config = dora if kind == "dora" else peft.BOFTConfig(target_modules=targets, boft_block_size=4)
    c.model = peft.get_peft_model(c.model, config).eval()
    assert error(c.output(), expected) < 1e-5
    with torch.no_grad():
        for name, parameter in c.model.named_parameters():
            if ".lora_" in name or "boft" in name:
                parameter.add_(torch.randn_like(parameter) * 0.3)
    adapted = c.output()
    assert error(adapted, expected) > 0.05
    c.model = c.model.merge_and_unload()
    assert error(c.output(), adapted) < 1e-5


def test_a_layer_without_known_projections_is_refused() -> None:
    class Odd(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.to_everything = torch.nn.Linear(2, 2)

    with pytest.raises(SparseAttentionError, match="to_everything"):
        check_projections(Odd())
    check_projections(tiny_model("t5").encoder.block[0].layer[0].SelfAttention)
    assert "t5" in CONFIGS
