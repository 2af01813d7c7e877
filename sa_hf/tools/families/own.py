"""What some architectures need in a tiny config beside what fields are called.

By ``model_type`` or by the class of a model: the path of a field, with dots between configs, and its value.
"""

from __future__ import annotations

from typing import Any

from sa_hf.tools.families.sizes import HEAD_DIM, HEADS, HIDDEN, IMAGE, WIDE, WINDOW

# Windows of 16 patches, more than a pattern keeps of each, the second of each stage shifted.
_SWIN = {"depths": [2, 2], "num_heads": [2, 4], "num_layers": 2, "window_size": 4, "image_size": 2 * IMAGE}
# A layer of attention that two places share, between layers of another kind.
_SHARED = ["linear_attention", "hybrid", "linear_attention", "hybrid"]
_ZAMBA = {
    "num_hidden_layers": 4, "layers_block_type": _SHARED, "attention_hidden_size": 2 * HIDDEN,
    "attention_head_dim": 2 * HIDDEN // HEADS, "use_mamba_kernels": False,
}  # fmt: skip
_MIMI = {"hidden_size": HIDDEN, "upsample_groups": HIDDEN, "num_filters": 8, "codebook_dim": HIDDEN}
_SERIES = {"prediction_length": 8, "context_length": 24, "num_time_features": 2, "feature_size": 11}
_FILTERS = {
    "acoustic_tokenizer_encoder_config.num_filters": 4, "semantic_tokenizer_encoder_config.num_filters": 4,
    "audio_config.num_filters": 4, "semantic_model_config.num_filters": 4,
}  # fmt: skip
_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
# As in the released models, where the config's default is attention without distances.
_DISENTANGLED = {"relative_attention": True, "pos_att_type": ["p2c", "c2p"]}
_DOTS = {"head_dim": HEAD_DIM + HEAD_DIM // 2}
_HUNYUAN_VL = {"rope_parameters": {**_ROPE, "mrope_section": [2, 2, 2, 2]}}
_HY4 = {"rope_parameters": {**_ROPE, "mrope_section": [2, 1, 1]}}
_INDEXER = {
    "indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": HEAD_DIM, "indexer_budget": 16,
    "indexer_compress_ratio": 4, "ngram_vocab_size_base": 128, "split_ngram_parts": 2, "hc_lowrank": 8,
}  # fmt: skip
_COMPASS = {
    "layer_types": ["sliding_attention", "full_attention"],
    "rope_parameters": {"sliding_attention": _ROPE, "full_attention": _ROPE},
}  # fmt: skip
_DEPTH = {"num_hidden_layers": 4, "backbone_out_indices": [0, 1, 2, 3], "neck_hidden_sizes": [16, 16, 16, 16]}


def _in(name: str, fields: dict[str, Any]) -> dict[str, Any]:
    return {f"{name}.{field}": value for field, value in fields.items()}


_RESNET = {
    "model_type": "resnet", "embedding_size": 16, "hidden_sizes": [16, 16, 32, 64], "depths": [1, 1, 1, 1],
    "layer_type": "basic",
}  # fmt: skip
_DETR = {"use_timm_backbone": False, "backbone": None, "backbone_config": {**_RESNET, "out_features": ["stage4"]}}
_FOUR = {"backbone_config.out_indices": [1, 2, 3, 4]}

# What a config's class has to be given before it has defaults at all.
SAID_FIRST: dict[str, dict[str, Any]] = {
    "gemma4_assistant": {
        "text_config": {
            "model_type": "gemma4_text", "hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": 0,
        },
    },
}  # fmt: skip

OWN: dict[str, dict[str, Any]] = {
    "align": {"projection_dim": 640},
    "apertus1p5": {"audio_config.codebook_dim": HIDDEN},
    "autoformer": _SERIES,
    "bamba": {"attn_layer_indices": [1]},
    "BeitForSemanticSegmentation": {"out_indices": [0, 1, 2, 3]},
    "big_bird": {"attention_type": "original_full"},
    "bigbird_pegasus": {"attention_type": "original_full"},
    "blip-2": {"image_token_index": 120},
    "bros": {"dim_bbox_sinusoid_emb_2d": HIDDEN // 4, "dim_bbox_sinusoid_emb_1d": 2, "dim_bbox_projection": HEAD_DIM},
    "chameleon": {"vocabulary_map": {"<image>": 120}},
    "clap": {"audio_config.num_mel_bins": 64, "audio_config.hidden_size": 8 * HIDDEN},
    "cohere_compass": _in("text_config", _COMPASS),
    "cohere_compass_text": _COMPASS,
    "conditional_detr": _DETR,
    "csm": _in("codec_config", _MIMI),
    "dbrx": {"attn_config.rope_theta": 10000.0, "attn_config.clip_qkv": 8.0},
    "dab-detr": _DETR,
    "Data2VecVisionForSemanticSegmentation": {"out_indices": [0, 1, 2, 3]},
    "deberta": {**_DISENTANGLED, "max_relative_positions": 12},
    "deberta-v2": {
        **_DISENTANGLED, "max_relative_positions": 128, "position_buckets": 8, "share_att_key": True,
        "norm_rel_ebd": "layer_norm", "position_biased_input": False, "conv_kernel_size": 3, "conv_act": "gelu",
    },
    "deepseek_ocr2": {"text_config.mlp_layer_types": ["dense", "sparse", "sparse", "sparse"]},
    "depth_anything": _FOUR,
    "detr": _DETR,
    "diffusion_gemma": {
        "text_config.num_experts": 4, "text_config.top_k_experts": 2, "text_config.moe_intermediate_size": WIDE,
    },
    "donut-swin": _SWIN,
    "dots3_note": {**_in("text_config.per_layer_config.1", _DOTS), "audio_config.adapter_in_dim": HIDDEN},
    "dots3_note_text": _in("per_layer_config.1", _DOTS),
    "dpt": _DEPTH,
    "emu3": {
        "vocabulary_map": {"<image>": 120, "<|extra_200|>": 121},
        "vq_config.base_channels": 32, "vq_config.channel_multiplier": [1, 1, 2, 2],
    },
    "ernie4_5_vl_moe": {"text_config.rope_parameters": {**_ROPE, "mrope_section": [3, 3, 2]}},
    "fun_asr_nano": {"adaptor_config.intermediate_size": HIDDEN // 4},
    "granite4_vision": {
        "deepstack_layer_map": [[0, 0], [1, 1]], "spatial_target_layers": [0, 1], "downsample_rate": "2/4",
    },
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"]},
    "hrm_text": {"num_layers_per_stack": 1, "num_hidden_layers": 8},
    "hunyuan_vl": _in("text_config", _HUNYUAN_VL),
    "hunyuan_vl_text": _HUNYUAN_VL,
    "hy_v4_vl": _in("text_config", _HY4),
    "hy_v4_vl_text": _HY4,
    "informer": _SERIES,
    "instructblip": {"image_token_index": 120},
    "instructblipvideo": {"video_token_index": 120},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "mamba_dt_rank": 4},
    "jetmoe": {"num_experts_per_tok": 2},  # whose heads are its key heads times these
    "kyutai_speech_to_text": _in("codec_config", _MIMI),
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1, "num_hidden_layers": 2},
    "lilt": {"hidden_size": 96},  # of which a sixth is a box's place
    "llama4": {
        "vision_config.intermediate_size": 4 * HIDDEN, "vision_config.projector_input_dim": HIDDEN,
        "vision_config.projector_output_dim": HIDDEN, "vision_config.vision_output_dim": HIDDEN,
    },
    "mamba2": {"num_heads": 2 * HIDDEN // HEAD_DIM},
    "maskformer-swin": _SWIN,
    "mimi": _MIMI,
    "mimi_decoder": _MIMI,
    "mistral4": {"head_dim": HEAD_DIM},
    "molmo2": {"adapter_config.vision_feature_layer": [-1, -1]},
    "moonshine_streaming": {
        "num_key_value_heads": HEADS,
        "encoder_config.num_hidden_layers": 2, "encoder_config.sliding_windows": [[4, 2], [4, 0]],
    },
    "nemo_speechlm": {"text_config.n_groups": 1},
    "nemotron_h": {"n_groups": 1, "layers_block_type": ["linear_attention", "full_attention", "mlp"]},
    "nemotron_h_omni": {"text_config.n_groups": 1},
    "pi0": {"chunk_size": 8},
    "perceiver": {"num_latents": 16, "d_latents": HIDDEN, "d_model": HIDDEN, "num_blocks": 1},
    "prompt_depth_anything": _FOUR,
    "qwen2_5_omni_thinker": {"vision_start_token_id": 120},
    "qwen3_omni_moe_thinker": {"vision_start_token_id": 120},
    "qwen2_5_omni": {
        "thinker_config.vision_start_token_id": 120,
        "token2wav_config.bigvgan_config.upsample_initial_channel": 64, "token2wav_config.dit_config.num_embeds": 64,
        "token2wav_config.dit_config.enc_channels": [16, 16, 16, 16, 48],
    },
    "qwen3_omni_moe": {
        "thinker_config.vision_start_token_id": 120,
        "talker_config.text_config.shared_expert_intermediate_size": WIDE, "talker_config.spatial_merge_size": 2,
    },
    "qwen4_exp": _in("text_config", _INDEXER),
    "qwen4_exp_text": _INDEXER,
    "recurrent_gemma": {"block_types": ["recurrent", "attention"], "num_key_value_heads": 1},
    "reformer": {"axial_pos_embds_dim": [16, 48]},
    "ReformerModelWithLMHead": {"is_decoder": True},
    "shieldgemma2": {"yes_token_index": 30, "no_token_index": 31},
    "step3p7": {"text_config.sliding_window": WINDOW},
    "swin": _SWIN,
    "swin2sr": {**_SWIN, "image_size": IMAGE // 2},
    "swinv2": _SWIN,
    "table-transformer": _DETR,
    "T5GemmaEncoderModel": {"is_encoder_decoder": False},
    "t5gemma2_encoder": {"text_config.dropout_rate": 0.0},  # which the whole model's config sets in it
    "time_series_transformer": _SERIES,
    "tipsv2_dpt": _FOUR,
    "upernet": {"backbone_config": {**_RESNET, "out_features": ["stage1", "stage2", "stage3", "stage4"]}},
    "vibevoice": _FILTERS,
    "vibevoice_asr": _FILTERS,
    "vjepa2": {"pred_num_hidden_layers": 1},
    "wavtokenizer": {"codebook_dim": HIDDEN},
    "wavtokenizer_encoder": {"codebook_dim": HIDDEN},
    "xmod": {"default_language": "en_XX"},
    "zamba": _ZAMBA,
    "zamba2": {**_ZAMBA, "mamba_headdim": 2 * HIDDEN // HEADS, "hybrid_layer_ids": [1, 3]},
    "zaya": {"num_experts_per_tok": 1},
    "zoedepth": _FOUR,
}  # fmt: skip
