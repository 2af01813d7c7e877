"""Encoders whose attention computes itself, or does not hand on what it is given, asking the interface."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from sa_hf.errors import SparseAttentionError
from sa_hf.hf.patching.asking_base import (
    Asking,
    asked_attention_forward,
    asked_mask,
    asks,
    attend,
    dense_masks,
    heads,
)
from sa_hf.hf.patching.asking_windows import whole_width

eager_attention_forward = asked_attention_forward  # found by this name, as in Transformers' modules


class AskingBert(Asking):
    """BERT's self-attention: Megatron-BERT, RemBERT, TAPAS, RoFormer, BLIP's text, ViLT, GIT, VisualBERT, FLAVA."""

    causal = None

    def prepare(self: Any) -> None:
        # BLIP's text model is an encoder, but where it writes captions and answers; GIT's layers do not say it.
        decodes = {"BlipTextLMHeadModel", "GitModel"} & set(self.sa_hf_around)
        self.is_causal = bool(getattr(self, "is_decoder", False) or decodes)

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
    """SigLIP's, AIMv2's and Idefics' attention, which ask already but hand no keywords on."""

    causal = None

    def asked(self: Any, hidden_states: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        query, key, value = (
            heads(part(hidden_states), self.num_heads) for part in (self.q_proj, self.k_proj, self.v_proj)
        )
        out = attend(self, query, key, value, args, kwargs, dropout=self.dropout, scaling=self.scale)
        return self.out_proj(out), None


class AskingSiglip2Head(Asking):
    """SigLIP 2's pooling of its patches by one query, which makes a mask of the config's kind for another attention."""

    asks_interface = False

    def forward(self: Any, hidden_state: Tensor, attention_mask: Tensor | None = None) -> Any:
        if attention_mask is None or not asks(self):
            return self.own.forward(self, hidden_state, attention_mask)
        query = self.probe.expand(len(hidden_state), -1, -1)
        least = torch.finfo(query.dtype).min
        hidden = torch.where(attention_mask.bool(), 0.0, least).to(query.dtype)
        pooled = self.attention(query, hidden_state, hidden_state, key_padding_mask=hidden)[0]
        return (pooled + self.mlp(self.layernorm(pooled)))[:, 0]


class AskingVideoMAE(Asking):
    """VideoMAE's attention, which asks already but takes no keywords."""

    causal = None

    def asked(self: Any, hidden_states: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        query, key, value = (
            heads(part(hidden_states), self.num_attention_heads) for part in (self.query, self.key, self.value)
        )
        return attend(self, query, key, value, args, kwargs, dropout=self.dropout_prob, scaling=self.scaling), None


class AskingVJEPA2(Asking):
    """V-JEPA 2's attention, which asks already but takes no keywords; it turns queries and keys by the place of a patch
    in its video."""

    causal = None

    def asked(self: Any, hidden_states: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        chosen = kwargs["position_mask"] if "position_mask" in kwargs else args[0] if args else None
        query, key, value = (
            heads(part(hidden_states), self.num_attention_heads) for part in (self.query, self.key, self.value)
        )
        places = self.get_position_ids(hidden_states, masks=chosen)
        query, key = (self.apply_rotary_embeddings(x, places) for x in (query, key))
        told = {**{name: x for name, x in kwargs.items() if name != "position_mask"}, "attention_mask": None}
        return self.proj(
            attend(self, query, key, value, (), told, dropout=self.dropout_prob, scaling=self.scaling)
        ), None


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


class AskingLuke(Asking):
    """LUKE's self-attention, over words alone: entities are tokens without a place among them."""

    def asked(self: Any, hidden_states: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        entities = kwargs["entity_hidden_states"] if "entity_hidden_states" in kwargs else args[0]
        if entities is not None:
            raise SparseAttentionError(
                "LUKE's entities stand behind the words without a position among them, and its words ask for them by "
                "projections of their own, so no pattern names their pairs; leave entity_ids out, or use "
                "`with sa_hf.dense(model):`"
            )
        query, key, value = (
            heads(part(hidden_states), self.num_attention_heads) for part in (self.query, self.key, self.value)
        )
        return attend(self, query, key, value, args[1:], kwargs, dropout=self.dropout.p), None


class AskingSqueezeBert(Asking):
    """SqueezeBERT's self-attention, which has the channels before the tokens."""

    def asked(self: Any, hidden_states: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        query, key, value = (
            heads(part(hidden_states).transpose(1, 2), self.num_attention_heads)
            for part in (self.query, self.key, self.value)
        )
        out = attend(self, query, key, value, args, kwargs, dropout=self.dropout.p)
        return {"context_layer": out.transpose(1, 2).contiguous()}


class AskingBlip(Asking):
    """BLIP's attention over an image, with one projection for queries, keys and values."""

    def asked(self: Any, hidden_states: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        query, key, value = (heads(part, self.num_heads) for part in self.qkv(hidden_states).chunk(3, dim=-1))
        out = attend(self, query, key, value, args, kwargs, dropout=self.dropout.p, scaling=self.scale)
        return self.projection(out), None


class AskingXLM(Asking):
    """XLM's and FlauBERT's attention, which is given 1 for real keys and 0 for padding."""

    def prepare(self: Any) -> None:
        self.layer_idx = self.layer_id
        self.num_heads = self.n_heads

    def asked(self: Any, hidden_states: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        given = kwargs["mask"] if "mask" in kwargs else args[0]
        if given.dim() != 2 or kwargs.get("kv") is not None:
            raise SparseAttentionError(
                "XLM's causal masks and its attention to another sequence stay with its own attention; a pattern goes "
                "into models with causal=False, is_encoder=True"
            )
        query, key, value = (heads(part(hidden_states), self.n_heads) for part in (self.q_lin, self.k_lin, self.v_lin))
        kwargs = {name: x for name, x in kwargs.items() if name not in ("cache", "mask")}
        out = attend(
            self, query, key, value, (given,), kwargs, dropout=self.dropout,
            narrow=lambda mask: asked_mask(self, hidden_states, mask != 0, causal=False),
        )  # fmt: skip
        return (self.out_lin(out),)


class AskingConvBert(Asking):
    """ConvBERT's attention in one half of its heads; a convolution is the other."""

    def asked(self: Any, hidden_states: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        query, key, value = (
            heads(part(hidden_states), self.num_attention_heads) for part in (self.query, self.key, self.value)
        )
        out = attend(self, query, key, value, args, kwargs, dropout=self.dropout.p)
        split = (self.num_attention_heads, self.attention_head_size)
        joined = torch.cat((out.unflatten(-1, split), self._convolved(hidden_states).unflatten(-1, split)), 2)
        return joined.flatten(2), None

    def _convolved(self: Any, hidden: Tensor) -> Tensor:
        """``[batch, n, channels]``: a kernel of each place and head over the places around it."""
        width, half = self.conv_kernel_size, (self.conv_kernel_size - 1) // 2
        chosen = self.key_conv_attn_layer(hidden.transpose(1, 2)).transpose(1, 2) * self.query(hidden)
        kernels = self.conv_kernel_layer(chosen).unflatten(-1, (self.num_attention_heads, width)).softmax(-1)
        around = torch.nn.functional.pad(self.conv_out_layer(hidden), (0, 0, half, half)).unfold(1, width, 1)
        found: Tensor = around.unflatten(2, (self.num_attention_heads, -1)) @ kernels[..., None]
        return found.flatten(2)


class AskingLilt(Asking):
    """LiLT's attention: the scores of the text and those of its boxes added, one softmax over the values of both. Its
    queries, keys and values are here side by side, so their product is that sum."""

    def prepare(self: Any) -> None:
        self.qk_head_dim = whole_width(sum(self._widths()))

    def asked(self: Any, hidden_states: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        boxes = kwargs["layout_inputs"] if "layout_inputs" in kwargs else args[0]
        parts = (self.query, self.layout_query), (self.key, self.layout_key), (self.value, self.layout_value)
        queries, keys, values = (
            [heads(part(x), self.num_attention_heads) for part, x in zip(both, (hidden_states, boxes), strict=True)]
            for both in parts
        )
        queries = [x / math.sqrt(width) for x, width in zip(queries, self._widths(), strict=True)]
        filled = (0, self.qk_head_dim - sum(self._widths()))
        query, key = (torch.nn.functional.pad(torch.cat(x, -1), filled) for x in (queries, keys))
        if args[2:]:
            kwargs = {**kwargs, "output_attentions": args[2]}
        out = attend(
            self, query, key, torch.cat(values, -1), args[1:], kwargs, dropout=self.dropout.p, scaling=1.0
        ).unflatten(-1, (self.num_attention_heads, -1))
        text, layout = (x.flatten(2) for x in out.split(self._widths(), -1))
        return text, layout

    def _widths(self: Any) -> tuple[int, int]:
        return self.attention_head_size, self.attention_head_size // self.channel_shrink_ratio


class AskingLongformer(Asking):
    """Longformer's and LED's attention without global tokens: a pattern inside the layer's own window."""

    def prepare(self: Any) -> None:
        self.sliding_window = self.one_sided_attn_window_size + 1

    def asked(self: Any, hidden_states: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if kwargs.get("is_global_attn"):
            raise SparseAttentionError(
                "the global tokens of Longformer and LED have projections of their own for their queries, keys and "
                "values, which no pattern has; leave global_attention_mask out (heads that set it by themselves "
                "cannot run sparse) and take global tokens from the pattern"
            )
        query, key, value = (heads(part(hidden_states), self.num_heads) for part in (self.query, self.key, self.value))
        out = attend(
            self, query, key, value, args, kwargs, dropout=self.dropout,
            narrow=lambda mask: asked_mask(
                self, hidden_states, mask, causal=False, window=self.one_sided_attn_window_size
            ),
        )  # fmt: skip
        return (out,)


ENCODERS: dict[str, Any] = {
    "BlipTextSelfAttention": AskingBert,
    "GitSelfAttention": AskingBert,
    "FlavaSelfAttention": AskingBert,
    "ViltSelfAttention": AskingBert,
    "VisualBertSelfAttention": AskingBert,
    "LukeSelfAttention": AskingLuke,
    "LiltSelfAttention": AskingLilt,
    "SqueezeBertSelfAttention": AskingSqueezeBert,
    "BlipAttention": AskingBlip,
    "BigBirdPegasusSelfAttention": AskingBert,
    "ConvBertSelfAttention": AskingConvBert,
    "modeling_flaubert.MultiHeadAttention": AskingXLM,
    "modeling_xlm.MultiHeadAttention": AskingXLM,
    "GraniteDoclingVisionAttention": AskingTower,
    "Idefics3VisionAttention": AskingTower,
    "Siglip2Attention": AskingTower,
    "Siglip2MultiheadAttentionPoolingHead": AskingSiglip2Head,
    "Sam3LiteTextTextAttention": AskingTower,
    "SmolVLMVisionAttention": AskingTower,
    "LongformerSelfAttention": AskingLongformer,
    "LEDEncoderSelfAttention": AskingLongformer,
    "MegatronBertSelfAttention": AskingBert,
    "RemBertSelfAttention": AskingBert,
    "TapasSelfAttention": AskingBert,
    "RoFormerSelfAttention": AskingBert,
    "MPNetSelfAttention": AskingMPNet,
    "MPNetEncoder": AskingMPNetEncoder,
    "SiglipAttention": AskingTower,
    "Aimv2Attention": AskingTower,
    "UMT5Attention": AskingUMT5,
    "VJEPA2RopeAttention": AskingVJEPA2,
    "VideoMAESelfAttention": AskingVideoMAE,
}
