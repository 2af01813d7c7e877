"""A tiny config of any architecture, from its class's own defaults.

Fields are shrunk by what they are called, the same everywhere: all hidden sizes are equal, and so are all numbers of
heads, so what fits together in the defaults still does. Lists with one value for each layer keep one layer of each
kind. ``own.py`` holds what some architectures need beside that.
"""

from __future__ import annotations

import re
from typing import Any

from sa_hf.tools.families.own import OWN, SAID_FIRST
from sa_hf.tools.families.sizes import (
    FRAMES,
    HEAD_DIM,
    HEADS,
    HIDDEN,
    IMAGE,
    KEY_HEADS,
    LAYERS,
    MOST_LAYERS,
    PATCH,
    POSITIONS,
    VOCABULARY,
    WIDE,
    WINDOW,
)

# The first pattern that a field's name matches as a whole says its value.
_SIZES: tuple[tuple[str, Any], ...] = (
    (r"mamba_d_state|state_size|ssm_state_size|mamba_state_size|d_state", 16),
    (r"mamba_d_head|mamba_head_dim", 2 * HEAD_DIM),
    (r"mamba_d_ssm", WIDE),
    (r"vocab_size|.*_vocab_size|padded_vocab_size|vocab_size_.*|unpadded_vocab_size", VOCABULARY),
    (r"type_vocab_size|token_type_vocab_size", None),
    (r"hidden_size_per_layer_input", 16),
    (r"(.*_)?(hidden_size|hidden_dim|d_model|embed_dim|n_embd|emb_dim|embedding_size|embedding_dim)|dim|project_dim"
     r"|.*projection_dim|projection_size|word_embed_proj_dim|out_hidden_size|pooler_output_size|output_dim|dim_model"
     r"|hidden_size_global|.*_hidden_dimension|attention_hidden_size|intra_bottleneck_size|encoder_dim|decoder_dim|width|lm_dim"
     r"|vision_output_dim|text_dim|vision_dim|projector_dim|fpn_hidden_size|model_dim|out_dim|n_state", HIDDEN),
    (r"(.*_)?(intermediate_size|ffn_dim|d_ff|d_inner|n_inner|ffn_hidden_size|mlp_dim|feedforward_dim"
     r"|inner_dim|ff_dim|mlp_hidden_size|linear_units|mlp_hidden_dim|dim_ff|ffn_hidden_dim|dim_feedforward)", WIDE),
    (r"num_key_value_heads|.*_key_value_heads|num_kv_heads|n_kv_heads|multi_query_group_num|.*num_kv_heads", KEY_HEADS),
    (r"num_attention_heads|num_heads|n_heads?|.*attention_heads|.*num_heads|.*_n_heads?|attention_heads|linear_num_\w+_heads"
     r"|mamba_num_heads|mamba_n_heads|n_mamba_heads", HEADS),
    (r"num_hidden_layers|n_layers?|num_layers|depth|layers|.*encoder_layers|.*decoder_layers|.*num_hidden_layers"
     r"|.*num_layers|.*_depth|.*n_layers|num_blocks|num_encoder_blocks_", LAYERS),
    (r"qk_nope_head_dim|v_head_dim|nope_head_dim|value_head_dim", HEAD_DIM),
    (r"qk_rope_head_dim|rotary_dim|rope_head_dim", HEAD_DIM // 2),
    (r"(.*_)?(head_dim|d_kv|kv_channels|attention_head_size|dim_head|d_head)|head_size"
     r"|linear_(key|value)_head_dim", HEAD_DIM),
    (r"kv_lora_rank|q_lora_rank|.*lora_rank|.*lora_dim", 32),
    (r"max_position_embeddings|n_positions|max_sequence_length|.*max_position_embeddings|seq_length|n_ctx|max_seq_len"
     r"|max_target_positions|context_length_|model_max_length|original_max_position_embeddings", POSITIONS),
    (r"max_source_positions", FRAMES // 2),
    (r"sliding_window|local_attention|attention_window_size|sliding_window_size", WINDOW),
    (r"attention_chunk_size", 8),
    (r"(num_experts|num_local_experts|n_routed_experts|moe_num_experts|num_routed_experts|.*num_experts)", 4),
    (r"num_experts_per_tok(en)?|moe_topk|moe_k|num_selected_experts|num_experts_per_token|top_k_experts"
     r"|experts_top_k", 2),
    (r"n_group|topk_group|num_expert_group|moe_num_shared_experts|n_shared_experts|num_shared_experts", 1),
    (r"first_k_dense_replace|num_dense_layers", 1),
    (r"num_nextn_predict_layers|mtp_num_layers|mtp_num_hidden_layers|num_mtp_layers", 0),
    (r"query_pre_attn_scalar", HEAD_DIM),
    (r"image_size|img_size|crop_size|input_resolution|resolution|max_image_size|pretrain_image_size", IMAGE),
    (r"patch_size", PATCH),
    (r"mm_tokens_per_image|image_seq_length|num_image_tokens", 16),
    (r"num_mel_bins|feature_size|feature_projection_input_dim|input_feat_per_channel|n_mels|num_mel_channels"
     r"|mel_dim", 16),
    (r"encoder_hash_byte_group_vocab", 64),
    (r"num_kv_shared_layers", 0),
    (r"time_step_rank|mamba_dt_rank", 8),
    (r"num_queries|num_query_tokens|latent_query_num|resampler_n_latents", 8),
    (r"conv_dim", 32),
    (r"num_conv_pos_embeddings", 16),
    (r"num_conv_pos_embedding_groups", 4),
    (r"classifier_proj_size|tdnn_dim|xvector_output_dim|codevector_dim|proj_codevector_dim", 32),
    (r"coordinate_size", 8),
    (r"shape_size", 16),
    (r"index_n_heads", 2),
    (r"index_head_dim", HEAD_DIM),
    (r"index_topk", 64),
)  # fmt: skip
_COMPILED = tuple((re.compile(pattern), value) for pattern, value in _SIZES)
# Lists of places of layers.
_PLACES = re.compile(
    r"deepstack_visual_indexes|fullatt_block_indexes|global_attn_indexes|full_attn_.*idx.*|encode_proj_layers_"
)
_DROPPED = ("out_features", "out_indices", "stage_names", "backbone_config_", "transformers_version", "_name_or_path")
# Sizes that have to be equal where they meet, whatever the default is; others are only made smaller.
_EXACT = (HIDDEN, WIDE, HEAD_DIM, HEADS, 2 * HEAD_DIM)
# Fields that have to be said and whose default is None.
UNSAID = {
    "vocab_size": VOCABULARY, "num_experts_per_tok": 2, "n_routed_experts": 4, "n_shared_experts": 1,
    "head_dim": HEAD_DIM, "num_key_value_heads": HEADS,
}  # fmt: skip

# Whose code has a default of its own for the sections of rotary channels, made for wide heads.
_SECTIONS = ("colqwen2", "glm", "qwen2_vl", "qwen2_5_vl", "qwen2_5_omni", "paddleocr_vl")


def tiny_config(config_class: Any, model_type: str, name: str = "") -> Any:
    """A config of the class, shrunk; ``attn_implementation`` is eager.

    Args: name: of the model's class, where that needs more of its own.
    """
    fields = shrunk(config_class(**SAID_FIRST.get(model_type, {})).to_dict())
    if fields.get("is_encoder_decoder"):
        fields.setdefault("decoder_start_token_id", 1)
    own = [OWN.get(key, {}) for key in dict.fromkeys((model_type, config_class.model_type, name))]
    for path, value in [item for one in own for item in one.items()]:
        *outer, field = path.split(".")
        where: dict[Any, Any] = fields
        for key in outer:
            where = where.get(int(key) if key.isdigit() else key, {})  # none in the config of a part alone
        where[field] = value
    if model_type.startswith(_SECTIONS):
        _say_sections(fields)
    config = config_class.from_dict(fields)
    _end_tokens(config)
    config._attn_implementation = "eager"
    return config


def _end_tokens(config: Any) -> None:
    """Heads that pool the last token want to know what padding is."""
    for one in [config, *(getattr(config, name, None) for name in getattr(config, "sub_configs", {}))]:
        for name, value in (
            ("pad_token_id", 0),
            ("bos_token_id", 1),
            ("eos_token_id", 2),
            ("decoder_start_token_id", 1),
        ):
            if one is not None and hasattr(one, name) and getattr(one, name) is None:
                setattr(one, name, value)


def shrunk(fields: dict[str, Any]) -> dict[str, Any]:
    """A config's fields, nested configs among them, shrunk by their names."""
    kept = layers_kept(fields)
    small: dict[str, Any] = {}
    tokens = iter(range(VOCABULARY - 1, 0, -1))
    for name, value in fields.items():
        if name in _DROPPED or (name == "hidden_size" and "depths" in fields):
            continue
        if name == "per_layer_config" and isinstance(value, dict):
            small[name] = _by_layer(value, kept)
            continue
        if not isinstance(name, str):
            small[name] = value
        elif isinstance(value, dict) and name not in ("id2label", "label2id"):
            small[name] = _rope(value) if "rope" in name else shrunk(value)
        elif name.endswith(("_token_id", "_token_index", "token_ids")):
            small[name] = _token(name, value, tokens)
        elif isinstance(value, list) and kept is not None and len(value) == kept[1] and not isinstance(value[0], list):
            small[name] = [value[i] for i in kept[0]]
        else:
            small[name] = _small(name, value, fields)
    if kept is not None:
        for name in ("num_hidden_layers", "n_layer", "num_layers"):
            if isinstance(fields.get(name), int):
                small[name] = len(kept[0])
    return small


def _small(name: str, value: Any, fields: dict[str, Any]) -> Any:
    if value is None:
        return UNSAID.get(name)
    if isinstance(value, bool) or not isinstance(value, int | list):
        return value
    if name in ("vision_feature_layer", "feature_layer"):
        return -1
    if _PLACES.fullmatch(name):
        return [0]
    staged = "depths" in fields
    if staged and name in ("num_heads", "num_attention_heads") and isinstance(value, list):
        return [2, 4, 8, 16, 32][: len(value)]
    if staged and name == "embed_dim" and isinstance(value, int):
        return HIDDEN // 2
    if name == "depths" and isinstance(value, list):
        return [1] * len(value)
    if staged and name == "window_size" and isinstance(value, int):
        return 2
    size = next((size for pattern, size in _COMPILED if pattern.fullmatch(name)), None)
    if size is None:
        return value
    if isinstance(value, list):
        return [min(x, size) if isinstance(x, int) else x for x in value]
    if size == KEY_HEADS and value in (_heads(fields), fields.get(name.replace("key_value", "attention"))):
        return HEADS
    if name == "head_dim" and "qk_rope_head_dim" in fields:
        return HEAD_DIM // 2
    if name == "qk_head_dim":
        return HEAD_DIM + HEAD_DIM // 2
    return size if size in _EXACT and value > 0 else min(value, size)


def _by_layer(value: dict[Any, Any], kept: tuple[list[int], int] | None) -> dict[Any, Any]:
    """Fields of single layers, of those that stay; their heads are wider than the others'."""
    places = {old: new for new, old in enumerate(kept[0])} if kept is not None else {0: 0, 1: 1}
    given = {places[int(key)]: shrunk(fields) for key, fields in value.items() if int(key) in places}
    return {
        key: {**fields, **({"head_dim": 2 * HEAD_DIM} if "head_dim" in fields else {})} for key, fields in given.items()
    }


def _heads(fields: dict[str, Any]) -> Any:
    return next((fields[n] for n in ("num_attention_heads", "n_head", "num_heads") if n in fields), None)


def _token(name: str, value: Any, tokens: Any) -> Any:
    if isinstance(value, list):
        return [_token(name, x, tokens) for x in value]
    if not isinstance(value, int) or value < 3:
        return value
    return 2 if name == "eos_token_id" else next(tokens)


def _rope(value: dict[str, Any]) -> dict[str, Any]:
    """Rotary parameters: sections and factors for the small heads."""
    small: dict[str, Any] = {}
    for name, x in value.items():
        if isinstance(x, dict):
            small[name] = _rope(x)
        elif name == "mrope_section":
            small[name] = [2, 3, 3]
        elif name in ("long_factor", "short_factor"):
            small[name] = [1.0] * (HEAD_DIM // 2)
        elif name == "original_max_position_embeddings":
            small[name] = POSITIONS
        else:
            small[name] = x
    return small


def _say_sections(fields: dict[str, Any]) -> None:
    """Say the sections of rotary channels, for small heads."""
    for name, value in fields.items():
        if name == "rope_parameters" and isinstance(value, dict) and "rope_type" in value:
            half = int(HEAD_DIM * value.get("partial_rotary_factor", 1.0)) // 2
            value.setdefault("mrope_section", [half - 2 * (half // 3), half // 3, half // 3])
        elif isinstance(value, dict):
            _say_sections(value)


def layers_kept(fields: dict[str, Any]) -> tuple[list[int], int] | None:
    """Which layers stay of a config whose lists tell its layers apart, and how many there were."""
    count = next(
        (fields[n] for n in ("num_hidden_layers", "n_layer", "num_layers") if isinstance(fields.get(n), int)), 0
    )
    if "depths" in fields:
        return None
    lists = {
        name: value
        for name, value in fields.items()
        if isinstance(value, list) and len(value) == count and count > 2 and value and not isinstance(value[0], list)
    }
    kinds = lists.get("layer_types") or lists.get("layers_block_type") or next(iter(lists.values()), None)
    if kinds is None:
        return None
    chosen: list[int] = []
    seen: set[Any] = set()
    for i, kind in enumerate(kinds):
        if kind not in seen and len(chosen) < MOST_LAYERS:
            seen.add(kind)
            chosen.append(i)
    for i in range(count):
        if len(chosen) < LAYERS and i not in chosen:
            chosen.append(i)
    return sorted(chosen), count
