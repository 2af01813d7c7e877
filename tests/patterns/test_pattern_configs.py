"""Configurations: defaults of the public contract, round trips, whole validation, warnings, layers refused."""

from __future__ import annotations

import dataclasses
import json
import math
import warnings
from typing import Any

import pytest
import torch
import transformers
from pattern_cases import every_case, label, static_patterns

import sa_hf
from sa_hf import (
    BigBirdAttentionConfig,
    ConfigVersionError,
    LogSparseAttentionConfig,
    LongNetAttentionConfig,
    SlidingWindowAttentionConfig,
    SparseAttentionConfig,
    SparseAttentionError,
    SparseTransformerAttentionConfig,
    StarAttentionConfig,
    available_patterns,
    sparse_attention,
)
from sa_hf.layer import LayerSpec
from sa_hf.patterns.base import StaticPatternConfig, whole_geometry

DEFAULTS: dict[str, dict[str, Any]] = {
    "dense": {},
    "sliding_window": {"window": 512, "num_sink_tokens": 0},
    "longnet": {
        "segment_length": (512, 1024, 2048, 4096, 8192, 16384, 32768),
        "dilated_ratio": (1, 2, 4, 8, 16, 32, 64),
        "head_offset": "modulo",
    },
    "logsparse": {"local_window": 1, "restart_length": None, "conv_kernel_size": 1},
    "sparse_transformer": {
        "kind": "fixed",
        "stride": 128,
        "summary": 32,
        "num_summary_groups": 1,
        "head_mode": "merged",
    },
    "bigbird": {
        "block_size": 64,
        "num_window_blocks": 3,
        "num_random_blocks": 3,
        "global_blocks": "ends",
        "num_global_blocks": 2,
        "num_extra_tokens": 0,
    },
    "star": {"relay": "token", "ring": True},
}


def spec(layer_idx: int = 0, causal: bool = False) -> LayerSpec:
    return LayerSpec(layer_idx, 4, 2, 2, 8, 16, causal)


@pytest.mark.parametrize("name", sorted(DEFAULTS))
def test_fields_and_defaults_are_the_contract(name: str) -> None:
    config = static_patterns()[name]()
    fields = {f.name: getattr(config, f.name) for f in dataclasses.fields(config)}
    assert fields == {"seed": 0, "drop_diagonal": False, **DEFAULTS[name]}
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.seed = 1  # type: ignore[misc]


@pytest.mark.parametrize("config", every_case(), ids=label)
@pytest.mark.filterwarnings("ignore:longnet")
def test_round_trip_through_json(config: StaticPatternConfig) -> None:
    data = json.loads(json.dumps(config.to_dict()))
    assert data["name"] == config.name
    again = SparseAttentionConfig.from_dict(data)
    assert again == config
    assert hash(again) == hash(config)
    with pytest.raises(ConfigVersionError, match="brand_new"):
        SparseAttentionConfig.from_dict({**data, "brand_new": 1})


def test_presets() -> None:
    assert BigBirdAttentionConfig.preset("paper") == BigBirdAttentionConfig()
    paper = LongNetAttentionConfig.preset("paper")
    assert paper.segment_length == (2048, 4096, 8192, 16384, 32768)
    assert paper.dilated_ratio == (1, 2, 4, 6, 12)
    enwik8 = SparseTransformerAttentionConfig.preset("enwik8")
    assert (enwik8.kind, enwik8.head_mode, enwik8.stride, enwik8.summary) == ("fixed", "merged", 128, 32)
    images = SparseTransformerAttentionConfig.preset("images", stride=64)
    assert (images.kind, images.stride) == ("strided", 64)
    for cls in static_patterns().values():
        for name in cls.presets():
            assert isinstance(cls.preset(name), cls)
    with pytest.raises(SparseAttentionError, match=r"no preset 'papr' \(did you mean 'paper'\?\)"):
        BigBirdAttentionConfig.preset("papr")


