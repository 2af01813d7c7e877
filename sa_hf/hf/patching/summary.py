"""``summary``: what runs where in a patched model."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from functools import lru_cache
from itertools import takewhile
from typing import Any

import torch
from torch import nn

from sa_hf.config import SparseAttention
from sa_hf.errors import SparseAttentionError
from sa_hf.hf.state.activity import place_of
from sa_hf.hf.state.layers import active_child, leaves
from sa_hf.hf.state.patch import required_patch
from sa_hf.hf.state.sites import Left, Site, computes_in, root_model
from sa_hf.layer import DEFAULT_BLOCK, LayerSpec
from sa_hf.ops.choice import CANDIDATES, choose_engine
from sa_hf.ops.host import with_host_defaults
from sa_hf.ops.parts import DistanceTerm, ScoreOptions
from sa_hf.patterns.base import StaticPatternConfig, whole_geometry
from sa_hf.patterns.dense import DenseAttentionConfig

# Bytes of a listed tile (column and kind, int32 each) and of a row statistic (fp32).
TILE_BYTES, STATISTIC_BYTES = 8, 4


@dataclass(frozen=True)
class LayerSummary:
    """One layer; ``index`` is its place in the stack, ``own`` the model's number of it where that is another (a hybrid
    counts the layers without attention, too). ``density`` is kept pairs over those of dense attention, None where it
    depends on the data; ``memory`` estimates the bytes of attention for one sequence (q, k, v, output, statistics,
    lists or weights)."""

    stack: str
    index: int
    pattern: str
    density: float | None
    engine: str
    reason: str
    memory: int
    own: int | None = None


@dataclass(frozen=True)
class Summary:
    """All layers at one length, encoder first; prints as a table. ``left``: what else of the model attends and is left
    as it is, ``{stack: why}`` (towers of images and sound, a half that no pattern can reach)."""

    model: str
    length: int
    layers: list[LayerSummary]
    left: dict[str, str] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready dict."""
        layers = [asdict(layer) for layer in self.layers]
        return {"model": self.model, "length": self.length, "layers": layers, "left": dict(self.left)}

    def __str__(self) -> str:
        rows = [("stack", "layer", "pattern", "density", "engine", "memory", "reason")]
        for layer in self.layers:
            density = "by data" if layer.density is None else f"{layer.density:.2%}"
            memory = f"{layer.memory / 2**20:.1f} MB"
            index = str(layer.index) if layer.own is None else f"{layer.index} (layer {layer.own})"
            rows.append((layer.stack, index, layer.pattern, density, layer.engine, memory, layer.reason))
        widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
        left = [f"left as it is: {stack}, {why}" for stack, why in self.left.items()]
        return "\n".join([f"{self.model} at {self.length} tokens", *lines, *left])

    __repr__ = __str__


@with_host_defaults
def summary(model: nn.Module, length: int | None = None) -> Summary:
    """What runs where: pattern, density, engine and estimated attention memory of each layer.

    Args:
        length: tokens of a sequence; None is the ``max_length`` given to ``patch_model``, else the model's limit.

    Raises:
        SparseAttentionError: the model is not patched, or has no limit and no length is given.
    """
    root = root_model(model)
    patch = required_patch(root, "summary")
    sites = patch.sites.all_sites
    if length is None:
        length = sites[0].spec.max_length
    if length is None:
        raise SparseAttentionError(
            f"{type(root).__name__} has no length limit of its own; give summary(model, length=...)"
        )
    whole_geometry(length, 1, 0, False)
    left = {name: _left(name, one) for name, one in patch.sites.left.items()}
    return Summary(type(root).__name__, length, [_layer(root, site, length) for site in sites], left)


def _left(name: str, stack: Left) -> str:
    layers = f"{len(stack.names)} layers" if stack.names else "all layers"
    layers += "" if name == stack.path else f" in {stack.path!r}"
    why = f"no pattern can go there: {stack.reason}" if stack.reason else f"a mapping can name it: {{{name!r}: ...}}"
    return f"{layers} ({why})"


def _layer(root: nn.Module, site: Site, length: int) -> LayerSummary:
    module = root.get_submodule(site.name)
    place, child = place_of(module), active_child(module)
    device, dtype = computes_in(module)  # the model may have moved since it was patched
    spec, index = replace(site.spec, device=device, dtype=dtype), site.spec.layer_idx
    own = None if place.index == index else place.index
    if not isinstance(child, SparseAttention):
        kept = _static_density(DenseAttentionConfig(), spec, tuple(range(spec.num_heads)), length)
        memory = _memory(spec, length, None, materialised=place.original == "eager")
        return LayerSummary(site.stack, index, "dense", kept, place.original, "left dense", memory, own)
    parts = list(leaves(child))
    densities = [_density(part, spec, length) for part in parts]
    known = [d * len(p.heads) for d, p in zip(densities, parts, strict=True) if d is not None]
    density = sum(known) / spec.num_heads if len(known) == len(parts) else None
    name = " + ".join(dict.fromkeys(part.config.name for part in parts))
    engine, reason = _engine(place.engine, spec)
    return LayerSummary(site.stack, index, name, density, engine, reason, _memory(spec, length, density), own)


def _density(part: SparseAttention, spec: LayerSpec, length: int) -> float | None:
    if isinstance(part.config, StaticPatternConfig):
        return _static_density(part.config, spec, part.heads, length)
    learned = getattr(part, "density", None)
    return None if learned is None else float(learned(length))


@lru_cache(maxsize=1024)
def _static_density(config: StaticPatternConfig, spec: LayerSpec, heads: tuple[int, ...], length: int) -> float:
    """Kept pairs inside the model's own window, over all pairs (causal: of the past)."""
    whole = whole_geometry(length, spec.num_heads, spec.layer_idx, spec.causal)
    shared = config.same_for_all_heads(whole)
    geometry = replace(whole, heads=heads[:1] if shared else heads, band=spec.band, chunk=spec.chunk)
    pairs = length * (length + 1) // 2 if spec.causal else length * length
    return float(config.row_sizes(geometry).sum()) / (pairs * len(geometry.heads))


def _engine(asked: str, spec: LayerSpec) -> tuple[str, str]:
    """The engine that serves the layer as it stands, and why that one."""
    query = torch.empty(1, 1, 1, spec.head_dim, dtype=spec.dtype, device=spec.device)
    some = DistanceTerm(query.new_empty(1, 1, 1, 1), torch.zeros(1, dtype=torch.int64, device=query.device))
    options = ScoreOptions(scale=1.0, query_term=some if spec.terms else None)
    chosen = choose_engine(asked, query, options)
    before = takewhile(lambda engine: engine is not chosen, CANDIDATES[asked])
    passed = [(engine.name, engine.unsupported(query, options)) for engine in before]
    reasons = [f"{name}: {reason}" for name, reason in passed if reason is not None]
    return chosen.name, "; ".join(reasons) or ("fastest here" if asked == "auto" else "asked for")


def _memory(spec: LayerSpec, length: int, density: float | None, *, materialised: bool = False) -> int:
    """Bytes of one sequence's attention; lists are counted as if no two heads shared them."""
    size = torch.empty(0, dtype=spec.dtype).element_size()
    rows = length * spec.num_heads
    held = 2 * (rows + length * spec.num_key_value_heads) * spec.head_dim * size + rows * STATISTIC_BYTES
    if materialised:
        held += rows * length * size
    if density is not None:
        tiles = density * spec.num_heads * (length / DEFAULT_BLOCK) ** 2 / (2 if spec.causal else 1)
        held += int(tiles * TILE_BYTES)
    return held
