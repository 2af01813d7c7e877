"""Every static pattern's mask equals its definition, whatever else was called before; and a plan is that mask."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from pattern_cases import CASES, every_case, label, static_patterns
from pattern_definitions import DEFINITIONS, Layer, expected

from sa_hf.layer import Geometry
from sa_hf.ops.counts import row_counts
from sa_hf.ops.parts import Band, BlockPart
from sa_hf.ops.reference import part_multiplicity
from sa_hf.patterns.base import StaticPatternConfig, finished_plan, pattern_parts

pytestmark = pytest.mark.filterwarnings("ignore:longnet")

LENGTHS = (1, 2, 7, 16, 63, 64, 96, 128, 257)
CPU = torch.device("cpu")
cases = pytest.mark.parametrize("config", every_case(), ids=label)
directions = pytest.mark.parametrize("causal", [False, True], ids=["bidirectional", "causal"])


def summed(parts: list, geometry: Geometry) -> torch.Tensor:
    """The multiset sum of a plan's parts, int64 ``[heads, query_length, key_length]``."""
    heads = len(geometry.heads)
    total = torch.zeros(heads, geometry.query_length, geometry.key_length, dtype=torch.int64)
    for part in parts:
        total += part_multiplicity(part, geometry.query_length, geometry.key_length)[0].expand(heads, -1, -1)
    return total


def test_every_static_pattern_has_a_definition_and_cases() -> None:
    assert set(CASES) <= set(DEFINITIONS) == set(static_patterns())


@cases
@directions
def test_mask_is_the_definition(config: StaticPatternConfig, causal: bool) -> None:
    for n in LENGTHS:
        for num_heads in (1, 2, 3, 8):
            for layer in (0, 1):
                want = expected(config, tuple(range(num_heads)), Layer(n, causal, num_heads, layer))
                got = config.multiplicity(n, num_heads, layer, causal)
                assert torch.equal(got, want), (n, num_heads, layer)
                assert torch.equal(config.mask(n, num_heads, layer, causal), want > 0)


@cases
@directions
def test_plan_is_the_definition(config: StaticPatternConfig, causal: bool) -> None:
    """The parts' multiset sum, under the model's own window, a dropped diagonal and a mixture's subset of heads."""
    for n in LENGTHS:
        for num_heads, heads in ((1, (0,)), (3, (0, 1, 2)), (8, tuple(range(8))), (8, (1, 3, 6))):
            for window, drop in ((None, False), (None, True), (40, False), (3, True)):
                chosen = replace(config, drop_diagonal=drop)
                geometry = Geometry(n, n, heads, num_heads, 1, causal, Band(window, window))
                want = expected(config, heads, Layer(n, causal, num_heads, 1), window=window, drop_diagonal=drop)
                parts = pattern_parts(chosen, geometry, CPU)
                at = (n, num_heads, heads, window, drop)
                assert torch.equal(summed(parts, geometry), want), at
                assert torch.equal(row_counts(parts, n, len(heads)), want.sum(-1)), at


@pytest.mark.parametrize("drop", [False, True])
@pytest.mark.parametrize("config", [c for c in every_case() if c.extra_tokens], ids=label)
def test_every_position_reads_the_extra_tokens_and_is_read_by_them(config: StaticPatternConfig, drop: bool) -> None:
    """A row that reads them and nothing else loses its own position like any other."""
    chosen, extra = replace(config, drop_diagonal=drop), config.extra_tokens
    for n in LENGTHS:
        for window in (None, 0, 3):
            geometry = Geometry(n, n, (0, 1), 2, 0, False, Band(window, window))
            want = expected(config, (0, 1), Layer(n, False, 2), window=window, drop_diagonal=drop)
            want = torch.nn.functional.pad(want, (extra, 0, extra, 0), value=1)
            whole = replace(geometry, key_length=extra + n, query_length=extra + n)
            assert torch.equal(summed(finished_plan(chosen, geometry, CPU), whole), want), (n, window)


@cases
@directions
def test_plan_of_the_last_queries_is_their_rows(config: StaticPatternConfig, causal: bool) -> None:
    """Prefill in chunks: fewer queries than keys."""
    for n, queries in ((2, 1), (70, 5), (128, 64), (257, 100)):
        for window, drop in ((None, False), (40, True)):
            chosen = replace(config, drop_diagonal=drop)
            geometry = Geometry(n, queries, (0, 1, 2), 3, 0, causal, Band(window, window))
            want = expected(config, (0, 1, 2), Layer(n, causal, 3), window=window, drop_diagonal=drop)
            got = summed(pattern_parts(chosen, geometry, CPU), geometry)
            assert torch.equal(got, want[:, n - queries :]), (n, queries, window, drop)