BAD: list[tuple[type[StaticPatternConfig], dict[str, Any], str]] = [
    (BigBirdAttentionConfig, {"block_size": 48}, r"block_size=48 .*power of two.* nearest: 32 or 64"),
    (BigBirdAttentionConfig, {"block_size": 0}, r"block_size=0 .*\[1, .*nearest: 1"),
    (BigBirdAttentionConfig, {"block_size": 64.0}, r"block_size=64.0 must be an integer"),
    (BigBirdAttentionConfig, {"num_random_blocks": -1}, r"num_random_blocks=-1 .*nearest: 0"),
    (BigBirdAttentionConfig, {"num_window_blocks": 2}, r"num_window_blocks=2 must be odd.* or 0; nearest: 1 or 3"),
    (BigBirdAttentionConfig, {"num_global_blocks": 3}, r"num_global_blocks=3 must be even.*nearest: 2 or 4.*'first'"),
    (BigBirdAttentionConfig, {"global_blocks": "end"}, r"global_blocks='end' .*did you mean 'ends'"),
    (BigBirdAttentionConfig, {"num_extra_tokens": True}, r"num_extra_tokens=True must be an integer"),
    (SlidingWindowAttentionConfig, {"window": 0}, r"window=0 must lie in \[1, .*nearest: 1"),
    (SlidingWindowAttentionConfig, {"num_sink_tokens": -3}, r"num_sink_tokens=-3 .*nearest: 0"),
    (SlidingWindowAttentionConfig, {"seed": 2**63}, r"seed=.* must lie in"),
    (SlidingWindowAttentionConfig, {"drop_diagonal": 1}, r"drop_diagonal=1 must be True or False"),
    (LongNetAttentionConfig, {"segment_length": (1024, 512)}, r"segment_length=\(1024, 512\) .*nearest: \(512, 1024\)"),
    (
        LongNetAttentionConfig,
        {"segment_length": (8, 16), "dilated_ratio": (1, 1)},
        r"dilated_ratio=\(1, 1\) must be increasing",
    ),
    (LongNetAttentionConfig, {"segment_length": (0, 16)}, r"segment_length=\(0, 16\) .*nearest: \(1, 16\)"),
    (LongNetAttentionConfig, {"segment_length": ()}, r"segment_length=\(\) must be increasing integers"),
    (LongNetAttentionConfig, {"segment_length": "512"}, r"segment_length='512' must be increasing integers"),
    (LongNetAttentionConfig, {"segment_length": (8, 16)}, r"one entry per branch each; nearest: the first 2 of both"),
    (LongNetAttentionConfig, {"head_offset": "group"}, r"did you mean 'grouped'"),
    (LogSparseAttentionConfig, {"local_window": None}, r"local_window=None means .*restart_length is None"),
    (LogSparseAttentionConfig, {"local_window": 0}, r"local_window=0 .*or be None; nearest: 1"),
    (LogSparseAttentionConfig, {"conv_kernel_size": 4}, r"conv_kernel_size=4 must be one of \[1, 2, 3, 6, 9\]"),
    (
        SparseTransformerAttentionConfig,
        {"summary": 64, "num_summary_groups": 3},
        r"summary=64 times num_summary_groups=3 .*stride=128; nearest: stride=192, or summary=42",
    ),
    (SparseTransformerAttentionConfig, {"kind": "stride"}, r"did you mean 'strided'"),
    (SparseTransformerAttentionConfig, {"stride": 0}, r"stride=0 .*nearest: 1"),
    (SparseTransformerAttentionConfig, {"head_mode": "per-head"}, r"did you mean 'per_head'"),
    (LogSparseAttentionConfig, {"conv_kernel_size": 3.0}, r"conv_kernel_size=3.0 must be one of"),
    (LogSparseAttentionConfig, {"conv_kernel_size": True}, r"conv_kernel_size=True must be one of"),
    (LongNetAttentionConfig, {"segment_length": tuple(range(1, 10**6))}, r"999999 entries; at most 64 branches"),
    (BigBirdAttentionConfig, {"num_extra_tokens": 2**31 - 1}, r"num_extra_tokens=2147483647 .*nearest: 4096"),
    (StarAttentionConfig, {"relay": "tokens"}, r"did you mean 'token'"),
    (StarAttentionConfig, {"ring": "yes"}, r"ring='yes' must be True or False"),
]


