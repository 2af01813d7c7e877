"""Attention whose scores have a term of the distance between query and key, by sines and cosines, asking the interface:
encoders of sound, and XLNet."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import one_hot, pad

from sa_hf.errors import SparseAttentionError, UnsupportedModelError
from sa_hf.hf.forward.layer_input import Carried, LayerCall
from sa_hf.hf.patching.asking_base import Asking, AskingSparse, asked_attention_forward, asked_mask, attend, heads
from sa_hf.hf.patching.asking_windows import whole_width

eager_attention_forward = asked_attention_forward  # found by this name, as in Transformers' modules

# Of Transformers' own embedding of distances (and of Vaswani et al. 2017, section 3.5).
_BASE = 10000.0
# On what XLNet gives its layers: what it was read as, for the other layers of the forward.
_NUMBERED = "sa_hf_numbers"


class AskingRelative(AskingSparse):
    """An encoder's attention that has, beside the scores of queries and keys, those of queries and distances,
    ``(q_i + v) W p(i - j)`` (Transformer-XL, Dai et al. 2019, section 3.3), with ``p`` sines and cosines.

    The model joins that term to its mask, ``[batch, heads, n, n]``. As the sine and cosine of ``(i - j) w`` are sums of
    products of those of ``i w`` and ``j w``, it is a scalar product as well: queries and keys get ``hidden_size`` more
    channels, the keys' being sines and cosines of their places, and no number is of a pair.
    """

    has_place_channels = True  # beside those of its projections
    drops_distances: ClassVar[str | None] = None  # the config's field by which it does in training

    def _placed(
        self: Any, hidden: Tensor, query: Tensor, key: Tensor, given: Tensor, biases: tuple[Tensor, Tensor],
        projection: Any, call: Any,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """Queries and keys ``[batch, heads, n, head_dim + hidden_size]``.

        Args: given: the model's own embedding of distances; biases: ``u`` and ``v``, ``[heads, head_dim]``;
        projection: ``W``.
        """
        width = hidden.shape[-1]
        sine, cosine = _places(hidden.shape[1], width, hidden)
        self._check(given, sine, cosine, call)
        # [hidden, heads, head_dim]: by its call, since an adapter or an offloaded weight is no plain weight.
        weight = projection(torch.eye(width, dtype=query.dtype, device=query.device))
        of_keys, of_places = (query + bias[:, None] for bias in biases)
        each = torch.einsum("bhnd,chd->bhnc", of_places, weight.unflatten(-1, (query.shape[1], -1)))
        turned, places = _turned(each[..., 0::2], each[..., 1::2], sine, cosine)
        key = torch.cat([key, places.expand(*key.shape[:3], -1).to(key.dtype)], -1)
        return torch.cat([of_keys, turned], -1).to(key.dtype), key

    def _proves(self: Any, call: Any) -> bool:
        """Whether the model's numbers are compared in this call: in the probe's, whose forward makes them."""
        return isinstance(call, Carried)

    def _check(self: Any, given: Tensor, sine: Tensor, cosine: Tensor, call: Any) -> None:
        n = sine.shape[0]
        if given.shape[1] != 2 * n - 1:
            raise SparseAttentionError(
                f"{given.shape[1]} distances for {n} tokens, where {2 * n - 1} are between them: tokens that a pattern "
                "adds have no place here; leave them out (num_extra_tokens, relay='virtual')"
            )
        name = self.drops_distances
        if name is not None and self.training and getattr(self.config, name) > 0:
            raise SparseAttentionError(
                f"{name}={getattr(self.config, name)} drops distances, which a pattern has as products of places; "
                f"train with {name}=0.0 in the encoder's config, or keep the layer dense"
            )
        # The numbers of the distances n - 1 down to 0 are those of our places: compared once.
        if self._proves(call) and not given.is_meta:
            ours = torch.stack([sine, cosine], -1).flatten(-2).flip(0).to(given.dtype)
            if not torch.allclose(given[0, :n], ours, atol=1e-2):
                raise UnsupportedModelError(
                    f"the distances of {type(self).__name__} are not the sines and cosines that a pattern can have as "
                    "products of places; keep it dense"
                )


class AskingParakeet(AskingRelative):
    """Parakeet's, Canary's and Cohere ASR's encoder."""

    drops_distances = "dropout_positions"

    def prepare(self: Any) -> None:
        self.qk_head_dim = self.head_dim + self.config.hidden_size

    def asked(self: Any, hidden_states: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        given = kwargs["position_embeddings"] if "position_embeddings" in kwargs else args[0]
        count, shared = self.config.num_attention_heads, self.config.num_key_value_heads
        query = heads(self.q_proj(hidden_states), count)
        key, value = (heads(part(hidden_states), shared) for part in (self.k_proj, self.v_proj))
        query, key = self._placed(
            hidden_states, query, key, given, (self.bias_u, self.bias_v), self.relative_k_proj, kwargs["sparse_call"]
        )
        out = attend(
            self, query, key, value, (), {"attention_mask": None, **kwargs},
            dropout=self.attention_dropout, scaling=self.scaling,
        )  # fmt: skip
        return self.o_proj(out), None


class AskingConformer(AskingRelative):
    """Wav2Vec2-Conformer's encoder, and SeamlessM4T's of sound, where their config says
    ``position_embeddings_type="relative"``. (Their convolutions read the rows of padding beside them, to which
    attention gives 0 here, as everywhere.)"""

    def prepare(self: Any) -> None:
        self.proved = False
        self.qk_head_dim = self.head_size + (self.config.hidden_size if self._is_relative() else 0)
        self.has_place_channels = self._is_relative()

    def _proves(self: Any, call: Any) -> bool:
        """In the first that has the model's table, which the probe's copy without weights has not."""
        first = not self.proved and not isinstance(call, Carried) and not torch.compiler.is_compiling()
        self.proved = self.proved or first
        return first

    def _is_relative(self: Any) -> bool:
        return bool(self.position_embeddings_type == "relative")

    def asked(self: Any, hidden_states: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if not self._is_relative():
            return self.own.forward(self, hidden_states, *args, **kwargs)
        query, key, value = (
            heads(part(hidden_states), self.num_heads) for part in (self.linear_q, self.linear_k, self.linear_v)
        )
        query, key = self._placed(
            hidden_states, query, key, kwargs["relative_position_embeddings"], (self.pos_bias_u, self.pos_bias_v),
            self.linear_pos, kwargs["sparse_call"],
        )  # fmt: skip
        out = attend(self, query, key, value, args, kwargs, dropout=self.dropout.p, scaling=self.scaling)
        return self.linear_out(out), None


class AskingXLNet(Asking):
    """XLNet's attention (Yang et al. 2019) of one stream: Transformer-XL's term of the distance, and one of whether two
    tokens are of one segment, as channels, too, a key's being the number of its segment. Tokens stand before the batch.

    Its second stream, of queries that do not see their own token, reads under masks of permutations: refused, and so
    are the hidden states of earlier calls (``mems``).
    """

    has_place_channels = True
    segments: ClassVar[int] = 8  # XLNet's own tokenizer has five

    def prepare(self: Any) -> None:
        self.num_heads, self.proved = self.n_head, False
        self.qk_head_dim = whole_width(self.d_head + self.d_model + self.segments)

    def asked(self: Any, hidden_states: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        names = ("g", "attn_mask_h", "attn_mask_g", "r", "seg_mat", "mems", "target_mapping", "output_attentions")
        given = {**dict.fromkeys(names), **dict(zip(names, args, strict=False)), **kwargs}
        self._check(hidden_states, given)
        rows = hidden_states.transpose(0, 1)
        query, key, value = (torch.einsum("bih,hnd->bnid", rows, part) for part in (self.q, self.k, self.v))
        call = given.get("sparse_call")
        call = replace(call, hidden_states=rows) if isinstance(call, LayerCall) else call
        query, key = self._scored(query, key, given["r"], given["seg_mat"])
        told = {"sparse_call": call, "output_attentions": given["output_attentions"]}
        out = attend(
            self, query, key, value, (given["attn_mask_g"],), told, dropout=self.dropout.p, scaling=self.scale,
            narrow=lambda mask: self._mask(rows, mask),
        )  # fmt: skip
        out = self.post_attention(hidden_states, out.unflatten(-1, (self.n_head, -1)).transpose(0, 1))
        return out, None

    def _scored(self: Any, query: Tensor, key: Tensor, given: Tensor, segments: Tensor | None) -> tuple[Tensor, Tensor]:
        """Queries and keys ``[B, heads, n, qk_head_dim]``. Args: given: the model's embedding of distances ``[2 n, B or
        1, d_model]``; segments: ``[n, n, B, 2]``, whose first number says that both tokens are of one segment."""
        sine, cosine = _places(key.shape[2], self.d_model, given)
        self._prove(given, sine, cosine)
        of_keys, of_places, of_segments = (
            query + bias[:, None] for bias in (self.r_w_bias, self.r_r_bias, self.r_s_bias)
        )
        each = torch.einsum("bnid,hnd->bnih", of_places, self.r)
        of_sine, of_cosine = each.chunk(2, dim=-1)
        turned, places = _turned(of_sine, of_cosine, sine, cosine)
        query, key = torch.cat([of_keys, turned], -1), torch.cat([key, places.expand(*key.shape[:3], -1)], -1)
        if segments is not None:
            own = one_hot(_numbers(segments, self.segments), self.segments).to(key.dtype)[:, None]
            # What a query adds to all keys alike no softmax shows: its number where the segments differ.
            more = of_segments @ (self.seg_embed[0] - self.seg_embed[1])[:, :, None]
            query = torch.cat([query, more * own], -1)
            key = torch.cat([key, own.expand(-1, key.shape[1], -1, -1)], -1)
        query, key = (pad(x, (0, self.qk_head_dim - x.shape[-1])) for x in (query, key))
        return query.to(key.dtype), key

    def _mask(self: Any, rows: Tensor, mask: Tensor | None) -> Any:
        """Args: mask: the model's own, ``[1, n, B, 1]``, 1 where a key is hidden."""
        if mask is None:
            return asked_mask(self, rows, None, causal=False)
        if mask.shape[0] == 1:
            real = getattr(mask, _NUMBERED, None)  # once for all layers
            if real is None:
                real = mask[0, :, :, 0].t() == 0
                setattr(mask, _NUMBERED, real)
            return asked_mask(self, rows, real, causal=False)
        raise SparseAttentionError(
            f"XLNet is given a mask of {mask.shape[0]} queries (perm_mask, or attn_type='uni'), whose pairs a pattern "
            "would have to drop; leave perm_mask out, and take attn_type='bi'"
        )

    def _check(self: Any, hidden: Tensor, given: dict[str, Any]) -> None:
        if given["g"] is not None:
            raise SparseAttentionError(
                "XLNet's second stream (target_mapping) reads under masks of permutations, whose pairs no pattern "
                "names; leave target_mapping and perm_mask out, or use `with sa_hf.dense(model):`"
            )
        if given["mems"] is not None and given["mems"].dim() > 1:
            raise SparseAttentionError(
                "XLNet is given the hidden states of an earlier call (mems), whose tokens have no position that a "
                "pattern names in a layer that is not causal; leave mems out"
            )
        n, distances = hidden.shape[0], given["r"].shape[0]
        if distances != 2 * n:
            raise SparseAttentionError(
                f"{distances} distances for {n} tokens, where XLNet with attn_type='bi' has {2 * n}: tokens that a "
                "pattern adds have no place here, and attn_type='uni' is not served; leave them out "
                "(num_extra_tokens, relay='virtual')"
            )
        config = self.config
        if config.bi_data or config.clamp_len > 0:
            raise SparseAttentionError(
                f"XLNet with bi_data={config.bi_data}, clamp_len={config.clamp_len} has other distances than sines and "
                "cosines of them; a pattern goes into models with bi_data=False, clamp_len=-1"
            )
        if self.training and config.dropout > 0:
            raise SparseAttentionError(
                f"dropout={config.dropout} drops distances, which a pattern has as products of places; train with "
                "dropout=0.0, or keep the layer dense"
            )

    def _prove(self: Any, given: Tensor, sine: Tensor, cosine: Tensor) -> None:
        """That the model's embedding is that of our places, once: its rows from 0 to distance ``1 - n`` are behind that
        of n, n - 1, ..."""
        if self.proved or given.is_meta or torch.compiler.is_compiling():
            return
        self.proved, n = True, sine.shape[0]
        ours = torch.cat([-sine, cosine], -1)
        if not torch.allclose(given[n:, 0], ours.to(given.dtype), atol=1e-2):
            raise UnsupportedModelError(
                f"the distances of {type(self).__name__} are not the sines and cosines that a pattern can have as "
                "products of places; keep it dense"
            )


def _numbers(segments: Tensor, limit: int) -> Tensor:
    """The number of each token's segment in its row, ``[B, n]`` int64, once for all layers."""
    held: Tensor | None = getattr(segments, _NUMBERED, None)
    if held is None:
        alike = segments[..., 0] > 0  # [n, n, B]
        first = alike.long().argmax(0).transpose(0, 1)  # of each token's segment, its first token
        starts = first == torch.arange(first.shape[1], device=first.device)
        held = (starts.cumsum(1) - 1).gather(1, first)
        if not torch.compiler.is_compiling() and bool((held >= limit).any()):
            raise SparseAttentionError(
                f"token_type_ids name more than {limit} segments in a row, for which XLNet has no channels here; give "
                "fewer, or use `with sa_hf.dense(model):`"
            )
        setattr(segments, _NUMBERED, held)
    return held


def _turned(of_sine: Tensor, of_cosine: Tensor, sine: Tensor, cosine: Tensor) -> tuple[Tensor, Tensor]:
    """Channels of queries ``[..., n, width]`` and of keys ``[n, width]`` whose products are those of what a query makes
    of the sine and the cosine of ``i - j``, with these: by the sine and cosine of each place."""
    turned = of_sine * sine + of_cosine * cosine, of_cosine * sine - of_sine * cosine
    return torch.cat(turned, -1), torch.cat([cosine, sine], -1)


def _places(n: int, width: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """Sine and cosine ``[n, width / 2]`` of each place. In float64: a difference of two angles keeps the rounding of
    the larger ones (4000 frames in float32: 1e-4)."""
    exponent = torch.arange(0, width, 2, dtype=torch.float, device=like.device) / width
    frequency = (1.0 / _BASE**exponent).double()  # rounded where the model rounds them
    angle = torch.arange(n, dtype=torch.float64, device=like.device)[:, None] * frequency
    return angle.sin().to(like.dtype), angle.cos().to(like.dtype)


RELATIVE: dict[str, Any] = {
    "ParakeetEncoderAttention": AskingParakeet,
    "SeamlessM4TConformerSelfAttention": AskingConformer,
    "Wav2Vec2ConformerSelfAttention": AskingConformer,
    "XLNetRelativeAttention": AskingXLNet,
}
