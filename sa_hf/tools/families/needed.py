"""Arguments beside text, pixels and sound that a forward cannot do without, by what they are called."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from sa_hf.tools.families.sizes import BATCH, FRAMES, HIDDEN, IMAGE, LENGTH, PATCH

_SIDE = 6  # patches of a side of an image that is a row of patches
_EPISODE = 5


def completed(model: Any, taken: dict[str, inspect.Parameter], given: dict[str, Any]) -> dict[str, Any]:
    """The inputs with those arguments that the forward has no default for and whose name says what they are."""
    asked = [name for name, one in taken.items() if one.default is one.empty and name not in given]
    return {**given, **{name: _BY_NAME[name](model, given) for name in asked if name in _BY_NAME}}


def special(model: Any, taken: dict[str, inspect.Parameter], text: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Inputs of models whose main input is none of text, pixels and sound, or comes in a form of its own."""
    for name, made in _BY_MAIN.items():
        if name in taken:
            yield completed(model, taken, {k: x for k, x in made(model, text).items() if k in taken})


def randn(*shape: int, seed: int = 2) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def _frames_mask(model: Any, given: dict[str, Any]) -> Tensor:
    """All frames of the sound, whose bins are the shorter axis here."""
    features = next(x for name, x in given.items() if name in ("input_features", "audio_mel"))
    return torch.ones(features.shape[0], max(features.shape[1:]), dtype=torch.long)


def _vision(model: Any) -> Any:
    return getattr(model.config, "vision_config", model.config)


def _grid(model: Any, given: dict[str, Any]) -> Tensor:
    return torch.tensor([[1, 4, 4]] * BATCH)


