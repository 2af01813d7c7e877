"""LogSparse: the piecewise series, whose forecast needs the first 24 values, with the convolution and without."""

from __future__ import annotations

import math
from typing import Any

import torch

from sa_hf.models import ConvTransConfig, ConvTransForForecasting
from sa_hf.patterns.logsparse import LogSparseAttentionConfig
from sa_hf.tasks.forecast import forecast_figures
from sa_hf.tasks.metrics import quantile_loss
from sa_hf.tasks.source import EVALUATION_SEEDS
from sa_hf.tasks.synthetic import PiecewiseTask
from sa_hf.tools.claims.claim import Claim, Figures
from sa_hf.tools.claims.small import fit

T0, SERIES_AT_ONCE, SERIES_HELD_OUT, SAMPLES = 96, 32, 128, 40
LOCAL, RATE, SCALE = 24, 2.5e-3, 0.05
PIECEWISE = PiecewiseTask(t0=T0)
BLIND, EXACT = "blind to the first values", "knows the amplitude"
MEDIAN = 60 / math.sqrt(2)  # of the larger of two amplitudes, each uniform in [0, 60)
UNDER = 0.5


def forecasts(variant: Any, seed: int, steps: int) -> Figures:
    values, covariates = PIECEWISE.series(SERIES_HELD_OUT, seed + EVALUATION_SEEDS)
    if variant in (BLIND, EXACT):
        wave = torch.sin(math.pi * torch.arange(T0, T0 + PIECEWISE.horizon) / 12)
        # The amplitude by the first two pieces, up to their noise: no forecast by those values is better.
        known = (values[:, :24] - 72).view(-1, 2, 12)
        first = torch.sin(math.pi * torch.arange(12) / 6)
        amplitude = ((known * first).sum(-1) / first.square().sum()).amax(1, keepdim=True)
        predicted = 72 + (amplitude if variant == EXACT else MEDIAN) * wave
        return {"R_0.5": quantile_loss(predicted.expand(len(values), -1), values[:, T0:], 0.5)}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        config = ConvTransConfig(
            max_position_embeddings=T0 + PIECEWISE.horizon, context_length=T0, num_covariates=PIECEWISE.num_covariates,
            attention=LogSparseAttentionConfig(local_window=LOCAL, conv_kernel_size=variant),
            hidden_dropout_prob=0.0, initializer_range=SCALE,
        )  # fmt: skip
        model = ConvTransForForecasting(config)

        def batch(step: int) -> dict[str, torch.Tensor]:
            some, known = PIECEWISE.series(SERIES_AT_ONCE, seed * 10**6 + step)
            labels = some.clone()
            labels[:, :T0] = math.nan  # the forecast alone is learned
            return {"values": some, "covariates": known, "labels": labels}

        fit(model, batch, steps, RATE)
    rows = [{"values": v, "covariates": c} for v, c in zip(values, covariates, strict=True)]
    return {"R_0.5": forecast_figures(model, rows, SAMPLES)["R_0.5"]}


LOGSPARSE_PIECEWISE = Claim(
    name="logsparse_piecewise",
    system="logsparse",
    statement="The forecast that needs the first values is found over t0 = 96, and better with the convolution "
    "(section 5.1).",
    setting=f"piecewise series with t0 = {T0}, ConvTrans of 3 layers and width 64 with `local_window={LOCAL}`, without "
    f"dropout, trained on the likelihood of the forecast alone; {SERIES_HELD_OUT} series forecast by {SAMPLES} "
    "samples; *blind* predicts with the median amplitude, *knows* with the one measured in the first 24 values",
    variants={"convolution of 6": 6, "no convolution": 1, BLIND: BLIND, EXACT: EXACT},
    measure=forecasts,
    steps=800,
    holds=lambda figures: (
        figures["convolution of 6"]["R_0.5"] < UNDER * figures[BLIND]["R_0.5"]
        and figures["convolution of 6"]["R_0.5"] < figures["no convolution"]["R_0.5"]
    ),
    rule=f"R_0.5 with the convolution is under {UNDER:g} of the blind one's, and under that without",
    tried="with dropout, a loss of all values and a local window of 8 the forecast stays worse than the blind one "
    "after 600 steps",
)
