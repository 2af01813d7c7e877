"""Ranking patterns: what is measured is compared at the length it was measured at, for every stack of a model."""

from __future__ import annotations

import pytest
import torch
from transformers import (
    AutoConfig,
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    GPT2Config,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
)

from sa_hf.patterns.sliding_window import SlidingWindowAttentionConfig
from sa_hf.tasks.load import auto_class
from sa_hf.tools.suggest import Measured, measure, stacks_of, suggest


def even(length: int, causal: bool) -> list[torch.Tensor]:
    """Attention that prefers nothing, ``[1, 2, n, n]``."""
    mask = torch.ones(length, length)
    mask = mask.tril() if causal else mask
    return [(mask / mask.sum(-1, keepdim=True)).expand(1, 2, -1, -1)]


@pytest.mark.parametrize("causal", [True, False])
def test_even_attention_gives_no_pattern_a_gain(causal: bool) -> None:
    found = suggest(num_heads=2, causal=causal, length=4096, attention=even(384, causal))
    gains = [s.measured.gain for s in found if s.measured is not None and s.measured.gain is not None]
    assert len(gains) >= 4
    assert gains == pytest.approx([0.0] * len(gains), abs=1e-5)


def test_local_attention_gains_all_with_a_window() -> None:
    near = (torch.arange(64)[:, None] - torch.arange(64)).abs() < 4
    local = [(near / near.sum(-1, keepdim=True)).expand(1, 2, -1, -1)]
    measured = measure(SlidingWindowAttentionConfig(window=4), local, causal=False)
    assert measured.density == pytest.approx(float(near.float().mean()))
    assert measured.mass == pytest.approx(1.0)
    assert measured.gain == pytest.approx(1.0)


def test_a_pattern_that_keeps_nearly_all_measured_pairs_does_not_rank_first() -> None:
    found = suggest(num_heads=2, causal=False, length=4096, attention=even(384, False))
    trivial = [s.measured is not None and s.measured.gain is None for s in found]
    assert {s.config.name for s, t in zip(found, trivial, strict=True) if t} >= {"sliding_window", "longnet"}
    assert trivial == sorted(trivial)
    assert Measured(64, 1.0, 1.0, 1.0).gain is None


def test_both_stacks_of_an_encoder_decoder_are_ranked() -> None:
    torch.manual_seed(0)
    t5 = T5ForConditionalGeneration(
        T5Config(vocab_size=32, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_decoder_layers=2, num_heads=2)
    ).eval()
    bart = BartForConditionalGeneration(
        BartConfig(
            vocab_size=32, d_model=16, encoder_layers=1, decoder_layers=2, encoder_attention_heads=2,
            decoder_attention_heads=4, encoder_ffn_dim=16, decoder_ffn_dim=16, max_position_embeddings=32,
        )
    ).eval()  # fmt: skip
    for model, heads in ((t5, (2, 2)), (bart, (2, 4))):
        stacks = stacks_of(model, torch.arange(3, 23)[None])
        assert [(s.name, s.causal, s.num_heads) for s in stacks] == [
            ("encoder", False, heads[0]),
            ("decoder", True, heads[1]),
        ]
        for stack, layers in zip(stacks, (1, 2), strict=True):
            assert stack.attention is not None
            assert [a.shape for a in stack.attention] == [(1, stack.num_heads, 20, 20)] * layers
            assert torch.allclose(stack.attention[0].sum(-1), torch.ones(()))


@pytest.mark.parametrize(
    ("config", "architecture", "expected"),
    [
        (BertConfig(), "BertForMaskedLM", "AutoModelForMaskedLM"),
        (BertConfig(), "BertModel", "AutoModel"),
        (BertConfig(), "BertForPreTraining", "AutoModelForPreTraining"),
        (GPT2Config(), "GPT2LMHeadModel", "AutoModelForCausalLM"),
        (T5Config(), "T5ForConditionalGeneration", "AutoModelForSeq2SeqLM"),
        (ViTConfig(), "ViTForImageClassification", "AutoModelForImageClassification"),
        (BertConfig(), "SomethingElse", "AutoModel"),
    ],
)
def test_the_auto_class_of_an_architecture(config: AutoConfig, architecture: str, expected: str) -> None:
    config.architectures = [architecture]
    assert auto_class(config).__name__ == expected
