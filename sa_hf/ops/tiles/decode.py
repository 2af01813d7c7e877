"""Decoding by torch's operators: the listed keys are gathered, with derivatives, on every device."""

from __future__ import annotations

import torch
from torch import Tensor

from sa_hf.ops.parts import ScoreOptions
from sa_hf.ops.sinks import with_sinks

# Elements of K gathered at once: 2**24 fp32 are 64 MB.
GATHERED_AT_ONCE = 2**24


def decode_gathered(query: Tensor, key: Tensor, value: Tensor, index: Tensor, options: ScoreOptions) -> Tensor:
    """As ``ops.decode.decode_attention``: a run of list places at a time, by an online softmax."""
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
        s, gate = _scores_and_gate(s, i, at, rows, batches, options)
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


def _scores_and_gate(
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
