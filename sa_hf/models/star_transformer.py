"""Star-Transformer (Guo et al., NAACL 2019, arXiv 1902.09113): a ring of satellites around one relay, O(n).

``h^0 = e`` (embedding + position) and ``s^0 = mean(e)``; for each of T cycles

    h_i = LN(ReLU(MHA(h_i, [h_{i-1}, h_i, h_{i+1}, e_i, s])))      a list of five: repeats count
    s   = LN(ReLU(MHA(s, [s; H])))

The ring is cyclic: the last token's neighbour is the first. Padding takes no part in the ring, the mean, the maximum
or the relay's keys, whichever side it stands on, also between real tokens.

A saved checkpoint carries a copy of this file, so it imports transformers and torch alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers import initialization as init
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import SequenceClassifierOutput, TokenClassifierOutput
from transformers.utils.generic import ModelOutput

try:
    from sa_hf.errors import SparseAttentionError as StarTransformerError
except ImportError:  # the copy of this file in a checkpoint, where sa_hf is not installed
    StarTransformerError = ValueError  # type: ignore[assignment, misc]  # the class that the installed one derives from

_AUTO_MAP = {
    "AutoConfig": "star_transformer.StarTransformerConfig",
    "AutoModel": "star_transformer.StarTransformerModel",
    "AutoModelForSequenceClassification": "star_transformer.StarTransformerForSequenceClassification",
    "AutoModelForTokenClassification": "star_transformer.StarTransformerForTokenClassification",
}


class StarTransformerConfig(PreTrainedConfig):
    """Configuration of a Star-Transformer.

    Args:
        num_hidden_layers: T, the number of cycles (also ``num_cycles``).
        num_attention_heads: heads of both attentions; divides ``hidden_size``.
        share_cycles: use one set of weights for all cycles.
        type_vocab_size: number of token types; 0 is none (the paper).
        classifier_dropout: dropout before the classification heads; None is ``hidden_dropout_prob``.

    Raises:
        SparseAttentionError: a field is out of its range.
    """

    model_type = "star_transformer"
    attribute_map = {"num_cycles": "num_hidden_layers"}  # noqa: RUF012  (a class attribute of transformers, not a field)

    vocab_size: int = 30522
    hidden_size: int = 256
    num_hidden_layers: int = 4
    num_attention_heads: int = 4
    max_position_embeddings: int = 4096
    type_vocab_size: int = 0
    share_cycles: bool = False
    hidden_dropout_prob: float = 0.1
    attention_probs_dropout_prob: float = 0.0
    classifier_dropout: float | None = None
    initializer_range: float = 0.02
    layer_norm_eps: float = 1e-5
    pad_token_id: int | None = 0

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        # Whole in every checkpoint, so that any Auto class loads it: saving alone would name the saved class only.
        if getattr(self, "auto_map", None) is None:
            self.auto_map = dict(_AUTO_MAP)
        for name in (
            "vocab_size",
            "hidden_size",
            "num_hidden_layers",
            "num_attention_heads",
            "max_position_embeddings",
        ):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise StarTransformerError(f"star_transformer.{name}={value!r} must be an integer >= 1; nearest: 1")
        if self.hidden_size % self.num_attention_heads:
            nearest = max(d for d in range(1, self.num_attention_heads + 1) if self.hidden_size % d == 0)
            raise StarTransformerError(
                f"star_transformer.num_attention_heads={self.num_attention_heads} must divide "
                f"hidden_size={self.hidden_size}; nearest: {nearest}"
            )
        types = self.type_vocab_size
        if isinstance(types, bool) or not isinstance(types, int) or types < 0:
            raise StarTransformerError(
                f"star_transformer.type_vocab_size={types!r} must be an integer >= 0; nearest: 0"
            )
        for name in ("hidden_dropout_prob", "attention_probs_dropout_prob", "classifier_dropout"):
            value = getattr(self, name)
            if value is None and name == "classifier_dropout":
                continue
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 1:
                raise StarTransformerError(f"star_transformer.{name}={value!r} must lie in [0, 1); nearest: 0.0")


@dataclass
class StarTransformerModelOutput(ModelOutput):
    """Output of :class:`StarTransformerModel`; rows of padding are 0.

    Attributes:
        last_hidden_state: ``[B, N, hidden]``, the satellites after the last cycle.
        relay_state: ``[B, hidden]``, the relay after the last cycle.
        pooler_output: ``[B, hidden]``, ``(s + max_i h_i) / 2``.
        hidden_states: with ``output_hidden_states``, the embeddings and each cycle's satellites.
    """

    last_hidden_state: Tensor | None = None
    relay_state: Tensor | None = None
    pooler_output: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None


@dataclass(frozen=True)
class _Ring:
    """Where the real tokens stand, all ``[B, N]``: ``mask`` bool; ``position`` in the sequence, and the slots of the
    ring's neighbours ``before`` and ``after``, int64."""

    mask: Tensor
    position: Tensor
    before: Tensor
    after: Tensor

    @classmethod
    def from_mask(cls, mask: Tensor) -> _Ring:
        rank = mask.long().cumsum(1) - 1
        count = mask.sum(1, keepdim=True).clamp(min=1)
        # Slots of the real tokens first, in order: the r-th of them holds the token of rank r.
        slots = torch.sort((~mask).to(torch.uint8), dim=1, stable=True).indices
        return cls(mask, rank.clamp(min=0), slots.gather(1, (rank - 1) % count), slots.gather(1, (rank + 1) % count))


