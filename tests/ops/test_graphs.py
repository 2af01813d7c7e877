"""What a hand-recorded CUDA graph reads must outlive the caches that made it."""

from __future__ import annotations

import weakref

import pytest
import torch

from sa_hf.ops import graphs
from sa_hf.ops.triton import engine as triton_engine
from sa_hf.patterns.base import Geometry, finished_plan
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
