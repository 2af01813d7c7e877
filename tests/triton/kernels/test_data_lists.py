"""Lists whose lengths only the device knows: never read by the host, never too small, and right when they are cut."""

from __future__ import annotations

from typing import Any, NoReturn

import pytest
import torch
from parity import assert_exact

from sa_hf.ops.data_layout import expiring_layout, range_layout
from sa_hf.ops.parts import BlockLayout, BlockPart, ScoreOptions, SegmentPart
from sa_hf.ops.reference import dense_attention, part_multiplicity
from sa_hf.ops.run import plan_backward, plan_forward
from sa_hf.ops.triton import TritonEngine
from sa_hf.ops.triton import lists as sa_lists
from sa_hf.ops.triton.lists import TileLists, layout_lists

pytestmark = pytest.mark.usefixtures("nan_filled")
N, RAMP = 75, 9


@pytest.fixture
def unread(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lists as on a GPU: with a fixed capacity."""
    monkeypatch.setattr("sa_hf.ops.data_layout.exact_lists", lambda device: False)


def some_spans(heads: int) -> torch.Tensor:
    return torch.rand(1, heads, N, generator=torch.Generator().manual_seed(1)) * 30


def some_ranges() -> BlockLayout:
    """Per head: a few wide ranges in front, then most rows on the last keys, as clusters of unequal size give."""
    g = torch.Generator().manual_seed(2)
    low = (torch.rand(1, 2, N, generator=g) * N).long().sort(-1).values
    low[:, 1, 20:] = N - 4
    high = (low + (torch.rand(1, 2, N, generator=g) * 12).long()).clamp(max=N).cummax(-1).values
    return range_layout(low, high, N, 40, block=16)


def all_lists(lists: TileLists) -> list[sa_lists.WorkList]:
    return [lists.by_query(), lists.by_key(1, 2), lists.by_key(2, 2), lists.by_diagonal()]


@pytest.mark.usefixtures("unread")
@pytest.mark.parametrize("kind", ["expiring", "ranges"])
def test_the_host_reads_nothing(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    layout = some_ranges() if kind == "ranges" else expiring_layout(some_spans(2), N, RAMP, 38, block=16)
    monkeypatch.setattr(sa_lists, "SMALLEST_CUT", 2)
    monkeypatch.setattr(sa_lists, "ITEMS_WANTED", 16)

    def refuse(*_: Any) -> NoReturn:
        raise AssertionError("a number was read from the device")

    for name in ("tolist", "item", "__bool__", "__int__", "__index__", "nonzero"):
        monkeypatch.setattr(torch.Tensor, name, refuse)
    made = all_lists(layout_lists(layout))
    monkeypatch.undo()
    tiles = int(layout.row_start[-1])
    for work in made:
        used = work.items[work.items[:, 0] >= 0]
        assert int((used[:, 3] - used[:, 1]).sum()) == tiles
        cut = work.splits[work.splits[:, 0] >= 0]
        assert int(cut[:, 2].sum()) == int((used[:, 4] >= 0).sum()) <= work.slots
        assert sorted(used[used[:, 4] >= 0, 4].tolist()) == list(range(int(cut[:, 2].sum())))


@pytest.mark.usefixtures("unread")
def test_cut_lists_of_unknown_length(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sa_lists, "SMALLEST_CUT", 2)
    monkeypatch.setattr(sa_lists, "ITEMS_WANTED", 16)
    layout = some_ranges()
    assert all(int((work.splits[:, 0] >= 0).sum()) for work in all_lists(layout_lists(layout))[:3])
    bias = torch.randn(2, 2 * N - 1, generator=torch.Generator().manual_seed(3))
    assert_exact(BlockPart(layout), n_q=N, heads=2, options=ScoreOptions(0.3, distance_bias=bias))


@pytest.mark.usefixtures("unread")
def test_lists_that_cannot_be_long_have_no_partials() -> None:
    spans = some_spans(1)
    layout = expiring_layout(spans, N, RAMP, 38, block=16)
    lists = layout_lists(layout)
    assert [work.slots for work in (lists.by_query(), lists.by_key(1, 2))] == [0, 0]
    assert_exact(BlockPart(layout), n_q=N, heads=2, options=ScoreOptions(0.3, spans=spans, ramp=RAMP))


@pytest.mark.parametrize("offset", [0, 5, 16])
@pytest.mark.parametrize("left", [0, 1, 15, 16, 17, 40])
def test_no_list_passes_the_bound(left: int, offset: int, monkeypatch: pytest.MonkeyPatch) -> None:
    spans = torch.full((1, 1, N), 1e6)  # nothing expires
    with monkeypatch.context() as m:
        m.setattr("sa_hf.ops.data_layout.exact_lists", lambda device: False)
        longest = expiring_layout(spans, N - offset, RAMP, left, block=16).longest
    exact = expiring_layout(spans, N - offset, RAMP, left, block=16)
    assert longest is not None
    assert int(exact.row_count.max()) <= longest
    assert int(torch.bincount(exact.columns).max()) <= longest


def test_table_gradient_beside_a_part_with_larger_values() -> None:
    """The fixed-point sums of a part with tiny values hold what the rest of the plan puts into delta."""
    n, heads, d = 33, 2, 16
    g = torch.Generator().manual_seed(4)
    q, k, v, grad = (torch.randn(1, heads, n, d, generator=g) for _ in range(4))
    v[:, :, :17] *= 1e-9
    options = ScoreOptions(0.3, distance_bias=torch.randn(heads, 2 * n - 1, generator=g))
    plan = [
        SegmentPart(n, 17, n, 17, key_index=slice(0, 17)),
        SegmentPart(n, n - 17, n, n - 17, key_index=slice(17, n)),
    ]
    engine = TritonEngine()
    out, lse = plan_forward(plan, q, k, v, options, engine)
    ours = plan_backward(plan, q, k, v, out, lse, grad, options, engine).distance_bias
    table = options.distance_bias.double().requires_grad_()
    counts = sum(part_multiplicity(part, n, n) for part in plan)
    expected, _ = dense_attention(q.double(), k.double(), v.double(), counts, options.with_tensors(distance_bias=table))
    expected.backward(grad.double())
    torch.testing.assert_close(ours.double(), table.grad, rtol=1e-4, atol=1e-5)
