"""Expire-Span: each key says how long it is remembered (Sukhbaatar et al. 2021, ICML, arXiv 2105.06548). Causal only.

``e_j = L * sigmoid(w . x_j + b)`` from the layer's input ``x_j``; ``m_ij = clamp(1 + (e_j - (i - j)) / ramp, 0, 1)``
multiplies the attention weights before they are normalised, and the own position has m = 1. The loss gains
``span_loss_coef * mean_j e_j``, so spans shrink to what pays. A key whose m is 0 for every later query is skipped tile
by tile and can leave the cache without any change to the outputs.
"""

from __future__ import annotations

import math
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from sa_hf.config import (
    SparseAttention,
    SparseAttentionConfig,
    check_bool,
    check_integer,
    check_number,
    register_pattern,
)
from sa_hf.errors import SparseAttentionError
from sa_hf.layer import AttentionInputs, LayerSpec
from sa_hf.ops.cpp.steps import PreparedStep
from sa_hf.ops.data_layout import EXPIRING
from sa_hf.ops.grouped import Group, key_places, map_groups, real_queries
from sa_hf.ops.planned import planned_attention
from sa_hf.ops.sequences import Sequences
from sa_hf.patterns.learned import LearnedAttention, refuse_drop_diagonal
from sa_hf.patterns.static import score_options
from sa_hf.patterns.steps import is_step_in_place, nearest_reach, run_step, shared_reads

DEFAULT_BIAS = 4.0  # spans start at sigmoid(4) = 0.98 of max_span; at max_span itself they would have no gradient
SHORTENING_LAYER = 0  # one draw shortens the spans of all layers of a batch


@register_pattern
@dataclass(frozen=True, kw_only=True)
class ExpireSpanAttentionConfig(SparseAttentionConfig):
    """Learned spans of memory.

    Args:
        max_span: L, the longest span in tokens.
        ramp: R, tokens over which an expiring key fades.
        per_head: a span per key and query head, not one per key.
        span_loss_coef: weight of the mean span in the loss, >= 0.
        initial_span: the span of every key at the start, below max_span; None is 0.98 max_span.
        random_shortening: in training, limit all spans of a batch to a random part of max_span.
    """

    name: ClassVar[str] = "expire_span"

    max_span: int = 1024
    ramp: int = 32
    per_head: bool = False
    span_loss_coef: float = 1e-6
    initial_span: float | None = None
    random_shortening: bool = False

    def validate(self) -> None:
        check_integer(self, "max_span", minimum=1)
        check_integer(self, "ramp", minimum=1)
        check_bool(self, "per_head")
        check_number(self, "span_loss_coef", minimum=0.0)
        check_bool(self, "random_shortening")
        check_number(self, "initial_span", minimum=0.0, maximum=float(self.max_span), optional=True)
        if self.initial_span is not None and not 0 < self.initial_span < self.max_span:
            raise SparseAttentionError(
                f"{self.name}.initial_span={self.initial_span} must lie strictly between 0 and "
                f"max_span={self.max_span}, where the sigmoid has a gradient; nearest: "
                f"{self.max_span * (0.98 if self.initial_span else 0.02)}"
            )
        refuse_drop_diagonal(self, "every query keeps its own position")

    @classmethod
    def presets(cls) -> dict[str, dict[str, Any]]:
        return {
            "enwik8": {"max_span": 16384, "ramp": 128, "span_loss_coef": 1e-6, "random_shortening": True},
            "small": {"max_span": 1024, "ramp": 32},
        }

    def check_layer(self, spec: LayerSpec) -> None:
        if not spec.causal:
            raise SparseAttentionError(
                f"expire_span is causal only, and layer {spec.layer_idx} is bidirectional: a key expires with the "
                'distance to later queries. Use a decoder, or {"decoder": ...} in an encoder-decoder model'
            )

    def build(self, spec: LayerSpec) -> ExpireSpanAttention:
        return ExpireSpanAttention(self, spec)