class StarAttention(nn.Module):
    """Multi-head attention of queries ``[B, N, hidden]`` over keys that the caller lays out."""

    def __init__(self, config: StarTransformerConfig) -> None:
        super().__init__()
        width = config.hidden_size
        self.num_heads = config.num_attention_heads
        self.dropout = config.attention_probs_dropout_prob
        self.query, self.key, self.value, self.output = (nn.Linear(width, width) for _ in range(4))

    def split(self, x: Tensor) -> Tensor:
        """``[B, N, hidden] -> [B, N, heads, head_dim]``."""
        return x.view(*x.shape[:-1], self.num_heads, -1)

    def attend(self, query: Tensor, keys: Tensor, values: Tensor, keep: Tensor | None = None) -> Tensor:
        """``query [B, N, heads, D]`` over ``keys, values [B, N, K, heads, D]``: ``[B, N, hidden]``.

        ``keep [B, N, K]`` marks the keys that take part.
        """
        scores = torch.einsum("bnhd,bnkhd->bnhk", query, keys) * query.shape[-1] ** -0.5
        if keep is not None:
            scores = scores.masked_fill(~keep.unsqueeze(2), -torch.inf)
        weights = scores.softmax(-1, dtype=torch.promote_types(scores.dtype, torch.float32)).to(values.dtype)
        weights = nn.functional.dropout(weights, self.dropout, self.training)
        result: Tensor = self.output(torch.einsum("bnhk,bnkhd->bnhd", weights, values).flatten(2))
        return result


