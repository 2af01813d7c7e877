"""Decoders whose attention computes itself, asking the interface."""

from __future__ import annotations

import math
import sys
from typing import Any

import torch
from torch import Tensor
from transformers.masking_utils import and_masks, sliding_window_overlay

from sa_hf.errors import SparseAttentionError
from sa_hf.hf.caches.layer import cache_in
from sa_hf.hf.forward.masks import MaskRequest
from sa_hf.hf.patching.asking_base import (
    Asking,
    AskingSparse,
    asked_attention_forward,
    asked_mask,
    attend,
    dense_masks,
    heads,
)
from sa_hf.hf.patching.asking_windows import biased_by_key, whole_width

eager_attention_forward = asked_attention_forward  # found by this name, as in Transformers' modules


class AskingGPTNeo(Asking):
    """GPT-Neo's attention, without a scale; every other layer reads the last ``window_size`` tokens."""

    causal = None

    def prepare(self: Any) -> None:
        self.layer_idx = self.layer_id
        self.sliding_window = self.config.window_size if self.attention_type == "local" else None

    def asked(self: Any, hidden_states: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        query, key, value = (
            heads(part(hidden_states), self.num_heads) for part in (self.q_proj, self.k_proj, self.v_proj)
        )
        window = self.sliding_window
        out = attend(
            self, query, key, value, args, kwargs, dropout=self.attn_dropout.p, scaling=1.0,
            narrow=None if window is None else lambda mask: within(mask, window),
        )  # fmt: skip
        return self.resid_dropout(self.out_proj(out)), None


def within(mask: Any, window: int) -> Any:
    """A causal mask with the layer's own window, which the model leaves to its layers."""
    if isinstance(mask, MaskRequest):
        function = and_masks(sliding_window_overlay(window), mask.arguments["mask_function"])
        narrower = MaskRequest({**mask.arguments, "mask_function": function, "allow_is_causal_skip": False})
        narrower.given = mask.given
        return narrower
    queries, keys = mask.shape[-2:]
    far = torch.ones(queries, keys, dtype=torch.bool, device=mask.device).tril(keys - queries - window)
    return mask.masked_fill(far, torch.finfo(mask.dtype).min)


class AskingXGLM(Asking):
    """BART's self-attention, as XGLM, MVP and TrOCR still have it."""

    causal = None

    def prepare(self: Any) -> None:
        self.is_causal = bool(self.is_decoder)

    def asked(self: Any, hidden_states: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if kwargs.get("key_value_states") is not None:
            return self.own.forward(self, hidden_states, *args, **dense_masks(kwargs))
        query, key, value = (
            heads(part(hidden_states), self.num_heads) for part in (self.q_proj, self.k_proj, self.v_proj)
        )
        if kwargs.get("attn_prompt") is not None:
            raise SparseAttentionError(
                "MVP's prompts are keys in front of the tokens, without a position that a pattern could name; build "
                "the model with use_prompt=False, or use `with sa_hf.dense(model):`"
            )
        out = attend(self, query, key, value, args, kwargs, dropout=self.dropout, scaling=self.scaling)
        return self.out_proj(out), None


class AskingLED(AskingXGLM):
    """LED's decoder, whose attention returns its cache as well."""

    def asked(self: Any, hidden_states: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        found = super().asked(hidden_states, args, kwargs)
        return (*found[:2], kwargs.get("cache"))


class AskingNeoXJapanese(Asking):
    """GPT-NeoX Japanese's attention, with the bias of its last layer beside what it returns."""

    causal = True

    def asked(self: Any, hidden_states: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        mixed = self.query_key_value(hidden_states).unflatten(-1, (self.num_attention_heads, -1)).transpose(1, 2)
        query, key, value = mixed.chunk(3, dim=-1)
        cos, sin = (angles[:, None] for angles in kwargs["position_embeddings"])
        width = cos.shape[-1]
        query, key = (
            torch.cat((x[..., :width] * cos + _half_turned(x[..., :width]) * sin, x[..., width:]), -1)
            for x in (query, key)
        )
        out = attend(self, query, key, value, args, kwargs, dropout=self.attention_dropout.p)
        return self.dense(out), None, self.dense_bias


class AskingGPT(Asking):
    """The first GPT's attention, which joins causality to a mask of padding by itself."""

    causal = True

    def prepare(self: Any) -> None:
        self.num_heads = self.n_head

    def asked(self: Any, hidden_states: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        parts = self.c_attn(hidden_states).split(self.split_size, dim=2)
        query, key, value = (heads(part, self.n_head) for part in parts)
        out = attend(
            self, query, key, value, args, kwargs, dropout=self.attn_dropout.p, scaling=None if self.scale else 1.0,
            narrow=lambda mask: asked_mask(self, hidden_states, mask, causal=True),
        )  # fmt: skip
        return [self.resid_dropout(self.c_proj(out))]


class AskingBloom(Asking):
    """BLOOM's attention: ALiBi as a table of distances, which its softmax cannot tell from one of places."""

    causal = True

    def asked(self: Any, hidden_states: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        query, key, value = self._reshape(self.query_key_value(hidden_states))
        residual = kwargs["residual"] if "residual" in kwargs else args[0]
        slopes = bloom_slopes(self.num_heads).to(hidden_states)
        out = attend(
            self, query, key, value, args, kwargs, dropout=self.attention_dropout.p, scaling=self.inv_norm_factor,
            bias=lambda length: alibi_table(slopes, length),
        )  # fmt: skip
        out = torch.nn.functional.dropout(self.dense(out), p=self.hidden_dropout, training=self.training)
        return residual + out, None


class AskingMpt(Asking):
    """MPT's attention, with its own ALiBi."""

    causal = True

    def asked(self: Any, hidden_states: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        mixed = self.Wqkv(hidden_states)
        if self.clip_qkv:
            mixed = mixed.clamp(min=-self.clip_qkv, max=self.clip_qkv)
        query, key, value = (heads(part, self.n_heads) for part in mixed.chunk(3, dim=2))
        given = kwargs["position_bias"] if "position_bias" in kwargs else args[0]
        # [heads, 1, limit], the last two places' difference being the slope
        slopes = None if given is None or given.shape[-1] < 2 else given[:, 0, -1] - given[:, 0, -2]
        out = attend(
            self, query, key, value, args, kwargs, dropout=self.attn_dropout_p, scaling=self.softmax_scale,
            bias=None if slopes is None else lambda length: alibi_table(slopes.to(hidden_states), length),
            narrow=lambda mask: _additive(mask, hidden_states),
        )  # fmt: skip
        return self.out_proj(out), None


def _additive(mask: Any, like: Tensor) -> Any:
    """MPT's mask of what is hidden, as one to add."""
    if isinstance(mask, Tensor) and mask.dtype == torch.bool:
        return torch.zeros_like(mask, dtype=like.dtype).masked_fill(mask, torch.finfo(like.dtype).min)
    return mask


class AskingFalcon(Asking):
    """Falcon's attention, with rotary positions or with ALiBi (``config.alibi``): of its places in bfloat16, so that it
    is a bias of each key and no table of distances. The model joins it to its mask, from which it is taken off here."""

    causal = None

    def prepare(self: Any) -> None:
        self.num_key_value_heads = self.num_heads if self.new_decoder_architecture else self.num_kv_heads
        self.widened = bool(self.config.alibi)
        if self.widened:
            self.qk_head_dim = whole_width(self.head_dim + 1)

    def asked(self: Any, hidden_states: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        split = self._split_heads(self.query_key_value(hidden_states))
        query, key, value = (x.transpose(1, 2) for x in split)
        alibi = kwargs.get("alibi")
        if alibi is None:
            cos, sin = kwargs["position_embeddings"]
            query, key = (x * cos[:, None] + _half_turned(x) * sin[:, None] for x in (query, key))
            return self.dense(attend(self, query, key, value, args, kwargs)), None
        if key.shape[1] < self.num_heads:
            raise SparseAttentionError(
                f"{self.num_heads} heads share the keys of {key.shape[1]}, and ALiBi gives each of them another bias "
                "of a key; a pattern goes into models with multi_query=False or alibi=False"
            )
        out = attend(
            self, query, key, value, args, kwargs, dropout=self.attention_dropout.p, scaling=self.inv_norm_factor,
            widen=lambda query, key, value: self._with_places(query, key, alibi, kwargs.get("sparse_call")),
            narrow=lambda mask: mask.unjoined if isinstance(mask, MaskRequest) else mask,
        )  # fmt: skip
        return self.dense(out), None

    def _with_places(self: Any, query: Tensor, key: Tensor, alibi: Tensor, call: Any) -> tuple[Tensor, Tensor]:
        """Args: alibi: ``[batch, heads, 1, tokens]``; a sparse cache hands out the keys of some tokens alone."""
        places, count = alibi[:, :, 0], key.shape[2]
        memory = getattr(call, "memory", None)
        slots = None if memory is None else memory.kept_slots(places.shape[-1])
        places = places if slots is None else places[..., slots.to(places.device)]
        # A static cache has places behind its tokens, which no query reads.
        places = torch.nn.functional.pad(places, (0, count - places.shape[-1])) if count > places.shape[-1] else places
        if places.shape[-1] != count:
            raise SparseAttentionError(
                f"{count} keys for {places.shape[-1]} places of ALiBi: tokens that a pattern adds have none here; "
                "leave them out (num_extra_tokens, relay='virtual')"
            )
        return biased_by_key(query, key, places * self.inv_norm_factor, self.inv_norm_factor)


class AskingDiffLlama(AskingSparse):
    """Differential attention (Ye et al. 2024), which asks twice with the same queries and keys, for the values of one
    half of the heads and of the other: here once, for both side by side, so that a pattern chooses, counts and lets a
    cache drop once for a layer."""

    def asked(self: Any, hidden_states: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        query, key, value = (
            part(hidden_states).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for part in (self.q_proj, self.k_proj, self.v_proj)
        )
        cos, sin = kwargs["position_embeddings"]
        query, key = sys.modules[self.own.__module__].apply_rotary_pos_emb(query, key, cos, sin)
        cache = cache_in(args, kwargs)
        if cache is not None:
            key, value = cache.update(key, value, self.layer_idx)
        value = torch.cat([half.repeat(1, 2, 1, 1) for half in value.chunk(2, dim=1)], -1)
        told = {name: x for name, x in kwargs.items() if x is not cache}
        out = attend(self, query, key, value, (), told, scaling=self.scaling)
        first, second = out.unflatten(-1, (query.shape[1], -1)).chunk(2, dim=2)
        signs = (self.lambda_q1, self.lambda_k1), (self.lambda_q2, self.lambda_k2)
        plus, minus = (torch.exp((x * y).sum(-1, dtype=torch.float32)).to(query.dtype) for x, y in signs)
        out = first - (plus - minus + self.lambda_init) * second
        return self.o_proj(((1 - self.lambda_init) * self.groupnorm(out)).flatten(2)), None


def _half_turned(x: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return torch.cat((-second, first), dim=-1)


def bloom_slopes(count: int) -> Tensor:
    """ALiBi's slope of each head (Press et al. 2022), as BLOOM has them: ``[heads]``."""
    closest = 2 ** math.floor(math.log2(count))
    base = 2 ** -(2 ** -(math.log2(closest) - 3))
    slopes = [base**power for power in range(1, closest + 1)]
    if closest != count:
        extra = 2 ** -(2 ** -(math.log2(2 * closest) - 3))
        slopes += [extra**power for power in range(1, 2 * (count - closest) + 1, 2)]
    return torch.tensor(slopes)


def alibi_table(slopes: Tensor, length: int) -> Tensor:
    """``slope * (j - i)`` for every distance below ``length``, ``[1, heads, 1, 2 * length - 1]``."""
    distance = torch.arange(1 - length, length, device=slopes.device)
    return (slopes[:, None] * distance)[None, :, None]


DECODERS: dict[str, Any] = {
    "modeling_openai.Attention": AskingGPT,  # another architecture has a class of this name, too
    "GPTNeoXJapaneseAttention": AskingNeoXJapanese,
    "LEDDecoderAttention": AskingLED,
    "MvpAttention": AskingXGLM,
    "TrOCRAttention": AskingXGLM,
    "GPTNeoSelfAttention": AskingGPTNeo,
    "XGLMAttention": AskingXGLM,
    "BloomAttention": AskingBloom,
    "MptAttention": AskingMpt,
    "DiffLlamaAttention": AskingDiffLlama,
    "FalconAttention": AskingFalcon,
}
