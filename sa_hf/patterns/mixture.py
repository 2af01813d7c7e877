"""Several patterns in one layer, each on some of its heads; their state is ``sparse.parts.<i>.*``."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from sa_hf.config import SparseAttention, SparseAttentionConfig
from sa_hf.errors import SparseAttentionError
from sa_hf.layer import AttentionInputs, LayerSpec
from sa_hf.ops.parts import DistanceTerm
from sa_hf.patterns.dense import DenseAttentionConfig

Parts = Sequence[tuple[tuple[int, ...], SparseAttentionConfig]]


def part_spec(heads: tuple[int, ...], spec: LayerSpec) -> LayerSpec:
    """The layer as one part sees it: ``num_heads`` and the head indices stay the model's own, its key heads are those
    that it is given (one per query head where the part cuts through a group of grouped-query attention)."""
    keys = key_heads(heads, spec)
    whole = len(keys) * (spec.num_heads // spec.num_key_value_heads) == len(heads)
    return replace(spec, heads=heads, num_key_value_heads=len(keys), whole_groups=whole)


def key_heads(heads: tuple[int, ...], spec: LayerSpec) -> list[int]:
    """The key head of each key head slot that a part is given."""
    group = spec.num_heads // spec.num_key_value_heads
    if len(heads) % group == 0 and all(
        heads[at : at + group] == tuple(range(heads[at], heads[at] + group)) and heads[at] % group == 0
        for at in range(0, len(heads), group)
    ):
        return [h // group for h in heads[::group]]
    return [h // group for h in heads]


def added(losses: Iterable[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Losses of several modules, summed by name."""
    total: dict[str, Tensor] = {}
    for one in losses:
        for name, loss in one.items():
            total[name] = total[name] + loss.to(total[name].device) if name in total else loss
    return total


class MixedSparseAttention(SparseAttention):
    """Runs each part on its query heads and their keys. Head indices are the model's own inside a part, too."""

    def __init__(self, parts: Parts, spec: LayerSpec) -> None:
        super().__init__(DenseAttentionConfig(), spec)
        listed = sorted(h for heads, _ in parts for h in heads)
        if listed != list(range(spec.num_heads)):
            raise SparseAttentionError(
                f"the parts name heads {listed}; each of 0 to {spec.num_heads - 1} belongs to one"
            )
        self.parts = nn.ModuleList(config.build(part_spec(heads, spec)) for heads, config in parts)
        self.part_heads = [heads for heads, _ in parts]
        order = [h for heads in self.part_heads for h in heads]
        self.place_of_head = [order.index(h) for h in range(spec.num_heads)]

    def forward(self, inputs: AttentionInputs) -> Tensor:
        outputs = [
            part(self._part_inputs(inputs, heads, index))
            for index, (heads, part) in enumerate(zip(self.part_heads, self.parts, strict=True))
        ]
        return torch.cat(outputs, dim=1)[:, self.place_of_head]

    def _part_inputs(self, inputs: AttentionInputs, heads: tuple[int, ...], index: int) -> AttentionInputs:
        keys = key_heads(heads, self.spec)
        remember, beside = inputs.remember, inputs.beside
        named = kept = None
        if remember is not None:

            def named(name: str, tensor: Tensor, dim: int, need: int | None = None, whole: bool = True) -> Tensor:
                joined: Tensor = remember(f"parts.{index}.{name}", tensor, dim, need, whole)
                return joined

        if beside is not None:

            def kept(name: str, tensor: Tensor | None = None) -> Tensor | None:
                found: Tensor | None = beside(f"parts.{index}.{name}", tensor)
                return found

        return replace(
            inputs,
            query=inputs.query[:, list(heads)],
            key=inputs.key[:, keys],
            value=inputs.value[:, keys],
            distance_bias=None if inputs.distance_bias is None else inputs.distance_bias[list(heads)],
            sinks=None if inputs.sinks is None else inputs.sinks[list(heads)],
            query_term=DistanceTerm.of_heads(inputs.query_term, list(heads)),
            key_term=DistanceTerm.of_heads(inputs.key_term, list(heads)),
            remember=named,
            beside=kept,
        )

    def reads_listed_keys(self, inputs: AttentionInputs) -> bool:
        return all(part.reads_listed_keys(inputs) for part in self._parts())

    def aux_losses(self) -> dict[str, Tensor]:
        return added(part.aux_losses() for part in self._parts())

    def unscaled_losses(self) -> dict[str, Tensor]:
        return added(part.unscaled_losses() for part in self._parts())

    def figures(self) -> dict[str, float]:
        return {f"part{i}_{k}": v for i, part in enumerate(self._parts()) for k, v in part.figures().items()}

    def advance_step(self) -> None:
        for part in self._parts():
            part.advance_step()

    def repeat_step(self) -> None:
        for part in self._parts():
            part.repeat_step()

    def drop_graph(self) -> None:
        for part in self._parts():
            part.drop_graph()

    def _parts(self) -> list[SparseAttention]:
        return [part for part in self.parts if isinstance(part, SparseAttention)]
