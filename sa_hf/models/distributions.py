"""The distributions of a forecast value: Gaussian, Student-t, and negative binomial for counts.

Each is made from the raw outputs of a linear head ``[..., k]`` and the scale of the series ``[...]``.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.distributions import (
    AffineTransform,
    Distribution,
    NegativeBinomial,
    Normal,
    StudentT,
    TransformedDistribution,
)
from torch.nn.functional import softplus

# The smallest scale and dispersion: keeps the likelihood of a constant series finite.
SMALLEST = 1e-4


def _gaussian(raw: Tensor, scale: Tensor) -> Distribution:
    return Normal(raw[..., 0] * scale, (softplus(raw[..., 1]) + SMALLEST) * scale)


def _student_t(raw: Tensor, scale: Tensor) -> Distribution:
    base = StudentT(2 + softplus(raw[..., 2]), raw[..., 0], softplus(raw[..., 1]) + SMALLEST)
    return TransformedDistribution(base, [AffineTransform(torch.zeros_like(scale), scale)])


def _negative_binomial(raw: Tensor, scale: Tensor) -> Distribution:
    # Mean scale * softplus(m); dispersion 1 / a.
    mean = (softplus(raw[..., 0]) + SMALLEST) * scale
    count = 1 / (softplus(raw[..., 1]) + SMALLEST)
    return NegativeBinomial(count, logits=mean.log() - count.log())


# name: (raw outputs per step, (raw [..., k], scale [...]) -> distribution of the value)
DISTRIBUTIONS: dict[str, tuple[int, Callable[[Tensor, Tensor], Distribution]]] = {
    "student_t": (3, _student_t),
    "gaussian": (2, _gaussian),
    "negative_binomial": (2, _negative_binomial),
}
