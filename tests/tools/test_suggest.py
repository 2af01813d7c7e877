"""Ranking patterns: what is measured is compared at the length it was measured at, for every stack of a model."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from older_releases import REFUSED_THERE, older_releases_may
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    AutoConfig,
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertModel,
    DebertaV2Config,
    DebertaV2Model,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
)

from sa_hf.config import SparseAttentionConfig
from sa_hf.layer import AttentionInputs, Geometry, LayerSpec
from sa_hf.ops.sequences import Sequences
from sa_hf.patterns.base import StaticPatternConfig
from sa_hf.patterns.block_topk import BlockTopKAttentionConfig, read_pairs
from sa_hf.patterns.routing import RoutingAttentionConfig
from sa_hf.patterns.sliding_window import SlidingWindowAttentionConfig
from sa_hf.tasks.load import auto_class
from sa_hf.tools import attention_rows
from sa_hf.tools.attention_rows import LayerRows, Measured, kept_by_clusters, measure_rows
from sa_hf.tools.mixture import ladder
from sa_hf.tools.suggest import candidates, density_of, stacks_of, suggest


def rows_with(probabilities: torch.Tensor, causal: bool) -> LayerRows:
    heads, length = probabilities.shape[0], probabilities.shape[-1]
    geometry = Geometry(length, length, tuple(range(heads)), heads, 0, causal)
    return LayerRows(geometry, torch.arange(length), probabilities)


def even(length: int, causal: bool) -> LayerRows:
    """Attention that prefers nothing, of two heads."""
    mask = torch.ones(length, length)
    mask = mask.tril() if causal else mask
    return rows_with((mask / mask.sum(-1, keepdim=True)).expand(2, -1, -1), causal)


def measured_on(rows: LayerRows, causal: bool) -> dict[SparseAttentionConfig, Measured]:
    static = [c for c in candidates(causal) if isinstance(c, StaticPatternConfig)]
    return {config: measure_rows(config, rows) for config in static}


@pytest.mark.parametrize("causal", [True, False])
def test_even_attention_gives_no_pattern_a_gain(causal: bool) -> None:
    measured = measured_on(even(384, causal), causal)
    found = suggest(num_heads=2, causal=causal, length=4096, measured=measured)
    gains = [s.measured.gain for s in found if s.measured is not None and s.measured.gain is not None]
    assert len(gains) >= 4
    assert gains == pytest.approx([0.0] * len(gains), abs=1e-5)


def test_local_attention_gains_all_with_a_window() -> None:
    near = (torch.arange(64)[:, None] - torch.arange(64)).abs() < 4
    rows = rows_with((near / near.sum(-1, keepdim=True)).expand(2, -1, -1), False)
    measured = measure_rows(SlidingWindowAttentionConfig(window=4), rows)
    assert measured.density == pytest.approx(float(near.float().mean()))
    assert measured.mass == pytest.approx(1.0)
    assert measured.gain == pytest.approx(1.0)


def test_a_pattern_that_keeps_nearly_all_measured_pairs_does_not_rank_first() -> None:
    found = suggest(num_heads=2, causal=False, length=4096, measured=measured_on(even(384, False), False))
    trivial = [s.measured is None or s.measured.gain is None for s in found]
    assert {s.config.name for s, t in zip(found, trivial, strict=True) if t} >= {"sliding_window", "longnet"}
    assert trivial == sorted(trivial)
    assert Measured(64, 1.0, 1.0, 1.0).gain is None


def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=2048,
        )
    ).eval()  # fmt: skip


def t5() -> T5ForConditionalGeneration:
    torch.manual_seed(0)
    config = T5Config(vocab_size=32, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_decoder_layers=2, num_heads=2)
    return T5ForConditionalGeneration(config).eval()


def gemma() -> Gemma2ForCausalLM:
    torch.manual_seed(0)
    return Gemma2ForCausalLM(
        Gemma2Config(
            vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
            num_key_value_heads=1, head_dim=8, sliding_window=12, attn_logit_softcapping=0.05,
        )
    ).eval()  # fmt: skip


def deberta() -> DebertaV2Model:
    torch.manual_seed(0)
    shape: Any = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2}
    terms = {"relative_attention": True, "pos_att_type": ["c2p", "p2c"], "position_buckets": 6}
    config = DebertaV2Config(**shape, **terms, num_attention_heads=2, initializer_range=0.3, max_position_embeddings=64)
    return DebertaV2Model(config).eval()


@pytest.mark.parametrize("make", [llama, t5, gemma, deberta])
def test_rows_are_those_of_the_models_own_dense_attention(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Grouped heads, a position bias, soft caps, the model's own window and terms of distances, against eager
    attention."""
    model, ids = make(), torch.randint(1, 32, (1, 60), generator=torch.Generator().manual_seed(1))
    seen: list[tuple[int, bool, torch.Tensor]] = []
    real = attention_rows.rows_of

    def watched(inputs: Any, layer: int, positions: torch.Tensor) -> LayerRows:
        rows = real(inputs, layer, positions)
        seen.append((layer, inputs.causal, rows.probabilities))
        return rows

    monkeypatch.setattr(attention_rows, "rows_of", watched)
    monkeypatch.setattr(attention_rows, "ROWS_AT_ONCE", 7)
    positions = torch.tensor([0, 3, 17, 30, 31, 58, 59])
    monkeypatch.setattr(attention_rows, "drawn_rows", lambda length: positions)
    before = {name: x.clone() for name, x in model.state_dict().items()}
    with older_releases_may(REFUSED_THERE):
        learned = RoutingAttentionConfig(num_clusters=2, window=8)
        kept = attention_rows.layers_kept(model, ids, [SlidingWindowAttentionConfig(window=4), learned])
    terms = isinstance(model, DebertaV2Model)
    assert all((learned in layer) != terms for stack in kept.values() for layer in stack)
    assert all(torch.equal(before[name], x) for name, x in model.state_dict().items())
    model.set_attn_implementation("eager")
    both = {"decoder_input_ids": ids} if model.config.is_encoder_decoder else {}
    with torch.no_grad():
        output = model(input_ids=ids, **both, output_attentions=True)
    if both:
        expected = [(False, a) for a in output.encoder_attentions] + [(True, a) for a in output.decoder_attentions]
    else:
        expected = [(not terms, a) for a in output.attentions]
    assert len(seen) == len(expected)
    for (_, causal, found), (should, attention) in zip(seen, expected, strict=True):
        assert causal == should
        torch.testing.assert_close(found, attention[0][:, positions], rtol=1e-4, atol=1e-5)


