"""What a hand-recorded CUDA graph reads must outlive the caches that made it."""

from __future__ import annotations

import weakref

import pytest
import torch

from sa_hf.layer import Geometry
from sa_hf.ops import graphs, slots
from sa_hf.ops.parts import SegmentPart
from sa_hf.ops.triton import engine as triton_engine
from sa_hf.patterns.base import finished_plan
from sa_hf.patterns.bigbird import BigBirdAttentionConfig


@pytest.mark.parametrize("recording", [True, False])
def test_what_a_graph_uses_is_kept_only_while_one_is_recorded(recording: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graphs, "_HELD", {})
    monkeypatch.setattr(graphs, "capturing", lambda x: recording)
    used = graphs.settled(torch.zeros(3))
    alive = weakref.ref(used)
    graphs.hold(used, used)
    del used
    assert (alive() is not None) == recording


def test_the_engine_holds_parts_and_lists(monkeypatch: pytest.MonkeyPatch) -> None:
    held: dict[int, object] = {}
    monkeypatch.setattr(graphs, "_HELD", held)
    monkeypatch.setattr(graphs, "capturing", lambda x: True)
    monkeypatch.setattr(triton_engine, "layout_lists", lambda layout: "the lists of the layout")
    geometry = Geometry(256, 256, (0,), 1, 0, False)
    (part,) = finished_plan(BigBirdAttentionConfig(block_size=16), geometry, torch.device("cpu"))
    triton_engine._held_lists(part, torch.zeros(1, 1, 256, 16))
    assert list(held.values()) == [part, "the lists of the layout"]


@pytest.mark.parametrize(("recording", "kept"), [(True, True), (False, True), (False, False)])
def test_what_is_made_of_an_index_is_kept_with_a_kept_plan(
    recording: bool, kept: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not while a graph is recorded, when it has no values yet, nor of an index that comes with the data."""
    monkeypatch.setattr(slots, "capturing", lambda x: recording)
    index = torch.tensor([[[2, -1, 0]]])
    if kept:
        slots.examine_slots([SegmentPart(3, 3, 1, 1, query_index=index)])
    made = [slots.made_of(index, name, lambda: torch.zeros(1)) for name in ("a", "a", "b")]
    assert (made[0] is made[1]) == (kept and not recording)
    assert made[0] is not made[2]
