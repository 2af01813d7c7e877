"""What an error says where no pattern can go, and which of several stacks gets one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers as tf
from older_releases import REFUSED_THERE, older_releases_may

import sa_hf
from sa_hf import UnsupportedModelError
from sa_hf.tools.families.check import FIRST, build
from sa_hf.tools.families.compare import outputs
from sa_hf.tools.families.registry import entries

ENTRIES = {entry.name: entry for entry in entries()}


def built(name: str) -> tuple[Any, dict[str, Any]]:
    if name not in ENTRIES:
        pytest.skip(f"transformers {tf.__version__} has no {name}")
    return build(ENTRIES[name])


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("FunnelModel", "computes its attention itself .*fewer than its keys"),
        ("YosoModel", "computes its attention itself .*by hashes, without a softmax"),
        ("CanineModel", "computes its attention itself .*so no layer can be replaced; models that ask"),
        ("ResNetModel", "has no attention: no module of it is called so"),
        ("MambaModel", "has no attention"),
    ],
)
def test_models_whose_attention_is_their_own_or_none(name: str, reason: str) -> None:
    model, _ = built(name)
    with pytest.raises(UnsupportedModelError, match=reason):
        sa_hf.patch_model(model, FIRST)


def test_of_two_stacks_as_long_as_each_other_a_model_around_one_is_named() -> None:
    model, _ = built("MimiModel")
    with (
        older_releases_may(REFUSED_THERE),
        pytest.raises(UnsupportedModelError, match=r"two decoder stacks.*get_submodule\('encoder'\)") as raised,
    ):
        sa_hf.patch_model(model, FIRST)
    part = model.get_submodule(str(raised.value).split("get_submodule('")[1].split("'")[0])
    assert isinstance(part, tf.PreTrainedModel)
    model, _ = built("HrmTextModel")
    with pytest.raises(UnsupportedModelError, match=r"neither is in a model of its own"):
        sa_hf.patch_model(model, FIRST)


@pytest.mark.parametrize(
    ("name", "left", "reason"),
    [
        ("Granite4VisionModel", "layerwise_projectors", "no part of the language model"),
        ("VideoPrismVisionModel", "temporal_layers", "beside the larger encoder stack 'spatial_layers'"),
    ],
)
def test_the_language_or_the_longest_stack_gets_the_pattern(name: str, left: str, reason: str) -> None:
    model, inputs = built(name)
    before = outputs(model, inputs)
    sa_hf.patch_model(model, FIRST)
    found = sa_hf.summary(model, 16)
    assert reason in found.left[left]
    assert {layer.pattern for layer in found.layers} == {FIRST.name}
    with sa_hf.dense(model):
        assert all(torch.equal(x, before[key]) for key, x in outputs(model, inputs).items())
