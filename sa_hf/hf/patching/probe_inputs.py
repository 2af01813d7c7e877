"""What a skeleton is called with when it is probed: tokens, images or sound, and then new tokens with a cache."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput

from sa_hf.errors import UnsupportedModelError
from sa_hf.hf.patching.sound import SOUND, sound_forms
from sa_hf.hf.state.positions import configs_of, position_limit
from sa_hf.hf.state.versions import tested_range

STAND_IN = "encoder_outputs"


def body_of(model: PreTrainedModel) -> PreTrainedModel:
    """The model without its head; the whole, where what is called its base is a part that takes no inputs (DINOv3)."""
    body: PreTrainedModel = model.base_model
    return body if body.main_input_name in parameters_of(body) else model


def parameters_of(body: PreTrainedModel) -> Any:
    """The parameters of its forward, by name."""
    return inspect.signature(body.forward).parameters


@dataclass(frozen=True)
class ProbeSizes:
    """Tokens of the two calls, and one that is none of the config's special ones. Different lengths tell
    self-attention from attention to the encoder, and new tokens from cached ones."""

    length: int = 24
    decoder_length: int = 17
    new: int = 5
    token: int = 0

    @classmethod
    def of(cls, model: PreTrainedModel) -> ProbeSizes:
        limit = min(position_limit(model) or 29, 29)
        new = min(5, max(1, limit // 5))
        length = limit - new
        special = {
            value
            for config in configs_of(model)
            for name, value in config.__dict__.items()
            if name.endswith(("token_id", "token_index")) and isinstance(value, int)
        }
        return cls(length, max(1, length - 7), new, next(x for x in range(len(special) + 1) if x not in special))


def _tokens(sizes: ProbeSizes, length: int) -> Tensor:
    return torch.full((1, length), sizes.token, dtype=torch.long)


def first_inputs(body: PreTrainedModel, sizes: ProbeSizes) -> Iterator[dict[str, Any]]:
    """Inputs of the kind that the model takes; of sound, several forms."""
    main, config, parameters = body.main_input_name, body.config, parameters_of(body)
    given: dict[str, Any] = {}
    if main == "input_ids":
        given["input_ids"] = _tokens(sizes, sizes.length)
        if "attention_mask" in parameters:
            given["attention_mask"] = torch.ones(1, sizes.length, dtype=torch.long)
    elif main == "pixel_values":
        config = getattr(config, "encoder", config)  # of images, beside a decoder of text
        size = config.image_size
        height, width = (size, size) if isinstance(size, int) else size
        given["pixel_values"] = torch.zeros(1, config.num_channels, height, width)
    if "decoder_input_ids" in parameters:
        given["decoder_input_ids"] = _tokens(sizes, sizes.decoder_length)
    if main in given:
        yield given
        images: Any = getattr(config, "vision_config", None)
        if (
            main == "input_ids"
            and "pixel_values" in parameters
            and isinstance(getattr(images, "image_size", None), int)
        ):
            # Text beside an image in one call (CLIP).
            yield {**given, "pixel_values": torch.zeros(1, images.num_channels, images.image_size, images.image_size)}
        return
    if main in SOUND:
        for form in sound_forms(main, config):
            yield {**given, **form}
    if STAND_IN in parameters:
        # An encoder of sound in a form of its own: what it needs is its own, and what it gives the decoder is not.
        width = getattr(body, "encoder_output_dim", None) or config.hidden_size
        yield {**given, STAND_IN: BaseModelOutput(torch.zeros(1, sizes.length, width))}
    elif main not in SOUND:
        raise UnsupportedModelError(
            f"its input is {main!r}; sparse attention serves models of tokens, of images and of sound"
        )


def next_inputs(body: PreTrainedModel, cache: Any, sizes: ProbeSizes, first: dict[str, Any]) -> dict[str, Any]:
    """Inputs of a second call, on new tokens after those in the cache."""
    given, parameters = dict(first), parameters_of(body)
    name = next((name for name in ("cache", "past_key_values") if name in parameters), None)
    if name is None:
        raise UnsupportedModelError(
            f"{type(body).__name__} returns a cache, but takes none as 'cache' or 'past_key_values' "
            f"({installed_release()})"
        )
    given["decoder_input_ids" if "decoder_input_ids" in given else "input_ids"] = _tokens(sizes, sizes.new)
    if "attention_mask" in given and "decoder_input_ids" not in given:
        given["attention_mask"] = torch.ones(1, sizes.length + sizes.new, dtype=torch.long)
    if hasattr(body, "rope_deltas"):  # positions of several axes; `generate` hands them on, and some models rely on it
        given["position_ids"] = torch.arange(sizes.length, sizes.length + sizes.new)[None]
    return {**given, "use_cache": True, name: cache}


def installed_release() -> str:
    """What an error says of the release that ran."""
    return f"transformers {transformers.__version__}; {tested_range()}"
