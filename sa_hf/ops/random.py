"""Counter-based randomness: every draw is a function of its counter words alone.

No generator state is read or set, so a recomputation under gradient checkpointing, another rank or another block
order draws the same numbers.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from sa_hf.ops.graphs import hold
from sa_hf.ops.parts import ScoreOptions

_MASK64 = (1 << 64) - 1


def splitmix64(x: int) -> int:
    """One splitmix64 step on an unsigned 64-bit number (Steele et al. 2014)."""
    z = (x + 0x9E3779B97F4A7C15) & _MASK64
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK64
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK64
    return z ^ (z >> 31)


def splitmix64_tensor(x: Tensor) -> Tensor:
    """:func:`splitmix64` on an int64 tensor that holds the 64 bits (two's complement)."""

    def shifted(z: Tensor, by: int) -> Tensor:
        return (z >> by) & ((1 << (64 - by)) - 1)

    z = x + _signed(0x9E3779B97F4A7C15)
    z = (z ^ shifted(z, 30)) * _signed(0xBF58476D1CE4E5B9)
    z = (z ^ shifted(z, 27)) * _signed(0x94D049BB133111EB)
    return z ^ shifted(z, 31)


def _signed(x: int) -> int:
    return x - (1 << 64) if x >= 1 << 63 else x


def hash32(x: Tensor) -> Tensor:
    """A 32-bit mixing function (`lowbias32`, Wellons 2018) on an int32 tensor that holds the 32 bits."""
    x = x ^ ((x >> 16) & 0xFFFF)
    x = x * 0x7FEB352D
    x = x ^ ((x >> 15) & 0x1FFFF)
    x = x * (0x846CA68B - (1 << 32))
    return x ^ ((x >> 16) & 0xFFFF)


def counter_words(numbers: tuple[int, ...], device: torch.device) -> Tensor:
    """Numbers of heads or of sequences, int64 on the device, made once: a copy from the host in every call would hold
    up the launches, and cannot be captured in a CUDA graph."""
    words = _counter_words(numbers, device)
    hold(words, words)
    return words


@lru_cache(maxsize=256)
def _counter_words(numbers: tuple[int, ...], device: torch.device) -> Tensor:
    with torch.inference_mode(False):  # what is made in evaluation serves training too
        return torch.tensor(numbers, dtype=torch.int64, device=device)


def dropout_words(seed: Tensor, sequence: Tensor, head: Tensor, position: Tensor, *, stream: int) -> Tensor:
    """The word of a query row (``stream=0``) or of a key column (``stream=1``) of the dropout counter.

    Args: int64 tensors that broadcast together: the seed (both halves are used), the number of the sequence, the
    query head, the position inside the sequence. Returns int32 of the broadcast shape.
    """
    low, high = _low32(seed), _low32(seed >> 32)
    word = hash32(low ^ (0x632BE5AB if stream else 0))
    for value in (high, _low32(sequence), _low32(head), _low32(position)):
        word = hash32(word ^ value)
    return word


def dropout_factor(options: ScoreOptions, batch: int, heads: int, i: Tensor, j: Tensor) -> Tensor:
    """What dropout makes of the probabilities at the positions ``i [q, 1]`` and ``j [1, k]`` of a call's sequences and
    query heads: 0 or ``1 / (1 - dropout)``, fp32 ``[batch, heads, q, k]``."""
    assert options.seed is not None
    ids = torch.arange(batch, device=i.device) if options.sequence_ids is None else options.sequence_ids
    sequence = ids[:, None, None, None]
    head = counter_words(tuple(options.heads or range(heads)), i.device)[:, None, None]
    rows = dropout_words(options.seed, sequence, head, i, stream=0)
    columns = dropout_words(options.seed, sequence, head, j, stream=1)
    return dropout_keep(rows, columns, options.dropout) / (1 - options.dropout)


def dropout_keep(row_word: Tensor, column_word: Tensor, dropout: float) -> Tensor:
    """Whether a probability is kept, bool: a function of (seed, sequence, head, i, j) through the two words."""
    return dropout_bits(row_word, column_word, dropout) == 0


def dropout_bits(row_word: Tensor, column_word: Tensor, dropout: float) -> Tensor:
    """:func:`dropout_keep` as int32: 0 where kept, -1 (all bits) where dropped; made in one buffer.

    The words are mixed already (:func:`dropout_words`); of a pair of them one product is made, by an odd number of the
    row's own (multiply-shift hashing, Dietzfelbinger et al. 1997), and its upper bits are compared. A full hash of each
    pair would take longer than attention itself (model_cards/results/kernels_h100.md, 1136e07 in a graph: forward+,
    which had one, beside forward).
    ``tests/ops/test_dropout_bits.py`` holds the masks against independent draws.
    """
    value = row_word ^ column_word
    value *= row_word | 1
    # 31 bits: their difference from the threshold is an int32, with the sign of the comparison.
    return value.bitwise_right_shift_(1).sub_(dropout_threshold(dropout)).bitwise_right_shift_(31)


def dropout_threshold(dropout: float) -> int:
    """The signed 31-bit number below which a product's upper bits are dropped."""
    return min(round(dropout * 2**31) - 2**30, 2**30 - 1)


def _low32(x: Tensor) -> Tensor:
    return ((x & 0xFFFFFFFF) - ((x & 0x80000000) << 1)).to(torch.int32)
