"""BigBird's own architecture behind transformers' attention interface.

Transformers' BigBird computes its attention itself. With ``attention_type="original_full"`` its self-attention is
BERT's, so the module can ask the ``AttentionInterface`` as BERT's does: its class is swapped for one that does, with
the same weights, names and results. ``sa_hf.tools.convert`` turns block-sparse checkpoints into that form.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.big_bird.modeling_big_bird import (
    BigBirdAttention,
    BigBirdBlockSparseAttention,
    BigBirdSelfAttention,
)

from sa_hf.errors import UnsupportedModelError
from sa_hf.hf.caches.layer import cache_in, is_cache


def eager_attention_forward(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, *,
    dropout: float = 0.0, **kwargs: Any,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The attention of :class:`BigBirdSelfAttention`, operation by operation, so that results stay bit for bit."""
    scores = torch.matmul(query, key.transpose(-1, -2)) / math.sqrt(query.shape[-1])
    if attention_mask is not None:
        scores = scores + attention_mask
    weights = nn.functional.dropout(nn.functional.softmax(scores, dim=-1), dropout, module.training)
    return torch.matmul(weights, value).permute(0, 2, 1, 3).contiguous(), weights


class BigBirdInterfaceAttention(BigBirdSelfAttention):
    """:class:`BigBirdSelfAttention`, asking the interface for its attention function."""

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Any = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Any = None,
        *args: Any,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        cache = cache_in(args, kwargs)
        kwargs = {name: value for name, value in kwargs.items() if not is_cache(value)}
        cross = encoder_hidden_states is not None
        source = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        query = self._heads(self.query(hidden_states))
        if cross and cache is not None and cache.get_seq_length(self.layer_idx) > 0:
            key = cache.layers[self.layer_idx].keys
            value = cache.layers[self.layer_idx].values
        else:
            key, value = self._heads(self.key(source)), self._heads(self.value(source))
            if cache is not None:
                key, value = cache.update(key, value, self.layer_idx)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
        out, weights = attend(
            self, query, key, value, encoder_attention_mask if cross else attention_mask,
            dropout=self.dropout.p if self.training else 0.0, scaling=self.attention_head_size**-0.5, **kwargs,
        )  # fmt: skip
        return out.reshape(*hidden_states.shape[:-1], self.all_head_size), weights

    def _heads(self, x: Tensor) -> Tensor:
        return x.view(*x.shape[:-1], -1, self.attention_head_size).transpose(1, 2)


def ask_interface(model: nn.Module) -> bool:
    """Let the BigBird attention in a model ask the interface; its outputs stay the same. Returns whether any did not.

    Raises:
        UnsupportedModelError: an attention module is in its block-sparse form.
    """
    owners = [module for module in model.modules() if isinstance(module, BigBirdAttention)]
    if any(isinstance(owner.self, BigBirdBlockSparseAttention) for owner in owners):
        raise UnsupportedModelError(
            f"{type(model).__name__} is in its attention_type='block_sparse' form, which computes its attention "
            "itself; convert it with `sa_hf.convert_bigbird(model)` (or `sa-hf convert`), "
            "which keeps its weights and blocks"
        )
    changed = [owner for owner in owners if type(owner.self) is BigBirdSelfAttention]
    for owner in changed:
        owner.self.__class__ = BigBirdInterfaceAttention
        owner.self.config, owner.self.is_causal = owner.config, bool(owner.config.is_decoder)
    return bool(changed)


def ask_no_more(model: nn.Module) -> None:
    """Undo :func:`ask_interface`."""
    for module in model.modules():
        if type(module) is BigBirdInterfaceAttention:
            del module.config, module.is_causal
            module.__class__ = BigBirdSelfAttention
