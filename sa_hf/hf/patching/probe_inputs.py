"""What the probe calls a model without its weights with: tokens, an image or sound, in a form that it takes."""

from __future__ import annotations

import inspect
import os.path
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput

from sa_hf.errors import UnsupportedModelError
from sa_hf.hf.patching.sound import SOUND, sound_forms
from sa_hf.hf.state.positions import configs_of, position_limit
from sa_hf.hf.state.versions import tested_range

STAND_IN = "encoder_outputs"
# The frames of sound under each token, where a config says it.
_STREAMED = "audio_length_per_tok"


def installed_release() -> str:
    """What an error says of the release that ran."""
    return f"transformers {transformers.__version__}; {tested_range()}"


def body_of(model: PreTrainedModel) -> PreTrainedModel:
    """The model without its head; the whole, where what is called its base is a part that takes no inputs (DINOv3), or
    others than tokens in its decoder (SpeechT5)."""
    body: PreTrainedModel = model.base_model
    inner, whole = parameters_of(body), parameters_of(model)
    values = "decoder_input_values" in inner and "decoder_input_ids" in whole
    return model if values or body.main_input_name not in inner else body


def inner_model(model: PreTrainedModel, names: list[str]) -> PreTrainedModel | None:
    """The innermost model of tokens or sound that holds all layers of these names, without its head; None where that
    is the whole."""
    path = os.path.commonpath([name.replace(".", "/") for name in names]).replace("/", ".")
    while path:
        inner = model.get_submodule(path)
        path = path.rpartition(".")[0]
        if isinstance(inner, PreTrainedModel) and {"input_ids", *SOUND} & parameters_of(inner).keys():
            return body_of(inner)
    return None


def parameters_of(body: PreTrainedModel) -> Any:
    """The parameters of its forward, by name."""
    return inspect.signature(body.forward).parameters


def takes_positions(model: PreTrainedModel, body: PreTrainedModel, name: str) -> bool:
    """Whether a call's position ids reach a layer: what ran takes them, or keywords, and a model inside takes them."""
    if any(parameter.endswith("position_ids") for parameter in parameters_of(body)):
        return True
    inner = inner_model(model, [name]) if takes_keywords(body) else None
    return inner is not None and "position_ids" in parameters_of(inner)


def takes_keywords(module: nn.Module) -> bool:
    """Whether a forward takes what a patch hands it."""
    parameters = inspect.signature(module.forward).parameters.values()
    return any(one.kind is one.VAR_KEYWORD or one.name == "sparse_call" for one in parameters)


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
    if _is_asked(parameters.get("grid_thw")):
        rows = _rows_of_patches(config, parameters)
        yield rows
        name, side = next(name for name in rows if name != "grid_thw"), config.patch_size
        yield {**rows, name: rows[name].unflatten(1, (-1, side, side))}  # patches as images (Kimi)
        return
    if main not in parameters:  # a tower that does not say what it takes (DINOv3's of images, SAM 3's of text)
        main = next((name for name in ("pixel_values", "input_ids") if name in parameters), main)
    if main == "pixel_values" and "spatial_shapes" in parameters and _images(config) is None:
        yield _shaped_patches(config)
        return
    given: dict[str, Any] = {}
    if main == "input_ids":
        given["input_ids"] = _tokens(sizes, sizes.length)
        if "attention_mask" in parameters:
            given["attention_mask"] = torch.ones(1, sizes.length, dtype=torch.long)
        if "bbox" in parameters:
            given["bbox"] = torch.zeros(1, sizes.length, 4, dtype=torch.long)
    elif main == "pixel_values":
        given.update(_packed_images(config) if "image_sizes" in parameters else _image(config))
    elif main == "pixel_values_videos":
        given.update(_video(config))
    if "decoder_input_ids" in parameters:
        given["decoder_input_ids"] = _tokens(sizes, sizes.decoder_length)
    if main == "input_ids" and _is_asked(parameters.get("pixel_values")):
        given.update(_image(config))
    if main in given:
        missing = [p for p in parameters if _is_asked(parameters[p]) and p not in given]
        if missing:
            raise UnsupportedModelError(
                f"its forward asks for {', '.join(missing)}, which is not known here (patches of several images in "
                "one row, say, each of which attends to its own)"
            )
        if main == "pixel_values" and "input_ids" in parameters:  # text that an image begins (BLIP)
            yield {**given, "input_ids": _tokens(sizes, sizes.length)}
        yield given
        name = "decoder_input_ids" if "decoder_input_ids" in given else "input_ids"
        yield from ({**given, name: ids} for ids in _codes(config, given.get(name)))
        if main == "input_ids":
            yield from ({**given, **more} for more in _beside_text(config, parameters, sizes))
        return
    if main in SOUND:
        for form in sound_forms(main, config):
            if not _is_asked(parameters.get("input_features_mask")):
                yield {**given, **form}
            if "input_features_mask" in parameters and main == "input_features":
                yield {**given, **form, "input_features_mask": torch.ones(1, max(form[main].shape), dtype=torch.long)}
    width = getattr(body, "encoder_output_dim", None) or getattr(config, "hidden_size", None)
    if STAND_IN in parameters and width is not None:
        # An encoder of sound in a form of its own: what it needs is its own, and what it gives the decoder is not.
        yield {**given, STAND_IN: BaseModelOutput(torch.zeros(1, sizes.length, width))}
    elif main not in SOUND:
        raise UnsupportedModelError(
            f"its input is {main!r}; sparse attention serves models of tokens, of images and of sound"
        )


