"""Synthetic tasks of the papers, exact and endless: the corridor, masked summation, and two kinds of time series."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sa_hf.errors import SparseAttentionError

IGNORED = -100  # the label that Transformers' losses skip


@dataclass(frozen=True)
class CorridorTask:
    """Expire-Span's corridor (section 5.1 of the paper), for causal language models.

    The first token is a colour; then come ``length - 3`` blank tokens, a door token, and the colour again. Only the
    colour at the end is predicted, so a model has to keep the first token and may forget all blanks.

    Token ids: 0 padding, 1 blank, 2 door, 3 and up the colours.
    """

    length: int = 64
    colours: int = 4

    def __post_init__(self) -> None:
        if self.length < 4 or self.colours < 2:
            raise SparseAttentionError(
                f"length={self.length} must be at least 4 and colours={self.colours} at least 2; nearest: "
                f"length={max(4, self.length)}, colours={max(2, self.colours)}"
            )

    @property
    def vocab_size(self) -> int:
        return 3 + self.colours

    def rows(self, count: int, seed: int = 0) -> list[dict[str, Any]]:
        """Rows ``{"input_ids", "attention_mask", "labels"}`` of ``length`` integers each."""
        rng = random.Random(f"corridor {seed}")
        rows = []
        for _ in range(count):
            colour = 3 + rng.randrange(self.colours)
            ids = [colour, *[1] * (self.length - 3), 2, colour]
            labels = [IGNORED] * (self.length - 1) + [colour]
            rows.append({"input_ids": ids, "attention_mask": [1] * self.length, "labels": labels})
        return rows


@dataclass(frozen=True)
class MaskedSummationTask:
    """Masked summation (section 4.1 of Star-Transformer) on tokens, for sequence classification.

    A row has ``length`` digits of which ``marked`` are marked (a token of their own); the class is their sum.
    Classes: ``0 .. marked * (base - 1)``. Token ids: 0 padding, 1 the leading [CLS], ``2 + d`` the plain digit d,
    ``2 + base + d`` the marked digit d.
    """

    length: int = 32
    marked: int = 2
    base: int = 4

    def __post_init__(self) -> None:
        if not 1 <= self.marked <= self.length or self.base < 2:
            raise SparseAttentionError(
                f"marked={self.marked} must lie in [1, {self.length}] and base={self.base} be at least 2; nearest: "
                f"marked={min(max(self.marked, 1), self.length)}, base={max(2, self.base)}"
            )

    @property
    def vocab_size(self) -> int:
        return 2 + 2 * self.base

    @property
    def num_labels(self) -> int:
        return self.marked * (self.base - 1) + 1

    def rows(self, count: int, seed: int = 0) -> list[dict[str, Any]]:
        """Rows ``{"input_ids", "attention_mask"}`` of ``1 + length`` integers each, and ``"labels"``, the sum."""
        rng = random.Random(f"summation {seed}")
        rows = []
        for _ in range(count):
            digits = [rng.randrange(self.base) for _ in range(self.length)]
            marked = set(rng.sample(range(self.length), self.marked))
            ids = [1, *(2 + d + self.base * (i in marked) for i, d in enumerate(digits))]
            total = sum(digits[i] for i in marked)
            rows.append({"input_ids": ids, "attention_mask": [1] * len(ids), "labels": total})
        return rows


@dataclass(frozen=True)
class SeriesTask:
    """Hourly-like series for forecasting: level, daily and weekly season of random strength and phase, noise.

    The season repeats at ``period`` and ``7 * period``, so a forecast needs values far back. Covariates are sine and
    cosine of both seasons' phase.
    """

    context: int = 168
    horizon: int = 24
    period: int = 24
    noise: float = 0.1

    def __post_init__(self) -> None:
        if self.context < 1 or self.horizon < 1 or self.period < 2 or self.noise < 0:
            raise SparseAttentionError(
                f"context={self.context} and horizon={self.horizon} must be at least 1, period={self.period} at least "
                f"2, noise={self.noise} at least 0; nearest: {max(1, self.context)}, {max(1, self.horizon)}, "
                f"{max(2, self.period)}, {max(0.0, self.noise)}"
            )

    num_covariates = 4

    def series(self, count: int, seed: int = 0) -> tuple[Tensor, Tensor]:
        """Values fp32 ``[count, context + horizon]`` and covariates fp32 ``[count, context + horizon, 4]``."""
        generator = torch.Generator().manual_seed(seed)
        uniform = torch.rand(5, count, 1, generator=generator)
        length = self.context + self.horizon
        # Each series starts at a random hour of a random week.
        time = torch.arange(length)[None] + (uniform[4] * 7 * self.period).long()
        day, week = (2 * math.pi * time / p for p in (self.period, 7 * self.period))
        level = 5 + 5 * uniform[0]
        values = level * (
            1 + (0.3 + 0.4 * uniform[1]) * torch.sin(day + 6 * uniform[2]) + 0.3 * torch.sin(week + 6 * uniform[3])
        )
        values = values + self.noise * level * torch.randn(count, length, generator=generator)
        return values, torch.stack([day.sin(), day.cos(), week.sin(), week.cos()], dim=-1)


@dataclass(frozen=True)
class PiecewiseTask:
    """The piecewise sinusoids of LogSparse (Li et al., NeurIPS 2019, section 5.1), for forecasting.

    With noise of variance 1 on each value, ``A1``, ``A2`` and ``A3`` uniform in [0, 60) and ``A4 = max(A1, A2)``:
    ``A1 sin(pi x / 6) + 72`` for x < 12, ``A2 ...`` for x < 24, ``A3 ...`` for x < t0, and ``A4 sin(pi x / 12) + 72``
    for the last ``horizon`` values, which are the forecast: it needs the first 24 values, t0 - 24 and more behind. The
    paper's t0 are 24, 48, 96 and 192. The covariates are sine and cosine of both periods' phase.

    Args:
        t0: values before the forecast, >= 24.
        horizon: values of the forecast; the paper's 24.
    """

    t0: int = 96
    horizon: int = 24

    num_covariates = 4

    def __post_init__(self) -> None:
        if self.t0 < 24 or self.horizon < 1:
            raise SparseAttentionError(
                f"t0={self.t0} must be at least 24 and horizon={self.horizon} at least 1; nearest: "
                f"t0={max(24, self.t0)}, horizon={max(1, self.horizon)}"
            )

    def series(self, count: int, seed: int = 0) -> tuple[Tensor, Tensor]:
        """Values fp32 ``[count, t0 + horizon]`` and covariates fp32 ``[count, t0 + horizon, 4]``."""
        generator = torch.Generator().manual_seed(seed)
        amplitudes = 60 * torch.rand(count, 3, generator=generator)
        amplitudes = torch.cat([amplitudes, amplitudes[:, :2].amax(1, keepdim=True)], 1)
        x = torch.arange(self.t0 + self.horizon)
        piece = (x >= 12).long() + (x >= 24).long() + (x >= self.t0).long()
        short, long = math.pi * x / 6, math.pi * x / 12
        values = 72 + amplitudes[:, piece] * torch.where(x < self.t0, short.sin(), long.sin())
        values = values + torch.randn(values.shape, generator=generator)
        phases = torch.stack([short.sin(), short.cos(), long.sin(), long.cos()], dim=-1)
        return values, phases.expand(count, -1, -1)