def _no_patch_masked(model: Any, given: dict[str, Any]) -> Tensor:
    """Every second patch of a video is masked."""
    config = model.config
    count = (config.image_size // config.patch_size) ** 2 * (config.num_frames // config.tubelet_size)
    return (torch.arange(count) % 2 == 0).expand(BATCH, -1)


def unasked(taken: dict[str, inspect.Parameter], given: dict[str, Any]) -> dict[str, Any]:
    """The inputs with a mask of all frames, which a forward may need all the same (Audio Flamingo)."""
    wanted = "input_features_mask" in taken and "input_features" in given
    return {**given, "input_features_mask": _frames_mask(None, given)} if wanted else {}


_BY_NAME: dict[str, Callable[[Any, dict[str, Any]], Any]] = {
    "audio_mel_mask": lambda model, given: _frames_mask(model, given).bool(),
    "bool_masked_pos": _no_patch_masked,
    "grid_thw": _grid,
    "image_grid_thw": _grid,
    "input_features_mask": _frames_mask,
    "merge_sizes": lambda model, given: torch.ones(BATCH, dtype=torch.long),
    "qformer_input_ids": lambda model, given: torch.arange(5, 5 + LENGTH).expand(BATCH, -1),
}


def _positioned(model: Any, text: dict[str, Any]) -> dict[str, Any]:
    """Flat patches and their places (Gemma 4's tower)."""
    side = _vision(model).patch_size
    places = torch.stack(torch.meshgrid(torch.arange(_SIDE), torch.arange(_SIDE), indexing="xy"), -1).flatten(0, 1)
    return {
        "pixel_values": torch.rand(BATCH, _SIDE**2, 3 * side * side, generator=torch.Generator().manual_seed(2)),
        "pixel_position_ids": places.expand(BATCH, -1, -1),
    }


def _packed(model: Any, text: dict[str, Any]) -> dict[str, Any]:
    """The patches of two images in one row, each ``[channels, side, side]`` (Kimi's tower)."""
    side = model.config.patch_size
    return {"pixel_values": randn(BATCH * 16, 3, side, side)}


def _interleaved(model: Any, text: dict[str, Any]) -> dict[str, Any]:
    """One image for each text, which every token reads (Idefics)."""
    size = _vision(model).image_size
    mask = torch.ones(BATCH, LENGTH, 1, dtype=torch.long)
    return {**text, "pixel_values": randn(BATCH, 1, 3, size, size), "image_attention_mask": mask}


def _frames(model: Any, text: dict[str, Any]) -> dict[str, Any]:
    """A video of two images, the places of its queries in front of the text (InstructBLIP's of videos)."""
    config, count = model.config, 2
    size = config.vision_config.image_size
    token = getattr(config, "video_token_index", None) or 0
    ids = torch.cat((torch.full((BATCH, count * config.num_query_tokens), token), text["input_ids"]), 1)
    return {
        **text,
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "pixel_values": randn(BATCH, count, 3, size, size),
    }


def _robot(model: Any, text: dict[str, Any]) -> dict[str, Any]:
    """A robot's state, noise to turn into actions, an image and an instruction (PI0)."""
    config = model.config
    vision = config.vlm_config.vision_config
    count = (vision.image_size // vision.patch_size) ** 2
    front = torch.full((BATCH, count), config.vlm_config.image_token_id)
    ids = torch.cat((front, text["input_ids"]), 1)
    return {
        "input_ids": ids, "attention_mask": torch.ones_like(ids),
        "pixel_values": randn(BATCH, 1, 3, vision.image_size, vision.image_size),
        "pixel_attention_mask": torch.ones(BATCH, 1, dtype=torch.bool),
        "state": randn(BATCH, config.max_state_dim, seed=3), "timestep": torch.tensor([0.3, 0.7])[:BATCH],
        "noise": randn(BATCH, config.chunk_size, config.max_action_dim, seed=4),
        "action_embeds": randn(BATCH, config.chunk_size + 1, config.dit_config.hidden_size, seed=5),
    }  # fmt: skip


def _series(model: Any, text: dict[str, Any]) -> dict[str, Any]:
    """Values before now, with those that come for a decoder."""
    config = model.config
    length, lags = getattr(config, "context_length", None) or FRAMES, getattr(config, "lags_sequence", None) or [0]
    before, after = length + max(lags), getattr(config, "prediction_length", None) or 0
    times = getattr(config, "num_time_features", 0)
    return {
        "past_values": randn(BATCH, before), "past_observed_mask": torch.ones(BATCH, before),
        "past_time_features": randn(BATCH, before, times, seed=3),
        "future_values": randn(BATCH, after, seed=4), "future_time_features": randn(BATCH, after, times, seed=5),
    }  # fmt: skip


def _episode(model: Any, text: dict[str, Any]) -> dict[str, Any]:
    """States, actions and returns (the decision transformer)."""
    config = model.config
    return {
        "states": randn(BATCH, _EPISODE, config.state_dim), "actions": randn(BATCH, _EPISODE, config.act_dim, seed=3),
        "rewards": randn(BATCH, _EPISODE, 1, seed=4), "returns_to_go": randn(BATCH, _EPISODE, 1, seed=5),
        "timesteps": torch.arange(_EPISODE).expand(BATCH, -1),
        "attention_mask": torch.ones(BATCH, _EPISODE, dtype=torch.long),
    }  # fmt: skip


def _queries(model: Any, text: dict[str, Any]) -> dict[str, Any]:
    """Learned queries, and an image's features that they read (a query former)."""
    width = getattr(model.config, "encoder_hidden_size", HIDDEN)
    return {
        "query_embeds": randn(BATCH, LENGTH, model.config.hidden_size),
        "encoder_hidden_states": randn(BATCH, (IMAGE // PATCH) ** 2, width, seed=3),
    }


def _page(model: Any, text: dict[str, Any]) -> dict[str, Any]:
    """The patches of a page, each behind its row and column, counted from 1 (Pix2Struct)."""
    width = _vision(model).patch_embed_hidden_size
    places = torch.cartesian_prod(torch.arange(1, 5), torch.arange(1, 5)).float().expand(BATCH, -1, -1)
    return {
        "flattened_patches": torch.cat((places, randn(BATCH, 16, width)), -1),
        "decoder_input_ids": torch.arange(5, 5 + LENGTH).expand(BATCH, -1),
    }


def _shared_keys(model: Any, text: dict[str, Any]) -> dict[str, Any]:
    """What a draft model reads of the model that it drafts for: hidden states, keys and values (Gemma 4)."""
    config = model.config.get_text_config()
    layers = {layer.self_attn.layer_type: layer.self_attn for layer in model.model.layers}
    shapes = {kind: (BATCH, config.num_key_value_heads, LENGTH, one.head_dim) for kind, one in layers.items()}
    shared = {kind: (randn(*shape, seed=3), randn(*shape, seed=4)) for kind, shape in shapes.items()}
    return {"inputs_embeds": randn(BATCH, 1, 2 * model.config.backbone_hidden_size), "shared_kv_states": shared}


_BY_MAIN: dict[str, Callable[[Any, dict[str, Any]], dict[str, Any]]] = {
    "action_embeds": _robot,
    "audio_mel": lambda model, text: {"audio_mel": randn(BATCH, 2 * FRAMES, model.config.input_feat_size)},
    "flattened_patches": _page,
    "grid_thw": _packed,
    "perceiver_embeddings": _interleaved,
    "past_values": _series,
    "pixel_position_ids": _positioned,
    "qformer_attention_mask": _frames,
    "query_embeds": _queries,
    "shared_kv_states": _shared_keys,
    "state": _robot,
    "states": _episode,
    "t_cond": lambda model, text: {**text, "t_cond": randn(1, 1, model.config.hidden_size)},
}
