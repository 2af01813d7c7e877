"""ETC's learned tokens and the virtual relay: against a model that is given them as real tokens."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hf_cases import ENCODERS, case, error, tiny_model, tokens
from torch import Tensor

import sa_hf
from sa_hf import SparseAttentionError

ETC = sa_hf.BigBirdAttentionConfig(block_size=16, num_extra_tokens=3, seed=5)
RELAY = sa_hf.StarAttentionConfig(relay="virtual")


def reference(model: Any, hidden: Tensor, kept: Tensor) -> Tensor:
    """BERT's layers by hand on ``[1, n, 32]`` under a bool mask ``[n, n]``."""
    for layer in model.encoder.layer:
        attention = layer.attention
        heads = [
            projection(hidden).view(1, -1, 4, 8).transpose(1, 2)
            for projection in (attention.self.query, attention.self.key, attention.self.value)
        ]
        scores = (heads[0] @ heads[1].transpose(-1, -2) / 8**0.5).masked_fill(~kept, -torch.inf)
        mixed = (scores.softmax(-1) @ heads[2]).transpose(1, 2).flatten(2)
        hidden = layer.output(layer.intermediate(x := attention.output(mixed, hidden)), x)
    return hidden


@pytest.mark.parametrize("config", [ETC, RELAY], ids=["etc", "relay"])
@pytest.mark.parametrize("everywhere", [True, False])
def test_they_run_through_every_layer_as_global_tokens(config: Any, everywhere: bool) -> None:
    model = tiny_model("bert")
    n, extra = 20, config.extra_tokens
    pattern = config if everywhere else {"1": config}
    sa_hf.patch_model(model, pattern)
    ids = tokens(1, n)
    with torch.no_grad():
        out = model(ids).last_hidden_state
        embedded = model.embeddings(ids)
        if config is ETC:
            learned = {name: p for name, p in model.named_parameters() if name.endswith("extra.tokens")}
            layer = 0 if everywhere else 1
            assert list(learned) == [f"encoder.layer.{layer}.attention.self.sparse.extra.tokens"]
            front = next(iter(learned.values()))[None]
        else:
            front = embedded.mean(1, keepdim=True)
        kept = torch.ones(n + extra, n + extra, dtype=torch.bool)
        if config is RELAY:
            for i in range(n):
                for j in range(n):
                    kept[i + 1, j + 1] = abs(i - j) in (0, 1, n - 1)
        if config is RELAY and not everywhere:
            layers, model.encoder.layer = model.encoder.layer, model.encoder.layer[:1]
            hidden = reference(model, torch.cat([front, embedded], 1), torch.ones_like(kept))
            model.encoder.layer = layers[1:]
            expected = reference(model, hidden, kept)
        else:
            expected = reference(model, torch.cat([front, embedded], 1), kept)
    assert error(out, expected[:, extra:]) < 1e-5


@pytest.mark.parametrize("config", [ETC, RELAY], ids=["etc", "relay"])
@pytest.mark.parametrize("family", [*ENCODERS, "t5", "bart", "vit"])
def test_nobody_outside_the_layers_sees_them(family: str, config: Any) -> None:
    c = case(family)
    before = c.output()
    sa_hf.patch_model(c.model, {"encoder": config})
    assert c.output().shape == before.shape
    assert error(c.output(), before) > 1e-5
    for _ in range(2):  # the recording hooks are installed by the first call that asks
        with torch.no_grad():
            out = c.model(**c.inputs, output_hidden_states=True)
        states = out.encoder_hidden_states if family in ("t5", "bart") else out.hidden_states
        length = 17 if family == "vit" else c.inputs["input_ids"].shape[1]
        assert {state.shape[1] for state in states} == {length}
    sa_hf.patch_model(c.model, {"encoder": config})
    with torch.no_grad():
        again = c.model(**c.inputs, output_hidden_states=True)
    states = again.encoder_hidden_states if family in ("t5", "bart") else again.hidden_states
    assert {state.shape[1] for state in states} == {length}
    sa_hf.unpatch_model(c.model)
    assert torch.equal(c.output(), before)


@pytest.mark.parametrize("config", [ETC, RELAY], ids=["etc", "relay"])
@pytest.mark.parametrize("layers", ["0-", "1-"])
@pytest.mark.parametrize("family", ["bert", "modernbert", "distilbert"])
def test_padding_does_not_reach_them(family: str, layers: str, config: Any) -> None:
    c = case(family)
    sa_hf.patch_model(c.model, {layers: config})
    with torch.no_grad():
        batch = c.model(**c.inputs)[0]
        for row, length in enumerate((20, 15, 9)):
            alone = c.model(input_ids=c.inputs["input_ids"][row : row + 1, :length])[0]
            assert error(batch[row, :length], alone[0]) < 1e-5


def test_they_are_drawn_from_the_seed_alone() -> None:
    torch.manual_seed(3)
    expected = torch.rand(2)
    found = []
    for seed in (5, 5, 6):
        model = tiny_model("bert")
        torch.manual_seed(3)
        sa_hf.patch_model(model, "bigbird", block_size=16, num_extra_tokens=2, seed=seed)
        assert torch.equal(torch.rand(2), expected)
        found.append(model.encoder.layer[0].attention.self.sparse.extra.tokens.detach())
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])


def test_bad_combinations_raise() -> None:
    model = tiny_model("bert")
    other = sa_hf.BigBirdAttentionConfig(block_size=16, num_extra_tokens=1)
    with pytest.raises(SparseAttentionError, match="different extra tokens"):
        sa_hf.patch_model(model, {"0": ETC, "1": other})
    with pytest.raises(SparseAttentionError, match="different extra tokens"):
        sa_hf.patch_model(model, {"0": RELAY, "1": other})
    sa_hf.patch_model(model, ETC)
    with pytest.raises(SparseAttentionError, match="one sequence per row"):
        model(tokens(1, 8), sequence_ids=torch.tensor([[0] * 4 + [1] * 4]))
    model.encoder.layer[0].register_forward_hook(lambda module, args, output: output * 1.0)
    with pytest.raises(SparseAttentionError, match="lost between two layers"):
        model(tokens(1, 8))
