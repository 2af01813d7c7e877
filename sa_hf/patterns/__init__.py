"""The patterns, one file each. Importing this package registers them."""

from sa_hf.patterns.dense import DenseAttentionConfig
from sa_hf.patterns.sliding_window import SlidingWindowAttentionConfig

__all__ = ["DenseAttentionConfig", "SlidingWindowAttentionConfig"]
