"""The matrix: for each static pattern of the registry, the configurations that every test runs."""

from __future__ import annotations

import warnings
from typing import Any

from sa_hf import (
    BigBirdAttentionConfig,
    DenseAttentionConfig,
    LogSparseAttentionConfig,
    LongNetAttentionConfig,
    SlidingWindowAttentionConfig,
    SparseTransformerAttentionConfig,
    StarAttentionConfig,
    available_patterns,
)
from sa_hf.patterns.base import StaticPatternConfig


def _uncovered(**fields: Any) -> LongNetAttentionConfig:
    """A LongNet without a branch of ratio 1: allowed, with a warning that its own test asserts."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return LongNetAttentionConfig(**fields)


CASES: dict[str, list[StaticPatternConfig]] = {
    "dense": [DenseAttentionConfig()],
    "sliding_window": [
        SlidingWindowAttentionConfig(window=1),
        SlidingWindowAttentionConfig(window=10),
        SlidingWindowAttentionConfig(window=100, num_sink_tokens=3),
        SlidingWindowAttentionConfig(window=10, num_sink_tokens=70),
    ],
    "longnet": [
        LongNetAttentionConfig(segment_length=(16, 32, 128), dilated_ratio=(1, 2, 4)),
        LongNetAttentionConfig(segment_length=(8, 21, 50), dilated_ratio=(1, 3, 4), head_offset="grouped"),
        _uncovered(segment_length=(3, 64), dilated_ratio=(2, 9)),
    ],
    "logsparse": [
        LogSparseAttentionConfig(),
        LogSparseAttentionConfig(local_window=5),
        LogSparseAttentionConfig(local_window=None, restart_length=32),
        LogSparseAttentionConfig(local_window=3, restart_length=10),
        LogSparseAttentionConfig(local_window=40),
        LogSparseAttentionConfig(local_window=33, restart_length=90),
    ],
    "sparse_transformer": [
        SparseTransformerAttentionConfig(kind="strided", stride=10),
        SparseTransformerAttentionConfig(kind="strided", stride=9, head_mode="interleaved"),
        SparseTransformerAttentionConfig(kind="strided", stride=16, head_mode="per_head"),
        SparseTransformerAttentionConfig(kind="fixed", stride=64, summary=16),
        SparseTransformerAttentionConfig(kind="fixed", stride=10, summary=3, num_summary_groups=3),
        SparseTransformerAttentionConfig(
            kind="fixed", stride=12, summary=2, num_summary_groups=2, head_mode="interleaved"
        ),
        SparseTransformerAttentionConfig(
            kind="fixed", stride=64, summary=8, num_summary_groups=3, head_mode="per_head"
        ),
    ],
    "bigbird": [
        BigBirdAttentionConfig(block_size=16),
        BigBirdAttentionConfig(block_size=16, num_window_blocks=0, num_random_blocks=2, num_global_blocks=0, seed=7),
        BigBirdAttentionConfig(block_size=32, global_blocks="first", num_global_blocks=1, num_random_blocks=1),
        BigBirdAttentionConfig(block_size=16, num_random_blocks=0, num_window_blocks=1, num_global_blocks=4),
        BigBirdAttentionConfig(block_size=128, num_random_blocks=1, seed=2**63 - 1),
        BigBirdAttentionConfig(block_size=4, num_random_blocks=2),
        BigBirdAttentionConfig(
            block_size=1, num_window_blocks=0, num_random_blocks=0, num_global_blocks=0, num_extra_tokens=2
        ),
    ],
    "star": [
        StarAttentionConfig(),
        StarAttentionConfig(ring=False),
        StarAttentionConfig(relay="virtual"),
    ],
}


def static_patterns() -> dict[str, type[StaticPatternConfig]]:
    return {name: cls for name, cls in available_patterns().items() if issubclass(cls, StaticPatternConfig)}


def every_case() -> list[StaticPatternConfig]:
    """The cases of every registered static pattern; one without cases of its own runs with its defaults."""
    return [config for name, cls in static_patterns().items() for config in CASES.get(name, [cls()])]


def label(config: StaticPatternConfig) -> str:
    """A short id for pytest: the pattern and the fields that differ from its defaults."""
    own = {k: v for k, v in config.to_dict().items() if k not in ("name", "version")}
    default = type(config)().to_dict()
    return "-".join([config.name, *(f"{k}={v}" for k, v in own.items() if v != default[k])])
