"""What one new query reads, and what a cache may drop."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from pattern_cases import every_case, label
from pattern_definitions import Layer, expected

from sa_hf import BigBirdAttentionConfig, LogSparseAttentionConfig, LongNetAttentionConfig, SlidingWindowAttentionConfig
from sa_hf.layer import Geometry
from sa_hf.ops.parts import Band
from sa_hf.patterns.base import StaticPatternConfig

pytestmark = pytest.mark.filterwarnings("ignore:longnet")

N = 257
HEADS = (0, 1, 2)
cases = pytest.mark.parametrize("config", every_case(), ids=label)


@cases
@pytest.mark.parametrize("causal", [False, True], ids=["bidirectional", "causal"])
def test_decode_keys_are_the_row_of_the_mask(config: StaticPatternConfig, causal: bool) -> None:
    for n in (1, 2, 17, 64, N):
        for window, drop in ((None, False), (None, True), (40, False)):
            chosen = replace(config, drop_diagonal=drop)
            geometry = Geometry(n, 1, HEADS, 3, 1, causal, Band(window, window))
            counts = expected(config, HEADS, Layer(n, causal, 3, 1), window=window, drop_diagonal=drop)
            for position in sorted({0, 1 % n, n // 2, n - 1}):
                keys = chosen.decode_keys(position, geometry)
                assert len(keys) == len(HEADS)
                for got, row in zip(keys, counts[:, position], strict=True):
                    assert got.dtype == torch.int64
                    assert got.tolist() == torch.repeat_interleave(torch.arange(n), row).tolist()


@cases
def test_decode_keys_need_only_the_past(config: StaticPatternConfig) -> None:
    """A causal row is the same when the sequence ends at it (as in generation) and when it goes on."""
    for position in (0, 5, 63, 64, 200):
        now = config.decode_keys(position, Geometry(position + 1, 1, HEADS, 3, 1, True))
        later = config.decode_keys(position, Geometry(1000, 1, HEADS, 3, 1, True))
        assert [k.tolist() for k in now] == [k.tolist() for k in later]


def needed(config: StaticPatternConfig, position: int, window: int | None) -> torch.Tensor:
    """By brute force: the positions before ``position`` that some row from it on reads, in any head."""
    counts = expected(config, HEADS, Layer(N, True, 3, 1), window=window)
    return (counts[:, position:, :position] > 0).any(1).any(0)


@cases
@pytest.mark.parametrize("window", [None, 40])
def test_nothing_is_dropped_that_a_later_query_reads(config: StaticPatternConfig, window: int | None) -> None:
    geometry = Geometry(N, 1, HEADS, 3, 1, True, Band(window, window))
    for position in (0, 1, 15, 16, 17, 63, 64, 65, 100, 128, 200, N - 1):
        kept = config.keep(position, geometry)
        assert kept.shape == (position,)
        assert kept.dtype == torch.bool
        lost = needed(config, position, window) & ~kept
        assert not lost.any(), (position, torch.nonzero(lost).flatten().tolist())


def _bounded(config: StaticPatternConfig) -> bool:
    """Whether the pattern lets a cache shrink: the others may read any position again."""
    if config.name == "sparse_transformer":
        return config.kind == "fixed" or config.head_mode == "interleaved"
    return config.name in ("sliding_window", "longnet", "star") or (
        config.name == "bigbird" and config.num_random_blocks == 0
    )


@pytest.mark.parametrize("config", [c for c in every_case() if _bounded(c)], ids=label)
def test_everything_is_dropped_that_no_later_query_reads(config: StaticPatternConfig) -> None:
    layer = 0 if config.name == "sparse_transformer" and config.kind == "strided" else 1
    geometry = Geometry(N, 1, HEADS, 3, layer, True)
    counts = expected(config, HEADS, Layer(N, True, 3, layer))
    for position in (1, 16, 33, 64, 65, 100, 127):
        want = (counts[:, position:, :position] > 0).any(1).any(0)
        assert torch.equal(config.keep(position, geometry), want), position


def test_what_a_cache_keeps_stays_small() -> None:
    """The sizes that the specification promises, at a length where a full cache would be 20,000."""
    at = 20_000
    geometry = Geometry(at, 1, (0, 1), 2, 0, True)
    assert int(SlidingWindowAttentionConfig(window=100, num_sink_tokens=4).keep(at, geometry).sum()) == 99 + 4
    longnet = LongNetAttentionConfig(segment_length=(64, 1024), dilated_ratio=(1, 8)).keep(at, geometry)
    assert int(longnet.sum()) <= 64 + 2 * 1024 // 8
    window = BigBirdAttentionConfig(num_random_blocks=0).keep(at, geometry)
    assert int(window.sum()) <= 64 + 2 * 64
    banded = replace(geometry, band=Band(300, 0))
    assert int(LogSparseAttentionConfig().keep(at, banded).sum()) == 256


def test_structured_rows_hold_no_more_than_their_keys() -> None:
    """A row of a long sequence is built from its keys: log2 n of them for LogSparse, not n tries."""
    at = 1 << 20
    for config, most in ((LogSparseAttentionConfig(), 21), (SlidingWindowAttentionConfig(window=9), 9)):
        (keys,) = config.decode_keys(at, Geometry(at + 1, 1, (0,), 1, 0, True))
        assert len(keys) <= most + 1
        assert int(keys[-1]) == at
