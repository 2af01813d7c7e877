"""Attention with a bias that no table of distances holds, asking the interface: Swin and its kin, LayoutLMv3, Doge.

The bias goes into channels beside the queries' and keys' own, so the product of the wider ones is the biased score:
exact under every pattern, and differentiable. Swin's is of the pairs of one small window, LayoutLMv3's of those of one
page: a key brings its place as a one-hot row, a query its row of the bias. Doge's is of the key alone, which takes one
channel.
"""

from __future__ import annotations

import math
import sys
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import normalize, pad, softplus

from sa_hf.errors import SparseAttentionError
from sa_hf.hf.forward.masks import MaskRequest
from sa_hf.hf.patching.asking_base import (
    Asking,
    AskingSparse,
    asked_attention_forward,
    attend,
    heads,
    left_dense,
    mask_in,
)

eager_attention_forward = asked_attention_forward  # found by this name, as in Transformers' modules

# The Triton kernels take widths of whole multiples of this.
MULTIPLE = 8


def whole_width(width: int) -> int:
    """The next width that all engines take."""
    return -(-width // MULTIPLE) * MULTIPLE


def biased(query: Tensor, key: Tensor, bias: Tensor, scaling: float) -> tuple[Tensor, Tensor]:
    """Queries and keys whose products, times ``scaling``, are those of the given ones and a bias.

    Args:
        query: ``[B, heads, n, D]``; key: the same; bias: ``[1 or B, heads, n, n]``.

    Returns:
        Both ``[B, heads, n, whole_width(D + n)]``.
    """
    wide = *query.shape[:3], query.shape[2]
    rows = (bias / scaling).to(query.dtype).expand(wide)
    places = torch.eye(wide[-1], dtype=key.dtype, device=key.device).expand(wide)
    return _joined(query, rows), _joined(key, places)


def biased_by_key(query: Tensor, key: Tensor, bias: Tensor, scaling: float) -> tuple[Tensor, Tensor]:
    """The same where each key has one bias for all queries.

    Args:
        query: ``[B, heads, queries, D]``; key: ``[B, key heads, keys, D]``; bias: ``[B, key heads, keys]``.

    Returns:
        ``[B, heads, queries, whole_width(D + 1)]`` and ``[B, key heads, keys, whole_width(D + 1)]``.
    """
    once = query.new_full((*query.shape[:3], 1), 1 / scaling)
    return _joined(query, once), _joined(key, bias[..., None].to(key.dtype))


def _joined(x: Tensor, channels: Tensor) -> Tensor:
    joined = torch.cat((x, channels), -1)
    return pad(joined, (0, whole_width(joined.shape[-1]) - joined.shape[-1]))


class AskingWindow(Asking):
    """Attention inside each window of a DonutSwin, MaskFormer's Swin and an older release's Swin,
    ``[batch * windows, n, channels]``; a shifted window's mask adds -100 between its parts."""

    widened = True
    mask_times: ClassVar[int] = 1

    def prepare(self: Any) -> None:
        self.qk_head_dim = whole_width(self.attention_head_size + self.window_size[0] * self.window_size[1])

    def asked(self: Any, hidden_states: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if left_dense(self):
            return self.own.forward(self, hidden_states, *args, **kwargs)
        query, key, value = (
            heads(part(hidden_states), self.num_attention_heads) for part in (self.query, self.key, self.value)
        )
        query, key, scaling = self._scored(query, key)
        return (self._attended(query, key, value, mask_in(args, kwargs), kwargs, scaling, self.dropout.p),)

    def _scored(self: Any, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor, float]:
        """Queries and keys whose products, times what is returned last, are the scores without their bias."""
        return query, key, 1 / math.sqrt(self.attention_head_size)

    def _bias(self: Any) -> Tensor:
        """``[1, heads, n, n]``."""
        n = self.window_size[0] * self.window_size[1]
        table: Tensor = self.relative_position_bias_table[self.relative_position_index.view(-1)]
        return table.view(n, n, -1).permute(2, 0, 1)[None]

    def _attended(
        self: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, kwargs: dict[str, Any],
        scaling: float, dropout: float,
    ) -> Tensor:  # fmt: skip
        """Args: mask: ``[windows, n, n]``, to add."""
        bias = self._bias()
        if mask is not None:
            bias = bias + self.mask_times * mask.repeat(query.shape[0] // mask.shape[0], 1, 1)[:, None]
        query, key = biased(query, key, bias, scaling)
        kwargs = {name: x for name, x in kwargs.items() if name != "attention_mask"}
        return attend(self, query, key, value, (), kwargs, dropout=dropout, scaling=scaling)


class AskingSwin(AskingWindow):
    """Swin's, which asks already, with its bias and mask as one mask of numbers. (In older releases the module around
    ``SwinSelfAttention`` has its name.)"""

    needs = ("q_proj", "relative_position_bias")

    def prepare(self: Any) -> None:
        self.qk_head_dim = whole_width(self.head_dim + self.relative_position_bias.window_area)

    def asked(self: Any, hidden_states: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if left_dense(self):
            return self.own.forward(self, hidden_states, *args, **kwargs)
        query, key, value = (
            heads(part(hidden_states), self.num_attention_heads) for part in (self.q_proj, self.k_proj, self.v_proj)
        )
        mask = mask_in(args, kwargs)
        out = self._attended(query, key, value, mask, kwargs, self.scaling, self.attention_dropout)
        return self.o_proj(out), None

    def _bias(self: Any) -> Tensor:
        bias: Tensor = self.relative_position_bias()
        return bias


class AskingSwin2(AskingWindow):
    """Swin V2's: cosines with a learned scale for each head, a bias that a network makes of distances; and its mask of
    shifted windows is added twice."""

    mask_times = 2

    def _scored(self: Any, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor, float]:
        scale = self.logit_scale.clamp(max=math.log(1.0 / 0.01)).exp()
        return normalize(query, dim=-1) * scale, normalize(key, dim=-1), 1.0

    def _bias(self: Any) -> Tensor:
        n = self.window_size[0] * self.window_size[1]
        table = self.continuous_position_bias_mlp(self.relative_coords_table).view(-1, self.num_attention_heads)
        return 16 * torch.sigmoid(table[self.relative_position_index.view(-1)].view(n, n, -1).permute(2, 0, 1))[None]


class AskingLayoutLMv3(AskingSparse):
    """LayoutLMv3's attention (Huang et al. 2022): a bias of the distance on the page and in the text, which its encoder
    makes of all pairs, once for all layers. A channel for each token holds it, so a score costs more than it does in
    the model's own attention, and a layer's memory grows with the pairs, as the model's own bias does."""

    widened = True

    def prepare(self: Any) -> None:
        self.unwidened = self.attention_head_size  # the channels of the bias are as many as the tokens of a call

    def asked(self: Any, hidden_states: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        bias = kwargs.get("position_bias")
        if bias is None:
            return self.own.forward(self, hidden_states, *args, **kwargs)
        if bias.shape[-1] != hidden_states.shape[1]:
            raise SparseAttentionError(
                f"a bias of {bias.shape[-1]} tokens for {hidden_states.shape[1]}: tokens that a pattern adds have no "
                "place on LayoutLMv3's page; leave them out (num_extra_tokens, relay='virtual')"
            )
        query, key, value = (
            heads(part(hidden_states), self.num_attention_heads) for part in (self.query, self.key, self.value)
        )
        query, key = biased(query, key, bias, self.scaling)
        told = {name: x for name, x in kwargs.items() if name != "position_bias"}
        return attend(self, query, key, value, args, told, dropout=self.dropout.p, scaling=self.scaling), None


class AskingDoge(Asking):
    """Doge's attention: each key's values give it a bias for every query that reads it. (Its rule to read the
    ``keep_window_size`` keys of the greatest bias alone is refused where it would drop any.)"""

    causal = True
    widened = True

    def prepare(self: Any) -> None:
        self.qk_head_dim = whole_width(self.head_dim + 1)

    def asked(self: Any, hidden_states: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        query, key, value = (part(hidden_states) for part in (self.q_proj, self.k_proj, self.v_proj))
        query, key, value = (x.unflatten(-1, (-1, self.head_dim)) for x in (query, key, value))
        query, key, value = (x.transpose(1, 2) for x in (self.q_norm(query), self.k_norm(key), value))
        cos, sin = kwargs["position_embeddings"]
        query, key = sys.modules[self.own.__module__].apply_rotary_pos_emb(query, key, cos, sin)

        def widen(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
            gate = softplus(self.dt_proj(value.transpose(1, 2).flatten(2)))
            return biased_by_key(query, key, torch.exp(self.A * gate).transpose(-1, -2), self.scaling)

        out = attend(
            self, query, key, value, args, kwargs, dropout=self.attention_dropout, scaling=self.scaling, widen=widen,
            narrow=lambda mask: self._checked(mask),
        )  # fmt: skip
        return self.o_proj(out), None

    def _checked(self: Any, mask: Any) -> Any:
        if not isinstance(mask, MaskRequest):
            return mask
        longest = mask.query_offset + mask.query_length
        if self.config.sliding_window is not None:
            longest = min(longest, self.config.sliding_window)
        if longest > self.keep_window_size:
            raise SparseAttentionError(
                f"over {longest} tokens Doge reads the keep_window_size={self.keep_window_size} keys of the greatest "
                f"bias alone, which no pattern knows; load the model with keep_window_size={longest}, so that the "
                "pattern alone says which keys are read, or give fewer tokens"
            )
        return mask


WINDOWS: dict[str, Any] = {
    "SwinAttention": AskingSwin,
    "SwinSelfAttention": AskingWindow,
    "Swinv2SelfAttention": AskingSwin2,
    "Swin2SRSelfAttention": AskingSwin2,
    "DonutSwinSelfAttention": AskingWindow,
    "MaskFormerSwinSelfAttention": AskingWindow,
    "LayoutLMv3SelfAttention": AskingLayoutLMv3,
    "DogeAttention": AskingDoge,
}