def _beside_text(config: Any, parameters: Any, sizes: ProbeSizes) -> Iterator[dict[str, Any]]:
    """An image, or sound, in one call with a text."""
    if "pixel_values" in parameters and _images(config) is not None:
        yield _image(config)  # CLIP
        if "image_encoder_embeddings" in parameters:
            yield _interleaved(config, sizes.length)
    if isinstance(getattr(config, _STREAMED, None), int):
        yield {"input_features": _streamed(config, sizes.length)}


def _interleaved(config: Any, count: int) -> dict[str, Tensor]:
    """One image that each of so many tokens reads (Idefics)."""
    pixels = _image(config)["pixel_values"][:, None]
    return {"pixel_values": pixels, "image_attention_mask": torch.ones(1, count, 1, dtype=torch.long)}


def _streamed(config: Any, count: int) -> Tensor:
    """Features of sound under so many tokens, which they are added to (Voxtral's stream)."""
    return torch.zeros(1, config.audio_config.num_mel_bins, count * getattr(config, _STREAMED))


def _codes(config: Any, ids: Tensor | None) -> Iterator[Tensor]:
    """Ids ``[1, n]`` as codes of sound, one of each codebook at a place: as rows of a batch (MusicGen), or beside each
    other, with the text's in front or without (Kyutai's speech to text, Dia)."""
    named = [(config, "num_codebooks"), (getattr(config, "decoder", None), "num_codebooks")]
    named.append((getattr(config, "decoder_config", None), "num_channels"))
    count = next((x for part, name in named if isinstance(x := getattr(part, name, None), int)), None)
    if ids is None or count is None:
        return
    yield ids.repeat(count, 1)
    for beside in (count + 1, count):
        yield ids[..., None].repeat(1, 1, beside)


def _images(config: Any) -> Any:
    """The config of what reads images: a model's own, or that of its tower; None where there is none."""
    parts = (config, *(getattr(config, name, None) for name in ("encoder", "vision_config", "backbone_config")))
    return next((part for part in parts if getattr(part, "image_size", None) is not None), None)


def _image(config: Any) -> dict[str, Tensor]:
    """One image.

    Raises:
        UnsupportedModelError: its size is not in the config.
    """
    images = _images(config)
    if images is None:
        raise UnsupportedModelError(
            f"the size of the images that it takes is not in {type(config).__name__} (image_size): it takes patches, "
            "or images of any size, and only towers of images of one size get patterns"
        )
    size, frames = images.image_size, getattr(images, "num_frames", None)
    height, width = (size, size) if isinstance(size, int) else size
    before = (1, frames) if isinstance(frames, int) else (1,)
    return {"pixel_values": torch.zeros(*before, getattr(images, "num_channels", None) or 3, height, width)}


