"""Checkpoints of Hugging Face's own BigBird, on our kernels: the same architecture, names and weights.

What changes is the set of keys alone: random blocks are drawn per (seed, layer, head, block), the same in training
and evaluation (Hugging Face's model evaluates with block 0 in their place, counted once for each), a short input does
not turn the model dense for good, any length works, and a decoder is causal.
"""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import transformers
from transformers import AutoTokenizer, BigBirdConfig, PreTrainedModel

from sa_hf.config import SparseAttentionConfig, check_fields
from sa_hf.errors import SparseAttentionError
from sa_hf.hf.patching.patch import patch_model
from sa_hf.patterns.bigbird import BigBirdAttentionConfig
from sa_hf.patterns.dense import DenseAttentionConfig
from sa_hf.tasks.load import read_config

# Blocks that Hugging Face's model does not let one choose: three around the own one, the first and the last.
FIXED = {"num_window_blocks": 3, "global_blocks": "ends", "num_global_blocks": 2}


def convert_bigbird(
    source: str | Path | PreTrainedModel, out_dir: str | Path | None = None, **options: Any
) -> PreTrainedModel:
    """A BigBird checkpoint of Hugging Face as a patched model with our kernels.

    Args:
        source: hub name or folder of a ``big_bird`` checkpoint, or a loaded model (which stays as it is).
        out_dir: where the converted checkpoint is written, with the source's tokenizer; None writes nothing.
        options: fields of :class:`BigBirdAttentionConfig`. Without any, the pattern is that of the source's config:
            its blocks where ``attention_type="block_sparse"``, dense where "original_full".

    Returns:
        The model, of the source's class (``BigBirdForMaskedLM``, ...), in evaluation mode where it was loaded.

    Raises:
        SparseAttentionError: there is no such source, it is no BigBird of Hugging Face, or an option does not fit.
    """
    if isinstance(source, PreTrainedModel):
        config, loaded = source.config, source
    else:
        config, loaded = read_config(str(source)), None
    if not isinstance(config, BigBirdConfig) or getattr(config, "sa_hf", None) is not None:
        found = "a checkpoint that sa_hf has patched" if getattr(config, "sa_hf", None) else config.model_type
        raise SparseAttentionError(
            f"{source if loaded is None else type(source).__name__} is {found}; convert_bigbird takes "
            "Hugging Face's own BigBird (model_type 'big_bird'). Other models: sa_hf.patch_model(model, 'bigbird')"
        )
    pattern = pattern_of(config, **options)
    model = _load(source, config) if loaded is None else _copy(loaded)
    patch_model(model, pattern)
    if out_dir is not None:
        model.save_pretrained(out_dir)
        if loaded is None:
            _copy_tokenizer(source, out_dir)
    return model


def pattern_of(config: BigBirdConfig, **options: Any) -> SparseAttentionConfig:
    """The pattern that a Hugging Face BigBird config describes, with single fields replaced by ``options``."""
    check_fields(BigBirdAttentionConfig, options)
    if config.attention_type == "original_full" and not options:
        return DenseAttentionConfig()
    if config.is_decoder and config.attention_type == "block_sparse":
        warnings.warn(
            "this BigBird is a decoder with attention_type='block_sparse', which Hugging Face's model computes without "
            "causality; the converted one is causal, so its outputs differ",
            stacklevel=3,
        )
    blocks = {"block_size": config.block_size, "num_random_blocks": config.num_random_blocks}
    return BigBirdAttentionConfig(**{**FIXED, **blocks, **options})


def _load(source: Any, config: BigBirdConfig) -> PreTrainedModel:
    name = (config.architectures or ["BigBirdModel"])[0]
    model_class = getattr(transformers, name, None)
    if not name.startswith("BigBird") or model_class is None:
        raise SparseAttentionError(
            f"{source} names the architecture {name!r}; it must be one of transformers' BigBird*"
        )
    config.attention_type = "original_full"
    model: PreTrainedModel = model_class.from_pretrained(source, config=config)
    return model


def _copy(model: PreTrainedModel) -> PreTrainedModel:
    """A copy in BigBird's ``original_full`` form, whose weights have the same names."""
    model = copy.deepcopy(model)
    model.base_model.set_attention_type("original_full")
    for module in model.modules():
        if isinstance(getattr(module, "config", None), BigBirdConfig):
            module.config.attention_type = "original_full"
    return model


def _copy_tokenizer(source: Any, out_dir: str | Path) -> None:
    try:
        tokenizer = AutoTokenizer.from_pretrained(source)
    except (OSError, ValueError):  # the source has none
        return
    tokenizer.save_pretrained(out_dir)
