"""Launcher of the decode kernels; the contract is that of ``ops.decode.decode_attention`` with its inputs checked."""

from __future__ import annotations

from functools import lru_cache

import torch
import triton
from torch import Tensor

from sa_hf.ops.graphs import hold
from sa_hf.ops.parts import ScoreOptions
from sa_hf.ops.triton.decode import decode_kernel, merge_kernel
from sa_hf.ops.triton.device import on_device
from sa_hf.ops.triton.launch import (
    aligned,
    build_options,
    chunks,
    configuration,
    empty_like,
    packed,
    stats_empty,
    strides,
)
from sa_hf.ops.triton.scores import LOG2_OF_E

# A split reads at least this many keys: below it, merging costs more than the memory's latency saves.
SMALLEST_SPLIT = 256
SPLITS_AT_ONCE = 16
# Programs that fill a machine: two for each of the 132 processors of an H100, where the device does not say.
PROGRAMS_WANTED = 264


def decode(query: Tensor, key: Tensor, value: Tensor, index: Tensor, options: ScoreOptions) -> Tensor:
    hold(query, index)
    query, key, value, index = aligned(query), aligned(key), aligned(value), packed(index)
    batch, heads, n_q, d = query.shape
    group = heads // key.shape[1]
    # Lists of single query heads cannot be packed: each reads other keys.
    pack = 1 if index.shape[1] == heads and group > 1 else group
    _, lists, _, most = index.shape
    out = empty_like(query)
    plain = all(x is None for x in (options.softcap, options.distance_bias, options.spans))
    config = configuration("decode" if plain else "decode+", query)
    programs = batch * (heads // pack) * n_q
    splits = max(1, min(triton.cdiv(_programs(query.device), programs), most // SMALLEST_SPLIT))
    chunk = max(1, triton.cdiv(triton.cdiv(most, splits), config.columns)) * config.columns
    splits = max(1, triton.cdiv(most, chunk))
    # The sinks are one split more, which holds their logits and no value.
    slots = splits if options.sinks is None else splits + 1
    lines = batch * heads * n_q * slots
    part, part_lse = stats_empty(query, max(1, lines * d)), stats_empty(query, max(1, lines))
    if options.sinks is not None:
        part[: lines * d].view(-1, slots, d)[:, -1] = 0
        part_lse[:lines].view(batch, heads, n_q, slots)[..., -1] = options.sinks[:, None]
    bias = None if options.distance_bias is None else (options.distance_bias.float() * LOG2_OF_E).contiguous()
    spans = None if options.spans is None else packed(options.spans.float())
    rows = max(config.rows, 1 << (pack - 1).bit_length())
    with on_device(query.device):
        decode_kernel[splits, heads // pack * n_q, batch](
            query, key, value, out, part, part_lse, index, bias, spans,
            **strides("q", query.stride()), **strides("k", key.stride()), **strides("v", value.stride()),
            **strides("o", out.stride()),
            sib=lists * n_q * most if index.shape[0] > 1 else 0, sih=n_q * most if lists > 1 else 0,
            seb=0 if spans is None else spans.shape[1] * spans.shape[2],
            seh=0 if spans is None or spans.shape[1] == 1 else spans.shape[2],
            n_q=n_q, n_k=key.shape[2], heads=heads, group=group, packed=pack, most=most, chunk=chunk, splits=slots,
            centre=0 if bias is None else (bias.shape[1] + 1) // 2 - 1, extra=options.extra_tokens,
            scale=float(options.scale), softcap=1.0 if options.softcap is None else float(options.softcap),
            inv_ramp=1.0 / float(options.ramp), ROWS=rows, BLOCK_K=config.columns, **chunks(d),
            SOFTCAP=options.softcap is not None, **build_options(config),
        )  # fmt: skip
        if slots > 1:
            merge_kernel[(batch * heads * n_q,)](
                part, part_lse, out, **strides("o", out.stride()), n_q=n_q, heads=heads, splits=slots,
                SPLITS_AT_ONCE=SPLITS_AT_ONCE, D=d, WIDTH=1 << (d - 1).bit_length(), **build_options(),
            )  # fmt: skip
    return out


@lru_cache(maxsize=16)
def _programs(device: torch.device) -> int:
    if device.type != "cuda":
        return PROGRAMS_WANTED
    return 2 * torch.cuda.get_device_properties(device).multi_processor_count