@pytest.mark.parametrize(("cls", "fields", "message"), BAD, ids=[f"{c.name}-{f}" for c, f, _ in BAD])
def test_bad_values_name_the_value_the_rule_and_the_nearest(
    cls: type[StaticPatternConfig], fields: dict[str, Any], message: str
) -> None:
    with pytest.raises(SparseAttentionError, match=message):
        cls(**fields)


HOSTILE = [
    None, True, -1, 2**63, 10**400, -(10**400), 10**5000, 1.5, math.nan, math.inf, "1", "x" * 10**6, b"1", [], [[1]],
    {"a": 1}, list(range(10**5)), object(),
]  # fmt: skip


@pytest.mark.parametrize("name", sorted(available_patterns()))
def test_a_config_file_may_hold_anything(name: str) -> None:
    """Whatever stands in a field, it is taken or refused by an error of this package that fits on a screen."""
    cls = available_patterns()[name]
    messages = []
    for field in dataclasses.fields(cls):
        for value in HOSTILE:
            try:
                cls.from_dict({"name": name, field.name: value})
            except SparseAttentionError as error:
                messages.append(str(error))
    assert max(map(len, messages)) < 1000
    for version in (0, -1, 1.0, "1", None, 10**5000):
        with pytest.raises(ConfigVersionError, match="versions 1 to 1"):
            cls.from_dict({"name": name, "version": version})
    for data in ({"name": "x" * 10**6}, {"name": 10**5000}, {"name": name, "k" * 10**6: 1}):
        with pytest.raises(SparseAttentionError) as refused:
            SparseAttentionConfig.from_dict(data)
        assert len(str(refused.value)) < 1000


@pytest.mark.parametrize(
    "config",
    [
        BigBirdAttentionConfig(block_size=2**30),
        SparseTransformerAttentionConfig(stride=2**31 - 1, summary=2**31 - 1),
        SparseTransformerAttentionConfig(stride=2**31 - 1, summary=2**29, num_summary_groups=2, head_mode="per_head"),
        LogSparseAttentionConfig(local_window=2**31 - 1, restart_length=2**31 - 1),
        LongNetAttentionConfig(segment_length=(2**31 - 1,), dilated_ratio=(1,)),
        SlidingWindowAttentionConfig(window=2**31 - 1, num_sink_tokens=2**31 - 1),
    ],
    ids=lambda c: c.name,
)
def test_sizes_beyond_the_input_cost_what_the_input_does(config: StaticPatternConfig) -> None:
    """Arrays of the size of such a field would be 8 to 16 GB."""
    geometry = whole_geometry(40, 4, 0, True)
    mask = config.mask(40, 4, causal=True)
    for head, keys in enumerate(config.decode_keys(39, geometry)):
        assert keys.tolist() == torch.nonzero(mask[head, 39]).flatten().tolist()
    assert config.density(40, 4, causal=True) == pytest.approx(float(mask.sum()) / (4 * 820))


@pytest.mark.parametrize("config", [SparseTransformerAttentionConfig(stride=8, summary=4, num_summary_groups=2)])
def test_the_bounds_themselves_are_valid(config: StaticPatternConfig) -> None:
    assert config.density(64) < 1
    strided = SparseTransformerAttentionConfig(kind="strided", stride=4)  # summary=32 has no meaning there
    assert strided.stride == 4
    BigBirdAttentionConfig(block_size=16, num_window_blocks=0, num_random_blocks=0, num_global_blocks=0)


