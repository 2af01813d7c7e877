"""Towers that take images in a form of their own, or whose config keeps their size elsewhere."""

from __future__ import annotations

import pytest
import torch
import transformers as tf
from older_releases import REFUSED_THERE, older_releases_may

import sa_hf
from sa_hf.tools.families.check import FIRST, build
from sa_hf.tools.families.compare import RIGHT, Result, compare, outputs
from sa_hf.tools.families.registry import entries

ENTRIES = {entry.name: entry for entry in entries()}


@pytest.mark.parametrize(
    "name",
    [
        "Siglip2VisionModel",
        "Siglip2ForImageClassification",
        "DepthAnythingForDepthEstimation",
        "Kimi_K25VisionModel",
        "VideoLlama3VisionModel",
        "BridgeTowerModel",
        "IdeficsModel",
    ],
)
def test_outputs_and_gradients_equal_its_own_eager_attention(name: str) -> None:
    if name not in ENTRIES:
        pytest.skip(f"transformers {tf.__version__} has no {name}")
    model, inputs = build(ENTRIES[name])
    with older_releases_may(REFUSED_THERE):
        sa_hf.patch_model(model, FIRST)
    compare(model, inputs, FIRST.name, found := Result(RIGHT))
    assert found.status == RIGHT, found.reason
    assert f"{FIRST.name} gradients" in found.figures


def test_room_behind_the_patches_of_a_smaller_image_changes_nothing() -> None:
    """SigLIP 2 fills its rows of patches: what it pools is that of the patches alone."""
    model, inputs = build(ENTRIES["Siglip2VisionModel"])
    patches = inputs["pixel_values"][:, :12]
    shapes = torch.tensor([[3, 4]] * len(patches))
    alone = {
        "pixel_values": patches,
        "spatial_shapes": shapes,
        "pixel_attention_mask": torch.ones(patches.shape[:2], dtype=torch.long),
    }
    filled = {
        "pixel_values": inputs["pixel_values"],
        "spatial_shapes": shapes,
        "pixel_attention_mask": (torch.arange(16) < 12).long().expand(len(patches), -1),
    }
    dense = outputs(model, filled)["pooler_output"]
    with older_releases_may(REFUSED_THERE):
        sa_hf.patch_model(model, FIRST)
    pooled = outputs(model, filled)["pooler_output"]
    torch.testing.assert_close(pooled, outputs(model, alone)["pooler_output"], atol=1e-5, rtol=1e-5)
    assert not torch.allclose(pooled, dense, atol=1e-3)
    with sa_hf.dense(model):
        torch.testing.assert_close(outputs(model, filled)["pooler_output"], dense, atol=1e-5, rtol=1e-5)
