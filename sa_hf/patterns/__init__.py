"""The patterns, one file each. Importing this package registers them."""

from sa_hf.patterns.bigbird import BigBirdAttentionConfig
from sa_hf.patterns.block_topk import BlockTopKAttentionConfig
from sa_hf.patterns.dense import DenseAttentionConfig
from sa_hf.patterns.expire_span import ExpireSpanAttentionConfig
from sa_hf.patterns.logsparse import LogSparseAttentionConfig
from sa_hf.patterns.longnet import LongNetAttentionConfig
from sa_hf.patterns.routing import RoutingAttentionConfig
from sa_hf.patterns.sliding_window import SlidingWindowAttentionConfig
from sa_hf.patterns.sparse_transformer import SparseTransformerAttentionConfig
from sa_hf.patterns.sparsebert import SparseBertAttentionConfig
from sa_hf.patterns.star import StarAttentionConfig

__all__ = [
    "BigBirdAttentionConfig",
    "BlockTopKAttentionConfig",
    "DenseAttentionConfig",
    "ExpireSpanAttentionConfig",
    "LogSparseAttentionConfig",
    "LongNetAttentionConfig",
    "RoutingAttentionConfig",
    "SlidingWindowAttentionConfig",
    "SparseBertAttentionConfig",
    "SparseTransformerAttentionConfig",
    "StarAttentionConfig",
]