def test_no_tensor_grows_with_the_square_of_the_text() -> None:
    model, largest = llama(), 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            nonlocal largest
            found = func(*args, **(kwargs or {}))
            if isinstance(found, torch.Tensor):
                largest = max(largest, found.untyped_storage().size() // found.element_size() if found.numel() else 0)
            return found

    sizes = []
    for n in (1024, 2048):
        configs, largest = ladder(True), 0
        with Watch():
            kept = attention_rows.layers_kept(model, torch.arange(n)[None] % 64, configs)
        assert [set(layer) for layer in kept["decoder"]] == [set(configs)] * 2
        sizes.append(largest)
    assert sizes[1] < 2.5 * sizes[0]
    assert sizes[1] < 2048 * 2048


def test_drawn_rows_lie_evenly_and_are_all_of_a_short_text() -> None:
    found = attention_rows.drawn_rows(1000, 100)
    assert [int(p) // 10 for p in found] == list(range(100))
    assert attention_rows.drawn_rows(50, 100).tolist() == list(range(50))


def test_routing_is_measured_by_the_clusters_of_the_text() -> None:
    # Four themes in turn, far apart: clusters are i mod 4, so that a row reads itself, i - 4 and i - 8.
    length, width = 64, 8
    vectors = torch.eye(width)[torch.arange(length) % 4].expand(1, 2, -1, -1).clone()
    inputs = AttentionInputs(vectors, vectors, vectors, Sequences.full(1, length, length), True, 1.0)
    spec = LayerSpec(0, 1, 2, 2, width, 2 * width, causal=True)
    rows = torch.tensor([0, 9, 63])
    kept = kept_by_clusters(RoutingAttentionConfig(num_clusters=4, window=3), inputs, spec, rows)
    assert kept.shape == (2, 3, length)
    assert [sorted(row.nonzero()[:, 0].tolist()) for row in kept[1]] == [[0], [1, 5, 9], [55, 59, 63]]
    assert torch.equal(kept[0], kept[1])


@pytest.mark.parametrize("causal", [True, False])
def test_routing_is_ranked_at_no_more_pairs_than_it_reads(causal: bool) -> None:
    ids = torch.randint(3, 90, (1, 96), generator=torch.Generator().manual_seed(0))
    shape: Any = {"vocab_size": 99, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1}
    shape |= {"num_attention_heads": 2, "initializer_range": 0.3}
    model: Any = LlamaForCausalLM(LlamaConfig(**shape)) if causal else BertModel(BertConfig(**shape))
    config = RoutingAttentionConfig(num_clusters=4, window=24, local_window=8)
    (stack,) = stacks_of(model.eval(), ids, [config])
    measured = (stack.measured() or {})[config]
    assert 0 < measured.density <= density_of(config, stack.num_heads, causal, 96)
    assert measured.gain is not None
    assert measured.gain > 0.02  # what is near in content is attended more than by chance
    published = [c for c in candidates(causal) if isinstance(c, RoutingAttentionConfig)]
    assert published[0] in [s.config for s in suggest(num_heads=2, causal=causal, length=8192)]
    assert not any(isinstance(c, RoutingAttentionConfig) for c in ladder(causal))


def test_blocks_chosen_by_content_are_measured_as_they_read() -> None:
    generator = torch.Generator().manual_seed(0)
    query, key = torch.randn(1, 4, 64, 8, generator=generator), torch.randn(1, 2, 64, 8, generator=generator)
    positions = torch.tensor([5, 20, 21, 63])
    for causal, selection in itertools.product((True, False), ("query", "query_block")):
        config = BlockTopKAttentionConfig(block_size=8, top_k=2, num_window_blocks=1, selection=selection)
        whole = read_pairs(config, query, key, causal)
        assert torch.equal(read_pairs(config, query, key, causal, positions), whole[:, :, positions])
        geometry = Geometry(64, 64, (0, 1, 2, 3), 4, 0, causal)
        rows = LayerRows(geometry, positions, torch.ones(4, 4, 64) / 64, query, key)
        kept = whole[0][:, positions].double()
        assert measure_rows(config, rows).mass == pytest.approx(float((kept.sum(-1) / 64).mean()))


def bart() -> BartForConditionalGeneration:
    return BartForConditionalGeneration(
        BartConfig(
            vocab_size=32, d_model=16, encoder_layers=1, decoder_layers=2, encoder_attention_heads=2,
            decoder_attention_heads=4, encoder_ffn_dim=16, decoder_ffn_dim=16, max_position_embeddings=32,
        )
    ).eval()  # fmt: skip


@pytest.mark.parametrize(("make", "heads"), [(t5, (2, 2)), (bart, (2, 4))])
def test_both_stacks_of_an_encoder_decoder_are_ranked(make: Any, heads: tuple[int, int]) -> None:
    model = make()
    with older_releases_may(REFUSED_THERE):
        stacks = stacks_of(model, torch.arange(3, 23)[None])
    assert [(s.name, s.causal, s.num_heads) for s in stacks] == [
        ("encoder", False, heads[0]),
        ("decoder", True, heads[1]),
    ]
    for stack, layers in zip(stacks, (1, 2), strict=True):
        assert stack.layers is not None
        assert len(stack.layers) == layers
        measured = stack.measured()
        assert measured is not None
        assert all(m.length == 20 and 0 < m.mass <= 1 for m in measured.values())
    assert stacks_of(model)[0].layers is None


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
