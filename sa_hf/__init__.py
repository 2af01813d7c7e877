"""Sparse attention for Hugging Face Transformers.

Importing this package has no side effect and needs torch alone; the functions that touch a model import transformers
when they are called.
"""

from __future__ import annotations

import importlib
from typing import Any

from sa_hf.config import SparseAttentionConfig, available_patterns
from sa_hf.errors import ConfigVersionError, NotStaticError, SparseAttentionError, UnsupportedModelError
from sa_hf.functional import sparse_attention
from sa_hf.patterns import *  # noqa: F403
from sa_hf.patterns import __all__ as _patterns
from sa_hf.patterns import drawing as _drawing  # noqa: F401  (its import makes patterns draw)

__version__ = "0.1.0"

# Public names that need transformers, or more than one process: loaded on first use.
_LAZY = {
    "patch_model": "sa_hf.hf.patching.patch",
    "unpatch_model": "sa_hf.hf.patching.sparse_model",
    "dense": "sa_hf.hf.patching.patch",
    "summary": "sa_hf.hf.patching.summary",
    "extend_positions": "sa_hf.hf.patching.extend",
    "figures": "sa_hf.hf.patching.figures",
    "auxiliary_losses": "sa_hf.hf.forward.losses",
    "freeze_masks": "sa_hf.hf.patching.freeze",
    "parameter_groups": "sa_hf.hf.training.groups",
    "prepare_peft": "sa_hf.hf.patching.peft",
    "sparse_cache": "sa_hf.hf.caches.sparse",
    "StarTransformerConfig": "sa_hf.models.star_transformer",
    "StarTransformerModel": "sa_hf.models.star_transformer",
    "StarTransformerForSequenceClassification": "sa_hf.models.star_transformer",
    "StarTransformerForTokenClassification": "sa_hf.models.star_transformer",
    "ConvTransConfig": "sa_hf.models.conv_trans",
    "ConvTransForForecasting": "sa_hf.models.forecasting",
    "convert_bigbird": "sa_hf.tools.convert",
    "sequence_parallel_longnet": "sa_hf.distributed.sequence_parallel",
}

__all__ = [
    "ConfigVersionError",
    "NotStaticError",
    "SparseAttentionConfig",
    "SparseAttentionError",
    "UnsupportedModelError",
    "available_patterns",
    "sparse_attention",
    *_patterns,
    *_LAZY,
]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'sa_hf' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