class StarCycle(GradientCheckpointingLayer):
    """One cycle: every satellite, then the relay."""

    def __init__(self, config: StarTransformerConfig) -> None:
        super().__init__()
        self.satellite_attention = StarAttention(config)
        self.relay_attention = StarAttention(config)
        self.satellite_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.relay_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, satellites: Tensor, relay: Tensor, embeddings: Tensor, ring: _Ring) -> tuple[Tensor, Tensor]:
        """``satellites, embeddings [B, N, hidden]``, ``relay [B, 1, hidden]`` -> new satellites and relay."""
        star = self.satellite_attention

        def five(project: nn.Linear) -> Tensor:
            own = project(satellites)
            before, after = (own.gather(1, i.unsqueeze(-1).expand_as(own)) for i in (ring.before, ring.after))
            context = [before, own, after, project(embeddings), project(relay).expand_as(own)]
            return star.split(torch.stack(context, dim=2))  # [B, N, 5, heads, head_dim]

        attended = star.attend(star.split(star.query(satellites)), five(star.key), five(star.value))
        satellites = self.satellite_norm(torch.relu(attended))

        hub = self.relay_attention
        context = torch.cat([relay, satellites], dim=1)
        keys, values = (hub.split(project(context)).unsqueeze(1) for project in (hub.key, hub.value))
        keep = nn.functional.pad(ring.mask, (1, 0), value=True).unsqueeze(1)
        relay = self.relay_norm(torch.relu(hub.attend(hub.split(hub.query(relay)), keys, values, keep)))
        return satellites, relay


class StarTransformerPreTrainedModel(PreTrainedModel):
    """What the Star-Transformer models share."""

    config_class = StarTransformerConfig
    base_model_prefix = "star_transformer"
    supports_gradient_checkpointing = True
    _input_embed_layer = "word_embeddings"
    _no_split_modules = ["StarCycle"]  # noqa: RUF012

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, StarAttention):
            # There is no residual path, so the projections must keep the scale of what passes through them.
            for linear in (module.query, module.key, module.value, module.output):
                init.xavier_uniform_(linear.weight)