@cases
@directions
def test_a_position_stands_in_one_slot_of_a_head(config: StaticPatternConfig, causal: bool) -> None:
    """On a GPU gradients find their way back by the slot of each position: of two, one would be lost."""
    for n, queries in ((1, 1), (7, 7), (64, 64), (70, 5), (257, 257), (257, 100)):
        for num_heads, heads in ((1, (0,)), (8, (0, 1, 2, 3, 4, 5, 6, 7)), (8, (1, 3, 6))):
            for window in (None, 3):
                geometry = Geometry(n, queries, heads, num_heads, 1, causal, Band(window, window))
                for part in pattern_parts(config, geometry, CPU):
                    for index, positions in ((part.query_index, queries), (part.key_index, n)):
                        if isinstance(index, torch.Tensor):
                            assert index.dtype == torch.int64
                            assert index.shape[1] in (1, len(heads))
                            lanes = index.flatten(0, 1)
                            assert int(index.max()) < positions
                            for lane in lanes:
                                filled = lane[lane >= 0]
                                assert len(filled.unique()) == len(filled), (n, queries, heads, window)


@cases
def test_causal_rows_do_not_depend_on_what_follows(config: StaticPatternConfig) -> None:
    longest = config.multiplicity(257, 3, 1, causal=True)
    for n in LENGTHS[:-1]:
        assert torch.equal(config.multiplicity(n, 3, 1, causal=True), longest[:, :n, :n]), n
    assert not config.length_dependent(causal=True)


@pytest.mark.parametrize("config", [c for c in every_case() if not c.length_dependent(causal=False)], ids=label)
def test_a_pattern_is_the_same_at_every_length_unless_it_says_otherwise(config: StaticPatternConfig) -> None:
    longest = config.multiplicity(257, 3)
    for n in LENGTHS[:-1]:
        assert torch.equal(config.multiplicity(n, 3), longest[:, :n, :n]), n


@cases
def test_heads_share_their_lists_only_where_their_masks_are_equal(config: StaticPatternConfig) -> None:
    for layer in (0, 1):
        counts = config.multiplicity(257, 3, layer)
        alike = torch.equal(counts, counts[:1].expand_as(counts))
        assert alike or not config.same_for_all_heads(Geometry(257, 257, (0, 1, 2), 3, layer))


@cases
def test_layers_share_a_plan_only_where_their_masks_are_equal(config: StaticPatternConfig) -> None:
    masks = [config.multiplicity(200, num_heads=3, layer_idx=layer) for layer in range(5)]
    for layer, mask in enumerate(masks):
        assert torch.equal(mask, masks[config.layer_of_plan(layer)])
        assert config.layer_of_plan(config.layer_of_plan(layer)) == config.layer_of_plan(layer) <= layer


@cases
def test_no_global_randomness_and_no_history(config: StaticPatternConfig) -> None:
    """The same mask whatever was asked before, and torch's generator neither read nor moved."""
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = config.multiplicity(96, 3, 1, causal=True)
    pattern_parts(config, Geometry(96, 96, (0, 1, 2), 3, 1), CPU)
    assert torch.equal(torch.get_rng_state(), state)
    for length, heads, layer in ((257, 8, 0), (7, 1, 1), (128, 3, 1)):
        config.multiplicity(length, heads, layer, causal=True)
    torch.manual_seed(2)
    assert torch.equal(type(config).from_dict(config.to_dict()).multiplicity(96, 3, 1, causal=True), first)


def names_tiles(config: StaticPatternConfig) -> bool:
    """Whether a pattern says more of its tiles than its predicate: without that, all are tried, and may be listed."""
    return any(getattr(type(config), name) is not getattr(StaticPatternConfig, name) for name in PLANNING)


PLANNING = ("candidates", "plan", "block_plan")
# The columns of the others grow with the length: the cost formulas cover them.
FEW_TILES = [c for c in every_case() if c.name not in ("dense", "sparse_transformer") and names_tiles(c)]


@pytest.mark.parametrize("n", [4096, 16384])
@pytest.mark.parametrize("config", FEW_TILES, ids=label)
def test_layouts_list_a_few_tiles_per_row_at_any_length(config: StaticPatternConfig, n: int) -> None:
    """Block lists never hold n x n tiles, and element masks are shared by the tiles that look alike."""
    for causal in (False, True):
        for part in pattern_parts(config, Geometry(n, n, (0, 1), 2, 0, causal), CPU):
            if isinstance(part, BlockPart):
                layout = part.layout
                per_row = layout.row_count.float().mean()
                assert per_row <= 24, (causal, per_row)
                # Shared means stored once. How many there are is bounded where a tile lies in one pair of blocks;
                # a tile of 16 over blocks of 4 has one mask per placing of the random blocks in it.
                assert len(layout.masks) == len(torch.unique(layout.masks.flatten(1), dim=0))
                if getattr(config, "block_size", layout.block_q) >= layout.block_q:
                    assert layout.masks.shape[0] <= 64
