"""Counter-based randomness: every draw is a function of its counter words alone.

No generator state is read or set, so a recomputation under gradient checkpointing, another rank or another block
order draws the same numbers.
"""

from __future__ import annotations

import torch
from torch import Tensor

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


def dropout_keep(row_word: Tensor, column_word: Tensor, dropout: float) -> Tensor:
    """Whether a probability is kept, bool: a function of (seed, sequence, head, i, j) through the two words."""
    # 31 bits: a non-negative int32 compares with the threshold without an unsigned type.
    value = hash32(row_word ^ column_word) & 0x7FFFFFFF
    return value >= min(round(dropout * 2**31), 2**31 - 1)


def _low32(x: Tensor) -> Tensor:
    return ((x & 0xFFFFFFFF) - ((x & 0x80000000) << 1)).to(torch.int32)
