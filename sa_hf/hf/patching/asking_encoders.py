"""Encoders whose attention computes itself, or does not hand on what it is given, asking the interface."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sa_hf.hf.patching.asking_base import Asking, asked_attention_forward, asks, attend, dense_masks, heads

eager_attention_forward = asked_attention_forward  # found by this name, as in Transformers' modules


class AskingBert(Asking):
    """BERT's self-attention: Megatron-BERT, RemBERT, TAPAS, RoFormer."""

    causal = None

    def prepare(self: Any) -> None:
        self.is_causal = bool(getattr(self, "is_decoder", False))

    def asked(self: Any, hidden_states: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if kwargs.get("encoder_hidden_states") is not None:
            return self.own.forward(self, hidden_states, *args, **dense_masks(kwargs))
        query, key, value = (
            heads(part(hidden_states), self.num_attention_heads) for part in (self.query, self.key, self.value)
        )
        angles = kwargs.get("sinusoidal_pos")
        if angles is not None:
            turned = (query, key, value) if self.rotary_value else (query, key)
            query, key, *rest = self.apply_rotary_position_embeddings(angles, *turned)
            value = rest[0] if rest else value
        out = attend(self, query, key, value, args, kwargs, dropout=self.dropout.p)
        return out, None


class AskingMPNet(Asking):
    """MPNet's self-attention, with its bias as a table of distances (:class:`AskingMPNetEncoder`)."""

    def asked(self: Any, hidden_states: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        query, key, value = (heads(part(hidden_states), self.num_attention_heads) for part in (self.q, self.k, self.v))
        table = kwargs["position_bias"] if "position_bias" in kwargs else args[1]
        out = attend(self, query, key, value, args, kwargs, dropout=self.dropout.p, bias=lambda length: table)
        return self.o(out), None


class AskingMPNetEncoder(Asking):
    """The layers' owner, which computes the bias that they share: ``[1, heads, 1, 2 n - 1]``, never of all pairs."""

    asks_interface = False

    def forward(self: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        return self.own.forward(self, hidden_states, *args, **kwargs)

    def compute_position_bias(self: Any, x: Tensor, position_ids: Any = None, num_buckets: int = 32) -> Any:
        if not asks(self) or position_ids is not None:
            return self.own.compute_position_bias(self, x, position_ids, num_buckets)
        distance = torch.arange(1 - x.shape[1], x.shape[1], device=x.device)
        bucket = self.relative_position_bucket(distance, num_buckets=num_buckets)
        return self.relative_attention_bias(bucket).t()[None, :, None]


class AskingTower(Asking):
    """SigLIP's and AIMv2's attention, which ask already but hand no keywords on."""

    causal = None

    def asked(self: Any, hidden_states: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        query, key, value = (
            heads(part(hidden_states), self.num_heads) for part in (self.q_proj, self.k_proj, self.v_proj)
        )
        out = attend(self, query, key, value, args, kwargs, dropout=self.dropout, scaling=self.scale)
        return self.out_proj(out), None


class AskingUMT5(Asking):
    """UMT5's attention, in which each layer makes a bias of its own: here a table of distances."""

    causal = None

    def asked(self: Any, hidden_states: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if not self.has_relative_attention_bias:  # cross-attention, whose bias is 0
            return self.own.forward(self, hidden_states, *args, **kwargs)
        query, key, value = (heads(part(hidden_states), self.n_heads) for part in (self.q, self.k, self.v))

        def bias(length: int) -> Tensor:
            distance = torch.arange(1 - length, length, device=hidden_states.device)
            table: Tensor = self.relative_attention_bias(self._relative_position_bucket(distance))
            return table.t()[None, :, None]

        out = attend(self, query, key, value, args, kwargs, dropout=self.dropout, scaling=self.scaling, bias=bias)
        return self.o(out), None


ENCODERS: dict[str, Any] = {
    "MegatronBertSelfAttention": AskingBert,
    "RemBertSelfAttention": AskingBert,
    "TapasSelfAttention": AskingBert,
    "RoFormerSelfAttention": AskingBert,
    "MPNetSelfAttention": AskingMPNet,
    "MPNetEncoder": AskingMPNetEncoder,
    "SiglipAttention": AskingTower,
    "Aimv2Attention": AskingTower,
    "UMT5Attention": AskingUMT5,
}
