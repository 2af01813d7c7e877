"""The patterns that the GPU suite measures, at sizes where each has work to do."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sa_hf.config import SparseAttentionConfig, pattern_class
from sa_hf.layer import Geometry
from sa_hf.patterns.base import StaticPatternConfig


@dataclass(frozen=True)
class Case:
    """One row of the suite: a pattern, causal or not.

    ``family`` names the kernels that it exercises: block, reordered or offsets.
    """

    label: str
    config: StaticPatternConfig
    causal: bool
    family: str

    @property
    def key(self) -> str:
        return f"{self.label}/{'causal' if self.causal else 'full'}"


def _config(name: str, **fields: object) -> StaticPatternConfig:
    config = pattern_class(name)(**fields)  # type: ignore[arg-type]  # field types differ by pattern
    assert isinstance(config, StaticPatternConfig)
    return config


def timing_cases(toy: bool = False) -> list[Case]:
    """Every static pattern in its published shape (``toy``: small windows, for a dry run at a few hundred tokens).

    Most important first: the suite works through them in this order until its budget ends.
    """
    window, block, stride = (16, 16, 16) if toy else (512, 64, 128)
    segments, ratios = ((16, 32, 64), (1, 2, 4)) if toy else ((2048, 4096, 8192, 16384, 32768), (1, 2, 4, 6, 12))
    bigbird = _config("bigbird", block_size=block)
    named = [
        ("bigbird", bigbird, "block"),
        ("bigbird-128", _config("bigbird", block_size=block if toy else 128), "block"),
        ("sliding_window", _config("sliding_window", window=window), "block"),
        ("longnet", _config("longnet", segment_length=segments, dilated_ratio=ratios), "reordered"),
        ("logsparse", _config("logsparse"), "offsets"),
        ("strided", _config("sparse_transformer", kind="strided", stride=stride), "reordered"),
        ("fixed", _config("sparse_transformer", kind="fixed", stride=stride, summary=stride // 4), "reordered"),
        ("star", _config("star", ring=False), "offsets"),
    ]
    ordered: list[Case] = []
    for label, config, family in named:
        # A dry run under the interpreter takes one direction of each: parity has both.
        ordered += [Case(label, config, causal, family) for causal in ((True,) if toy else (True, False))]
    return ordered


def decode_cases(toy: bool = False) -> list[Case]:
    """The causal ones, and a window whose keys (268 MB at 16 heads of 128 in 16 bits) are far beyond any cache."""
    wide = Case("sliding_window-32k", _config("sliding_window", window=16 if toy else 32768), True, "block")
    return [*(case for case in timing_cases(toy) if case.causal), wide]


# What compiled FlexAttention is measured on: a row costs a compilation of its own.
FLEX_CASES = ("bigbird/causal", "sliding_window/causal", "logsparse/causal")
# Blocks of its mask: its own first, in both passes; the tiles of its backward do not divide 64 (torch 2.11 to 2.13).
FLEX_BLOCK, FLEX_OTHER_BLOCK = 128, 64


def parity_configs() -> list[tuple[str, StaticPatternConfig]]:
    """Small shapes of every static pattern, odd ones too, for parity with the fp64 oracle."""
    return [
        ("dense", _config("dense")),
        ("sliding_window", _config("sliding_window", window=70, num_sink_tokens=3)),
        ("sliding_window-diagonal", _config("sliding_window", window=33, drop_diagonal=True)),
        ("bigbird", _config("bigbird", block_size=32)),
        ("bigbird-first", _config("bigbird", block_size=64, global_blocks="first", num_global_blocks=1)),
        ("longnet", _config("longnet", segment_length=(64, 128, 256), dilated_ratio=(1, 2, 4))),
        ("logsparse", _config("logsparse")),
        ("logsparse-restart", _config("logsparse", local_window=8, restart_length=64)),
        ("strided", _config("sparse_transformer", kind="strided", stride=24)),
        ("fixed", _config("sparse_transformer", kind="fixed", stride=32, summary=8, num_summary_groups=2)),
        ("fixed-per-head", _config("sparse_transformer", kind="fixed", stride=32, summary=8, head_mode="per_head")),
        ("star", _config("star")),
    ]


def decode_lists(config: StaticPatternConfig, length: int, heads: int) -> Tensor:
    """The positions that the last of ``length`` reads, int64 ``[1, heads, 1, m]``, ended by -1."""
    rows = config.decode_keys(length - 1, Geometry(length, 1, tuple(range(heads)), heads, 0, True))
    index = torch.full((1, heads, 1, max(len(row) for row in rows)), -1, dtype=torch.int64)
    for head, row in enumerate(rows):
        index[0, head, 0, : len(row)] = row
    return index


def describe(config: SparseAttentionConfig) -> str:
    """The fields that differ from the defaults, for a table's first column."""
    default = type(config)()
    changed = {k: v for k, v in config.to_dict().items() if v != default.to_dict().get(k)}
    return ", ".join(f"{k}={v}" for k, v in changed.items()) or "defaults"
