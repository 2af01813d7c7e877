"""What the probe gives a model of sound: samples or features, in the forms that Transformers' models take."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

# Seconds of sound do not matter here, only that some frames are left behind the convolutions.
SAMPLES, FRAMES = 8000, 96
SOUND = ("input_values", "input_features")
# The fields under which configs keep the width of a frame of features.
_WIDTHS = (
    "num_mel_bins", "feature_projection_input_dim", "input_feat_per_channel", "feature_size", "input_dim", "n_mels",
)  # fmt: skip


def sound_forms(main: str, config: Any) -> Iterator[dict[str, Any]]:
    """Inputs to try, one after another: ``input_values [1, samples]`` and ``[1, 1, samples]``, or ``input_features
    [1, width, frames]`` and ``[1, frames, width]``, spectrograms ``[1, frames, width]`` of one length."""
    if main == "input_values":
        yield {main: torch.zeros(1, SAMPLES)}
        yield {main: torch.zeros(1, 1, SAMPLES)}
    audio = next((x for x in (getattr(config, n, None) for n in ("audio_config", "encoder_config")) if x), config)
    width = next((w for w in (getattr(audio, name, None) for name in _WIDTHS) if isinstance(w, int)), None)
    if width is None:
        return
    limit = getattr(audio, "max_source_positions", None)
    # Whisper takes exactly as many frames as its table of positions has places for, two each.
    window = getattr(audio, "n_window", None)  # half of one (Qwen's encoders), of which there are whole ones
    whole = [2 * limit] if isinstance(limit, int) else [4 * window] if isinstance(window, int) else []
    for frames in dict.fromkeys([*whole, FRAMES]):
        yield {main: torch.zeros(1, width, frames)}
        yield {main: torch.zeros(1, frames, width)}
    patches = getattr(config, "max_length", None)
    if main == "input_values" and isinstance(patches, int):  # a spectrogram cut into patches (AST)
        yield {main: torch.zeros(1, patches, width)}
