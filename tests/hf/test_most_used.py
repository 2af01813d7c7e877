"""The most used architectures, tiny: outputs and gradients equal their own eager attention under a pattern's pairs.

The whole registry, with padding, generation and reloads: ``python scripts/families.py``.
"""

from __future__ import annotations

import pytest
import torch
import transformers as tf
from older_releases import listed, skip_refused

import sa_hf
from sa_hf.tools.families import reference
from sa_hf.tools.families.check import FIRST, build, check
from sa_hf.tools.families.compare import (
    LIMIT,
    NOT_BUILT,
    RIGHT,
    WRONG,
    Result,
    compare,
    outputs,
    relative_error,
)
from sa_hf.tools.families.inputs import LENGTH
from sa_hf.tools.families.reference import own_attention
from sa_hf.tools.families.registry import Entry, entries

TEXT = [
    "BertModel", "BertForSequenceClassification", "RobertaModel", "XLMRobertaForMaskedLM", "DistilBertModel",
    "AlbertModel", "ElectraModel", "ModernBertModel", "CamembertModel", "BartForConditionalGeneration",
    "MBartModel", "MarianModel", "T5ForConditionalGeneration", "LlamaForCausalLM", "GemmaForCausalLM",
    "Gemma2ForCausalLM", "MistralForCausalLM", "MixtralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM",
    "PhiForCausalLM", "GPT2LMHeadModel", "GPTNeoXForCausalLM", "OPTForCausalLM",
]  # fmt: skip
LATER = [
    "CohereForCausalLM", "Cohere2ForCausalLM", "DeepseekV3ForCausalLM", "EsmForMaskedLM", "Exaone4ForCausalLM",
    "GlmForCausalLM", "Glm4ForCausalLM", "GPTBigCodeForCausalLM", "GptOssForCausalLM", "GPTJForCausalLM",
    "GraniteForCausalLM", "JambaForCausalLM", "Lfm2ForCausalLM", "Llama4ForCausalLM", "M2M100ForConditionalGeneration",
    "MT5ForConditionalGeneration", "OlmoForCausalLM", "Olmo2ForCausalLM", "PegasusForConditionalGeneration",
    "Phi3ForCausalLM", "Qwen2MoeForCausalLM", "Qwen3MoeForCausalLM", "Qwen3NextForCausalLM", "SmolLM3ForCausalLM",
    "StableLmForCausalLM", "Starcoder2ForCausalLM", "LlavaForConditionalGeneration", "Mistral3ForConditionalGeneration",
    "Blip2Model", "T5ForQuestionAnswering", "MoonshineModel", "LayoutLMModel", "MobileBertForMaskedLM",
    "Gemma3ForConditionalGeneration", "Qwen2_5_VLForConditionalGeneration", "CLIPTextModel", "CLIPVisionModel",
]  # fmt: skip
IMAGES = ["ViTModel", "DeiTModel", "Dinov2Model", "BeitModel"]
ENTRIES = {entry.name: entry for entry in entries()}


@pytest.mark.parametrize("name", [*TEXT, *LATER, *IMAGES])
def test_outputs_and_gradients_equal_its_own_eager_attention(name: str) -> None:
    if name not in ENTRIES:
        pytest.skip(f"transformers {tf.__version__} has no {name}")
    found = check(ENTRIES[name], quick=True)
    skip_refused(found)
    assert found.status == RIGHT, found.reason
    assert {FIRST.name, f"{FIRST.name} gradients"} <= found.figures.keys()


def test_gradients_below_the_rounding_of_float32_are_compared_in_float64() -> None:
    found = check(ENTRIES["MobileBertForMaskedLM"], quick=True)
    assert any("float64" in note for note in found.notes)
    assert found.figures[f"{FIRST.name} gradients"] < 1e-6


def test_what_does_not_depend_on_its_attention_is_not_called_right() -> None:
    found = check(listed("RfDetrDinov2Backbone"), quick=True)
    assert found.status == NOT_BUILT
    assert "does not depend on its attention" in found.reason


def test_another_set_of_pairs_is_found_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs = build(ENTRIES["BertModel"])
    sa_hf.patch_model(model, FIRST)
    with own_attention(model, patterns=False):
        dense = outputs(model, inputs)
    assert relative_error(outputs(model, inputs)["last_hidden_state"], dense["last_hidden_state"]) > 100 * LIMIT
    found = Result(RIGHT)
    compare(model, inputs, "as patched", found)
    assert found.status == RIGHT
    wider = sa_hf.SlidingWindowAttentionConfig(window=5, num_sink_tokens=2)
    pairs = torch.where(wider.mask(LENGTH), 0.0, reference.HIDDEN)
    monkeypatch.setattr(reference, "log_weights", lambda child, n: pairs)
    compare(model, inputs, "another window", found)
    assert found.status == WRONG
    assert "another window" in found.reason


def test_what_does_not_run_is_not_built_and_what_is_refused_says_why() -> None:
    missing = check(Entry("NoSuchModel", "bert", "AutoModel"))
    assert missing.status == NOT_BUILT
    assert "NoSuchModel" in missing.reason
    refused = check(ENTRIES["YosoModel"], quick=True)
    assert refused.status == "refused"
    assert "AttentionInterface" in refused.reason
