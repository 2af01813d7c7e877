"""Values of another width than the keys (multi-head latent attention: 192 and 128): brought to one width and back.

Engines have one head_dim. Zeros widen the narrower side: the scores and the first columns of the output are exactly
those of the narrow one, and autograd cuts the gradients. Cost: a copy of what is widened, and products at the greater
width (192 and 128: a forward has 384 columns in place of 320).
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor
from torch.nn.functional import pad


def at_one_width(
    attend: Callable[[Tensor, Tensor, Tensor], Tensor], query: Tensor, key: Tensor, value: Tensor
) -> Tensor:
    """``attend(query, key, value)`` at the greater of two widths, its output cut.

    Args:
        attend: attention that reads no scale off its inputs' width.
        query: ``[B, H, Nq, D]``; key ``[B, Hkv, Nk, D]``; value ``[B, Hkv, Nk, Dv]``.

    Returns:
        ``[B, H, Nq, Dv]``.
    """
    of_keys, of_values = key.shape[-1], value.shape[-1]
    if of_keys == of_values:
        return attend(query, key, value)
    if of_values < of_keys:
        return attend(query, key, pad(value, (0, of_keys - of_values)))[..., :of_values]
    wide_query, wide_key = (pad(x, (0, of_values - of_keys)) for x in (query, key))
    return attend(wide_query, wide_key, value)
