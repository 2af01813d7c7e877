"""TEMPORARY stand-in, replaced by the tile engine: dense per part."""
from __future__ import annotations
import torch
from torch import Tensor
from sa_hf.ops.engine import Gradients
from sa_hf.ops.parts import Part, ScoreOptions
from sa_hf.ops.reference import _slot_mask


class NativeEngine:
    name = "native"

    def unsupported(self, query: Tensor, options: ScoreOptions) -> str | None:
        return None

    def _probs(self, part, q, k, options, lse=None):
        mask = _slot_mask(part, q.device)
        if isinstance(part.query_index, Tensor):
            mask = mask & (part.query_index >= 0)[..., :, None]
        if isinstance(part.key_index, Tensor):
            mask = mask & (part.key_index >= 0)[..., None, :]
        g = q.shape[1] // k.shape[1]
        s = (q.double() @ k.double().repeat_interleave(g, 1).transpose(-1, -2)) * options.scale
        assert options.softcap is None and options.distance_bias is None and options.dropout == 0 and options.spans is None
        s = s.masked_fill(~mask, -torch.inf)
        if lse is None:
            lse = torch.logsumexp(s, -1)
        safe = torch.where(torch.isfinite(lse), lse.double(), torch.inf)
        return torch.exp(s - safe[..., None]).nan_to_num(0.0), lse, g

    def forward(self, part: Part, q, k, v, options):
        p, lse, g = self._probs(part, q, k, options)
        return (p @ v.double().repeat_interleave(g, 1)).to(q.dtype), lse.float()

    def backward(self, part, q, k, v, out, lse, go, options):
        p, _, g = self._probs(part, q, k, options, lse)
        go = go.double()
        delta = (go * out.double()).sum(-1, keepdim=True)
        kk, vv = k.double().repeat_interleave(g, 1), v.double().repeat_interleave(g, 1)
        ds = p * (go @ vv.transpose(-1, -2) - delta) * options.scale
        dq, dk, dv = ds @ kk, ds.transpose(-1, -2) @ q.double(), p.transpose(-1, -2) @ go
        fold = lambda x: x.view(x.shape[0], -1, g, *x.shape[2:]).sum(2)
        return Gradients(dq.to(q.dtype), fold(dk).to(q.dtype), fold(dv).to(q.dtype))
