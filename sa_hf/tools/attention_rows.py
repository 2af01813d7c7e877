"""Dense attention of a model on a text, row by row: how much of its probability a pattern keeps, never n x n.

Each layer runs an ordinary window as wide as the text, which is dense attention in linear memory. What it is given is
seen from outside, and the probabilities of some of its rows, drawn evenly over the text, are made block by block.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from sa_hf.config import SparseAttentionConfig
from sa_hf.layer import AttentionInputs, Geometry, LayerSpec
from sa_hf.ops.parts import DistanceTerm
from sa_hf.patterns.base import StaticPatternConfig
from sa_hf.patterns.block_topk import BlockTopKAttentionConfig, read_pairs
from sa_hf.patterns.routing import RoutingAttentionConfig
from sa_hf.patterns.sliding_window import SlidingWindowAttentionConfig
from sa_hf.tools.seen import attended

ROWS = 128  # measured of each layer; all of a shorter text
ROWS_AT_ONCE = 32
SEED = 0
# A pattern that keeps more than this share of each measured row keeps its mass, too, whatever its shape.
TRIVIAL_DENSITY = 0.9


@dataclass(frozen=True)
class Measured:
    """What a pattern keeps of ``length`` measured tokens.

    ``density``: its share of the dense pairs; ``mass``: its share of the dense model's attention probability, mean over
    rows; ``chance``: the mass that it would keep of even attention, the mean over rows of their kept share.
    """

    length: int
    density: float
    mass: float
    chance: float

    @property
    def gain(self) -> float | None:
        """How far the mass exceeds that of as many pairs chosen blindly, 0, on the way to all of it, 1; None where
        nearly all pairs are kept."""
        return None if self.chance > TRIVIAL_DENSITY else (self.mass - self.chance) / (1 - self.chance)


def mean_of(layers: Sequence[Measured]) -> Measured:
    """What is kept of all layers, each weighing the same."""
    count = len(layers)
    sums = [sum(values) / count for values in zip(*((m.density, m.mass, m.chance) for m in layers), strict=True)]
    return Measured(layers[0].length, sums[0], sums[1], sums[2])


@dataclass(frozen=True, eq=False)
class LayerRows:
    """Rows of a layer's dense attention on one text.

    Args:
        geometry: of the whole text.
        positions: int64 ``[r]``, which rows, ascending.
        probabilities: fp32 ``[H, r, n]``; a row's are 1 together, less what an attention sink takes.
        query, key: ``[1, H, n, D]`` and ``[1, Hkv, n, D]``, what a choice by content goes by; None: no such pattern is
            measured.
        call: the layer's own, and what the layer is, for clusters; None: no such pattern is measured.
    """

    geometry: Geometry
    positions: Tensor
    probabilities: Tensor
    query: Tensor | None = None
    key: Tensor | None = None
    call: tuple[AttentionInputs, LayerSpec] | None = None


def measure_rows(config: SparseAttentionConfig, rows: LayerRows) -> Measured:
    """A pattern's share of the pairs and of the probability in rows of one layer."""
    length = rows.geometry.key_length
    kept = _kept(config, rows)
    dense = rows.geometry.reached(rows.positions[:, None], torch.arange(length)[None]).sum(-1).double()
    sizes = kept.sum(-1).double()
    mass = (rows.probabilities * kept).sum(-1) / rows.probabilities.sum(-1).clamp(min=1e-30)
    # A causal row has few pairs at its start: its share of them is not the share of all pairs.
    density = float(sizes.sum() / (dense.sum() * len(kept)))
    return Measured(length, density, float(mass.double().mean()), float((sizes / dense).mean()))


def _kept(config: SparseAttentionConfig, rows: LayerRows) -> Tensor:
    """The pairs of a pattern in the rows, bool ``[H, r, n]``."""
    geometry = rows.geometry
    i, j = rows.positions[None, :, None], torch.arange(geometry.key_length)[None, None]
    reached = geometry.reached(i, j)
    if isinstance(config, BlockTopKAttentionConfig):
        assert rows.query is not None
        assert rows.key is not None
        return read_pairs(config, rows.query, rows.key, geometry.causal, rows.positions)[0] & reached
    if isinstance(config, RoutingAttentionConfig):
        assert rows.call is not None
        return kept_by_clusters(config, *rows.call, rows.positions)
    assert isinstance(config, StaticPatternConfig)
    head = torch.tensor(geometry.heads)[:, None, None]
    kept = torch.zeros(len(geometry.heads), len(rows.positions), geometry.key_length, dtype=torch.bool)
    for branch in config.branches(geometry):
        kept |= branch(head, i, j) & reached
    return kept


