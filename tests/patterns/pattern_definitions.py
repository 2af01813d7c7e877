"""The static patterns written from the specification with plain loops: the tests' own oracle.

``row(config, head, i, n, ...)`` lists the keys of one query, repeats included (LongNet), before causality, the
model's window and ``drop_diagonal``; ``expected`` applies those and fills a tensor. Nothing of the code under test
is called: only field values of its configs are read.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Layer:
    """Where a row stands: the sequence's length, the layer, its number of heads, and whether it is causal."""

    n: int
    causal: bool
    num_heads: int = 1
    layer_idx: int = 0


def dense_row(config: Any, head: int, i: int, at: Layer) -> list[int]:
    return list(range(at.n))


def sliding_window_row(config: Any, head: int, i: int, at: Layer) -> list[int]:
    return [j for j in range(at.n) if abs(i - j) < config.window or j < config.num_sink_tokens]


def longnet_row(config: Any, head: int, i: int, at: Layer) -> list[int]:
    keys = []
    for w, r in zip(config.segment_length, config.dilated_ratio, strict=True):
        s = head % r if config.head_offset == "modulo" else head // math.ceil(at.num_heads / r)
        if (i % w) % r == s:
            keys += [j for j in range(at.n) if j // w == i // w and (j % w) % r == s]
    return keys


def logsparse_row(config: Any, head: int, i: int, at: Layer) -> list[int]:
    return [j for j in range(at.n) if abs(i - j) in _logsparse_distances(config, at.n)]


@cache
def _logsparse_distances(config: Any, n: int) -> frozenset[int]:
    restart = config.restart_length
    m = math.ceil(math.log2(restart)) if config.local_window is None else config.local_window
    distances = set()
    for anchor in [0] if restart is None else range(0, n, restart):
        within = n if restart is None else restart
        steps = [*range(m), *(m - 1 + 2**k for k in range(n.bit_length() + 1))]
        distances |= {anchor + step for step in steps if step <= within}
    return frozenset(distances)


def sparse_transformer_row(config: Any, head: int, i: int, at: Layer) -> list[int]:
    l, c, v = config.stride, config.summary, config.num_summary_groups  # noqa: E741
    part = {"merged": None, "interleaved": at.layer_idx % 2, "per_head": head % 2}[config.head_mode]
    g = (head // 2 if config.head_mode == "per_head" else head) % v
    local, column = set(), set()
    for j in range(at.n):
        if config.kind == "strided":
            if abs(i - j) < l:
                local.add(j)
            if abs(i - j) % l == 0:
                column.add(j)
        else:
            if i // l == j // l:
                local.add(j)
            if l - (g + 1) * c <= j % l < l - g * c:
                column.add(j)
            if part is not None and j == i:
                column.add(j)
    return sorted(local | column if part is None else [local, column][part])


def star_row(config: Any, head: int, i: int, at: Layer) -> list[int]:
    first = 1 if config.relay == "token" else 0
    satellites = list(range(first, at.n))
    if i < first:
        return list(range(at.n))
    keys = set(range(first)) | {j for j in satellites if abs(i - j) <= 1}
    if config.ring and not at.causal:
        place, count = satellites.index(i), len(satellites)
        keys |= {satellites[(place - 1) % count], satellites[(place + 1) % count]}
    return sorted(keys)


def mix(x: int) -> int:
    """The splitmix64 step on unsigned 64-bit numbers, as the specification writes it."""
    mask = 2**64 - 1
    z = (x + 0x9E3779B97F4A7C15) & mask
    z = ((z ^ z >> 30) * 0xBF58476D1CE4E5B9) & mask
    z = ((z ^ z >> 27) * 0x94D049BB133111EB) & mask
    return z ^ z >> 31


def bigbird_blocks(config: Any, head: int, block: int, count: int, at: Layer) -> set[int]:
    """Key blocks of one query block in a sequence of ``count`` blocks."""
    ends = config.global_blocks == "ends"
    leading = config.num_global_blocks // 2 if ends else config.num_global_blocks
    trailing = config.num_global_blocks // 2 if ends and not at.causal else 0
    everything = {b for b in range(count) if b < leading or b >= count - trailing}
    if block in everything and not at.causal:
        return set(range(count))
    reachable = range(block + 1) if at.causal else range(count)
    attended = {b for b in reachable if abs(b - block) <= (config.num_window_blocks - 1) // 2}
    attended |= {block} | {b for b in everything if b in reachable}
    eligible = [b for b in reachable if b not in attended]
    if len(eligible) <= config.num_random_blocks:
        return attended | set(eligible)
    drawn: list[int] = []
    t = 0
    while len(drawn) < config.num_random_blocks:
        state = mix(mix(mix(mix(mix(config.seed) ^ at.layer_idx) ^ head) ^ block) ^ t)
        candidate = state % len(reachable)
        if candidate not in attended and candidate not in drawn:
            drawn.append(candidate)
        t += 1
    return attended | set(drawn)


@cache
def _bigbird_blocks(config: Any, head: int, block: int, count: int, at: Layer) -> frozenset[int]:
    return frozenset(bigbird_blocks(config, head, block, count, at))


def bigbird_row(config: Any, head: int, i: int, at: Layer) -> list[int]:
    b = config.block_size
    blocks = _bigbird_blocks(config, head, i // b, math.ceil(at.n / b), at)
    return [j for j in range(at.n) if j // b in blocks]


DEFINITIONS: dict[str, Callable[[Any, int, int, Layer], list[int]]] = {
    "dense": dense_row,
    "sliding_window": sliding_window_row,
    "longnet": longnet_row,
    "logsparse": logsparse_row,
    "sparse_transformer": sparse_transformer_row,
    "star": star_row,
    "bigbird": bigbird_row,
}
# Patterns whose definition names neither head nor layer: one table serves all.
SAME_FOR_ALL = ("dense", "sliding_window", "logsparse", "star")


@cache
def head_counts(config: Any, head: int, at: Layer) -> Tensor:
    """How often each pair of one head is read, int16 ``[n, n]``, causality applied."""
    counts = [[0] * at.n for _ in range(at.n)]
    for i in range(at.n):
        for j in DEFINITIONS[config.name](config, head, i, at):
            if j <= i or not at.causal:
                counts[i][j] += 1
    return torch.tensor(counts, dtype=torch.int16)


def expected(
    config: Any, heads: tuple[int, ...], at: Layer, *, window: int | None = None, drop_diagonal: bool = False
) -> Tensor:
    """The pattern of some heads, int64 ``[len(heads), n, n]``; ``window``: the model keeps ``|i - j| <= window``."""
    if config.name in SAME_FOR_ALL:
        heads, at = (0,) * len(heads), replace(at, num_heads=1, layer_idx=0)
    counts = torch.stack([head_counts(config, head, at) for head in heads]).long()
    i, j = torch.meshgrid(torch.arange(at.n), torch.arange(at.n), indexing="ij")
    if window is not None:
        counts = torch.where((i - j).abs() <= window, counts, 0)
    if drop_diagonal:
        others = torch.where(i == j, 0, counts)
        # Extra tokens have no column, but every row reads them.
        extra = getattr(config, "num_extra_tokens", 0) > 0 or getattr(config, "relay", None) == "virtual"
        counts = torch.where((others.sum(-1, keepdim=True) > 0) | extra, others, counts)
    return counts
