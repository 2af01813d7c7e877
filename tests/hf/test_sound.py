"""Models of sound: samples or features in, masks of frames that the model makes itself."""

from __future__ import annotations

import pytest
import torch
import transformers as tf

import sa_hf
from sa_hf.hf.patching.sound import SAMPLES, sound_forms
from sa_hf.tools.families.check import FIRST, build, check
from sa_hf.tools.families.compare import RIGHT, Result, compare
from sa_hf.tools.families.registry import entries

ENTRIES = {entry.name: entry for entry in entries()}
NAMES = [
    "WhisperForConditionalGeneration", "WhisperForCausalLM", "Wav2Vec2Model", "HubertModel", "Data2VecAudioModel",
    "SEWModel", "UniSpeechModel", "UniSpeechSatModel", "Speech2TextModel", "ASTModel",
    "ParakeetForTDT", "Qwen3ASREncoder", "AudioFlamingo3Encoder", "VibeVoiceAsrModel", "OmniASRModel",
    "VoxtralRealtimeEncoder",
    "VoxtralRealtimeModel",
]  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_outputs_and_gradients_equal_its_own_eager_attention(name: str) -> None:
    if name not in ENTRIES:
        pytest.skip(f"transformers {tf.__version__} has no {name}")
    found = check(ENTRIES[name], quick=True)
    assert found.status == RIGHT, found.reason
    assert f"{FIRST.name} gradients" in found.figures


@pytest.mark.parametrize("name", ["Wav2Vec2Model", "HubertModel"])
def test_a_shorter_row_of_samples(name: str) -> None:
    """The model turns the mask of samples into one of frames, which patterns then leave out."""
    model, inputs = build(ENTRIES[name])
    mask = torch.ones_like(inputs["input_values"], dtype=torch.long)
    mask[-1, 4000:] = 0
    sa_hf.patch_model(model, FIRST)
    compare(model, {**inputs, "attention_mask": mask}, "padded", found := Result(RIGHT))
    assert found.status == RIGHT, found.reason
    with torch.no_grad():
        padded = model(**inputs, attention_mask=mask)[0]
        whole = model(**inputs)[0]
    assert not torch.allclose(padded[-1, :5], whole[-1, :5])
    assert torch.equal(padded[0], whole[0])


def test_forms_of_sound() -> None:
    whisper = tf.WhisperConfig(num_mel_bins=8, max_source_positions=50)
    assert [tuple(form["input_features"].shape) for form in sound_forms("input_features", whisper)] == [
        (1, 8, 100), (1, 100, 8), (1, 8, 96), (1, 96, 8),
    ]  # fmt: skip
    assert [tuple(form["input_values"].shape) for form in sound_forms("input_values", tf.HubertConfig())] == [
        (1, SAMPLES),
        (1, 1, SAMPLES),
    ]


def test_a_model_of_sound_that_computes_its_attention_is_refused() -> None:
    """VITS adds values of each distance to what it returns."""
    model = tf.VitsModel(tf.VitsConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=4, vocab_size=20))
    with pytest.raises(sa_hf.UnsupportedModelError, match=r"AttentionInterface.*values of its own for each distance"):
        sa_hf.patch_model(model, FIRST)