def _video(config: Any) -> dict[str, Tensor]:
    """One video (V-JEPA 2, VideoPrism).

    Raises:
        UnsupportedModelError: its frames or their size are not in the config.
    """
    names = ("frames_per_clip", "num_frames"), ("crop_size", "image_size")
    found = [next((x for name in some if (x := getattr(config, name, None)) is not None), None) for some in names]
    frames, size = found
    if not isinstance(frames, int) or not isinstance(size, int):
        raise UnsupportedModelError(
            f"the frames of the videos that it takes, or their size, are not in {type(config).__name__} "
            "(num_frames, image_size)"
        )
    return {"pixel_values_videos": torch.zeros(1, frames, getattr(config, "num_channels", None) or 3, size, size)}


def _packed_images(config: Any) -> dict[str, Tensor]:
    """Two images of different sizes below the largest, whose patches make one row (Pixtral)."""
    side = getattr(config, "patch_size", None)
    if not isinstance(side, int):
        return _image(config)
    pixels = torch.zeros(2, getattr(config, "num_channels", None) or 3, 3 * side, 4 * side)
    return {"pixel_values": pixels, "image_sizes": torch.tensor([[3 * side, 4 * side], [2 * side, 3 * side]])}


def _rows_of_patches(config: Any, parameters: Any) -> dict[str, Tensor]:
    """The patches of two images of different sizes in one row, with their grids (Qwen's and GLM's towers)."""
    merged = next((m for m in (getattr(config, n, None) for n in ("spatial_merge_size", "merge_size")) if m), 2)
    names = ("in_channels", "num_channels", "in_chans")
    channels = next((c for c in (getattr(config, name, None) for name in names) if isinstance(c, int)), 3)
    width = channels * config.patch_size**2 * (getattr(config, "temporal_patch_size", None) or 1)
    grids = torch.tensor([[1, 2 * merged, 3 * merged], [1, 2 * merged, merged]])
    name = next(name for name in ("hidden_states", "pixel_values") if name in parameters)
    given = {name: torch.zeros(int(grids.prod(1).sum()), width), "grid_thw": grids}
    return {**given, "merge_sizes": torch.ones(2, dtype=torch.long)} if "merge_sizes" in parameters else given


def _shaped_patches(config: Any) -> dict[str, Tensor]:
    """An image as a row of patches behind which is room, with its rows and columns (SigLIP 2)."""
    vision = getattr(config, "vision_config", config)
    width = vision.num_channels * vision.patch_size**2
    real = torch.arange(16)[None] < 12
    return {
        "pixel_values": torch.zeros(1, 16, width),
        "pixel_attention_mask": real.long(),
        "spatial_shapes": torch.tensor([[3, 4]]),
    }


def _is_asked(parameter: inspect.Parameter | None) -> bool:
    gathered = parameter is None or parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
    return not gathered and parameter.default is parameter.empty  # type: ignore[union-attr]


def next_inputs(body: PreTrainedModel, cache: Any, sizes: ProbeSizes, first: dict[str, Any]) -> dict[str, Any]:
    """Inputs of a second call, on new tokens after those in the cache."""
    given, parameters = dict(first), parameters_of(body)
    name = next((name for name in ("cache", "past_key_values") if name in parameters), None)
    if name is None:
        raise UnsupportedModelError(
            f"{type(body).__name__} returns a cache, but takes none as 'cache' or 'past_key_values' "
            f"({installed_release()})"
        )
    main = "decoder_input_ids" if "decoder_input_ids" in given else "input_ids"
    if main not in given and "inputs_embeds" in parameters:  # a stream of sound, as its layers take it
        embeds = torch.zeros(1, sizes.new, body.config.hidden_size)
        return {"inputs_embeds": embeds, "use_cache": True, name: cache}
    ids = given[main]  # [1, n], or codes: [codebooks, n] or [1, n, codebooks]
    given[main] = ids.new_full((ids.shape[0], sizes.new, *ids.shape[2:]), sizes.token)
    if "input_features" in given and main == "input_ids":
        given["input_features"] = _streamed(body.config, sizes.new)
    if "image_attention_mask" in given:
        given.update(_interleaved(body.config, sizes.new))
    if "attention_mask" in given and "decoder_input_ids" not in given:
        given["attention_mask"] = torch.ones(1, sizes.length + sizes.new, dtype=torch.long)
    if hasattr(body, "rope_deltas"):  # positions of several axes; `generate` hands them on, and some models rely on it
        given["position_ids"] = torch.arange(sizes.length, sizes.length + sizes.new)[None]
    return {**given, "use_cache": True, name: cache}
