"""ConvTrans: probabilistic forecasting with LogSparse attention (Li et al., NeurIPS 2019, arXiv 1907.00235).

A decoder-only Transformer reads a series value by value: the input at step ``t`` is the value before it, the
covariates of ``t`` and the series' own embedding, and the output is the distribution of the value at ``t``. Queries
and keys are made by a causal convolution, so that a value is compared by the shape around it. Training minimises the
negative log-likelihood; forecasts are sampled step by step and reported by their quantiles
(``sa_hf.tasks.metrics.quantile_loss``, R_0.5 and R_0.9).

A saved checkpoint carries the code that it needs, as a patched model's does.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributions import Distribution
from transformers import PreTrainedModel
from transformers.utils.generic import ModelOutput

from sa_hf.errors import SparseAttentionError
from sa_hf.hf.checkpoints.publish import code_files, save_whole
from sa_hf.models.conv_trans import ConvTransConfig, ConvTransLayer, LayerCache
from sa_hf.models.distributions import DISTRIBUTIONS


@dataclass
class ForecastOutput(ModelOutput):
    """Output of :class:`ConvTransForForecasting`; padding is 0.

    Attributes:
        loss: mean negative log-likelihood of the labelled values, where labels were given.
        logits: ``[B, T, k]``, the raw parameters of each step's distribution (``model.distribution`` reads them).
        scale: ``[B]``, the scale of each series.
        last_hidden_state: ``[B, T, hidden]``.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    scale: Tensor | None = None
    last_hidden_state: Tensor | None = None


class ConvTransPreTrainedModel(PreTrainedModel):
    """What the models of this file share."""

    config_class = ConvTransConfig
    base_model_prefix = "model"
    main_input_name = "values"
    supports_gradient_checkpointing = True
    _no_split_modules = ["ConvTransLayer"]  # noqa: RUF012

    @classmethod
    def register_for_auto_class(cls, auto_class: Any = "AutoModel") -> None:
        """Nothing; see :class:`ConvTransConfig`."""

    @functools.wraps(PreTrainedModel.save_pretrained)
    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> None:
        code = functools.partial(code_files, __name__, __file__)
        save_whole(self, super().save_pretrained, code, save_directory, args, kwargs)


