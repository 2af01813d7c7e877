"""The hundred most used architectures of text, vision and language, and sound that have attention, by ``model_type``.

Chosen by hand, before their results were seen, as what is loaded most from the Hub as far as we know: no counts of
downloads were at hand. One that Transformers has under two types (a config of text and one around it) is named once.
"""

from __future__ import annotations

ENCODERS = (
    "bert", "roberta", "xlm-roberta", "distilbert", "albert", "electra", "deberta", "deberta-v2", "mpnet", "modernbert",
    "camembert", "longformer", "big_bird", "xlnet", "mobilebert", "nomic_bert", "esm", "layoutlm", "layoutlmv3", "luke",
    "roformer", "eurobert", "xlm-roberta-xl", "megatron-bert",
)  # fmt: skip
PAIRS = (
    "t5", "mt5", "umt5", "bart", "mbart", "marian", "pegasus", "m2m_100", "blenderbot", "led", "longt5", "t5gemma",
)  # fmt: skip
DECODERS = (
    "llama", "qwen2", "qwen3", "qwen2_moe", "qwen3_moe", "qwen3_next", "qwen3_5", "mistral", "mixtral", "gemma",
    "gemma2", "gemma3_text", "phi", "phi3", "gpt2", "gpt_neox", "gpt_neo", "gptj", "gpt_bigcode", "gpt_oss", "opt",
    "bloom", "falcon", "mpt", "starcoder2", "codegen", "cohere", "cohere2", "stablelm", "olmo2", "olmo3", "glm4",
    "glm4_moe", "deepseek_v2", "deepseek_v3", "granite", "granitemoehybrid", "smollm3", "exaone4", "falcon_h1",
)  # fmt: skip
IMAGES = (
    "clip", "siglip", "blip", "blip-2", "llava", "llava_next", "llava_onevision", "qwen2_vl", "qwen2_5_vl", "qwen3_vl",
    "gemma3", "paligemma", "idefics3", "smolvlm", "internvl", "mistral3",
)  # fmt: skip
SOUND = (
    "whisper", "wav2vec2", "hubert", "wavlm", "wav2vec2-bert", "seamless_m4t_v2", "audio-spectrogram-transformer",
    "clap",
)  # fmt: skip
MOST_USED = (*ENCODERS, *PAIRS, *DECODERS, *IMAGES, *SOUND)
