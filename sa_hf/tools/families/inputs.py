"""What a tiny model is called with: tokens, pixels or sound, by its signature and config."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from sa_hf.tools.families.needed import completed, special, unasked
from sa_hf.tools.families.sizes import BATCH, DECODER_LENGTH, FRAMES, HIDDEN, IMAGE, LENGTH, PATCH

CHOICES = 2
SHORT = 13  # real tokens of the padded row
SAMPLES = 6400
FIRST_TOKEN, TOKENS = 5, 28  # clear of special tokens at either end of the vocabulary, also of a protein's
SOUNDS = ("input_features", "input_values", "audio_values")


def parameters(model: Any) -> dict[str, inspect.Parameter]:
    return dict(inspect.signature(model.forward).parameters)


def candidates(model: Any) -> Iterator[dict[str, Any]]:
    """Inputs to try, the plainest first: text, pixels and sound, and what else the forward asks for; in a form of its
    own; and the same without a cache, for what fails in making one."""
    taken = parameters(model)
    several = [completed(model, taken, given) for given in _plain(model, taken)]
    several += special(model, taken, _text(model, taken))
    yield from several
    yield from filter(None, (unasked(taken, given) for given in several))
    if "use_cache" in taken:
        yield from ({**given, "use_cache": False} for given in several)


def _plain(model: Any, taken: dict[str, inspect.Parameter]) -> Iterator[dict[str, Any]]:
    """Text alone, with pixels, with sound; or what the main input is."""
    text = _text(model, taken)
    pixels = {"pixel_values": _pixels(model)} if "pixel_values" in taken else {}
    videos = {"pixel_values_videos": _videos(model)} if "pixel_values_videos" in taken else {}
    pictured = [_pictured(text, model, count) for count in _image_counts(model)] if text and pixels else []
    sounds = [{name: sound} for name in SOUNDS if name in taken for sound in _sounds(name, model)]
    decoder = {"decoder_input_ids": tokens(DECODER_LENGTH, 3, end_token(model))} if "decoder_input_ids" in taken else {}
    together = [(text,), (pixels,), *((sound,) for sound in sounds), (text, pixels)]
    together += [(shown, pixels) for shown in pictured]
    if "image_embeds_position_mask" in taken:  # Kosmos-2, whose places of an image are named beside the tokens
        places = (torch.arange(LENGTH) < model.config.latent_query_num).long().expand(BATCH, -1)
        together.append(({**text, "image_embeds_position_mask": places}, pixels))
    together += [(_flat(text, model, taken),), (text, _flat(text, model, taken)), (videos,)]
    together += [(codes,) for codes in _codes(model, text)]
    if "visual_feats" in taken:  # LXMERT, which has an image as boxes
        generator = torch.Generator().manual_seed(2)
        features = torch.randn(BATCH, 6, model.config.visual_feat_dim, generator=generator)
        together.append((text, {"visual_feats": features, "visual_pos": torch.rand(BATCH, 6, 4, generator=generator)}))
    for parts in [*together, *((text, sound) for sound in sounds), (_patches(model, taken),)]:
        if all(parts):
            given = {name: value for part in parts for name, value in part.items()}
            if decoder:
                yield {**given, **decoder}
            yield given
    for rows in list(_codes(model, text))[2:] if decoder else ():  # MusicGen's, read from a text
        yield {**text, "decoder_input_ids": rows["input_ids"]}


def tokens(length: int, seed: int, end: int) -> Tensor:
    """Ids that end with the end of a text, which some heads look for."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(FIRST_TOKEN, TOKENS, (BATCH, length), generator=generator)
    ids[:, -1] = end
    return ids