class ConvTransForForecasting(ConvTransPreTrainedModel):
    """A decoder-only forecaster with a probabilistic head."""

    def __init__(self, config: ConvTransConfig) -> None:
        super().__init__(config)
        width = config.hidden_size
        self.value_embedding = nn.Linear(1 + config.num_covariates, width)
        self.position_embeddings = nn.Embedding(config.max_position_embeddings, width)
        if config.num_series:
            self.series_embeddings = nn.Embedding(config.num_series, width)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)
        self.layers = nn.ModuleList(ConvTransLayer(config, i) for i in range(config.num_hidden_layers))
        self.norm = nn.LayerNorm(width, eps=config.layer_norm_eps)
        outputs, self._make = DISTRIBUTIONS[config.distribution]
        self.head = nn.Linear(width, outputs)
        self.post_init()

    def distribution(self, logits: Tensor, scale: Tensor) -> Distribution:
        """The distribution of the values: ``logits [B, T, k]``, ``scale [B]`` -> batch shape ``[B, T]``."""
        return self._make(logits.float(), scale.float()[:, None].expand(logits.shape[:2]))

    def forward(
        self,
        values: Tensor,
        covariates: Tensor | None = None,
        series_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        return_dict: bool | None = None,
    ) -> ForecastOutput | tuple[Tensor, ...]:
        """The distribution of every value, given those before it.

        Args:
            values: ``[B, T]``, floating.
            covariates: ``[B, T, num_covariates]``.
            series_ids: ``[B]`` int64, where ``config.num_series > 0``.
            attention_mask: ``[B, T]``, 1 real and 0 padding or missing; those steps are as if cut out.
            labels: ``[B, T]``, usually ``values``; NaN is not counted, nor is padding.

        Raises:
            SparseAttentionError: shapes that do not fit, or a series longer than the position table.
        """
        mask = self._check(values, covariates, series_ids, attention_mask)
        order, front, steps, covariates = _to_the_end(mask, values, covariates)
        scale = self._scale(steps, front)
        hidden, _ = self._run(_lagged(steps, front), scale, covariates, series_ids, front, None)
        hidden = torch.zeros_like(hidden).scatter(1, order.unsqueeze(-1).expand_as(hidden), hidden)
        logits = self.head(hidden).masked_fill(~mask.unsqueeze(-1), 0)
        loss = None if labels is None else self._nll(logits, scale, labels, mask)
        result = ForecastOutput(loss=loss, logits=logits, scale=scale, last_hidden_state=hidden)
        as_dict = self.config.return_dict if return_dict is None else return_dict
        return result if as_dict else cast("tuple[Tensor, ...]", result.to_tuple())

    @torch.no_grad()
    def forecast(
        self,
        values: Tensor,
        covariates: Tensor | None = None,
        series_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        *,
        steps: int | None = None,
        num_samples: int = 100,
    ) -> Tensor:
        """Sample the values that follow, step by step; quantiles of the samples are the forecast.

        Args:
            values: ``[B, T]``, the past.
            covariates: ``[B, T + steps, num_covariates]``, the future's included.
            attention_mask: ``[B, T]`` of the past.
            steps: how many values; None is what the covariates reach beyond the past.

        Returns:
            ``[B, num_samples, steps]``, drawn from torch's generator. Puts the model in no other mode: call ``eval()``
            before.
        """
        batch, past = values.shape
        if steps is None:
            if covariates is None:
                raise SparseAttentionError("give steps, or covariates that reach into the future")
            steps = covariates.shape[1] - past
        if steps < 1 or num_samples < 1:
            raise SparseAttentionError(f"steps={steps} and num_samples={num_samples} must be at least 1; nearest: 1")
        future = None
        if covariates is not None:
            if covariates.shape[1] != past + steps:
                raise SparseAttentionError(
                    f"covariates cover {covariates.shape[1]} steps; the past and the forecast are {past} + {steps}"
                )
            covariates, future = covariates[:, :past], covariates[:, past:].repeat_interleave(num_samples, 0)
        mask = self._check(values, covariates, series_ids, attention_mask, extra=steps)
        _, mask, history, covariates = _to_the_end(mask, values, covariates)
        scale = self._scale(history, mask)
        _, caches = self._run(_lagged(history, mask), scale, covariates, series_ids, mask, [])
        caches = [c.repeated(num_samples) for c in caches]
        scale, mask, last = (x.repeat_interleave(num_samples, 0) for x in (scale, mask, history[:, -1:]))
        series_ids = None if series_ids is None else series_ids.repeat_interleave(num_samples, 0)
        drawn = []
        for t in range(steps):
            mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
            now = None if future is None else future[:, t : t + 1]
            hidden, caches = self._run(last, scale, now, series_ids, mask, caches)
            last = self.distribution(self.head(hidden), scale).sample().to(values.dtype)
            drawn.append(last)
        return torch.cat(drawn, dim=1).view(batch, num_samples, steps)

    # -- steps of the forward --------------------------------------------------------------------------------------

    def _run(
        self, previous: Tensor, scale: Tensor, covariates: Tensor | None, series_ids: Tensor | None, mask: Tensor,
        caches: list[LayerCache] | None,
    ) -> tuple[Tensor, list[LayerCache]]:  # fmt: skip
        """``previous [B, T]``, the value before each step, after the cached ones; ``mask [B, past + T]`` with padding
        in front. ``caches``: of the layers, none where there is no step yet, None where nothing is to be kept. Returns
        ``[B, T, hidden]`` and the caches that hold these steps, too."""
        inputs = (previous / scale[:, None]).unsqueeze(-1)
        if covariates is not None:
            inputs = torch.cat([inputs, covariates.to(inputs.dtype)], dim=-1)
        position = (mask.long().cumsum(1) - 1).clamp(min=0)[:, mask.shape[1] - previous.shape[1] :]
        x = self.value_embedding(inputs.to(self.value_embedding.weight.dtype)) + self.position_embeddings(position)
        if series_ids is not None:
            x = x + self.series_embeddings(series_ids).unsqueeze(1)
        x = self.dropout(x)
        kept = []
        for i, layer in enumerate(self.layers):
            x, cache = layer(x, mask, caches[i] if caches else None)
            if caches is not None:
                kept.append(cache)
        return self.norm(x), kept

    def _scale(self, values: Tensor, mask: Tensor) -> Tensor:
        """``1 + mean |y|`` over each row's first ``context_length`` real steps, ``[B]``."""
        known = mask & (mask.long().cumsum(1) <= self.config.context_length)
        total = values.abs().masked_fill(~known, 0).sum(1)
        scale: Tensor = 1 + total / known.sum(1).clamp(min=1)
        return scale

    def _nll(self, logits: Tensor, scale: Tensor, labels: Tensor, mask: Tensor) -> Tensor:
        if labels.shape != mask.shape:
            raise SparseAttentionError(f"labels {list(labels.shape)} must be of the values' shape {list(mask.shape)}")
        counted = mask & ~labels.isnan()
        target = labels.float().masked_fill(~counted, 0)
        likelihood = self.distribution(logits, scale).log_prob(target)
        total: Tensor = likelihood.masked_fill(~counted, 0).sum()
        return -total / counted.sum().clamp(min=1)

    def _check(
        self, values: Tensor, covariates: Tensor | None, series_ids: Tensor | None, attention_mask: Tensor | None,
        extra: int = 0,
    ) -> Tensor:  # fmt: skip
        """The mask as bool ``[B, T]``, after the checks of the inputs' shapes."""
        if values.dim() != 2 or not values.dtype.is_floating_point or values.shape[1] < 1:
            raise SparseAttentionError(
                f"values must be floating [batch, time], not {values.dtype} {list(values.shape)}"
            )
        wanted = [*values.shape, self.config.num_covariates]
        got = [*values.shape, 0] if covariates is None else list(covariates.shape)
        if got != wanted:
            raise SparseAttentionError(f"covariates {got} must be [batch, time, num_covariates] = {wanted}")
        if (series_ids is not None) != bool(self.config.num_series):
            raise SparseAttentionError(
                f"num_series={self.config.num_series}: series_ids must be given exactly where it is above 0"
            )
        length, limit = values.shape[1] + extra, self.config.max_position_embeddings
        if length > limit:
            raise SparseAttentionError(
                f"the series has {length} steps, above max_position_embeddings={limit}; shorten it to {limit}"
            )
        if attention_mask is None:
            return torch.ones_like(values, dtype=torch.bool)
        if attention_mask.shape != values.shape:
            raise SparseAttentionError(
                f"attention_mask {list(attention_mask.shape)} must be of the values' shape {list(values.shape)}"
            )
        return attention_mask.to(values.device).bool()


def _lagged(values: Tensor, mask: Tensor) -> Tensor:
    """The value before each step, 0 at the first; padding (in front) holds 0 already."""
    return nn.functional.pad(values, (1, -1)).masked_fill(~mask, 0)


def _to_the_end(
    mask: Tensor, values: Tensor, covariates: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Padding to the front, real steps in order: a row's steps are then contiguous and end together. Returns the order
    ``[B, T]``, and by it the mask, the values (0 at padding) and the covariates."""
    order = torch.sort(mask.to(torch.uint8), dim=1, stable=True).indices
    mask = mask.gather(1, order)
    if covariates is not None:
        covariates = covariates.gather(1, order.unsqueeze(-1).expand_as(covariates))
    return order, mask, values.gather(1, order).masked_fill(~mask, 0), covariates
