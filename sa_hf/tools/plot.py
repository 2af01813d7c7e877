"""A patched model's attention, layer by layer, as one picture: static patterns, and what has been learned or routed.

What a layer reads that follows its data (Expire-Span, Routing) is seen, not derived (``seen.py``).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from sa_hf.config import SparseAttention
from sa_hf.errors import SparseAttentionError
from sa_hf.hf.state.assignment import format_indices
from sa_hf.hf.state.layers import leaves
from sa_hf.hf.state.patch import required_patch
from sa_hf.hf.state.sites import Site, root_model
from sa_hf.layer import AttentionInputs
from sa_hf.ops.host import with_host_defaults
from sa_hf.patterns.base import StaticPatternConfig
from sa_hf.patterns.drawing import (
    DENSE_LENGTH,
    KEPT,
    PLOT_CELLS,
    SHOWN_LENGTHS,
    Panel,
    draw_panels,
    mask_cells,
    part_cells,
    part_colours,
    shown_length,
)
from sa_hf.patterns.routing import RoutingAttention
from sa_hf.patterns.sparsebert import SparseBertAttention
from sa_hf.tools.seen import attended, inputs_seen

NEEDS_TEXT = "what this layer reads\ndepends on the text:\ngive one (--text FILE)"


@dataclass(frozen=True)
class _Row:
    """Layers that look the same: one row of panels."""

    stack: str
    layers: list[int]
    site: Site
    child: SparseAttention


@with_host_defaults
def plot_model(
    model: nn.Module, path: str | Path, *, input_ids: Tensor | None = None, length: int | None = None, heads: int = 1
) -> list[str]:
    """Draw the sparse layers of a patched model, a row for each, layers that look the same in one.

    Args:
        input_ids: int64 ``[1, n]``, what layers are drawn on whose pairs follow their data, and of which ``figures``
            tells afterwards. Without it those are left blank, with a note.
        length: tokens of the layers that need no text; None is as many as show every pattern, of 256 to 1,024, or less
            where the model or a mask has less.
        heads: panels of a row.

    Returns:
        The rows left blank, by name.

    Raises:
        ImportError: matplotlib is missing.
        SparseAttentionError: the model is not patched, all its layers are dense, or all need a text.
    """
    root = root_model(model)
    rows = _grouped(required_patch(root, "plot").sparse_sites(root))
    if not rows:
        raise SparseAttentionError(f"all attention layers of {type(root).__name__} are dense: nothing to draw")
    limits = [r.site.spec.max_length for r in rows] + [_mask_limit(p) for r in rows for p in leaves(r.child)]
    wanted = length or max(_shown_length(r.site, p) for r in rows for p in leaves(r.child))
    shown = min([wanted, *(limit for limit in limits if limit is not None)])
    if length is not None and shown < length:
        raise SparseAttentionError(f"length={length} is above what the model's layers take; nearest: {shown}")
    seen = {} if input_ids is None else inputs_seen(root, (*(row.child for row in rows), *_routed(rows)), input_ids)
    drawn = [_panels(row, shown, heads, seen.get(id(row.child))) for row in rows]
    for part in _routed(rows):
        if id(part) in seen:  # last: a layer that is drawn runs again, and forgets its figures
            part.note_clusters(seen[id(part)])
    blank = [_name(row) for row, panels in zip(rows, drawn, strict=True) if all(not p.cells for p in panels)]
    if len(blank) == len(rows):
        raise SparseAttentionError("what every layer of this model reads depends on the text; add --text FILE")
    draw_panels(drawn, path, type(root).__name__)
    return blank


def _grouped(sites: list[tuple[Site, SparseAttention]]) -> list[_Row]:
    rows: dict[Any, _Row] = {}
    for site, child in sites:
        key = (site.stack, *(_looks(part, site) for part in leaves(child)))
        row = rows.setdefault(key, _Row(site.stack, [], site, child))
        row.layers.append(site.spec.layer_idx)
    return list(rows.values())


def _looks(part: SparseAttention, site: Site) -> Any:
    """Equal for parts of two layers that read the same pairs."""
    if isinstance(part.config, StaticPatternConfig):
        return part.config, part.heads, part.config.layer_of_plan(site.spec.layer_idx)
    return id(part.owner) if isinstance(part, SparseBertAttention) else id(part)


def _shown_length(site: Site, part: SparseAttention) -> int:
    """The length at which a picture shows the part's pattern, as long as that is quick to draw; of one that is
    learned, the smallest."""
    if isinstance(part.config, StaticPatternConfig):
        return min(DENSE_LENGTH, shown_length(part.config, site.spec.causal, 1))
    return SHOWN_LENGTHS[0]


def _mask_limit(part: SparseAttention) -> int | None:
    """The longest sequence that a learned mask has a place for."""
    return part.config.mask_length if isinstance(part, SparseBertAttention) and not part.config.structured else None


def _name(row: _Row) -> str:
    patterns = " + ".join(dict.fromkeys(part.config.name for part in leaves(row.child)))
    return f"{patterns}, {row.stack} {'layer' if len(row.layers) == 1 else 'layers'} {format_indices(row.layers)}"


def _panels(row: _Row, length: int, heads: int, inputs: AttentionInputs | None) -> list[Panel]:
    causal, panels = row.site.spec.causal, []
    weights: Tensor | None = None
    for head in range(min(heads, row.site.spec.num_heads)):
        part = next(p for p in leaves(row.child) if head in p.heads)
        pattern, title = part.config.name, f"{_name(row)}\n{'causal' if causal else 'bidirectional'}, head {head}"
        if isinstance(part.config, StaticPatternConfig):
            drawn = _static_cells(part.config, row.site, length, head)
            # One legend serves all rows: its labels name the pattern.
            cells = {pattern if k == KEPT else f"{pattern}: {k}": v for k, v in drawn.items()}
            panels.append(Panel(title, length, causal, cells, part_colours(pattern, cells)))
        elif isinstance(part, SparseBertAttention):
            panels.append(_panel(part.mask(length)[part.heads.index(head)], pattern, title, causal))
        elif inputs is None:
            panels.append(Panel(title, length, causal, {}, {}, NEEDS_TEXT))
        else:
            weights = attended(row.child, inputs) if weights is None else weights
            panels.append(_panel(weights[head], pattern, title, causal))
    return panels


def _static_cells(config: StaticPatternConfig, site: Site, length: int, head: int) -> dict[str, Tensor]:
    spec, cells = site.spec, (PLOT_CELLS, PLOT_CELLS)
    every = part_cells(config, length, cells, spec.causal, spec.num_heads, spec.layer_idx)
    return next(drawn for at, drawn in enumerate(every) if at == head)


def _panel(mask: Tensor, pattern: str, title: str, causal: bool) -> Panel:
    cells = min(len(mask), PLOT_CELLS)
    drawn = {pattern: mask_cells(mask.cpu(), cells, cells)}
    return Panel(title, len(mask), causal, drawn, part_colours(pattern, drawn))


def _routed(rows: list[_Row]) -> list[RoutingAttention]:
    return [part for row in rows for part in leaves(row.child) if isinstance(part, RoutingAttention)]
