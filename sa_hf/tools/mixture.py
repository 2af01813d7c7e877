"""A mixture by layers under a budget: each layer gets what keeps most of its attention for the pairs that it costs."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sa_hf.config import SparseAttentionConfig
from sa_hf.errors import SparseAttentionError
from sa_hf.patterns.bigbird import BigBirdAttentionConfig
from sa_hf.patterns.block_topk import BlockTopKAttentionConfig
from sa_hf.patterns.dense import DenseAttentionConfig
from sa_hf.patterns.logsparse import LogSparseAttentionConfig
from sa_hf.patterns.longnet import LongNetAttentionConfig
from sa_hf.patterns.routing import RoutingAttentionConfig
from sa_hf.patterns.sliding_window import SlidingWindowAttentionConfig
from sa_hf.patterns.sparse_transformer import SparseTransformerAttentionConfig
from sa_hf.tools.attention_rows import TRIVIAL_DENSITY, Measured
from sa_hf.tools.suggest import Candidate, Stack, candidates, density_of

DENSE = DenseAttentionConfig()
STEPS = 2000  # in which densities are counted: a step is 0.05 % of the dense pairs of a layer


@dataclass(frozen=True)
class Mixture:
    """One stack: the config of each layer, their mean density at the wanted length, and mean mass at the measured."""

    stack: str
    layers: tuple[SparseAttentionConfig, ...]
    density: float
    mass: float


def ladder(causal: bool) -> list[Candidate]:
    """What a layer can get: the candidates in their published shapes, and cheaper and dearer ones of each. Routing is
    none: without training its centroids are not those that were measured."""
    window = 2 if causal else 3
    more: list[Candidate] = [
        *(SlidingWindowAttentionConfig(window=w, num_sink_tokens=4) for w in (32, 64, 128, 256, 512, 1024)),
        *(BigBirdAttentionConfig(block_size=b) for b in (16, 32)),
        *(LogSparseAttentionConfig(local_window=w) for w in (16, 64, 256)),
        *(SparseTransformerAttentionConfig(kind="fixed", stride=s, summary=s // 8) for s in (32, 64)),
        *(SparseTransformerAttentionConfig(kind="strided", stride=s) for s in (32, 64)),
        LongNetAttentionConfig(segment_length=(64, 256, 1024, 4096), dilated_ratio=(1, 4, 16, 64)),
        *(
            BlockTopKAttentionConfig(block_size=b, top_k=k, num_window_blocks=window)
            for b in (16, 32, 64)
            for k in (2, 4, 8)
        ),
    ]
    return list(dict.fromkeys([*(c for c in candidates(causal) if not isinstance(c, RoutingAttentionConfig)), *more]))


def check_budget(budget: float) -> None:
    """Raise ``SparseAttentionError`` for what is no share of the dense pairs."""
    if not 0 < budget <= 1:
        raise SparseAttentionError(f"budget={budget} must lie in (0, 1]; nearest: {min(1.0, max(0.05, budget))}")


def best_mixture(stack: Stack, length: int, budget: float) -> Mixture:
    """The layers' patterns with the most attention mass whose mean density at ``length`` is at most ``budget``: exact,
    by dynamic programming over densities rounded up to 0.05 %.

    Patterns that keep nearly all pairs of the measured text are left out, as their mass says nothing, but for dense;
    routing, too (:func:`ladder`).

    Args:
        stack: measured, with the configs of :func:`ladder` at least.
        budget: mean over layers of the share of the dense pairs, in (0, 1].

    Raises:
        SparseAttentionError: the budget is out of range, or below what the cheapest patterns cost.
    """
    check_budget(budget)
    assert stack.layers
    costs: dict[SparseAttentionConfig, float] = {DENSE: 1.0}
    for config in stack.layers[0]:
        costs[config] = density_of(config, stack.num_heads, stack.causal, length)  # type: ignore[arg-type]
    options = [_options(layer, costs) for layer in stack.layers]
    capacity = math.floor(budget * STEPS * len(options) + 1e-9)
    cheapest = sum(min(cost for cost, _, _ in layer) for layer in options)
    if cheapest > capacity:
        raise SparseAttentionError(
            f"budget={budget} is below what the cheapest patterns cost at {length} tokens; nearest: "
            f"{math.ceil(1000 * cheapest / (STEPS * len(options))) / 1000}"
        )
    chosen = _knapsack(options, capacity)
    density = sum(costs[config] for config, _ in chosen) / len(chosen)
    return Mixture(stack.name, tuple(c for c, _ in chosen), density, sum(mass for _, mass in chosen) / len(chosen))


Option = tuple[int, float, SparseAttentionConfig]


def _options(
    layer: Mapping[SparseAttentionConfig, Measured], costs: Mapping[SparseAttentionConfig, float]
) -> list[Option]:
    """(cost in steps, mass, config) of one layer, cheapest first, none that another beats in both."""
    every: list[Option] = [(STEPS, 1.0, DENSE)]
    for config, kept in layer.items():
        if kept.chance <= TRIVIAL_DENSITY and not isinstance(config, RoutingAttentionConfig):
            every.append((math.ceil(costs[config] * STEPS - 1e-9), kept.mass, config))
    found: list[Option] = []
    for option in sorted(every, key=lambda o: (o[0], -o[1])):
        if not found or option[1] > found[-1][1]:
            found.append(option)
    return found


def _knapsack(layers: Sequence[Sequence[Option]], capacity: int) -> list[tuple[SparseAttentionConfig, float]]:
    """One option of each layer, of the greatest sum of mass within the capacity."""
    best: dict[int, tuple[float, tuple[int, ...]]] = {0: (0.0, ())}
    for layer in layers:
        after: dict[int, tuple[float, tuple[int, ...]]] = {}
        for cost, (mass, path) in best.items():
            for number, (more, gained, _) in enumerate(layer):
                total = cost + more
                if total <= capacity and (total not in after or mass + gained > after[total][0]):
                    after[total] = (mass + gained, (*path, number))
        # Costs that no cheaper one beats.
        best, top = {}, -1.0
        for cost in sorted(after):
            if after[cost][0] > top:
                best[cost], top = after[cost], after[cost][0]
    _, path = max(best.values(), key=lambda state: state[0])
    return [(layers[at][number][2], layers[at][number][1]) for at, number in enumerate(path)]


def mixture_mapping(mixtures: Sequence[Mixture]) -> dict[str, Any]:
    """The mapping of ``patch_model``, as plain data: of one stack by layers, of several by stack and layers."""
    from sa_hf.hf.state.assignment import format_indices

    stacks = {}
    for mixture in mixtures:
        groups: dict[SparseAttentionConfig, list[int]] = {}
        for layer, config in enumerate(mixture.layers):
            groups.setdefault(config, []).append(layer)
        stacks[mixture.stack] = {
            format_indices(where): "dense" if config == DENSE else json.loads(json.dumps(config.to_dict()))
            for config, where in groups.items()
        }
    return stacks if len(stacks) > 1 else next(iter(stacks.values()))


def write_mixture(
    path: Path, mixtures: Sequence[Mixture], *, model: str, length: int, measured: int, budget: float
) -> None:
    """A YAML file: flags of ``sa-hf finetune --config``, and under ``pattern`` the mapping of ``patch_model``."""
    import yaml

    head = [
        f"# sa-hf suggest: a mixture by layers of at most {budget:g} of the dense pairs at {length} tokens, the most"
    ]
    head.append(f"# attention mass that this allows on {measured} tokens of the text that was given.")
    for m in mixtures:
        head.append(f"# {m.stack}: {m.density:.3f} of the dense pairs, {m.mass:.3f} of the attention mass")
    head.append('# In code: patch_model(model, yaml.safe_load(open(FILE))["pattern"])')
    body = yaml.safe_dump({"model": model, "max_length": length, "pattern": mixture_mapping(mixtures)}, sort_keys=False)
    path.write_text("\n".join([*head, body]), encoding="utf-8")
