"""Attention that reads another sequence's keys beside those of its own tokens in one softmax, asking the interface.

The pattern chooses among the layer's own keys; the others are all read. With ``L`` the log-sum-exp of a query's scores
of the others, the softmax of both is that of its own scores less ``L`` with one logit of 0 more in the denominator,
which an attention sink is. So ``L`` goes into channels beside the query's own, a channel of ones beside the values
counts what the sink leaves, and the others get the rest: exact under every pattern, in every engine, and in decoding.
"""

from __future__ import annotations

import inspect
import sys
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from torch.utils.checkpoint import checkpoint
from transformers.masking_utils import create_bidirectional_mask

from sa_hf.errors import SparseAttentionError
from sa_hf.hf.caches.layer import cache_in, is_cache
from sa_hf.hf.patching.asking_base import AskingSparse, attend
from sa_hf.hf.patching.asking_windows import whole_width

# Numbers of 16 bits that hold one of 32.
_PIECES = 3
# Scores of one head that are made at once.
_SCORES = 2**22


class AskingMerged(AskingSparse):
    """T5Gemma 2's decoder, whose layers read the encoder's output by the projections of their own tokens."""

    widened = True
    has_sinks = True

    def prepare(self: Any) -> None:
        self.qk_head_dim = whole_width(self.head_dim + _PIECES)
        self.has_place_channels = True  # beside those of its projections

    def asked(self: Any, hidden_states: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self.training and self.attention_dropout > 0:
            raise SparseAttentionError(
                f"attention_dropout={self.attention_dropout} drops weights of the decoder's tokens and of the "
                "encoder's together, which a pattern counts apart; train with attention_dropout=0.0 in the decoder's "
                "config, or keep its layers dense"
            )
        query, key, value = self._projected(hidden_states, self.q_proj, self.k_proj, self.v_proj)
        cos, sin = kwargs["position_embeddings"]
        turn = sys.modules[self.own.__module__].apply_rotary_pos_emb
        query, key = turn(self.q_norm(query), self.k_norm(key), cos, sin)
        cache = cache_in(args, kwargs)
        if cache is not None:
            key, value = cache.self_attention_cache.update(key, value, self.layer_idx)
        mask: Any = kwargs["merged_attention_mask"]
        others = self._of_encoder(kwargs["encoder_hidden_states"], cache)
        out, total, seen = read_whole(query, others[0], others[1], mask.joined.padding, self.scaling)
        told = {name: x for name, x in kwargs.items() if not is_cache(x)} | {"attention_mask": mask.unjoined}
        query, key = _less(query, key, total, self.scaling)
        own = attend(
            self, query, key, pad(value, (0, 1), value=1.0), (), told, scaling=self.scaling,
            sinks=query.new_zeros(query.shape[1]),
        ).unflatten(-1, (query.shape[1], -1))  # fmt: skip
        own, share = own[..., :-1], own[..., -1:]
        merged = own + (1 - share) * out.transpose(1, 2)
        if seen is not None:  # rows of the batch whose encoder has tokens
            merged = torch.where(seen[:, None, None, None], merged, own / share.clamp(min=torch.finfo(own.dtype).tiny))
        return self.o_proj(merged.flatten(2)), None, None

    def _projected(self: Any, hidden: Tensor, *projections: Any) -> tuple[Tensor, ...]:
        """``[batch, heads, n, head_dim]`` of each."""
        return tuple(part(hidden).unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for part in projections)

    def _of_encoder(self: Any, hidden: Tensor, cache: Any) -> tuple[Tensor, Tensor]:
        """Keys and values of the encoder's tokens, made once for a cache."""
        if cache is not None and cache.is_updated.get(self.layer_idx):
            held = cache.cross_attention_cache.layers[self.layer_idx]
            return held.keys, held.values
        key, value = self._projected(hidden, self.k_proj, self.v_proj)
        key = self.k_norm(key)
        if cache is not None:
            key, value = cache.cross_attention_cache.update(key, value, self.layer_idx)
            cache.is_updated[self.layer_idx] = True
        return key, value


def read_whole(
    query: Tensor, key: Tensor, value: Tensor, padding: Tensor | None, scale: float
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Attention to every key that is no padding, some queries at a time.

    Args:
        query: ``[B, H, N, D]``; key, value: ``[B, Hkv, M, D]``; padding: ``[B, M]``, 1 real, or None.

    Returns:
        ``[B, H, N, D]``, the log-sum-exp ``[B, H, N]`` in float32 at least, and ``[B]`` bool: which rows of the batch
        have a key at all (None: all); what is given of the others means nothing.
    """
    shared = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(shared, 1) if shared > 1 else x for x in (key, value))
    hidden = None if padding is None else ~padding[:, None, None, : key.shape[2]].bool()
    rows = query.split(max(1, _SCORES // key.shape[2]), 2)
    if len(rows) > 1 and torch.is_grad_enabled():
        parts = [checkpoint(_read, x, key, value, hidden, scale, use_reentrant=False) for x in rows]
    else:
        parts = [_read(x, key, value, hidden, scale) for x in rows]
    out, total = (torch.cat(x, 2) for x in zip(*parts, strict=True))
    if hidden is None:
        return out, total, None
    seen = ~hidden.all(-1)[:, :, 0]
    return out, torch.where(seen[..., None], total, 0.0), seen[:, 0]


def _read(query: Tensor, key: Tensor, value: Tensor, hidden: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    scores = query @ key.mT
    scores = (scores if scores.dtype == torch.float64 else scores.float()) * scale
    if hidden is not None:
        scores = scores.masked_fill(hidden, torch.finfo(scores.dtype).min)
    total = scores.logsumexp(-1)
    return torch.exp(scores - total[..., None]).to(value.dtype) @ value, total


def _less(query: Tensor, key: Tensor, total: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Queries and keys ``[B, heads, n, whole_width(D + _PIECES)]`` whose scores are those of the given ones less a
    number of each query, ``total [B, H, N]``."""
    rest, pieces = -total / scale, []
    for _ in range(_PIECES):
        pieces.append(rest.to(query.dtype))
        rest = rest - pieces[-1]
    wide = whole_width(query.shape[-1] + _PIECES)
    query = torch.cat([query, torch.stack(pieces, -1)], -1)
    key = pad(key, (0, _PIECES), value=1.0)
    return pad(query, (0, wide - query.shape[-1])), pad(key, (0, wide - key.shape[-1]))


# Older releases (5.5) join a mask that a function of the model's own decides; there the decoder is left as it is.
_PLAIN = "allow_is_bidirectional_skip" in inspect.signature(create_bidirectional_mask).parameters
MERGED: dict[str, Any] = {"T5Gemma2MergedAttention": AskingMerged} if _PLAIN else {}
