"""Freezing learned masks in a model, and the diagonal study."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForMaskedLM, BertConfig, BertForMaskedLM, GPT2Config, GPT2LMHeadModel

import sa_hf
from sa_hf.config import SparseAttentionConfig
from sa_hf.errors import SparseAttentionError
from sa_hf.patterns.sparsebert import SparseBertAttention, SparseBertAttentionConfig
from sa_hf.tools.study import diagonal_probabilities, diagonal_study, format_study, mask_report


def bert() -> BertForMaskedLM:
    torch.manual_seed(0)
    return BertForMaskedLM(
        BertConfig(
            vocab_size=40,
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=32,
            initializer_range=0.3,
        )
    ).eval()


def ids(length: int = 24) -> Tensor:
    return torch.randint(40, (2, length), generator=torch.Generator().manual_seed(1))


def spread(model: nn.Module) -> list[SparseBertAttention]:
    masks = [m for m in model.modules() if isinstance(m, SparseBertAttention)]
    for mask in masks:
        if mask.logits is not None:
            generator = torch.Generator().manual_seed(3)
            mask.logits.data = 0.5 + torch.randn(mask.logits.shape, generator=generator)
    return masks


@pytest.mark.parametrize("structure", ["structured", "unstructured"])
@pytest.mark.parametrize("share_layers", [False, True])
def test_frozen_model_equals_the_deterministic_one_and_is_saved(
    structure: str, share_layers: bool, tmp_path: Path
) -> None:
    model = bert()
    dense = model(ids()).logits
    sa_hf.patch_model(model, "sparsebert", structure=structure, share_layers=share_layers, mask_length=32)
    masks = spread(model)
    before = model(ids()).logits
    assert (before - dense).abs().max() > 1e-3
    assert sa_hf.freeze_masks(model) is model
    assert sum(p.requires_grad for n, p in model.named_parameters() if "sparse" in n) == 0
    after = model(ids()).logits
    torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-5)
    assert all(mask.config.frozen for mask in masks)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForMaskedLM.from_pretrained(tmp_path, trust_remote_code=True).eval()
    assert torch.equal(loaded(ids()).logits, after)
    fields = loaded.config.sa_hf["layers"]["encoder"]["0"]
    config = SparseAttentionConfig.from_dict(fields)
    assert isinstance(config, SparseBertAttentionConfig)
    assert config.frozen
    sa_hf.freeze_masks(loaded)
    assert torch.equal(loaded(ids()).logits, after)


def test_frozen_parts_of_a_mixture_by_heads() -> None:
    model = bert()
    config = SparseBertAttentionConfig(mask_length=32)
    sa_hf.patch_model(model, {"heads": {"0": config, "1": "dense"}})
    spread(model)
    before = model(ids()).logits
    sa_hf.freeze_masks(model)
    torch.testing.assert_close(model(ids()).logits, before, rtol=1e-4, atol=1e-5)


def test_freeze_refuses_models_without_learned_masks() -> None:
    with pytest.raises(SparseAttentionError, match="no learned mask"):
        sa_hf.freeze_masks(bert())
    model = bert()
    sa_hf.patch_model(model, "sliding_window", window=4)
    with pytest.raises(SparseAttentionError, match="no learned mask"):
        sa_hf.freeze_masks(model)


def test_study_finds_the_diagonal_that_matters_and_restores_the_model() -> None:
    """A GPT-2 trained to repeat the token two positions back, by attention alone."""
    torch.manual_seed(0)
    model = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=16, n_embd=32, n_layer=1, n_head=2, n_positions=32, attn_pdrop=0, resid_pdrop=0, embd_pdrop=0
        )
    )
    generator = torch.Generator().manual_seed(0)
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)

    def batch() -> dict[str, Tensor]:
        tokens = torch.randint(16, (16, 16), generator=generator)
        tokens[:, 2:] = tokens[:, :2].repeat(1, 8)[:, : 16 - 2]  # period 2: the next token is the one before this one
        return {"input_ids": tokens, "labels": tokens}

    for _ in range(60):
        loss = model(**batch()).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.eval()
    given = [batch() for _ in range(2)]
    before = model(**given[0]).logits
    names = sorted(model.state_dict())
    effects = diagonal_study(model, given, distances=range(6), max_length=16)
    assert torch.equal(model(**given[0]).logits, before)
    assert sorted(model.state_dict()) == names
    assert {effect.distance for effect in effects} == set(range(6))
    assert effects[0].distance == 1
    assert effects[0].increase > 2 * effects[1].increase
    lines = format_study(effects).splitlines()
    assert lines[2].split()[0] == "1"
    assert lines[2].count("#") == max(line.count("#") for line in lines)
    with pytest.raises(SparseAttentionError, match="distance 16"):
        diagonal_study(model, given, distances=[16], max_length=16)
    sa_hf.patch_model(model, "sliding_window")
    with pytest.raises(SparseAttentionError, match="patched"):
        diagonal_study(model, given, distances=[1], max_length=16)


@pytest.mark.parametrize("structure", ["structured", "unstructured"])
def test_report_counts_kept_pairs_by_head(structure: str) -> None:
    model = bert()
    sa_hf.patch_model(model, "sparsebert", structure=structure, mask_length=12)
    masks = spread(model)
    rows = mask_report(model, 10)
    assert [(row.layer, row.head) for row in rows] == [(0, 0), (0, 1), (1, 0), (1, 1)]
    table = masks[0].keep_table()
    for row in rows:
        kept = 0
        for i in range(10):
            mine = [bool(table[row.head, i, j] if table.dim() == 3 else table[row.head, abs(i - j)]) for j in range(10)]
            kept += sum(mine) or 1
        assert row.density == kept / 100
    logits = masks[0].logits
    assert logits is not None
    for distance in (0, 3, 11):
        if logits.dim() == 2:
            chance = torch.sigmoid(logits[1, distance])
        else:
            pairs = [(i, j) for i in range(12) for j in range(12) if abs(i - j) == distance]
            chance = torch.stack([torch.sigmoid(logits[1, i, j]) for i, j in pairs]).mean()
        torch.testing.assert_close(diagonal_probabilities(masks[0])[1, distance], chance.detach())
