"""The keywords that models hand down to their attention: what the adapter reads, and what changes nothing here."""

from __future__ import annotations

import inspect
from typing import Any

from torch import nn
from transformers.loss.loss_utils import LOSS_MAPPING, fixed_cross_entropy

from sa_hf.errors import SparseAttentionError
from sa_hf.hf.caches.layer import is_cache

# Keywords that the adapter reads.
SERVED = {
    "cu_seq_lens_q", "distance_terms", "dropout", "is_causal", "output_attentions", "position_bias", "scaling",
    "sequence_ids", "sliding_window", "softcap", "sparse_call",
}  # fmt: skip
# What a layer with attention sinks hands down, and what no other layer may be given.
SINKS = "s_aux"
# What attention that adds terms of the distance hands down: those of its queries and of its keys, each or None.
TERMS = "distance_terms"
# Keywords that models hand down to their attention and that change nothing here. Those of ``TransformersKwargs`` are
# named and not read from it: what a newer release adds may change attention. (``seq_idx`` is read by layers of linear
# attention alone; packed rows come with ``cu_seq_lens_q`` or restarting positions, too.)
HARMLESS = {
    "attention_mask", "cache_position", "cu_seq_lens_k", "deterministic", "is_causal", "labels", "logits_to_keep",
    "max_length_k", "max_length_q", "num_items_in_batch", "output_hidden_states", "output_router_logits",
    "position_ids", "return_dict", "seq_idx", "token_type_ids", "use_cache", "interpolate_pos_encoding",
}  # fmt: skip


def _loss_keywords() -> frozenset[str]:
    """What Transformers' losses and torch's cross entropy take: models hand it down to the layers on its way."""
    losses = [*LOSS_MAPPING.values(), fixed_cross_entropy, nn.functional.cross_entropy]
    names = {name for loss in losses for name in inspect.signature(loss).parameters}
    return frozenset(names - SERVED)


LOSS_KEYWORDS = _loss_keywords()
KNOWN = HARMLESS | SERVED | LOSS_KEYWORDS


def unknown_keywords(kwargs: dict[str, Any]) -> list[str]:
    """The keywords of a call that ask for something which the adapter does not know."""
    return [
        name
        for name, value in kwargs.items()
        if name not in KNOWN and value is not None and value is not False and not is_cache(value)
    ]


def refuse_attentions() -> None:
    raise SparseAttentionError(
        "output_attentions=True asks for the n x n attention weights, which sparse attention never builds; "
        "leave it out, or use `with sa_hf.dense(model):` and attn_implementation='eager'"
    )