def _text(model: Any, taken: dict[str, Any]) -> dict[str, Any]:
    if "input_ids" not in taken:
        return {}
    ids = tokens(LENGTH, 1, end_token(model))
    given: dict[str, Any] = {"input_ids": ids}
    if "attention_mask" in taken:
        given["attention_mask"] = torch.ones_like(ids)
    if "bbox" in taken:
        corners = torch.randint(0, 50, (*ids.shape, 4), generator=torch.Generator().manual_seed(4))
        given["bbox"] = corners + torch.tensor([0, 0, 50, 50])
    if type(model).__name__ == "BlipForQuestionAnswering":  # whose decoder shows in its loss alone
        given["labels"] = tokens(LENGTH, 5, end_token(model))
    if "qformer_input_ids" in taken:
        given["qformer_input_ids"] = tokens(LENGTH, 6, end_token(model))
    if isinstance(getattr(model.config, "question_token_id", None), int):  # Splinter
        ids[:, SHORT - 4] = model.config.question_token_id  # within a padded row, too
    if isinstance(getattr(model.config, "type_vocab_sizes", None), list):  # TAPAS: a question, then a table
        column = (torch.arange(LENGTH) - 6).clamp(min=0)
        kinds = [column > 0, (column + 3) // 4, (column + 3) % 4 + (column > 0).long(), *[torch.zeros(LENGTH)] * 4]
        given["token_type_ids"] = torch.stack(kinds, -1).long().expand(BATCH, -1, -1)
    if type(model).__name__ in ("LongformerForQuestionAnswering", "LongformerForMultipleChoice"):
        ids[:, [6, 7, -1]] = model.config.sep_token_id  # behind the question, which is global
    if "MultipleChoice" in type(model).__name__:
        given = {name: value[:, None].repeat_interleave(CHOICES, 1) for name, value in given.items()}
    return given


def _pictured(text: dict[str, Any], model: Any, count: int) -> dict[str, Any]:
    """The text with the places of an image's tokens in front."""
    token = next(x for x in _image_tokens(model) if isinstance(x, int))
    ids = text["input_ids"]
    front = torch.full((len(ids), count), token)
    given = {**text, "input_ids": torch.cat((front, ids), 1)}
    if "attention_mask" in text:
        given["attention_mask"] = torch.ones_like(given["input_ids"])
    return given


def _codes(model: Any, text: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Codes of sound, one of each codebook at a place: beside each other, or as rows of a batch."""
    count = getattr(model.config, "num_codebooks", None) or getattr(
        getattr(model.config, "decoder", None), "num_codebooks", None
    )
    if not text or not isinstance(count, int):
        return
    ids = tokens(LENGTH, 7, FIRST_TOKEN)
    for codes in (count, count + 1):
        yield {**text, "input_ids": (ids[..., None] + torch.arange(codes)) % TOKENS}
    yield {**text, "input_ids": (ids.repeat_interleave(count, 0) + torch.arange(count).repeat(BATCH)[:, None]) % TOKENS}


def _image_tokens(model: Any) -> list[Any]:
    return [getattr(model.config, name, None) for name in ("image_token_id", "image_token_index", "video_token_id")]


def _image_counts(model: Any) -> list[int]:
    """How many tokens an image may have: a query former's, or its patches, with a class token or without."""
    if not any(isinstance(x, int) for x in _image_tokens(model)):
        return []
    config = model.config
    queries = getattr(config, "num_query_tokens", None) or getattr(config, "latent_query_num", None)
    return [x for x in (queries, (IMAGE // PATCH) ** 2, (IMAGE // PATCH) ** 2 + 1) if isinstance(x, int)]


def _flat(text: dict[str, Any], model: Any, taken: dict[str, Any]) -> dict[str, Any]:
    """An image as a row of patches, with its shape beside (SigLIP 2)."""
    if "spatial_shapes" not in taken:
        return {}
    vision = getattr(model.config, "vision_config", model.config)
    side = vision.patch_size
    patches = torch.randn(BATCH, 16, vision.num_channels * side * side, generator=torch.Generator().manual_seed(2))
    mask = {"pixel_attention_mask": torch.ones(BATCH, 16, dtype=torch.long)} if "pixel_attention_mask" in taken else {}
    return {"pixel_values": patches, "spatial_shapes": torch.tensor([[4, 4]] * BATCH), **mask}


def _pixels(model: Any) -> Tensor:
    config = model.config
    vision = getattr(config, "vision_config", config)
    size = getattr(vision, "image_size", None) or IMAGE
    height, width = size if isinstance(size, list | tuple) else (size, size)
    channels = getattr(vision, "num_channels", None) or 3
    shape = [BATCH, channels, height, width]
    frames = getattr(vision, "num_frames", None)
    if isinstance(frames, int):
        shape = [BATCH, frames, channels, height, width]
    return torch.randn(shape, generator=torch.Generator().manual_seed(2))


def _videos(model: Any) -> Tensor:
    """``[batch, frames, channels, height, width]``."""
    vision = getattr(model.config, "vision_config", model.config)
    size = next((x for n in ("image_size", "crop_size") if isinstance(x := getattr(vision, n, None), int)), IMAGE)
    frames = next((x for n in ("num_frames", "frames_per_clip") if isinstance(x := getattr(vision, n, None), int)), 2)
    return torch.randn(BATCH, frames, 3, size, size, generator=torch.Generator().manual_seed(2))


def _sounds(name: str, model: Any) -> Iterator[Tensor]:
    """Samples, with and without a channel, or features, in either order."""
    config = model.config
    audio = getattr(config, "audio_config", None) or getattr(config, "encoder_config", None) or config
    names = ("num_mel_bins", "feature_size", "n_mels", "input_feat_per_channel", "feature_projection_input_dim")
    bins = next((getattr(audio, n) for n in names if isinstance(getattr(audio, n, None), int)), 16)
    samples = [(BATCH, SAMPLES), (BATCH, 1, SAMPLES)] if name != "input_features" else []
    for shape in [
        *samples,
        (BATCH, bins, FRAMES),
        (BATCH, FRAMES, bins),
        (BATCH, getattr(audio, "max_length", 1), bins),
        (BATCH, FRAMES, HIDDEN),
        (BATCH, 1, FRAMES, bins),
        (BATCH, FRAMES, 128),
        (BATCH, bins, 4 * (getattr(config, "n_window", None) or FRAMES)),  # windows of Qwen's encoders
        (BATCH, bins, 8 * LENGTH),  # of which each token has eight (Voxtral's stream)
    ]:
        yield torch.randn(shape, generator=torch.Generator().manual_seed(2))


def _patches(model: Any, taken: dict[str, Any]) -> dict[str, Any]:
    """Flat patches with a grid of them for each image, as Qwen's towers take them."""
    if "grid_thw" not in taken:
        return {}
    config = model.config
    name = "pixel_values" if "pixel_values" in taken else "hidden_states"
    side = getattr(config, "patch_size", 1)
    width = getattr(config, "in_channels", None) or getattr(config, "num_channels", None) or 3
    width = width * side * side * (getattr(config, "temporal_patch_size", None) or 1)
    patches = torch.randn(BATCH * 16, width, generator=torch.Generator().manual_seed(2))
    return {name: patches, "grid_thw": torch.tensor([[1, 4, 4]] * BATCH)}


def padded(model: Any, inputs: dict[str, Any], side: str) -> dict[str, Any]:
    """The same with the last row ``SHORT`` tokens long, padded on the ``side``."""
    mask, ids = inputs["attention_mask"].clone(), inputs["input_ids"].clone()
    hidden = slice(SHORT, None) if side == "right" else slice(None, LENGTH - SHORT)
    mask[-1, ..., hidden] = 0
    ids[-1, ..., hidden] = padding_token(model)
    if side == "right":
        ids[-1, ..., SHORT - 1] = end_token(model)
    return {**inputs, "input_ids": ids, "attention_mask": mask}


def padding_token(model: Any) -> int:
    return _token(model, "pad_token_id", 0)


def end_token(model: Any) -> int:
    return _token(model, "eos_token_id", 2)


def _token(model: Any, name: str, default: int) -> int:
    try:
        config = model.config.get_text_config()
    except ValueError:  # two models of text (MusicGen)
        config = model.config
    value = getattr(config, name, None)
    value = value[0] if isinstance(value, list) and value else value
    return value if isinstance(value, int) and value >= 0 else default
