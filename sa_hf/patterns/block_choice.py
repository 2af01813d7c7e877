"""Blocks chosen by content: which vectors choose for a row, from which pooled keys, and what they choose."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from sa_hf.errors import SparseAttentionError
from sa_hf.ops.parts import Band
from sa_hf.ops.sequences import Sequences
from sa_hf.patterns.block_sets import BlockSets, block_queries, choose_blocks


class Choice(NamedTuple):
    """How blocks are chosen: ``top_k`` of them among ``sets``, by each query (``by_row``) or each block of queries, and
    by the query heads of a key head together (``shared``) or each for itself."""

    sets: BlockSets
    top_k: int
    by_row: bool
    shared: bool


def chosen_blocks(
    choice: Choice, query: Tensor, start: int, pooled: Tensor, offset: int, length: int, band: Band
) -> tuple[Tensor, Tensor]:
    """The chosen blocks of each row, int64 ``[G, C, R, k]``, and the rows' own blocks ``[R]``.

    Rows are query blocks or queries from position ``offset`` on, C key heads where their query heads choose together,
    else query heads.

    Args:
        query: ``[G, H, m, D]``, the queries of the last m positions, from ``start`` on: those of the rows, and of the
            block before them.
        pooled: ``[G, Hkv, blocks, D]``, of the whole sequence of ``length``.
        band: the model's own window.
    """
    vectors, pooled, low, high = choosing_vectors(choice, query, start, pooled, offset, length)
    chosen = choose_blocks(vectors, pooled, (low, high), choice.sets, band, choice.top_k)
    return chosen, low // choice.sets.block


def choosing_vectors(
    choice: Choice, query: Tensor, start: int, pooled: Tensor, offset: int, length: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What chooses and what is chosen from, for the arguments of :func:`chosen_blocks`: ``[G, C, R, D]``, pooled
    keys ``[G, C, blocks, D]``, and the first and the last position of each row, int64 ``[R]``.

    Raises:
        SparseAttentionError: queries are missing that the choice goes by.
    """
    sets = choice.sets
    if offset and not sets.causal:
        raise SparseAttentionError(
            "bidirectional block_topk attends whole sequences: query and key length must be equal"
        )
    device = pooled.device
    if choice.by_row:
        low = high = torch.arange(offset, length, device=device)
        vectors = query[:, :, offset - start :]
    else:
        first = offset // sets.block
        low = torch.arange(first, sets.count(length), device=device) * sets.block
        high = low + sets.block - 1
        choosing = max(first, sets.window + sets.sinks)
        if sets.causal and choosing < sets.count(length) and start > (choosing - 1) * sets.block:
            raise SparseAttentionError(
                f'block_topk.selection="query_block" chooses for block {choosing} by the queries of block '
                f"{choosing - 1}, and this call has those from position {start} on; give it the queries of the whole "
                'sequence, or use selection="query"'
            )
        # No row's choice may depend on tokens behind it: a causal block goes by the queries of the one before.
        vectors = block_queries(query, start, first - sets.causal, len(low), sets.block)
    group_size = vectors.shape[1] // pooled.shape[1]
    if not choice.shared:
        pooled = pooled.repeat_interleave(group_size, 1)
    elif group_size > 1:
        vectors = vectors.unflatten(1, (-1, group_size)).sum(2, dtype=torch.float64)
    return vectors, pooled, low, high


def check_remembered(sequences: Sequences, start: int, sets: BlockSets) -> None:
    """That the queries which a choice goes by lie at slot ``start`` or behind it.

    Raises:
        SparseAttentionError: padding between the real tokens of a row sets them further apart than the cache keeps.
    """
    gather = None if sequences.key_gather is None else sequences.key_gather.cpu()
    for span in sequences.spans:
        own = (span.key_length - span.query_length) // sets.block
        if span.query_length == 0 or own < sets.window:
            continue
        at = span.key_start + (own - 1) * sets.block
        slot = at if gather is None else int(gather[span.row, at])
        if slot < start:
            raise SparseAttentionError(
                f"row {span.row}: block_topk chooses by the queries from slot {slot} on, and the cache keeps those "
                f"from slot {start} on: zeros inside attention_mask set tokens apart. Pad on the left, or use "
                'selection="query"'
            )
