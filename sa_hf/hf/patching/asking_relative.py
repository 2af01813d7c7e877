"""Parakeet's attention, whose scores have a term of the distance between query and key, asking the interface."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sa_hf.errors import SparseAttentionError, UnsupportedModelError
from sa_hf.hf.forward.layer_input import Carried
from sa_hf.hf.patching.asking_base import AskingSparse, attend, heads

# Of Transformers' own embedding of distances (and of Vaswani et al. 2017, section 3.5).
_BASE = 10000.0


class AskingParakeet(AskingSparse):
    """Parakeet's, Canary's and Cohere ASR's encoder: beside the scores of queries and keys those of queries and
    distances, ``(q_i + v) W p(i - j)`` (Transformer-XL, Dai et al. 2019, section 3.3), with ``p`` sines and cosines.

    The model joins that term to its mask, ``[batch, heads, n, n]``. As the sine and cosine of ``(i - j) w`` are sums of
    products of those of ``i w`` and ``j w``, it is a scalar product as well: queries and keys get ``hidden_size`` more
    channels, the keys' being sines and cosines of their places, and no number is of a pair.
    """

    has_place_channels = True  # beside those of its projections

    def prepare(self: Any) -> None:
        self.qk_head_dim = self.head_dim + self.config.hidden_size

    def asked(self: Any, hidden_states: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        given = kwargs["position_embeddings"] if "position_embeddings" in kwargs else args[0]
        sine, cosine = _places(hidden_states.shape[1], self.config.hidden_size, hidden_states)
        self._check(given, sine, cosine, kwargs["sparse_call"])
        count, shared = self.config.num_attention_heads, self.config.num_key_value_heads
        query = heads(self.q_proj(hidden_states), count)
        key, value = (heads(part(hidden_states), shared) for part in (self.k_proj, self.v_proj))
        # [hidden, heads, head_dim]: by its call, since an adapter or an offloaded weight is no plain weight.
        weight = self.relative_k_proj(torch.eye(self.config.hidden_size, dtype=query.dtype, device=query.device))
        each = torch.einsum("bhnd,chd->bhnc", query + self.bias_v[:, None], weight.unflatten(-1, (count, -1)))
        of_sine, of_cosine = each[..., 0::2], each[..., 1::2]
        turned = of_sine * sine + of_cosine * cosine, of_cosine * sine - of_sine * cosine
        query = torch.cat([query + self.bias_u[:, None], *turned], -1)
        places = torch.cat([cosine, sine], -1).expand(*key.shape[:3], -1)
        key = torch.cat([key, places.to(key.dtype)], -1)
        out = attend(
            self, query.to(key.dtype), key, value, (), {"attention_mask": None, **kwargs},
            dropout=self.attention_dropout, scaling=self.scaling,
        )  # fmt: skip
        return self.o_proj(out), None

    def _check(self: Any, given: Tensor, sine: Tensor, cosine: Tensor, call: Any) -> None:
        n = sine.shape[0]
        if given.shape[1] != 2 * n - 1:
            raise SparseAttentionError(
                f"{given.shape[1]} distances for {n} tokens, where {2 * n - 1} are between them: tokens that a pattern "
                "adds have no place here; leave them out (num_extra_tokens, relay='virtual')"
            )
        if self.training and self.config.dropout_positions > 0:
            raise SparseAttentionError(
                f"dropout_positions={self.config.dropout_positions} drops distances, which a pattern has as products "
                "of places; train with dropout_positions=0.0 in the encoder's config, or keep the layer dense"
            )
        # The probe has the installed release's numbers: those of the distances n - 1 down to 0 are our places'.
        if isinstance(call, Carried) and not given.is_meta:
            ours = torch.stack([sine, cosine], -1).flatten(-2).flip(0).to(given.dtype)
            if not torch.allclose(given[0, :n], ours, atol=1e-2):
                raise UnsupportedModelError(
                    f"the distances of {type(self).__name__} are not the sines and cosines that a pattern can have as "
                    "products of places; keep it dense"
                )


def _places(n: int, width: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """Sine and cosine ``[n, width / 2]`` of each place. In float64: a difference of two angles keeps the rounding of
    the larger ones (4000 frames in float32: 1e-4)."""
    exponent = torch.arange(0, width, 2, dtype=torch.float, device=like.device) / width
    frequency = (1.0 / _BASE**exponent).double()  # rounded where the model rounds them
    angle = torch.arange(n, dtype=torch.float64, device=like.device)[:, None] * frequency
    return angle.sin().to(like.dtype), angle.cos().to(like.dtype)


RELATIVE: dict[str, Any] = {"ParakeetEncoderAttention": AskingParakeet}
