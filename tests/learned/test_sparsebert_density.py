"""SparseBERT's density loss, and masks that the layers of a stack share."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from learned_cases import attention_inputs, build_sparsebert, layer_spec, scatter_logits

from sa_hf.errors import SparseAttentionError
from sa_hf.ops.parts import Band
from sa_hf.ops.sequences import Sequences
from sa_hf.patterns.sparsebert import SparseBertAttentionConfig

STRUCTURES = ("structured", "unstructured")


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("causal", [False, True])
def test_density_loss_is_the_mean_gate_over_heads_and_pairs(structure: str, causal: bool) -> None:
    module = build_sparsebert(structure=structure, causal=causal, hard=False).train()
    scatter_logits(module)
    mask = torch.ones(2, 14, dtype=torch.long)
    mask[1, 9:] = 0
    inputs = attention_inputs(length=14, causal=causal, band=Band(6, 4))
    inputs.sequences = Sequences.from_mask(2, 14, 14, mask)
    module(inputs)
    gate = module.gate().detach()
    total, pairs = 0.0, 0
    for n in (14, 9):
        for i in range(n):
            for j in range(n):
                if -(0 if causal else 4) <= i - j <= 6:
                    total += sum(float(gate[h, i, j] if gate.dim() == 3 else gate[h, abs(i - j)]) for h in range(2))
                    pairs += 2
    assert math.isclose(float(module.aux_losses()["sparsebert_density"].detach()), 20.0 * total / pairs, rel_tol=1e-5)


def test_shared_mask_is_owned_by_the_first_layer() -> None:
    config = SparseBertAttentionConfig(mask_length=16)
    layers = [config.build(layer_spec(layer=i)) for i in range(3)]
    for layer in layers:
        layer.tie(layers)
    stack = torch.nn.ModuleList(layers).train()
    assert [name for name, _ in stack.named_parameters()] == ["0.logits"]
    scatter_logits(layers[0])
    inputs = attention_inputs(length=16)
    outs = [layer(inputs) for layer in layers]
    assert torch.equal(outs[0], outs[1])  # the sample is shared as well
    assert [sorted(layer.aux_losses()) for layer in layers] == [["sparsebert_density"], [], []]
    twin = copy.deepcopy(stack)
    assert twin[2].owner is twin[0]
    for layer in layers:
        layer.freeze()
    assert sorted(stack.state_dict()) == ["0.kept", "0.step", "1.step", "2.step"]
    stack.eval()
    assert torch.equal(layers[2](inputs), layers[0](inputs))
    with pytest.raises(SparseAttentionError, match="share_layers=False"):
        config.build(layer_spec(heads=4)).tie(layers)


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("causal", [False, True])
def test_a_shared_mask_is_charged_for_every_pair_that_a_layer_reads(structure: str, causal: bool) -> None:
    """A first layer that slides does not hide what the others read further away; equal layers count once."""
    config = SparseBertAttentionConfig(mask_length=16, structure=structure, hard=False)
    found = {}
    for bands in (
        (Band(2, 1), Band(4, 0), Band()),
        (Band(2, 1), Band(4, 0)),
        (Band(4, 1),),
        (Band(4, 1),) * 3,
        (Band(),),
    ):
        layers = [config.build(layer_spec(layer=i, causal=causal)).train() for i in range(len(bands))]
        scatter_logits(layers[0])
        for layer in layers:
            layer.tie(layers)
        for layer, band in zip(layers, bands, strict=True):
            layer(attention_inputs(length=14, causal=causal, band=band))
        loss = layers[0].aux_losses()["sparsebert_density"]
        loss.backward()
        assert layers[0].logits is not None
        found[bands] = float(loss.detach()), layers[0].logits.grad
        for layer, band in zip(layers, bands, strict=True):  # the figure is of the layer's own pairs
            alone = config.build(layer_spec(causal=causal)).eval()
            alone.logits = layers[0].logits
            alone(attention_inputs(length=14, causal=causal, band=band))
            assert layer.figures() == alone.figures()
    first, second, one, three, full = found.values()
    for (loss, grad), (expected, wanted) in ((first, full), (second, one), (three, one)):
        assert loss == pytest.approx(expected, rel=1e-6)
        assert torch.allclose(grad, wanted)
    if structure == "structured":
        assert bool((first[1][:, :14] != 0).all())


def test_a_shared_mask_outlives_the_layer_that_owned_it() -> None:
    config = SparseBertAttentionConfig(mask_length=16)
    layers = [config.build(layer_spec(layer=i)) for i in range(3)]
    for layer in layers:
        layer.tie(layers)
    scatter_logits(layers[0])
    expected = layers[2].keep_table().clone()
    for layer in layers[1:]:
        layer.tie(layers[1:])
    assert [name for name, _ in torch.nn.ModuleList(layers[1:]).named_parameters()] == ["0.logits"]
    assert torch.equal(layers[2].keep_table(), expected)
    assert layers[2].owner is layers[1]


def test_unshared_masks_average_their_loss() -> None:
    config = SparseBertAttentionConfig(mask_length=16, share_layers=False)
    layers = [config.build(layer_spec(layer=i)).train() for i in range(4)]
    for layer in layers:
        layer.tie(layers)
        layer.advance_step()
        layer(attention_inputs(length=16))
    total = sum(float(layer.aux_losses()["sparsebert_density"].detach()) for layer in layers)
    mean = sum(float(layer._density(layer.gate(), layer._band).detach()) for layer in layers) / 4
    assert math.isclose(total, 20 * mean, rel_tol=1e-6)