def kept_by_clusters(
    config: RoutingAttentionConfig, inputs: AttentionInputs, spec: LayerSpec, positions: Tensor
) -> Tensor:
    """The pairs, bool ``[H, r, n]``, that routing reads in some rows of one call of a layer on one text, with the
    centroids that training would start from on it (k-means)."""
    child = config.build(spec)
    plain = replace(inputs, remember=None, beside=None, dropout=0.0)
    child.train()
    child(plain)
    child.update_centroids()
    return attended(child.eval(), plain, positions.to(inputs.query.device)).cpu() > 0


def rows_of(inputs: AttentionInputs, layer_idx: int, positions: Tensor) -> LayerRows:
    """The dense probabilities of some rows of a layer, from one call of it on one text, in blocks of rows."""
    query, key = inputs.query[:1].float().cpu(), inputs.key[:1].float().cpu()
    heads, length = query.shape[1], key.shape[2]
    geometry = Geometry(
        length, length, tuple(range(heads)), heads, layer_idx, inputs.causal, band=inputs.band, chunk=inputs.chunk
    )
    keys = key[0].repeat_interleave(heads // key.shape[1], 0).transpose(1, 2)
    j = torch.arange(length)
    pieces = []
    for part in positions.split(ROWS_AT_ONCE):
        scores = query[0, :, part] @ keys * inputs.scale
        if inputs.softcap is not None:
            scores = inputs.softcap * torch.tanh(scores / inputs.softcap)
        if inputs.distance_bias is not None:
            bias = inputs.distance_bias.float().cpu()
            scores = scores + bias[:, j[None] - part[:, None] + (bias.shape[1] + 1) // 2 - 1]
        for term, own in ((inputs.query_term, part[:, None]), (inputs.key_term, j[None])):
            if term is not None:
                first = DistanceTerm(term.values[:1].float().cpu(), term.buckets.cpu())
                scores = scores + first.of_pairs(own, j[None] - part[:, None])[0]
        scores = scores.masked_fill(~geometry.reached(part[:, None], j[None]), -torch.inf)
        if inputs.sinks is not None:
            sink = inputs.sinks.float().cpu()[:, None, None].expand(-1, len(part), 1)
            scores = torch.cat([scores, sink], -1)
        pieces.append(scores.softmax(-1)[..., :length])
    return LayerRows(geometry, positions, torch.cat(pieces, 1), query, key)


def drawn_rows(length: int, count: int = ROWS) -> Tensor:
    """``count`` positions, one drawn in each of as many equal stretches of the text; all of a shorter text."""
    if length <= count:
        return torch.arange(length)
    generator = torch.Generator().manual_seed(SEED)
    found = (torch.arange(count) + torch.rand(count, generator=generator)) * length / count
    return found.long().clamp(max=length - 1)


@torch.no_grad()
def layers_kept(
    model: Any, input_ids: Tensor, configs: Sequence[SparseAttentionConfig]
) -> dict[str, list[dict[SparseAttentionConfig, Measured]]]:
    """What each pattern keeps of each layer's dense attention on a text: ``{stack: [layer: {config: measured}]}``.

    Args:
        model: unpatched; it is given back so. Of an encoder-decoder model both stacks read the text.
        input_ids: int64 ``[1, n]``, on any device.
        configs: static patterns, ``block_topk`` without an indexer, and routing, whose clusters are found on the text
            itself; those that do not serve a layer are left out of it.
    """
    from sa_hf import patch_model, unpatch_model
    from sa_hf.hf.state.patch import required_patch
    from sa_hf.hf.state.sites import root_model

    root, length = root_model(model), input_ids.shape[1]
    found: dict[str, list[dict[SparseAttentionConfig, Measured]]] = {}
    positions = drawn_rows(length)
    training = root.training
    patch_model(root, SlidingWindowAttentionConfig(window=length))
    try:
        root.eval()
        with ExitStack() as stack:
            for site, child in required_patch(root, "measure").sparse_sites(root):
                layers = found.setdefault(site.stack, [])
                layers.append({})

                def note(_: nn.Module, given: tuple[Any, ...], site: Any = site, into: Any = layers[-1]) -> None:
                    if not into:  # a layer that runs twice (ALBERT) is measured once
                        rows = replace(rows_of(given[0], site.spec.layer_idx, positions), call=(given[0], site.spec))
                        into.update({c: measure_rows(c, rows) for c in configs if _serves(c, site.spec)})

                stack.callback(child.register_forward_pre_hook(note).remove)
            ids = input_ids.to(next(root.parameters()).device)
            both = {"decoder_input_ids": ids} if root.config.is_encoder_decoder else {}
            root(input_ids=ids, **both)
    finally:
        root.train(training)
        unpatch_model(root)
    return found


def _serves(config: SparseAttentionConfig, spec: LayerSpec) -> bool:
    if spec.terms and not isinstance(config, StaticPatternConfig):
        return False
    if isinstance(config, BlockTopKAttentionConfig):
        return spec.causal or config.num_window_blocks % 2 == 1
    if isinstance(config, RoutingAttentionConfig):
        return spec.chunk is None and (spec.causal or not spec.sinks)
    return True
