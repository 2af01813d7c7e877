"""The configuration and the layers of ConvTrans (Li et al., NeurIPS 2019, arXiv 1907.00235); the model itself is in
``forecasting.py``."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig
from transformers.modeling_layers import GradientCheckpointingLayer

import sa_hf.patterns  # noqa: F401  (registers the patterns that a config names)
from sa_hf.config import SparseAttentionConfig
from sa_hf.errors import SparseAttentionError
from sa_hf.functional import sparse_attention
from sa_hf.hf.checkpoints.files import REMOTE_FILE
from sa_hf.models.distributions import DISTRIBUTIONS
from sa_hf.patterns.base import StaticPatternConfig
from sa_hf.patterns.logsparse import LogSparseAttentionConfig

_REMOTE = REMOTE_FILE.removesuffix(".py")
_AUTO_MAP = {
    "AutoConfig": f"{_REMOTE}.ConvTransConfig",
    "AutoModelForTimeSeriesPrediction": f"{_REMOTE}.ConvTransForForecasting",
}


class ConvTransConfig(PreTrainedConfig):
    """Configuration of :class:`ConvTransForForecasting`.

    Args:
        context_length: leading values of a series that give its scale, ``1 + mean |y|``: what is known before the
            forecast begins.
        max_position_embeddings: the longest series, forecast included.
        num_covariates: real-valued covariates per step, known for the future too.
        num_series: number of series with an embedding of their own; 0 is none.
        distribution: "student_t", "gaussian", or "negative_binomial" (counts).
        attention: the pattern (a config or its dict); None is LogSparse with ``conv_kernel_size=3``. A LogSparse
            config's ``conv_kernel_size`` is the width of the convolution that makes queries and keys.

    Raises:
        SparseAttentionError: a field is out of its range.
    """

    model_type = "conv_trans"

    context_length: int = 168
    max_position_embeddings: int = 1024
    num_covariates: int = 0
    num_series: int = 0
    hidden_size: int = 64
    num_hidden_layers: int = 3
    num_attention_heads: int = 4
    intermediate_size: int = 256
    distribution: str = "student_t"
    attention: Any = None
    hidden_dropout_prob: float = 0.1
    attention_probs_dropout_prob: float = 0.0
    initializer_range: float = 0.02
    layer_norm_eps: float = 1e-5

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        if getattr(self, "auto_map", None) is None:
            self.auto_map = dict(_AUTO_MAP)
        if self.attention is None:
            self.attention = LogSparseAttentionConfig(conv_kernel_size=3)
        if isinstance(self.attention, SparseAttentionConfig):
            self.attention = self.attention.to_dict()
        self.pattern()
        minima = {
            "context_length": 1, "max_position_embeddings": 1, "num_covariates": 0, "num_series": 0, "hidden_size": 1,
            "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 1,
        }  # fmt: skip
        for name, minimum in minima.items():
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
                raise SparseAttentionError(
                    f"conv_trans.{name}={value!r} must be an integer >= {minimum}; nearest: {minimum}"
                )
        if self.hidden_size % self.num_attention_heads:
            nearest = max(d for d in range(1, self.num_attention_heads + 1) if self.hidden_size % d == 0)
            raise SparseAttentionError(
                f"conv_trans.num_attention_heads={self.num_attention_heads} must divide "
                f"hidden_size={self.hidden_size}; nearest: {nearest}"
            )
        for name in ("hidden_dropout_prob", "attention_probs_dropout_prob"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 1:
                raise SparseAttentionError(f"conv_trans.{name}={value!r} must lie in [0, 1); nearest: 0.0")
        if self.distribution not in sorted(DISTRIBUTIONS):
            raise SparseAttentionError(
                f"conv_trans.distribution={self.distribution!r} must be one of {sorted(DISTRIBUTIONS)}"
            )

    @classmethod
    def register_for_auto_class(cls, auto_class: Any = "AutoConfig") -> None:
        """Nothing: a registered class would have Transformers copy code files of its own choice at each save."""

    def pattern(self) -> StaticPatternConfig:
        """The attention pattern of every layer."""
        pattern = SparseAttentionConfig.from_dict(self.attention)
        if not isinstance(pattern, StaticPatternConfig) or pattern.extra_tokens:
            raise SparseAttentionError(
                f"conv_trans.attention={pattern.name!r} must be a static pattern without extra tokens; "
                "nearest: 'logsparse'"
            )
        return pattern

    @property
    def conv_kernel_size(self) -> int:
        return int(getattr(self.pattern(), "conv_kernel_size", 1))


@dataclass
class LayerCache:
    """What a layer keeps of past steps: key, value ``[B, H, T, D]``, and the last inputs ``[B, k - 1, hidden]``."""

    key: Tensor
    value: Tensor
    inputs: Tensor

    def repeated(self, times: int) -> LayerCache:
        return LayerCache(*(x.repeat_interleave(times, 0) for x in (self.key, self.value, self.inputs)))


class ConvSelfAttention(nn.Module):
    """Causal sparse self-attention whose queries and keys come from a causal convolution."""

    def __init__(self, config: ConvTransConfig) -> None:
        super().__init__()
        width, kernel = config.hidden_size, config.conv_kernel_size
        self.num_heads, self.kernel = config.num_attention_heads, kernel
        self.dropout = config.attention_probs_dropout_prob
        # The convolution is done here: the operator only needs the set of keys.
        pattern = config.pattern()
        self.pattern = replace(pattern, conv_kernel_size=1) if kernel > 1 else pattern  # type: ignore[call-arg]
        self.query, self.key = (nn.Conv1d(width, width, kernel) for _ in range(2))
        self.value, self.output = (nn.Linear(width, width) for _ in range(2))

    def forward(
        self, x: Tensor, mask: Tensor, layer_idx: int, cache: LayerCache | None = None
    ) -> tuple[Tensor, LayerCache]:
        """``x [B, T, hidden]`` (0 at padding, which stands in front) after the cached steps; ``mask [B, past + T]``."""
        before = x.new_zeros(x.shape[0], self.kernel - 1, x.shape[2]) if cache is None else cache.inputs
        wide = torch.cat([before, x], dim=1)
        convolved = wide.transpose(1, 2)

        def heads(y: Tensor) -> Tensor:
            return y.view(y.shape[0], y.shape[1], self.num_heads, -1).transpose(1, 2)

        query = heads(self.query(convolved).transpose(1, 2))
        key, value = heads(self.key(convolved).transpose(1, 2)), heads(self.value(x))
        if cache is not None:
            key, value = torch.cat([cache.key, key], dim=2), torch.cat([cache.value, value], dim=2)
        attended = sparse_attention(
            query, key, value, self.pattern, causal=True, layer_idx=layer_idx, attention_mask=mask,
            dropout=self.dropout if self.training else 0.0,
        )  # fmt: skip
        result = self.output(attended.transpose(1, 2).flatten(2))
        return result, LayerCache(key, value, wide[:, wide.shape[1] - self.kernel + 1 :])


class ConvTransLayer(GradientCheckpointingLayer):
    """Attention and feed-forward, each with a residual path and a norm in front."""

    def __init__(self, config: ConvTransConfig, layer_idx: int) -> None:
        super().__init__()
        self.layer_idx = layer_idx
        self.attention_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.attention = ConvSelfAttention(config)
        self.feed_forward_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.feed_forward = nn.Sequential(
            nn.Linear(config.hidden_size, config.intermediate_size),
            nn.GELU(),
            nn.Linear(config.intermediate_size, config.hidden_size),
        )
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, x: Tensor, mask: Tensor, cache: LayerCache | None = None) -> tuple[Tensor, LayerCache]:
        real = mask[:, mask.shape[1] - x.shape[1] :, None]
        normed = self.attention_norm(x).masked_fill(~real, 0)
        attended, cache = self.attention(normed, mask, self.layer_idx, cache)
        x = x + self.dropout(attended)
        return x + self.dropout(self.feed_forward(self.feed_forward_norm(x))), cache
