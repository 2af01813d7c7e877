"""Parity of the lists that depend on data (expire-spans, clusters), and CUDA graphs of them replayed with other data.

On a GPU such lists have a fixed capacity and are never read by the host; the oracle is dense, in fp64 on the CPU.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from sa_hf.ops.data_layout import EXPIRING
from sa_hf.ops.parts import ScoreOptions
from sa_hf.ops.planned import planned_attention
from sa_hf.patterns.block_sets import BLOCK_TOPK
from sa_hf.patterns.clusters import CLUSTERS, MEMBERS
from sa_hf.tools.bench import data_oracle
from sa_hf.tools.bench.parity import ParityResult, Shape, bound_of, relative_rms
from sa_hf.tools.bench.timing import capture

NUM_CLUSTERS = 4
RAMP = 16.0
LOCAL_WINDOW = 32
BLOCK = 16


@dataclass(frozen=True)
class DataCase:
    """A kind of data: how it is drawn (floats are differentiated), the attention by it, and its oracle."""

    label: str
    draw: Callable[[Shape, torch.Generator], tuple[Tensor, ...]]
    attend: Callable[..., Tensor]
    oracle: Callable[[Tensor, Tensor, Tensor, tuple[Tensor, ...]], Tensor]


def _options(query: Tensor, spans: Tensor | None = None) -> ScoreOptions:
    return ScoreOptions(query.shape[-1] ** -0.5, spans=spans, ramp=RAMP)


def _draw_spans(shape: Shape, generator: torch.Generator) -> tuple[Tensor, ...]:
    return (torch.rand(shape.batch, 1, shape.length, generator=generator) * (shape.length // 2),)


def _expire(query: Tensor, key: Tensor, value: Tensor, data: tuple[Tensor, ...], engine: str) -> Tensor:
    reach = query.shape[2] // 2 + int(RAMP) - 1
    return planned_attention(query, key, value, EXPIRING, _options(query, data[0]), engine, numbers=[reach])


def _exact_expire(query: Tensor, key: Tensor, value: Tensor, data: tuple[Tensor, ...]) -> Tensor:
    return data_oracle.expiring(query, key, value, data[0], RAMP)


def _draw_clusters(shape: Shape, generator: torch.Generator) -> tuple[Tensor, ...]:
    return tuple(
        torch.randint(NUM_CLUSTERS, (shape.batch, heads, shape.length), generator=generator)
        for heads in (shape.num_heads, shape.num_key_value_heads)
    )


def _window(query: Tensor) -> int:
    return max(2, query.shape[2] // 8)


def _causal(query: Tensor, key: Tensor, value: Tensor, data: tuple[Tensor, ...], engine: str) -> Tensor:
    return planned_attention(
        query, key, value, CLUSTERS, _options(query), engine, tensors=data, numbers=[_window(query), None]
    )  # fmt: skip


def _exact_causal(query: Tensor, key: Tensor, value: Tensor, data: tuple[Tensor, ...]) -> Tensor:
    return data_oracle.clustered(query, key, value, data[0], data[1], _window(query))


def _draw_members(shape: Shape, generator: torch.Generator) -> tuple[Tensor, ...]:
    window = shape.length // (2 * NUM_CLUSTERS) + 1
    sizes = (shape.batch, shape.num_heads, NUM_CLUSTERS, shape.length)
    return tuple(
        torch.rand(sizes, generator=generator).argsort(-1)[..., :window].sort(-1).values.contiguous() for _ in range(2)
    )


def _bidirectional(query: Tensor, key: Tensor, value: Tensor, data: tuple[Tensor, ...], engine: str) -> Tensor:
    return planned_attention(
        query, key, value, MEMBERS, _options(query), engine, tensors=data,
        numbers=[LOCAL_WINDOW, None, None], mean_slots=data[0].shape[2] * data[0].shape[3],
    )  # fmt: skip


def _exact_bidirectional(query: Tensor, key: Tensor, value: Tensor, data: tuple[Tensor, ...]) -> Tensor:
    return data_oracle.members(query, key, value, data[0], data[1], LOCAL_WINDOW)


def _draw_blocks(shape: Shape, generator: torch.Generator) -> tuple[Tensor, ...]:
    """A choice per query, on the blocks before its own and its window of one."""
    own = torch.arange(shape.length) // BLOCK
    drawn = torch.rand(shape.batch, shape.num_heads, shape.length, int(own[-1]) + 1, generator=generator)
    earlier = (torch.arange(drawn.shape[-1]) < own[:, None]) & (torch.arange(drawn.shape[-1]) > 0)
    best = drawn.masked_fill(~earlier, -1.0).topk(min(2, drawn.shape[-1]), dim=-1)
    return (torch.where(best.values >= 0, best.indices, -1).contiguous(),)


def _draw_lists(shape: Shape, generator: torch.Generator) -> tuple[Tensor, ...]:
    """A choice per block of queries."""
    return (_draw_blocks(shape, generator)[0][:, :, ::BLOCK].contiguous(),)


def _choose(query: Tensor, key: Tensor, value: Tensor, data: tuple[Tensor, ...], engine: str) -> Tensor:
    by_row = int(data[0].shape[2] == query.shape[2])
    return planned_attention(
        query, key, value, BLOCK_TOPK, _options(query), engine, tensors=data,
        numbers=[BLOCK, 1, 1, 1, by_row, 0, None, None],
    )  # fmt: skip


def _exact_choose(query: Tensor, key: Tensor, value: Tensor, data: tuple[Tensor, ...]) -> Tensor:
    chosen = data[0]
    if chosen.shape[2] != query.shape[2]:  # of blocks of queries
        chosen = chosen.repeat_interleave(BLOCK, dim=2)[:, :, : query.shape[2]]
    return data_oracle.blocks_chosen(query, key, value, chosen, BLOCK, window=1, sinks=1)


CASES = (
    DataCase("expire_span", _draw_spans, _expire, _exact_expire),
    DataCase("routing-causal", _draw_clusters, _causal, _exact_causal),
    DataCase("routing", _draw_members, _bidirectional, _exact_bidirectional),
    DataCase("block_topk", _draw_lists, _choose, _exact_choose),
    DataCase("block_topk-query", _draw_blocks, _choose, _exact_choose),
)


def case_inputs(case: DataCase, shape: Shape, seed: int) -> tuple[list[Tensor], tuple[Tensor, ...]]:
    """Query, key, value and the gradient of the output; the data."""
    generator = torch.Generator().manual_seed(seed)
    heads = (shape.num_heads, *[shape.num_key_value_heads] * 2, shape.num_heads)
    vectors = [torch.randn(shape.batch, h, shape.length, shape.head_dim, generator=generator) for h in heads]
    return vectors, case.draw(shape, generator)


def run_case(
    attend: Callable[[Tensor, Tensor, Tensor, tuple[Tensor, ...]], Tensor],
    vectors: Sequence[Tensor],
    data: Sequence[Tensor],
) -> tuple[Tensor, ...]:
    """Output and the gradients of query, key, value and of what is continuous in the data."""
    *qkv, grad = vectors
    leaves = [x.detach().requires_grad_() for x in qkv]
    used = [x.detach().requires_grad_() if x.is_floating_point() else x for x in data]
    out = attend(leaves[0], leaves[1], leaves[2], tuple(used))
    return out.detach(), *torch.autograd.grad(out, [*leaves, *(x for x in used if x.requires_grad)], grad)


def data_parity(case: DataCase, dtype: torch.dtype, device: torch.device, *, engine: str, shape: Shape) -> ParityResult:
    """Errors against a fixed bound; ``dense_errors`` repeats it."""
    vectors, data = case_inputs(case, shape, 0)
    rounded = [x.to(dtype) for x in vectors]
    exact = [x.double() if x.is_floating_point() else x for x in data]
    oracle = run_case(case.oracle, [x.double() for x in rounded], exact)
    moved = [x.to(device) for x in rounded], [x.to(device) for x in data]
    first, second = (run_case(partial(case.attend, engine=engine), *moved) for _ in range(2))
    errors = tuple(relative_rms(a.cpu(), b) for a, b in zip(first, oracle, strict=True))
    same = all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    return ParityResult(errors, (bound_of(dtype),) * len(errors), same)


def replay_equals_a_new_run(
    case: DataCase, dtype: torch.dtype, device: torch.device, *, engine: str, shape: Shape
) -> bool:  # fmt: skip
    """Capture forward and backward in a CUDA graph, change all inputs, replay: the result is that of a new run. On the
    CPU, where nothing is captured, the call itself is run again."""
    draws = [case_inputs(case, shape, seed) for seed in (0, 1)]
    vectors, other = ([x.to(device, dtype) for x in drawn[0]] for drawn in draws)
    data, other_data = ([x.to(device) for x in drawn[1]] for drawn in draws)
    attend = partial(case.attend, engine=engine)
    run = partial(run_case, attend, vectors, data)
    replay, result = capture(run) if device.type == "cuda" else (None, ())
    for old, new in zip([*vectors, *data], [*other, *other_data], strict=True):
        old.copy_(new)
    if replay is None:
        result = run()
    else:
        replay()
    return all(torch.equal(a, b) for a, b in zip(result, run_case(attend, other, other_data), strict=True))
