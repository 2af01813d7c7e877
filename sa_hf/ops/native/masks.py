"""Element masks by integer arithmetic: on the CPU torch selects an element with a branch, 5 to 20 times slower.

Measured on one core for 2**19 elements: ``masked_fill_`` with an irregular mask 1.8 ms, adding 0 or -inf made this way
0.14 ms; ``any(-1)`` of a bool tensor 1.1 ms, the maximum of 8 bools at once 0.03 ms.
"""

from __future__ import annotations

import torch
from torch import Tensor

# The bits of -inf as a signed integer of the same width.
_MINUS_INFINITY = {torch.float32: (torch.int32, -(1 << 23)), torch.float64: (torch.int64, -(1 << 52))}


def additive(kept: Tensor, dtype: torch.dtype) -> Tensor:
    """0 where kept and -inf elsewhere, in fp32 or fp64, of the mask's shape."""
    integer, infinity = _MINUS_INFINITY[dtype]
    return kept.to(integer).sub_(1).bitwise_and_(infinity).view(dtype)


def any_kept(kept: Tensor) -> Tensor:
    """``kept.any(-1)``."""
    if kept.shape[-1] % 8 or not kept.is_contiguous():
        return kept.any(-1)
    return kept.view(torch.int64).amax(-1) > 0


def drop_(x: Tensor, dropped: Tensor) -> Tensor:
    """Set ``x`` (fp32 or fp64) to 0 in place where ``dropped`` (int32: 0 or -1) is -1; of one shape."""
    integer, _ = _MINUS_INFINITY[x.dtype]
    x.view(integer).bitwise_and_(dropped.bitwise_not().to(integer))
    return x