class StarTransformerModel(StarTransformerPreTrainedModel):
    """The bare Star-Transformer encoder."""

    def __init__(self, config: StarTransformerConfig) -> None:
        super().__init__(config)
        self.word_embeddings = nn.Embedding(config.vocab_size, config.hidden_size, padding_idx=config.pad_token_id)
        self.position_embeddings = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        if config.type_vocab_size:
            self.token_type_embeddings = nn.Embedding(config.type_vocab_size, config.hidden_size)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)
        self.cycles = nn.ModuleList(
            StarCycle(config) for _ in range(1 if config.share_cycles else config.num_hidden_layers)
        )
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> StarTransformerModelOutput | tuple[Tensor, ...]:
        """Encode a batch.

        Args:
            input_ids: ``[B, N]`` int64, or ``inputs_embeds [B, N, hidden]`` in its place.
            attention_mask: ``[B, N]``, 1 real and 0 padding, on either side or inside.
            token_type_ids: ``[B, N]``, with ``config.type_vocab_size > 0`` alone.

        Raises:
            SparseAttentionError: both or none of ids and embeddings, or an input longer than the position table.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise StarTransformerError("pass exactly one of input_ids and inputs_embeds")
        words = self.word_embeddings(input_ids) if inputs_embeds is None else inputs_embeds
        ring = _Ring.from_mask(self._mask(words, attention_mask))
        embeddings = self._embed(words, token_type_ids, ring)
        count = ring.mask.sum(1, keepdim=True).clamp(min=1)
        satellites, relay = embeddings, (embeddings.sum(1) / count).to(embeddings.dtype).unsqueeze(1)
        states = [satellites]
        for t in range(self.config.num_hidden_layers):
            cycle = self.cycles[0 if self.config.share_cycles else t]
            satellites, relay = cycle(satellites, relay, embeddings, ring)
            satellites = satellites.masked_fill(~ring.mask.unsqueeze(-1), 0)
            states.append(satellites)
        top = satellites.masked_fill(~ring.mask.unsqueeze(-1), -torch.inf).amax(1)
        top = torch.where(ring.mask.any(1, keepdim=True), top, 0.0)
        wants_states = self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
        result = StarTransformerModelOutput(
            last_hidden_state=satellites,
            relay_state=relay.squeeze(1),
            pooler_output=(relay.squeeze(1) + top) / 2,
            hidden_states=tuple(states) if wants_states else None,
        )
        return result if _as_dict(self.config, return_dict) else result.to_tuple()

    def _mask(self, words: Tensor, attention_mask: Tensor | None) -> Tensor:
        if attention_mask is None:
            return torch.ones(words.shape[:2], dtype=torch.bool, device=words.device)
        if attention_mask.shape != words.shape[:2]:
            raise StarTransformerError(
                f"attention_mask has shape {list(attention_mask.shape)}; it must be [batch, length] = "
                f"{list(words.shape[:2])}"
            )
        return attention_mask.to(words.device).bool()

    def _embed(self, words: Tensor, token_type_ids: Tensor | None, ring: _Ring) -> Tensor:
        """Embedding + position (inside the sequence) + type, ``[B, N, hidden]``; 0 at padding."""
        limit = self.config.max_position_embeddings
        if words.shape[1] > limit:
            raise StarTransformerError(
                f"the input has {words.shape[1]} tokens, above max_position_embeddings={limit}; truncate to {limit}"
            )
        embeddings = words + self.position_embeddings(ring.position)
        if token_type_ids is not None:
            if not self.config.type_vocab_size:
                raise StarTransformerError(
                    "token_type_ids were given, but type_vocab_size=0: leave them out "
                    "(tokenizer(..., return_token_type_ids=False)) or build the model with type_vocab_size=2"
                )
            embeddings = embeddings + self.token_type_embeddings(token_type_ids)
        real: Tensor = self.dropout(embeddings).masked_fill(~ring.mask.unsqueeze(-1), 0)
        return real


class StarTransformerWithHead(StarTransformerPreTrainedModel):
    """A Star-Transformer with a linear head; what it stands on and its loss are the subclass's."""

    output_class: type[ModelOutput]

    def __init__(self, config: StarTransformerConfig) -> None:
        super().__init__(config)
        self.star_transformer = StarTransformerModel(config)
        dropout = config.hidden_dropout_prob if config.classifier_dropout is None else config.classifier_dropout
        self.dropout = nn.Dropout(dropout)
        self.classifier = nn.Linear(config.hidden_size, cast(int, config.num_labels))
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> ModelOutput | tuple[Tensor, ...]:
        """As :class:`StarTransformerModel`, with ``labels``; returns ``logits`` and, with labels, ``loss``."""
        encoded = self.star_transformer(
            input_ids, attention_mask, token_type_ids, inputs_embeds, output_hidden_states, return_dict=True
        )
        logits = self.classifier(self.dropout(self.features(encoded)))
        loss = None if labels is None else self.loss(logits, labels)
        result = self.output_class(loss=loss, logits=logits, hidden_states=encoded.hidden_states)
        return result if _as_dict(self.config, return_dict) else result.to_tuple()

    def features(self, encoded: StarTransformerModelOutput) -> Any:
        """What the head reads, ``[..., hidden]``."""
        raise NotImplementedError

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        raise NotImplementedError


class StarTransformerForSequenceClassification(StarTransformerWithHead):
    """A linear head on ``(s + max_i h_i) / 2`` (the paper's section 3.3): ``logits [B, num_labels]`` and ``labels [B]``
    (multi-label: ``[B, num_labels]``)."""

    output_class = SequenceClassifierOutput

    def features(self, encoded: StarTransformerModelOutput) -> Any:
        return encoded.pooler_output

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        loss: Tensor = self.loss_function(labels=labels, pooled_logits=logits, config=self.config)
        return loss


class StarTransformerForTokenClassification(StarTransformerWithHead):
    """A linear head on every satellite: ``logits [B, N, num_labels]`` and ``labels [B, N]`` (-100 is ignored)."""

    output_class = TokenClassifierOutput

    def features(self, encoded: StarTransformerModelOutput) -> Any:
        return encoded.last_hidden_state

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        loss: Tensor = self.loss_function(logits, labels, self.config)
        return loss


def _as_dict(config: PreTrainedConfig, return_dict: bool | None) -> bool:
    return bool(config.return_dict if return_dict is None else return_dict)
