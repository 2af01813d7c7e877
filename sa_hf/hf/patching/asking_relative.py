"""Attention of sound whose scores have a term of the distance between query and key, asking the interface."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from sa_hf.errors import SparseAttentionError, UnsupportedModelError
from sa_hf.hf.forward.layer_input import Carried
from sa_hf.hf.patching.asking_base import AskingSparse, attend, heads

# Of Transformers' own embedding of distances (and of Vaswani et al. 2017, section 3.5).
_BASE = 10000.0


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
        of_sine, of_cosine = each[..., 0::2], each[..., 1::2]
        turned = of_sine * sine + of_cosine * cosine, of_cosine * sine - of_sine * cosine
        places = torch.cat([cosine, sine], -1).expand(*key.shape[:3], -1)
        key = torch.cat([key, places.to(key.dtype)], -1)
        return torch.cat([of_keys, *turned], -1).to(key.dtype), key

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
}