@pytest.mark.parametrize(
    ("value", "nearest"),
    [
        ("256", "256"), (2.6, "3"), (-3.5, "1"), (1e40, "2147483647"), (torch.tensor(7), "7"),
        ("4k", "512"), (None, "512"), (True, "512"), (float("nan"), "512"), (torch.ones(2), "512"),
    ],
)  # fmt: skip
def test_a_number_of_another_type_is_refused_with_the_valid_one_next_to_it(value: Any, nearest: str) -> None:
    with pytest.raises(SparseAttentionError, match=rf"window=.* must be an integer >= 1; nearest: {nearest}$"):
        SlidingWindowAttentionConfig(window=value)


@pytest.mark.parametrize(("length", "heads", "layer"), [(0, 1, 0), (4, 0, 0), (4, 1, -1), (4.0, 1, 0), (True, 1, 0)])
def test_masks_of_no_length_are_refused(length: Any, heads: int, layer: int) -> None:
    for ask in (SlidingWindowAttentionConfig().mask, SlidingWindowAttentionConfig().density):
        with pytest.raises(SparseAttentionError, match="must be an integer >= "):
            ask(length, heads, layer)


# -- warnings ------------------------------------------------------------------------------------------------------


def test_longnet_without_a_full_branch_warns() -> None:
    with pytest.warns(UserWarning, match="no branch with ratio 1"):
        LongNetAttentionConfig(segment_length=(8, 16), dilated_ratio=(2, 4))


def test_longnet_warns_for_inputs_longer_than_its_segments() -> None:
    config = LongNetAttentionConfig(segment_length=(8, 24), dilated_ratio=(1, 2), seed=3)
    x = torch.zeros(1, 2, 25, 4)
    with pytest.warns(UserWarning, match="25 tokens is longer than the largest segment, 24"):
        sparse_attention(x, x, x, config)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sparse_attention(x[:, :, :24], x[:, :, :24], x[:, :, :24], config)


def test_interleaved_layers_of_one_parity_warn() -> None:
    config = SparseTransformerAttentionConfig(head_mode="interleaved")
    for layers, part in (((0, 2), "local"), ((1,), "column")):
        with pytest.warns(UserWarning, match=f"one parity.*{part} part alone"):
            config.check_layers([spec(i) for i in layers])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        config.check_layers([spec(0), spec(3)])
        SparseTransformerAttentionConfig().check_layers([spec(0), spec(2)])


def test_interleaved_parts_of_a_mixture_warn_alike() -> None:
    """Over the layers that run the part on the same heads."""
    config = SparseTransformerAttentionConfig(head_mode="interleaved")
    llama = transformers.LlamaConfig(
        hidden_size=32, num_hidden_layers=4, num_attention_heads=4, intermediate_size=64, vocab_size=99
    )
    first, last = {"heads": {"0-1": config, "2-3": "dense"}}, {"heads": {"0-1": "dense", "2-3": config}}
    for pattern, part in (
        ({"0,2": first}, "local"),
        ({"1": last}, "column"),
        ({"0": first, "1": last}, "(local|column)"),
    ):
        with pytest.warns(UserWarning, match=f"one parity.*{part} part alone"):
            sa_hf.patch_model(transformers.LlamaForCausalLM(llama), pattern)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sa_hf.patch_model(transformers.LlamaForCausalLM(llama), {"0-1": first, "2,3": last})


# -- layers and calls refused --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (BigBirdAttentionConfig(num_extra_tokens=2), r"num_extra_tokens=2 .*nearest: num_extra_tokens=0"),
        (StarAttentionConfig(relay="virtual"), r"relay='virtual' .*nearest: relay='token'"),
    ],
    ids=["etc", "virtual"],
)
def test_extra_tokens_serve_encoders_only(config: StaticPatternConfig, message: str) -> None:
    assert config.extra_tokens == (2 if config.name == "bigbird" else 1)
    config.check_layer(spec())
    with pytest.raises(SparseAttentionError, match=message):
        config.check_layers([spec(0), spec(1, causal=True)])
    x = torch.zeros(1, 2, 9, 4)
    for causal in (False, True):
        with pytest.raises(SparseAttentionError, match="extra tokens needs a model"):
            sparse_attention(x, x, x, config, causal=causal)