@dataclass(frozen=True, eq=False)
class _Seen:
    """The last forward, detached: spans of all keys ``[B, S, Nk]`` and of the new tokens ``[B, S, Nq]``."""

    spans: Tensor
    fresh: Tensor
    sequences: Sequences
    key_slots: Tensor | None  # of the spans' keys, where a cache has dropped others

    @property
    def real(self) -> Tensor:
        """Which of the new tokens are real, bool ``[B, Nq]``."""
        return real_queries(self.sequences, self.fresh.device)


class ExpireSpanAttention(LearnedAttention):
    """The spans of one layer.

    State: ``weight`` fp32 ``[S, hidden]`` and ``bias`` fp32 ``[S]``; S is 1, or the number of query heads.
    """

    remembers = True
    config: ExpireSpanAttentionConfig
    figure_names = ("mean_span", "max_span", "tokens_kept")

    def __init__(self, config: ExpireSpanAttentionConfig, spec: LayerSpec) -> None:
        config.check_layer(spec)
        super().__init__(config, spec)
        rows = len(self.heads) if config.per_head else 1
        bias = DEFAULT_BIAS
        if config.initial_span is not None:
            bias = math.log(config.initial_span / (config.max_span - config.initial_span))
        self.weight = nn.Parameter(torch.zeros(rows, spec.hidden_size, dtype=torch.float32, device=spec.device))
        self.bias = nn.Parameter(torch.full((rows,), bias, dtype=torch.float32, device=spec.device))
        self._seen: _Seen | None = None
        self._owes_loss = False  # the last forward was a step of decoding: who asks for its loss has it made

    @property
    def draws_by_forward(self) -> bool:
        return self.config.random_shortening

    def spans(self, hidden_states: Tensor) -> Tensor:
        """``e_j`` of the tokens, fp32 ``[B, S, N]``, from the layer's input ``[B, N, hidden]``."""
        kind = hidden_states.device.type
        with torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else nullcontext():
            logits = hidden_states.float() @ self.weight.float().t() + self.bias.float()
        return self.config.max_span * torch.sigmoid(logits).transpose(1, 2)

    def evictable(self, position: int | Tensor, spans: Tensor, key_positions: Tensor | None = None) -> Tensor:
        """Which keys no query at ``position`` or later can see, whatever the head: bool ``[B, N]``.

        Args:
            position: of the next query; a number, or int64 broadcastable to ``[B, N]``.
            spans: ``[B, S, N]`` of the keys; ``key_positions [B, N]`` their positions, None is ``0 .. N - 1``.
        """
        if key_positions is None:
            key_positions = torch.arange(spans.shape[-1], device=spans.device).expand(spans.shape[0], -1)
        # In fp64, as the layout that drops tiles: fp32 rounds the sum, and would drop a key with a little weight left.
        return (spans.double() + self.config.ramp <= (position - key_positions)[:, None]).all(1)

    def expired_keys(self, noted: _Seen | None = None) -> Tensor | None:
        seen = self._seen if noted is None else noted
        if seen is None:
            return None
        position, length = key_places(seen.sequences, seen.spans.device)
        slots = seen.key_slots
        if slots is None:
            return self.evictable(length, seen.spans, position) | (position < 0)
        gone = torch.ones_like(position, dtype=torch.bool)
        gone[:, slots] = self.evictable(length[:, slots], seen.spans, position[:, slots]) | (position[:, slots] < 0)
        return gone

    def forward(self, inputs: AttentionInputs) -> Tensor:
        if not inputs.causal:
            raise SparseAttentionError("expire_span is causal only; this call is bidirectional")
        in_place = self._in_place(inputs)
        fresh, spans = self._noted_spans(inputs)
        self._owes_loss = in_place
        if not in_place:
            mean = _mean_span(fresh, real_queries(inputs.sequences, fresh.device))
            self._keep_loss("expire_span", mean, self.config.span_loss_coef)
        if self.training and self.config.random_shortening:
            limit = self.uniform(1, layer=SHORTENING_LAYER, steps_back=self.steps_back).float() * self.config.max_span
            spans = torch.minimum(spans, limit)
        options = replace(score_options(inputs, self.heads), spans=spans, ramp=float(self.config.ramp))
        left = nearest_reach(self.config.max_span + self.config.ramp - 1, inputs.band.left)
        if in_place:
            return run_step(inputs, shared_reads(inputs.sequences, left), options)

        def attend_group(group: Group) -> Tensor:
            return planned_attention(
                group.query, group.key, group.value, EXPIRING, group.options, inputs.engine, numbers=[left]
            )

        return map_groups(inputs.query, inputs.key, inputs.value, inputs.sequences, options, attend_group)

    def repeated(self, earlier: SparseAttention, step: PreparedStep, inputs: AttentionInputs) -> PreparedStep | None:
        alike = isinstance(earlier, ExpireSpanAttention) and earlier.config == self.config and not self.training
        if not alike or (torch.is_grad_enabled() and self.weight.requires_grad):
            return None
        _, spans = self._noted_spans(inputs)
        self._owes_loss = True
        return step.again(spans=spans)

    def _noted_spans(self, inputs: AttentionInputs) -> tuple[Tensor, Tensor]:
        """:meth:`_spans_of_keys`, kept for what is asked after the forward."""
        fresh, spans = self._spans_of_keys(inputs)
        if not torch.compiler.is_exporting():  # tensors of a trace mean nothing after it
            self._seen = _Seen(spans.detach(), fresh.detach(), inputs.sequences, inputs.key_slots)
            inputs.note(self, self._seen)
        return fresh, spans

    def _in_place(self, inputs: AttentionInputs) -> bool:
        return not self.training and is_step_in_place(inputs, self.weight, self.bias)

    def aux_losses(self) -> dict[str, Tensor]:
        self._make_loss()
        return super().aux_losses()

    def unscaled_losses(self) -> dict[str, Tensor]:
        self._make_loss()
        return super().unscaled_losses()

    @torch.no_grad()
    def _make_loss(self) -> None:
        if self._owes_loss and self._seen is not None:
            mean = _mean_span(self._seen.fresh, self._seen.real)
            self._live["expire_span"], self._unscaled["expire_span"] = self.config.span_loss_coef * mean, mean
        self._owes_loss = False

    def __getstate__(self) -> dict[str, Any]:
        self._make_loss()
        return super().__getstate__()

    def reads_listed_keys(self, inputs: AttentionInputs) -> bool:
        return self._in_place(inputs)

    def _spans_of_keys(self, inputs: AttentionInputs) -> tuple[Tensor, Tensor]:
        """The spans of the new tokens ``[B, S, Nq]`` and of all keys ``[B, S, Nk]``.

        In training the cache carries the inputs, detached, and the spans of earlier segments are computed anew with
        the parameters as they are now, so that spans beyond one segment are learned. Else it carries the spans.
        """
        hidden = inputs.hidden_states
        if hidden is None:
            raise SparseAttentionError("expire_span computes spans from the layer's input, but hidden_states is None")
        fresh = self.spans(hidden)
        if inputs.remember is None:
            spans = fresh
        elif self.training:
            carried = inputs.remember("inputs", hidden.detach(), dim=1)
            spans = torch.cat([self.spans(carried[:, : carried.shape[1] - hidden.shape[1]]), fresh], dim=2)
        else:
            spans = inputs.remembered("spans", fresh, dim=2)
        if spans.shape[2] != inputs.key.shape[2]:
            raise SparseAttentionError(
                f"the cache holds spans of {spans.shape[2]} tokens for {inputs.key.shape[2]} keys: it was filled in "
                f"{'evaluation' if self.training else 'training'} mode. Start a new cache after switching the mode"
            )
        return fresh, spans

    def figures(self) -> dict[str, float]:
        if self._seen is None:
            return {}
        spans = self._seen.fresh.transpose(1, 2)[self._seen.real]
        expired = self.expired_keys()
        if expired is None or not spans.numel():
            return {}
        return {
            "mean_span": float(spans.mean()),
            "max_span": float(spans.max()),
            "tokens_kept": float((~expired).sum()) / len(self._seen.sequences.spans),
        }


def _mean_span(spans: Tensor, real: Tensor) -> Tensor:
    """The mean of the real tokens' spans ``[B, S, N]``."""
    count = (real.sum() * spans.shape[1]).clamp(min=1)
    return spans.masked_fill(~real[:, None], 0).sum() / count
