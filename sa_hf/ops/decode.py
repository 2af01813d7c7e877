"""Attention of a few new queries over listed positions of a long cache: cost and traffic follow the lists alone."""

from __future__ import annotations

import torch
from torch import Tensor

from sa_hf.errors import SparseAttentionError
from sa_hf.ops.choice import CANDIDATES, CPP, TRITON
from sa_hf.ops.cpp.rows import ELEMENTS
from sa_hf.ops.cpp.steps import Listed, decode_step
from sa_hf.ops.graphs import eager
from sa_hf.ops.parts import ScoreOptions
from sa_hf.ops.reads import Reads, Row, RunLists
from sa_hf.ops.sinks import with_sinks
from sa_hf.ops.transforms import has_tangent
from sa_hf.ops.widths import at_one_width

# Elements of K gathered at once by the torch path: 2**24 fp32 are 64 MB.
GATHERED_AT_ONCE = 2**24


def decode_attention(
    query: Tensor, key: Tensor, value: Tensor, index: Tensor | Reads, options: ScoreOptions, engine: str = "auto",
    kept: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Each query attends the key positions that its list names.

    Args:
        query: ``[B, H, Nq, D]``, the last Nq positions of the sequences; few rows.
        key: ``[B, Hkv, Nk, D]``, H a multiple of Hkv; value: ``[B, Hkv, Nk, Dv]``.
        index: integer ``[B | 1, 1 | Hkv | H, Nq, m]``, positions in ``0 .. Nk - 1`` in any order; -1 is empty, a
            repeated position counts each time. Lists that the heads of a group share are read once for the group.
            Or :class:`Reads`, where :func:`runs_in_place`.
        options: scale, softcap, distance bias, spans and sinks; dropout must be 0.
        engine: "auto" (triton on a GPU where no gradient is wanted), "triton", "native" (the C++ kernel where no
            gradient is wanted), or "torch" (torch's operators, differentiable, also where the others do not serve).
        kept: the slots of the keys, int64 ``[Nk]`` ascending, with :class:`Reads` alone; None: key j stands at slot j.

    Returns:
        ``[B, H, Nq, Dv]`` in the query's dtype; a query without a key is 0.

    Raises:
        SparseAttentionError: shapes that do not fit together, dropout, or an engine that cannot serve the input.
    """
    if isinstance(index, Reads):
        return decode_step(query, key, value, index, options, kept=kept)
    _check(query, key, value, index, options)
    if engine not in CANDIDATES:
        raise SparseAttentionError(f"engine={engine!r} must be one of {list(CANDIDATES)}")
    if engine in ("auto", "triton"):
        reason = _triton_reason(query, key, value, options)
        if engine == "triton" and reason is not None:
            raise SparseAttentionError(f"engine 'triton' cannot decode {tuple(query.shape)}: {reason}; use 'native'")
        if reason is None and (query.is_cuda or engine == "triton"):
            return at_one_width(lambda q, k, v: TRITON.decode(q, k, v, index, options), query, key, value)
    if runs_in_place(query, key, value, options, engine) and not options.extra_tokens:
        length, n_q = key.shape[2], query.shape[2]
        first = length - n_q
        rows = [
            (Row(b, q, 0, 0, first + q, 0, length), _NO_RUNS) for b in range(query.shape[0]) for q in range(n_q)
        ]  # fmt: skip
        reads = Reads.of(rows, len(rows))
        return decode_step(query, key, value, reads, options, listed=Listed(index))
    return _gathered(query, key, value, index, options)


_NO_RUNS = RunLists.of([[]])


def runs_in_place(query: Tensor, key: Tensor, value: Tensor, options: ScoreOptions, engine: str) -> bool:
    """Whether the C++ kernel takes a step: on the CPU, not in fp64, without gradients, in no graph or transform."""
    if engine not in ("auto", "native") or query.device.type != "cpu" or options.dropout > 0:
        return False
    tensors = query, key, value, options.distance_bias, options.spans, options.sinks
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors):
        return False
    dtype = query.dtype
    if dtype not in ELEMENTS or key.dtype != dtype or value.dtype != dtype or not eager(*tensors):
        return False
    if torch._C._are_functorch_transforms_active() or has_tangent(*tensors):
        return False
    return CPP.unsupported(query, options) is None


def _check(query: Tensor, key: Tensor, value: Tensor, index: Tensor, options: ScoreOptions) -> None:
    batch, heads, n_q, _ = query.shape
    kv_heads = key.shape[1]
    if key.shape[:3] != value.shape[:3] or heads % kv_heads or key.shape[0] != batch or key.shape[3] != query.shape[3]:
        raise SparseAttentionError(
            f"query {tuple(query.shape)}, key {tuple(key.shape)} and value {tuple(value.shape)} must be "
            "[B, H, Nq, D], [B, Hkv, Nk, D] and [B, Hkv, Nk, Dv] with H a multiple of Hkv"
        )
    fits = index.dim() == 4 and index.shape[0] in (1, batch) and index.shape[1] in (1, kv_heads, heads)
    if not fits or index.shape[2] != n_q or index.dtype not in (torch.int32, torch.int64):
        raise SparseAttentionError(
            f"index is {index.dtype} {tuple(index.shape)}; it must be an integer tensor [{batch} or 1, one of "
            f"{sorted({1, kv_heads, heads})}, {n_q}, m]"
        )
    if options.dropout > 0:
        raise SparseAttentionError(f"dropout={options.dropout} has no place in decoding; nearest: 0")


def _triton_reason(query: Tensor, key: Tensor, value: Tensor, options: ScoreOptions) -> str | None:
    tensors = query, key, value, options.distance_bias, options.spans, options.sinks
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors):
        return "its decode kernel has no backward"
    if has_tangent(*tensors):
        return "its decode kernel has no forward-mode derivative"
    return TRITON.unsupported(query, options)


def _gathered(query: Tensor, key: Tensor, value: Tensor, index: Tensor, options: ScoreOptions) -> Tensor:
    """Gather and attend, a run of list places at a time, by an online softmax."""
    batch, heads, n_q, _ = query.shape
    width = max(key.shape[3], value.shape[3])
    stats = torch.float64 if query.dtype == torch.float64 else torch.float32
    group = heads // key.shape[1]
    if index.shape[1] not in (1, heads):
        index = index.repeat_interleave(group, dim=1)
    index = index.expand(batch, heads, n_q, -1)
    rows = torch.arange(heads, device=query.device)[:, None, None]
    batches = torch.arange(batch, device=query.device)[:, None, None, None]
    i = torch.arange(key.shape[2] - n_q, key.shape[2], device=query.device)[:, None]
    peak = torch.full((batch, heads, n_q, 1), -torch.inf, dtype=stats, device=query.device)
    total = torch.zeros_like(peak)
    acc = torch.zeros(batch, heads, n_q, value.shape[3], dtype=stats, device=query.device)
    step = max(1, GATHERED_AT_ONCE // (batch * heads * n_q * width))
    for places in index.long().split(step, dim=-1) if index.shape[-1] else ():
        at = places.clamp(min=0)
        k, v = (x[batches, rows // group, at].to(stats) for x in (key, value))
        s = (k @ query.to(stats).unsqueeze(-1)).squeeze(-1) * options.scale
        s, gate = _options(s, i, at, rows, batches, options)
        kept = (places >= 0) & (gate > 0)
        s = s.masked_fill(~kept, -torch.inf)
        new_peak = torch.maximum(peak, s.detach().amax(-1, keepdim=True))
        shift = new_peak.masked_fill(new_peak == -torch.inf, 0.0)
        p = torch.exp(s - shift) * gate
        decay = torch.exp(peak - shift)
        total = total * decay + p.sum(-1, keepdim=True)
        acc = acc * decay + (p.unsqueeze(-2) @ v).squeeze(-2)
        peak = new_peak
    total = torch.where(total > 0, total, 1.0)
    out, _ = with_sinks(acc / total, (torch.log(total) + peak).squeeze(-1), options.sinks)
    return out.to(query.dtype)


def _options(
    s: Tensor, i: Tensor, j: Tensor, rows: Tensor, batches: Tensor, options: ScoreOptions
) -> tuple[Tensor, Tensor]:
    """Softcap, bias and gate at query positions ``i`` and key positions ``j [B, H, Nq, m]``: ``(score, gate)``."""
    if options.softcap is not None:
        s = options.softcap * torch.tanh(s / options.softcap)
    if options.distance_bias is not None:
        table = options.distance_bias.to(s.dtype)
        centre = (table.shape[1] + 1) // 2 - 1
        real = (i >= options.extra_tokens) & (j >= options.extra_tokens)
        s = s + torch.where(real, table[rows, (j - i).clamp(-centre, centre) + centre], 0.0)
    if options.spans is None:
        return s, torch.ones_like(s)
    span = options.spans.to(s.dtype)[batches, rows if options.spans.shape[1] > 1 else torch.zeros_like(rows), j]
    gate = torch.clamp(1 + (span - (i - j)) / options.ramp, 0, 1)
    return s, torch.where(i == j, 1.0, gate)
