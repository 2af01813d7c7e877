"""Forecasts of a trained forecaster, and what they are worth."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from sa_hf.tasks.metrics import quantile_loss

QUANTILES = (0.5, 0.9)
SAMPLES_SEED = 0
# Series sampled at once: the sampled values depend on it, so it is no flag.
BATCH = 64


def forecast_figures(model: Any, rows: Sequence[dict[str, Any]], num_samples: int = 100) -> dict[str, float]:
    """The quantile losses ``{"R_0.5", "R_0.9"}`` of sampled forecasts behind each row's context.

    Args:
        model: a ``ConvTransForForecasting``; its ``context_length`` says where the forecast begins.
        rows: ``{"values" [T], "covariates" [T, c], ...}``.
        num_samples: per series; drawn from a seed of their own, the same whatever was drawn before.
    """
    context = model.config.context_length
    device = next(model.parameters()).device
    values = torch.stack([row["values"] for row in rows]).to(device)
    covariates = torch.stack([row["covariates"] for row in rows]).to(device)
    was_training = model.training
    model.eval()
    drawn = []
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(SAMPLES_SEED)
        for past, known in zip(values[:, :context].split(BATCH), covariates.split(BATCH), strict=True):
            drawn.append(model.forecast(past, known, num_samples=num_samples))
    samples = torch.cat(drawn)
    model.train(was_training)
    return {f"R_{q}": quantile_loss(samples.quantile(q, dim=1), values[:, context:], q) for q in QUANTILES}
