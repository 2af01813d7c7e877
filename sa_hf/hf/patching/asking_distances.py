"""Attention whose scores have terms of each query or key with the distance between them, asking the interface.

What a query, or a key, adds at a distance is one of few numbers, which it makes for each bucket of distances: a row for
each token (``ops.parts.DistanceTerm``), and never a number of each pair.
"""

from __future__ import annotations

import inspect
import math
import sys
from typing import Any

import torch
from torch import Tensor
from transformers.masking_utils import create_bidirectional_mask

from sa_hf.errors import SparseAttentionError
from sa_hf.hf.forward.masks import MaskRequest
from sa_hf.hf.patching.asking_base import (
    Asking,
    AskingSparse,
    asked_attention_forward,
    asked_mask,
    asks,
    attend,
    dense_masks,
    heads,
)
from sa_hf.hf.patching.asking_relative import AskingConformer
from sa_hf.ops.parts import DistanceTerm

eager_attention_forward = asked_attention_forward  # found by this name, as in Transformers' modules


class AskingDeberta(Asking):
    """The disentangled attention of DeBERTa-v2 and v3 (DeBERTa, He et al. 2021, section 3.1): the score of i and
    j has ``q_i . k(i - j)``, of the query's content and the distance ("c2p"), and ``k_j . q(i - j)``, of the key's
    ("p2c")."""

    has_distance_terms = True

    def asked(self: Any, hidden_states: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        given = _named(self, args, kwargs)
        if given.get("relative_pos") is not None:
            raise SparseAttentionError(
                f"{type(self).__name__} is given relative_pos of all pairs, which a pattern never builds; leave it out"
            )
        states = given.get("query_states")
        query, key, value = self._projected(hidden_states, hidden_states if states is None else states)
        scale = 1 / math.sqrt(query.shape[-1] * self._parts_of_a_score())
        terms = self._terms(query, key, given["rel_embeddings"], scale) if self.relative_attention else None
        dropout = self.dropout.p if hasattr(self.dropout, "p") else self.dropout.drop_prob
        return attend(self, query, key, value, (), given, dropout=dropout, scaling=scale, terms=terms), None

    def _terms(
        self: Any, query: Tensor, key: Tensor, embeddings: Tensor, scale: float
    ) -> tuple[DistanceTerm | None, DistanceTerm | None]:
        """Args: embeddings: ``[buckets, hidden]``, first those of later keys."""
        middle, span, back = self._buckets(key.shape[2], key.device)
        embeddings = self.pos_dropout(embeddings)[middle - span : middle + span]
        places, of_query, of_key = (span + back).clamp(0, 2 * span - 1), None, None
        if "c2p" in self.pos_att_type:
            values = query @ self._of_distances("c2p", embeddings).mT * scale
            of_query = DistanceTerm(values, places)
        if "p2c" in self.pos_att_type:
            values = key @ self._of_distances("p2c", embeddings).mT * scale
            of_key = DistanceTerm(values, places)
        return of_query, of_key

    def _parts_of_a_score(self: Any) -> int:
        """By which it is scaled."""
        return 1 + ("c2p" in self.pos_att_type) + ("p2c" in self.pos_att_type)

    def _projected(self: Any, hidden: Tensor, states: Tensor) -> tuple[Tensor, ...]:
        """Queries of ``states``, keys and values of ``hidden``: ``[batch, heads, n, head_dim]``."""
        made = self.query_proj(states), self.key_proj(hidden), self.value_proj(hidden)
        return tuple(heads(x, self.num_attention_heads) for x in made)

    def _buckets(self: Any, n: int, device: torch.device) -> tuple[int, int, Tensor]:
        """Which embeddings there are: the middle one, how many on either side; and of the distances ``j - i`` from
        ``1 - n`` to ``n - 1`` which one ``i - j`` has, counted from the middle."""
        back = torch.arange(n - 1, -n, -1, device=device)
        if self.position_buckets > 0 and self.max_relative_positions > 0:
            bucket = sys.modules[self.own.__module__].make_log_bucket_position
            back = bucket(back, self.position_buckets, self.max_relative_positions).long()
        return self.pos_ebd_size, self.pos_ebd_size, back

    def _of_distances(self: Any, kind: str, embeddings: Tensor) -> Tensor:
        """What the embeddings are to a query ("c2p") or a key, ``[1, heads, buckets, head_dim]``."""
        if self.share_att_key:
            made = self.key_proj if kind == "c2p" else self.query_proj
        else:
            made = self.pos_key_proj if kind == "c2p" else self.pos_query_proj
        return heads(made(embeddings[None]), self.num_attention_heads)


class AskingSewD(AskingDeberta):
    """SEW-D's, which in older releases hands back no weights where none are asked for."""

    def asked(self: Any, hidden_states: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        both = super().asked(hidden_states, args, kwargs)
        return both[0] if "output_attentions" in inspect.signature(self.own.forward).parameters else both


class AskingFirstDeberta(AskingDeberta):
    """DeBERTa's own, with one projection for queries, keys and values, and all distances up to a longest one."""

    def asked(self: Any, hidden_states: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self.head_logits_proj is not None:
            raise SparseAttentionError(
                "DeBERTa with talking_head=True mixes the scores and the weights of its heads, each of which a pattern "
                "has by itself; load a model with talking_head=False, or keep the layer dense"
            )
        return super().asked(hidden_states, args, kwargs)

    def _parts_of_a_score(self: Any) -> int:
        return 1 + len(self.pos_att_type)

    def _projected(self: Any, hidden: Tensor, states: Tensor) -> tuple[Tensor, ...]:
        count = self.num_attention_heads
        query, key, value = heads(self.in_proj(hidden), count).chunk(3, dim=-1)
        if states is not hidden:
            query = heads(self.in_proj(states), count).chunk(3, dim=-1)[0]
        of_query, of_value = (heads(bias[None, None], count) for bias in (self.q_bias, self.v_bias))
        return query + of_query, key, value + of_value

    def _buckets(self: Any, n: int, device: torch.device) -> tuple[int, int, Tensor]:
        longest = self.max_relative_positions
        return longest, min(n, longest), torch.arange(n - 1, -n, -1, device=device)

    def _of_distances(self: Any, kind: str, embeddings: Tensor) -> Tensor:
        made = self.pos_proj if kind == "c2p" else self.pos_q_proj
        return heads(made(embeddings[None]), self.num_attention_heads)


class AskingDebertaEncoder(Asking):
    """The layers' owner, which makes their mask and the distances of all pairs: it asks for the one, and leaves out the
    others, of which every layer makes what it needs."""

    asks_interface = False

    def forward(self: Any, hidden_states: Any, *args: Any, **kwargs: Any) -> Any:
        return self.own.forward(self, hidden_states, *args, **kwargs)

    def get_attention_mask(self: Any, attention_mask: Any) -> Any:
        if not asks(self) or isinstance(attention_mask, MaskRequest) or attention_mask.dim() != 2:
            return self.own.get_attention_mask(self, attention_mask)
        dtype = next(x.dtype for x in self.parameters() if x.is_floating_point())  # quantised weights are integers
        tokens = torch.empty((*attention_mask.shape, 1), dtype=dtype, device=attention_mask.device)
        return create_bidirectional_mask(config=self.config, inputs_embeds=tokens, attention_mask=attention_mask.long())

    def get_rel_pos(self: Any, hidden_states: Any, query_states: Any = None, relative_pos: Any = None) -> Any:
        return relative_pos if asks(self) else self.own.get_rel_pos(self, hidden_states, query_states, relative_pos)


class AskingWavLM(Asking):
    """WavLM's attention (Chen et al. 2022, section 3.2): a bias of distances, weighed by a gate of each query. The
    first layer's biases of buckets, ``[buckets, heads]``, go from layer to layer where the bias of all pairs did."""

    has_distance_terms = True

    def asked(self: Any, hidden_states: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        given = {"attention_mask": None, **_named(self, args, kwargs)}
        biases = given.pop("position_bias", None)
        if biases is None:
            biases = self.rel_attn_embed(torch.arange(self.num_buckets, device=hidden_states.device))
        query, key, value = (
            heads(part(hidden_states), self.num_heads) for part in (self.q_proj, self.k_proj, self.v_proj)
        )
        n = hidden_states.shape[1]
        buckets = self._relative_positions_bucket(torch.arange(1 - n, n, device=hidden_states.device))
        values = self._gates(hidden_states) * biases.t()[None, :, None]
        out = attend(
            self, query, key, value, (), given, dropout=self.dropout, scaling=self.scaling,
            narrow=lambda mask: asked_mask(self, hidden_states, mask, causal=False),
            terms=(DistanceTerm(values, buckets), None),
        )  # fmt: skip
        return self.out_proj(out), None, biases

    def _gates(self: Any, hidden: Tensor) -> Tensor:
        """Of each query, ``[batch, heads, n, 1]``."""
        made = self.gru_rel_pos_linear(heads(hidden, self.num_heads)).unflatten(-1, (2, 4)).sum(-1)
        update, reset = torch.sigmoid(made).chunk(2, dim=-1)
        gates: Tensor = update * (reset * self.gru_rel_pos_const - 1.0) + 2.0
        return gates


class AskingRelativeKey(AskingSparse):
    """SeamlessM4T v2's encoder of sound, where ``position_embeddings_type="relative_key"`` (Shaw et al. 2018): the
    score of i and j has ``q_i . E[j - i]``, of distances up to a longest one on either side."""

    def prepare(self: Any) -> None:
        self.has_distance_terms = self._has_relative_keys()

    def _has_relative_keys(self: Any) -> bool:
        return bool(self.position_embeddings_type == "relative_key")

    def asked(self: Any, hidden_states: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if not self._has_relative_keys():
            return self.own.forward(self, hidden_states, *args, **kwargs)
        return _with_relative_keys(self, hidden_states, args, kwargs)


class AskingWav2Vec2Bert(AskingConformer):
    """Wav2Vec2-BERT's, which may have sines and cosines of distances in their stead."""

    def prepare(self: Any) -> None:
        super().prepare()
        self.has_distance_terms = bool(self.position_embeddings_type == "relative_key")

    def asked(self: Any, hidden_states: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if not self.has_distance_terms:
            return super().asked(hidden_states, args, kwargs)
        return _with_relative_keys(self, hidden_states, args, kwargs)


def _with_relative_keys(module: Any, hidden: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    query, key, value = (
        heads(part(hidden), module.num_heads) for part in (module.linear_q, module.linear_k, module.linear_v)
    )
    left, right = module.left_max_position_embeddings, module.right_max_position_embeddings
    longest = max(left, right)
    distances = torch.arange(-longest, longest + 1, device=hidden.device).clamp(-left, right) + left
    embeddings = module.distance_embedding(torch.arange(left + right + 1, device=hidden.device))
    values = query @ embeddings.to(query.dtype).t() / math.sqrt(module.head_size)
    out = attend(
        module, query, key, value, args, kwargs, dropout=module.dropout.p, scaling=module.head_size**-0.5,
        terms=(DistanceTerm(values, distances), None),
    )  # fmt: skip
    return module.linear_out(out), None


class AskingSpeechT5(Asking):
    """SpeechT5's attention; its encoder adds relative keys (Shaw et al. 2018), ``q_i . E[i - j]``."""

    causal = None

    def prepare(self: Any) -> None:
        self.is_causal = bool(self.is_decoder)
        self.has_distance_terms = not self.is_decoder

    def asked(self: Any, hidden_states: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        given = _named(self, args, kwargs)
        if given.get("key_value_states") is not None:
            return self.own.forward(self, hidden_states, *args, **dense_masks(kwargs))
        query, key, value = (
            heads(part(hidden_states), self.num_heads) for part in (self.q_proj, self.k_proj, self.v_proj)
        )
        embeddings, of_query = given.pop("position_bias", None), None
        if embeddings is not None:  # of the distances i - j from the least to the greatest: ours are j - i
            longest = embeddings.shape[0] // 2
            places = torch.arange(longest, -longest - 1, -1, device=query.device).clamp(max=longest - 1) + longest
            of_query = DistanceTerm(query @ embeddings.to(query.dtype).t() * self.scaling, places)
        out = attend(
            self, query, key, value, (), given, dropout=self.dropout, scaling=self.scaling, terms=(of_query, None)
        )
        return self.out_proj(out), None


class AskingSpeechT5Distances(Asking):
    """What makes the embeddings of the distances of all pairs: here those of each distance, ``[distances, head_dim]``,
    the least first."""

    asks_interface = False

    def forward(self: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        if not asks(self):
            return self.own.forward(self, hidden_states, *args, **kwargs)
        return self.pe_k(torch.arange(2 * self.max_length, device=hidden_states.device))


class AskingSeamlessEncoder(Asking):
    """The layers' owner, which cuts long sound into chunks by a mask of all pairs: none where one chunk holds all."""

    asks_interface = False

    def forward(self: Any, hidden_states: Any, *args: Any, **kwargs: Any) -> Any:
        return self.own.forward(self, hidden_states, *args, **kwargs)

    def _apply_chunk_attention(self: Any, attention_mask: Any, hidden_states: Tensor) -> Any:
        frames, chunk = hidden_states.shape[1], self.config.speech_encoder_chunk_size
        if not asks(self):
            return self.own._apply_chunk_attention(self, attention_mask, hidden_states)
        if frames <= chunk:
            return attention_mask
        raise SparseAttentionError(
            f"{frames} frames of sound are more than the {chunk} that SeamlessM4T v2 reads as one chunk "
            "(speech_encoder_chunk_size), and its mask of chunks is one of all pairs; give it shorter sound, or load "
            "the model with speech_encoder_chunk_size=None"
        )


def _named(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a call after the hidden states, by their names."""
    names = list(inspect.signature(module.own.forward).parameters)[2:]
    return {**dict(zip(names, args, strict=False)), **kwargs}


DISTANCES: dict[str, Any] = {
    "modeling_deberta.DisentangledSelfAttention": AskingFirstDeberta,
    "modeling_deberta_v2.DisentangledSelfAttention": AskingDeberta,
    "modeling_sew_d.DisentangledSelfAttention": AskingSewD,
    "DebertaEncoder": AskingDebertaEncoder,
    "DebertaV2Encoder": AskingDebertaEncoder,
    "SEWDTransformerEncoder": AskingDebertaEncoder,
    "WavLMAttention": AskingWavLM,
    "Wav2Vec2BertSelfAttention": AskingWav2Vec2Bert,
    "SeamlessM4Tv2ConformerSelfAttention": AskingRelativeKey,
    "SeamlessM4Tv2ConformerEncoder": AskingSeamlessEncoder,
    "SpeechT5Attention": AskingSpeechT5,
    "SpeechT5RelativePositionalEncoding": AskingSpeechT5Distances,
}
