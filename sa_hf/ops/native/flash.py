"""Torch's own CPU flash attention, called on batches of tiles where there are no compiled kernels.

The op takes the log-sum-exp and the output in its backward, so handing it those of a whole plan gives the exact
gradient of a union of parts.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from sa_hf.ops.parts import ScoreOptions

_FORWARD = "_scaled_dot_product_flash_attention_for_cpu"
_BACKWARD = "_scaled_dot_product_flash_attention_for_cpu_backward"
# The op is private to torch: only the schema that was tried is called.
_SCHEMAS = {
    _FORWARD: "(Tensor query, Tensor key, Tensor value, float dropout_p=0., bool is_causal=False, *, "
    "Tensor? attn_mask=None, float? scale=None) -> (Tensor output, Tensor logsumexp)",
    _BACKWARD: "(Tensor grad_out, Tensor query, Tensor key, Tensor value, Tensor out, Tensor logsumexp, "
    "float dropout_p, bool is_causal, *, Tensor? attn_mask=None, float? scale=None) -> "
    "(Tensor grad_query, Tensor grad_key, Tensor grad_value)",
}


@cache
def has_op() -> bool:
    """Whether this torch has both ops with the known schemas."""
    for name, schema in _SCHEMAS.items():
        packet = getattr(torch.ops.aten, name, None)
        if packet is None or str(packet.default._schema) != f"aten::{name}{schema}":
            return False
    return True


def serves(x: Tensor, options: ScoreOptions) -> bool:
    """Whether the op can run tiles of ``x``, in fp32, under these options, spans apart."""
    return (
        x.device.type == "cpu"
        and x.dtype != torch.float64
        and options.dropout == 0
        and options.softcap is None
        and options.distance_bias is None
        and has_op()
    )


def flash_forward(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float, *, causal: bool
) -> tuple[Tensor, Tensor]:
    """``q [T, a, d]``, ``k, v [T, m, d]``, ``bias [T | 1, a | 1, m]`` added to the scores (-inf leaves a pair out) ->
    output ``[T, a, d]``, log-sum-exp ``[T, a]``."""
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        q[:, None], k[:, None], v[:, None], 0.0, causal, attn_mask=_expanded(bias, q, k), scale=scale
    )
    lse = lse.view(q.shape[:2])
    if bias is not None:
        # The op leaves 0 as the log-sum-exp of a row without keys.
        lse = lse.masked_fill(torch.isneginf(bias.amax(-1)), -torch.inf)
    return out[:, 0], lse


def flash_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, bias: Tensor | None, scale: float, *,
    causal: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of queries, keys and values; ``out [T, a, d]`` and ``lse [T, a]`` are the whole plan's."""
    # exp(score - inf) = 0: a row without keys gives no gradient.
    lse = torch.where(torch.isneginf(lse), torch.inf, lse)
    grads = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
        grad[:, None], q[:, None], k[:, None], v[:, None], out[:, None], lse[:, None], 0.0, causal,
        attn_mask=_expanded(bias, q, k), scale=scale,
    )  # fmt: skip
    grad_q, grad_k, grad_v = (g[:, 0] for g in grads)
    return grad_q, grad_k, grad_v


def _expanded(bias: Tensor | None, q: Tensor, k: Tensor) -> Tensor | None:
    """``[T | 1, 1, a, m]``"""
    return None if bias is None else bias.expand(-1, q.shape[1], k.shape[1])[:, None]
