"""The patterns, one file each. Importing this package registers them."""

from sa_hf.patterns.bigbird import BigBirdAttentionConfig
from sa_hf.patterns.dense import DenseAttentionConfig
from sa_hf.patterns.sliding_window import SlidingWindowAttentionConfig
from sa_hf.patterns.sparsebert import SparseBertAttentionConfig

__all__ = [
    "BigBirdAttentionConfig",
    "DenseAttentionConfig",
    "SlidingWindowAttentionConfig",
    "SparseBertAttentionConfig",
]
