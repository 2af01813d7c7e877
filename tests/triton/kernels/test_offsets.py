"""Fixed offsets under the interpreter against the fp64 oracle."""

from __future__ import annotations

import pytest
import torch
from parity import assert_exact
from test_block import OPTIONS, some_options

from sa_hf.ops.parts import OffsetsPart

pytestmark = pytest.mark.usefixtures("nan_filled")

TWO_SIDED = ((0, 1, 4, 16, 32), (0, -1, -25))


@pytest.mark.parametrize(
    ("part", "d", "heads", "kv_heads"),
    [
        (OffsetsPart(1, ((0, 1),)), 16, 2, 1),
        (OffsetsPart(35, TWO_SIDED[:1]), 24, 2, 1),
        (OffsetsPart(35, TWO_SIDED, 5, 32), 80, 2, 2),
        (OffsetsPart(35, ((0,), (34, 60), (), (-2,))), 16, 4, 2),
    ],
)
def test_shapes(part: OffsetsPart, d: int, heads: int, kv_heads: int) -> None:
    assert_exact(part, n_q=part.length, d=d, heads=heads, kv_heads=kv_heads)


@pytest.mark.parametrize("chosen", OPTIONS, ids=lambda c: "+".join(c))
def test_options(chosen: dict[str, bool]) -> None:
    n, heads = 33, 2
    assert_exact(OffsetsPart(n, TWO_SIDED), n_q=n, heads=heads, options=some_options(n, heads, **chosen))


def test_behind_extra_tokens_and_in_another_order() -> None:
    behind = OffsetsPart(31, TWO_SIDED[:1], query_index=slice(2, 33), key_index=slice(2, 33))
    assert_exact(behind, n_q=33, options=some_options(33, 2, bias=True, dropout=True))
    g = torch.Generator().manual_seed(2)
    order = torch.randperm(33, generator=g)[None, None].expand(1, 2, -1)
    order = order.masked_fill(torch.rand(1, 2, 33, generator=g) < 0.2, -1)
    part = OffsetsPart(33, TWO_SIDED, query_index=order, key_index=order.flip(2))
    assert_exact(part, n_q=33, options=some_options(33, 2, bias=True, spans=True, dropout=True))
