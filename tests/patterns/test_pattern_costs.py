"""The numbers of the papers: sparsities, computed pairs, densities at lengths where no n x n tensor fits."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from pattern_cases import every_case, label
from pattern_definitions import Layer, bigbird_blocks, mix

from sa_hf import (
    BigBirdAttentionConfig,
    LogSparseAttentionConfig,
    LongNetAttentionConfig,
    SlidingWindowAttentionConfig,
    SparseAttentionConfig,
    SparseTransformerAttentionConfig,
    StarAttentionConfig,
)
from sa_hf.layer import Geometry
from sa_hf.ops.counts import kept_pairs
from sa_hf.ops.parts import BlockPart, OffsetsPart, SegmentPart
from sa_hf.ops.random import splitmix64, splitmix64_tensor
from sa_hf.patterns.base import StaticPatternConfig, pattern_parts

pytestmark = pytest.mark.filterwarnings("ignore:longnet")


def pairs(config: StaticPatternConfig, n: int, num_heads: int = 1, causal: bool = False) -> float:
    """Pairs that the plan computes per head, repeats counted."""
    geometry = Geometry(n, n, tuple(range(num_heads)), num_heads, 0, causal)
    return kept_pairs(pattern_parts(config, geometry, torch.device("cpu")), n, num_heads) / num_heads


@pytest.mark.parametrize(
    ("config", "sparsity"),
    [
        (SparseTransformerAttentionConfig(kind="strided", stride=4), 70.39),
        (SparseTransformerAttentionConfig(kind="fixed", stride=4, summary=1), 72.66),
        (LogSparseAttentionConfig(), 89.83),
        (StarAttentionConfig(ring=False), 96.13),
    ],
    ids=["strided", "fixed", "log", "star"],
)
def test_reference_sparsities_at_128(config: StaticPatternConfig, sparsity: float) -> None:
    assert f"{100 * (1 - config.density(128)):.2f}" == f"{sparsity:.2f}"


def test_longnet_pairs_are_the_formula() -> None:
    """sum_b n w_b / r_b^2 per head, bidirectional: the mean over heads that run through all offsets."""
    config = LongNetAttentionConfig(segment_length=(64, 128, 512), dilated_ratio=(1, 2, 4))
    n = 1024
    formula = sum(n * w / r**2 for w, r in zip(config.segment_length, config.dilated_ratio, strict=True))
    assert pairs(config, n, num_heads=4) == formula


def test_longnet_paper_preset_is_85_percent_of_dense_at_4096() -> None:
    config = LongNetAttentionConfig.preset("paper")
    assert round(100 * pairs(config, 4096, num_heads=12) / 4096**2) == 85


def test_longnet_default_reads_about_a_thousand_keys_per_row() -> None:
    for n in (8192, 32768):
        assert 900 < pairs(LongNetAttentionConfig(), n, num_heads=64) / n < 1100


def test_sliding_window_pairs() -> None:
    n, w, sinks = 1000, 64, 4
    assert pairs(SlidingWindowAttentionConfig(window=w), n, causal=True) == n * w - w * (w - 1) / 2
    outside = sum(min(sinks, max(0, i - w + 1)) for i in range(n))
    with_sinks = pairs(SlidingWindowAttentionConfig(window=w, num_sink_tokens=sinks), n, causal=True)
    assert with_sinks == n * w - w * (w - 1) / 2 + outside


def test_logsparse_pairs_grow_as_n_log_n() -> None:
    for n in (1024, 16384):
        exact = sum(1 + i.bit_length() for i in range(n))
        assert pairs(LogSparseAttentionConfig(), n, causal=True) == exact
        assert exact <= n * (math.log2(n) + 1)


def test_sparse_transformer_pairs() -> None:
    n, l, c = 1024, 32, 8  # noqa: E741
    fixed = SparseTransformerAttentionConfig(kind="fixed", stride=l, summary=c)
    assert pairs(fixed, n) == n * l + n * c * (n // l - 1)
    strided = SparseTransformerAttentionConfig(kind="strided", stride=l)
    local = n * (2 * l - 1) - l * (l - 1)
    assert pairs(strided, n) == local + n * (n // l - 1)
    assert pairs(strided, n, causal=True) == (local + n * (n // l - 1) + n) / 2


def test_bigbird_pairs() -> None:
    """Inner rows read window + random + global blocks, the two global rows everything."""
    n, b = 4096, 64
    blocks = n // b
    inner = (blocks - 4) * (3 + 3 + 2) + 2 * (3 + 3 + 1)  # a row beside an end has that end in its window
    assert pairs(BigBirdAttentionConfig(), n, num_heads=3) == b * b * (inner + 2 * blocks)


def test_star_pairs_are_linear() -> None:
    for n in (128, 5000):
        relay, satellites = n + (n - 1), 3 * (n - 1)
        assert pairs(StarAttentionConfig(), n) == relay + satellites


@pytest.mark.parametrize("config", every_case(), ids=label)
def test_density_is_the_share_of_kept_pairs(config: StaticPatternConfig) -> None:
    for n in (1, 7, 129):
        for causal, drop in ((False, False), (True, False), (False, True), (True, True)):
            chosen = replace(config, drop_diagonal=drop)
            mask = chosen.mask(n, 3, 1, causal)
            dense = n * (n + 1) / 2 if causal else n * n
            assert chosen.density(n, 3, 1, causal) == pytest.approx(int(mask.sum()) / (3 * dense), abs=1e-12)


def test_density_at_65536() -> None:
    """By formula; the masks themselves would hold 4 G pairs."""
    n = 65536
    assert SlidingWindowAttentionConfig(window=512).density(n, causal=True) == pytest.approx(
        (512 * n - 512 * 511 / 2) / (n * (n + 1) / 2)
    )
    assert LogSparseAttentionConfig().density(n, causal=True) == pytest.approx(
        sum(1 + i.bit_length() for i in range(n)) / (n * (n + 1) / 2)
    )
    blocks = n // 64
    assert BigBirdAttentionConfig().density(n) == pytest.approx(((blocks - 4) * 8 + 2 * 7 + 2 * blocks) / blocks**2)
    # One branch: the union is the branch. Two nested ones: the second adds what the first does not hold.
    assert LongNetAttentionConfig(segment_length=(1024,), dilated_ratio=(1,)).density(n) == 1024 / n
    nested = LongNetAttentionConfig(segment_length=(1024, 4096), dilated_ratio=(1, 4))
    assert nested.density(n) == pytest.approx((1024 + (4096 - 1024) / 4 / 4) / n)


def test_plans_at_65536_are_small() -> None:
    """Index tensors are shared by heads where offsets agree, and block lists hold only tiles with kept pairs."""
    n = 65536
    geometry = Geometry(n, n, tuple(range(8)), 8, 0, True)
    configs: list[StaticPatternConfig] = [
        LongNetAttentionConfig(),
        SparseTransformerAttentionConfig(kind="strided"),
        BigBirdAttentionConfig(),
        SlidingWindowAttentionConfig(num_sink_tokens=4),
        LogSparseAttentionConfig(),
        StarAttentionConfig(),
    ]
    for config in configs:
        held = 0
        for part in pattern_parts(config, geometry, torch.device("cpu")):
            for index in (part.query_index, part.key_index):
                held += index.numel() * index.element_size() if isinstance(index, torch.Tensor) else 0
            if isinstance(part, BlockPart):
                tensors = (part.layout.columns, part.layout.kind, part.layout.masks)
                held += sum(x.numel() * x.element_size() for x in tensors)
        assert held <= 16 * n * 8, (config.name, held)
    strided = pattern_parts(configs[1], geometry, torch.device("cpu"))
    assert all(p.query_index.shape[:2] == (1, 1) for p in strided if isinstance(p, SegmentPart))
    assert [type(p) for p in pattern_parts(configs[4], geometry, torch.device("cpu"))] == [OffsetsPart]


# -- BigBird's random blocks ---------------------------------------------------------------------------------------


def test_splitmix64_is_the_published_sequence() -> None:
    """First outputs of splitmix64 seeded with 1234567 (the reference implementation's test vector)."""
    state, outputs = 1234567, []
    for _ in range(3):
        outputs.append(splitmix64(state))
        state = (state + 0x9E3779B97F4A7C15) % 2**64
    assert outputs == [6457827717110365317, 3203168211198807973, 9817491932198370423]
    assert [mix(x) for x in (0, 1, 2**64 - 1)] == [splitmix64(x) for x in (0, 1, 2**64 - 1)]
    signed = torch.tensor([0, 1, -1, 2**62])
    assert [x % 2**64 for x in splitmix64_tensor(signed).tolist()] == [mix(x % 2**64) for x in signed.tolist()]


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(
    "fields", [{}, {"seed": 2**63 - 1, "num_random_blocks": 7}, {"num_window_blocks": 59}], ids=str
)
def test_bigbird_random_blocks_at_length(causal: bool, fields: dict[str, int]) -> None:
    """64 blocks: the vectorised table against the loop over candidates, also where few blocks are eligible."""
    config = BigBirdAttentionConfig(block_size=16, **fields)
    n, at = 1024, Layer(1024, causal, 5, 11)
    for block in (0, 1, 2, 5, 31, 40, 62, 63):
        keys = config.decode_keys(block * 16 + 15, Geometry(n, 1, (0, 4), 5, 11, causal))
        for head, row in zip((0, 4), keys, strict=True):
            assert {k // 16 for k in row.tolist()} == bigbird_blocks(config, head, block, 64, at)


def test_bigbird_randomness_depends_on_seed_layer_head_and_block_alone() -> None:
    base = BigBirdAttentionConfig(block_size=16)
    mask = base.mask(1024, 2, 3)
    assert torch.equal(mask, BigBirdAttentionConfig(block_size=16).mask(1024, 2, 3))
    assert not torch.equal(mask[0], mask[1])
    assert not torch.equal(mask, base.mask(1024, 2, 4))
    assert not torch.equal(mask, BigBirdAttentionConfig(block_size=16, seed=1).mask(1024, 2, 3))
    assert torch.equal(mask[:1], base.mask(1024, 1, 3))


def test_an_unfrozen_learned_pattern_has_no_density() -> None:
    config = SparseAttentionConfig.from_dict({"name": "sparsebert"})
    with pytest.raises(ValueError, match="has no mask of its own"):
        config.density(64)
