"""T5's learned position bias as a table of distances, never ``[heads, n, n]``.

T5 computes its bias in the first layer and hands it to the others. A pre-hook gives every layer of a patched model
the table ``[1, heads, 1, 2 N - 1]`` instead: column ``j - i + N - 1`` is the bias of query ``i`` and key ``j``.
"""

from __future__ import annotations

import inspect
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from sa_hf.hf.forward.masks import MaskRequest
from sa_hf.ops.parts import DistanceTerm

BUCKET = "_relative_position_bucket"
# Of an encoder's queries and of its keys.
Terms: TypeAlias = tuple[DistanceTerm | None, DistanceTerm | None]


def has_bias_table(module: nn.Module) -> bool:
    """Whether this attention layer computes the bias that later layers share."""
    if not vars(module).get("has_relative_attention_bias", False) or not hasattr(module, BUCKET):
        return False
    return "position_bias" in inspect.signature(type(module).forward).parameters  # slow: of these layers alone


def bias_table(module: Any, length: int, device: torch.device) -> Tensor:
    """The bias of every distance within ``length`` positions, ``[1, heads, 1, 2 * length - 1]``; differentiable."""
    # Not the weight's device: an offloaded weight is on "meta" until its embedding is called.
    distance = torch.arange(1 - length, length, device=device)
    bucket = module._relative_position_bucket(
        distance,
        bidirectional=not module.is_decoder,
        num_buckets=module.relative_attention_num_buckets,
        max_distance=module.relative_attention_max_distance,
    )
    values: Tensor = module.relative_attention_bias(bucket)
    return values.t()[None, :, None]


def expanded_terms(terms: Terms, queries: int, keys: int, extra_tokens: int = 0) -> Tensor:
    """The terms of an encoder's queries and keys ``[batch, heads, queries, keys]``, summed, for a layer left dense;
    pairs with an extra token have none."""
    given = [term for term in terms if term is not None]
    i, j = (torch.arange(n, device=given[0].values.device) for n in (queries, keys))
    i, j = i[:, None], j[None, :]
    own = [i if term is terms[0] else j for term in given]
    total = sum((term.of_pairs(at, j - i) for term, at in zip(given, own, strict=True)), torch.tensor(0.0))
    return total if extra_tokens == 0 else torch.where((i >= extra_tokens) & (j >= extra_tokens), total, 0)


def expanded_bias(table: Tensor, query: Tensor, key: Tensor, request: MaskRequest | None, extra_tokens: int) -> Tensor:
    """The bias ``[1, heads, queries, keys]`` for a layer left dense; pairs with an extra token have none."""
    offset = 0 if request is None else request.query_offset
    first_key = 0 if request is None else request.key_offset
    centre = table.shape[-1] // 2
    i = torch.arange(query.shape[2] - extra_tokens, device=table.device)[:, None] + offset
    j = torch.arange(key.shape[2] - extra_tokens, device=table.device)[None, :] + first_key
    bias = table[:, :, 0][:, :, j - i + centre]
    return torch.nn.functional.pad(bias, (extra_tokens, 0, extra_tokens, 0)) if extra_tokens else bias
