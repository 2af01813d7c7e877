"""Gathered parts a few lanes at a time: the same outputs and gradients, whatever the size of a piece."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from ops_cases import compare, part_cases, shuffled

from sa_hf.ops import pieces as cutting
from sa_hf.ops.parts import Part, ScoreOptions
from sa_hf.ops.pieces import pieces

pytestmark = pytest.mark.usefixtures("cpu_path")

N, BATCH, DIM = 70, 2, 16
NAMES = (
    "blocks per head", "blocks shared", "blocks per sequence, key range", "segments", "offsets", "offsets per head",
)  # fmt: skip


def gathered(name: str, heads: int) -> Part:
    """The part over positions in an order of their own for every sequence and head, some slots empty."""
    (part,) = part_cases(N, BATCH, heads)[name]
    rows, columns = (torch.cat([shuffled(N, heads, seed + b, empty=2) for b in range(BATCH)]) for seed in (1, 5))
    return replace(part, query_index=rows, key_index=columns)


def every_option(heads: int) -> ScoreOptions:
    generator = torch.Generator().manual_seed(1)
    return ScoreOptions(
        scale=0.3, distance_bias=torch.randn(heads, 2 * N - 1, generator=generator).requires_grad_(),
        spans=(torch.rand(BATCH, heads, N, generator=generator) * N).requires_grad_(), ramp=7.3, dropout=0.3,
        seed=torch.tensor(2**40 + 7), sequence_ids=torch.tensor([3, 8]), heads=(5, 1, 4, 2)[:heads],
        sinks=torch.randn(heads, generator=generator).requires_grad_(),
    )  # fmt: skip


@pytest.mark.parametrize("at_once", [1, 2, 100])  # key heads in a piece
@pytest.mark.parametrize(("heads", "kv_heads"), [(2, 2), (4, 2), (4, 4)])
@pytest.mark.parametrize("name", NAMES)
def test_pieces_of_any_size_agree_with_the_oracle(
    name: str, heads: int, kv_heads: int, at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    part = gathered(name, heads)
    monkeypatch.setattr(cutting, "ELEMENTS", at_once * (heads // kv_heads) * N * DIM)
    query, key = torch.zeros(BATCH, heads, N, DIM), torch.zeros(BATCH, kv_heads, N, DIM)
    cut = len(list(pieces(part, query, key)))
    assert cut == (1 if at_once == 100 else BATCH * max(1, kv_heads // at_once))
    plan = [part, part_cases(N, BATCH, heads)["blocks shared"][0]]
    for options in (None, every_option(heads)):
        result = compare(
            plan, batch=BATCH, heads=heads, kv_heads=kv_heads, query_length=N, key_length=N, head_dim=DIM,
            options=options,
        )  # fmt: skip
        assert result.worst() < 1e-5, result.errors


def test_what_is_not_gathered_stays_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cutting, "ELEMENTS", 1)
    query, key = torch.zeros(BATCH, 2, N, DIM), torch.zeros(BATCH, 2, N, DIM)
    for name in NAMES:
        (piece,) = pieces(part_cases(N, BATCH, 2)[name][0], query, key)
        assert piece.whole
