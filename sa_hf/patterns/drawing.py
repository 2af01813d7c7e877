"""Pictures of a pattern: in the terminal, and as an image file in the one style of the model cards."""

from __future__ import annotations

import os
import textwrap
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sa_hf.config import Drawing, SparseAttentionConfig, draw_by
from sa_hf.errors import SparseAttentionError
from sa_hf.ops.host import with_host_defaults
from sa_hf.ops.layout import Predicate
from sa_hf.patterns.base import StaticPatternConfig, whole_geometry
from sa_hf.patterns.palette import FUTURE, LEFT_OUT, colour_of, shades

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SHOWN_DENSITY = 0.4  # below it a picture has light and dark
SHOWN_LENGTHS = (256, 512, 1024, 2048, 4096, 8192)  # beyond, a preview of 62 columns loses thin lines
PREVIEW_COLUMNS = 62  # cells of a preview; with the frame 64 characters
PLOT_CELLS = 512  # resolution of an image
# Up to this length the dense mask is drawn; beyond it the rows' key lists are, never an n x n tensor ...
DENSE_LENGTH = 1024
# ... of at most so many rows, spread evenly.
ROWS_SAMPLED = 4096
SHADES = " ░▒▓█"
DPI = 300  # 1,140 points for one panel: twice what a model card shows
TITLE_WIDTH = 51  # characters over a panel
GRID_DPI = 200  # of larger grids
MAX_PANELS = 4
LEGEND_CHARACTERS, LEGEND_PATCH = 15, 7  # of a legend, to an inch; taken by an entry's patch and the gaps around it
KEPT = "kept"  # label of a pattern of one piece


def shown_length(config: SparseAttentionConfig, causal: bool, heads: int) -> int:
    """The first power of two at which a picture is no solid block; the smallest where none is (dense attention)."""
    for length in SHOWN_LENGTHS:
        if config.density(length, heads, causal=causal) < SHOWN_DENSITY:
            return length
    return SHOWN_LENGTHS[0]


# -- cells ---------------------------------------------------------------------------------------------------------


def mask_cells(mask: Tensor, rows: int, columns: int) -> Tensor:
    """Share of kept pairs in the cells of a grid over ``mask`` (bool ``[queries, keys]``), ``[rows, columns]``."""
    row = torch.arange(mask.shape[0]) * rows // mask.shape[0]
    column = torch.arange(mask.shape[1]) * columns // mask.shape[1]
    by_row = torch.zeros(rows, mask.shape[1], dtype=torch.float32).index_add_(0, row, mask.float())
    kept = torch.zeros(rows, columns, dtype=torch.float32).index_add_(1, column, by_row)
    pairs = torch.bincount(row, minlength=rows)[:, None] * torch.bincount(column, minlength=columns)
    return kept / pairs.clamp(min=1)


def pattern_cells(
    config: SparseAttentionConfig, length: int, cells: tuple[int, int], causal: bool, num_heads: int, layer_idx: int
) -> Iterator[Tensor]:
    """Per head, the cells of a pattern at a length, ``[rows, columns]`` as in :func:`mask_cells`."""
    for parts in part_cells(config, length, cells, causal, num_heads, layer_idx):
        yield torch.stack(list(parts.values())).sum(0)


def part_cells(
    config: SparseAttentionConfig, length: int, cells: tuple[int, int], causal: bool, num_heads: int, layer_idx: int
) -> Iterator[dict[str, Tensor]]:
    """Per head, the cells of each part of a pattern that a picture tells apart, by label; a pair of several parts
    belongs to the first of them."""
    rows, columns = min(cells[0], length), min(cells[1], length)
    if not isinstance(config, StaticPatternConfig):
        for mask in config.mask(length, num_heads, layer_idx, causal):
            yield {KEPT: mask_cells(mask, rows, columns)}
        return
    whole = whole_geometry(length, num_heads, layer_idx, causal)
    named = config.named_parts(whole) or {KEPT: _everything}
    if length <= DENSE_LENGTH:
        i, j = torch.arange(length)[:, None], torch.arange(length)[None, :]
        for head, mask in enumerate(config.mask(length, num_heads, layer_idx, causal)):
            parts = _taken_apart(named, mask, torch.tensor(head), i, j)
            yield {label: mask_cells(part, rows, columns) for label, part in parts.items()}
        return
    sampled = torch.arange(min(length, ROWS_SAMPLED))
    sampled = sampled * length // len(sampled)
    for head in whole.heads:
        geometry = replace(whole, heads=(head,))
        kept = {label: torch.zeros(rows, columns, dtype=torch.float32) for label in named}
        for position in sampled.tolist():
            keys = torch.unique(config.decode_keys(position, geometry)[0])
            at = torch.ones_like(keys, dtype=torch.bool), torch.tensor(head), torch.full_like(keys, position), keys
            for label, part in _taken_apart(named, *at).items():
                listed = keys[part] * columns // length
                kept[label][position * rows // length] += torch.bincount(listed, minlength=columns)
        queries = torch.bincount(sampled * rows // length, minlength=rows)[:, None]
        pairs = (queries * torch.bincount(torch.arange(length) * columns // length)).clamp(min=1)
        yield {label: part / pairs for label, part in kept.items()}


def _everything(head: Tensor, i: Tensor, j: Tensor) -> Tensor:
    return torch.ones_like(i + j, dtype=torch.bool)


def _taken_apart(named: Mapping[str, Predicate], kept: Tensor, head: Tensor, i: Tensor, j: Tensor) -> dict[str, Tensor]:
    """Kept pairs by the first part that holds them; those of no part go to the last."""
    found, rest = {}, kept
    for label, holds in named.items():
        found[label] = rest & holds(head, i, j)
        rest = rest & ~found[label]
    found[label] = found[label] | rest
    return found


# -- terminal ------------------------------------------------------------------------------------------------------


@with_host_defaults
def preview(mask: Tensor, title: str) -> str:
    """A mask (bool ``[queries, keys]``) in block characters, darker where more is kept, at most 64 columns wide."""
    columns = min(mask.shape[1], PREVIEW_COLUMNS)
    return draw_cells(mask_cells(mask, max(1, min(mask.shape[0], columns) // 2), columns), title)


@with_host_defaults
def preview_pattern(
    config: SparseAttentionConfig, length: int, causal: bool, num_heads: int, layer_idx: int,
    columns: int = PREVIEW_COLUMNS,
) -> str:  # fmt: skip
    """Head 0 of a pattern, drawn as by :func:`preview` at any length, in at most so many columns beside the frame."""
    columns = min(length, columns)
    # A character is about twice as high as wide: half as many rows keep the square a square.
    cells = next(pattern_cells(config, length, (max(1, columns // 2), columns), causal, num_heads, layer_idx))
    density = config.density(length, num_heads, layer_idx, causal)
    return draw_cells(cells, _title(config, length, causal, density))


def draw_cells(cells: Tensor, title: str) -> str:
    """Cells ``[rows, columns]`` in [0, 1] as framed lines under a title; any kept pair shows."""
    shade = torch.ceil(cells * (len(SHADES) - 1)).clamp(max=len(SHADES) - 1).int()
    lines = ["│" + "".join(SHADES[s] for s in row) + "│" for row in shade.tolist()]
    edge = "─" * cells.shape[1]
    note = "rows: queries, columns: keys"
    return "\n".join([title[: PREVIEW_COLUMNS + 2], f"┌{edge}┐", *lines, f"└{edge}┘", note])


def _title(config: SparseAttentionConfig, length: int, causal: bool, density: float) -> str:
    return f"{config.name}, n = {length}, {'causal' if causal else 'bidirectional'}, {density:.2%} of dense"


# -- images --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Panel:
    """One square of a picture: the cells of each part ``[rows, columns]`` in [0, 1] by label, and their colours.

    ``note`` stands in the square where there are no cells.
    """

    title: str
    length: int
    causal: bool
    cells: Mapping[str, Tensor]
    colours: Mapping[str, str]
    note: str = ""


def pattern_panels(
    config: SparseAttentionConfig, length: int, *, causal: bool, num_heads: int = 1, layer_idx: int = 0
) -> list[Panel]:
    """A panel per head of a pattern, at most four."""
    drawn = part_cells(config, length, (PLOT_CELLS, PLOT_CELLS), causal, num_heads, layer_idx)
    return [
        Panel(f"head {head}", length, causal, cells, part_colours(config.name, cells))
        for head, cells in zip(range(min(num_heads, MAX_PANELS)), drawn, strict=False)
    ]


def mask_panel(mask: Tensor, pattern: str, title: str, *, causal: bool) -> Panel:
    """A panel of a given mask or gate, ``[n, n]`` in [0, 1]."""
    cells = min(len(mask), PLOT_CELLS)
    return Panel(title, len(mask), causal, {KEPT: mask_cells(mask, cells, cells)}, part_colours(pattern, [KEPT]))


def part_colours(pattern: str, labels: Iterable[str]) -> dict[str, str]:
    """The colours of a pattern's parts: shades of its one colour."""
    names = list(labels)
    return dict(zip(names, shades(colour_of(pattern), len(names)), strict=True))


@with_host_defaults
def plot(
    config: SparseAttentionConfig,
    path: str | os.PathLike[str],
    length: int,
    *,
    causal: bool = False,
    num_heads: int = 1,
    layer_idx: int = 0,
) -> None:
    """Write a picture of the pattern: rows are queries, columns keys, one panel per head (at most four).

    Raises:
        ImportError: matplotlib is missing (`pip install '.[tools]'` in a clone).
        NotStaticError: the pattern has no mask of its own.
    """
    title = _title(config, length, causal, config.density(length, num_heads, layer_idx, causal))
    panels = pattern_panels(config, length, causal=causal, num_heads=num_heads, layer_idx=layer_idx)
    draw_panels([panels], path, title)


@with_host_defaults
def plot_mask(
    mask: Tensor, path: str | os.PathLike[str], title: str, *, causal: bool = False, pattern: str = ""
) -> None:  # fmt: skip
    """Write a picture of given masks or gates, ``[heads, n, n]`` in [0, 1], in the same style.

    Args:
        pattern: whose colour it has.

    Raises:
        ImportError: matplotlib is missing (`pip install '.[tools]'` in a clone).
    """
    heads = enumerate(mask[:MAX_PANELS])
    draw_panels([[mask_panel(m, pattern, f"head {h}", causal=causal) for h, m in heads]], path, title)


def draw_panels(rows: Sequence[Sequence[Panel]], path: str | os.PathLike[str], title: str) -> None:
    """Write panels in a grid, row by row; a single one goes without its title.

    Raises:
        ImportError: matplotlib is missing (`pip install '.[tools]'` in a clone).
        SparseAttentionError: the path's suffix is no image format.
    """
    try:
        from matplotlib.backend_bases import FigureCanvasBase
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("drawing needs matplotlib: pip install '.[tools]' in a clone of sa_hf") from error
    formats, suffix = sorted(FigureCanvasBase.filetypes), os.path.splitext(path)[1][1:].lower()
    if suffix and suffix not in formats:
        raise SparseAttentionError(
            f"{os.fspath(path)!r} ends in {suffix!r}, which is no image format; use one of {formats}, for example 'png'"
        )
    columns = max(map(len, rows))
    # A Figure of its own, not pyplot: no window, no state that outlives the call.
    size = (3.4 * columns + 0.4, 3.4 * len(rows) + 0.9)
    figure = Figure(
        figsize=size,
        dpi=DPI if columns * len(rows) <= MAX_PANELS else GRID_DPI,
        layout="constrained",
        facecolor="white",
    )
    for line, panels in zip(figure.subplots(len(rows), columns, squeeze=False), rows, strict=True):
        for axes, panel in zip(line, panels, strict=False):
            _panel(axes, panel)
            if columns * len(rows) > 1:
                axes.set_title(panel.title, fontsize=9)
        for axes in line[len(panels) :]:
            axes.set_axis_off()
    # "n = 64" stays on a line: these blanks do not break.
    figure.suptitle(textwrap.fill(title.replace(" = ", "\u00a0=\u00a0"), TITLE_WIDTH * columns), fontsize=9.5)
    _legend(figure, [panel for panels in rows for panel in panels])
    figure.savefig(path)


def _panel(axes: Axes, panel: Panel) -> None:
    length = panel.length
    if panel.cells:
        axes.imshow(_image(panel), extent=(0, length, length, 0), interpolation="nearest")
    else:
        axes.set(xlim=(0, length), ylim=(length, 0), aspect="equal")
        axes.text(0.5, 0.5, panel.note, transform=axes.transAxes, fontsize=8, ha="center", va="center", wrap=True)
    ticks = [0, length // 2, length] if length > 1 else [0, 1]
    axes.set_xticks(ticks)
    axes.set_yticks(ticks)
    axes.tick_params(labelsize=7, length=2)
    axes.set_xlabel("key position", fontsize=8)
    axes.set_ylabel("query position", fontsize=8)
    for spine in axes.spines.values():
        spine.set_linewidth(0.6)


def _image(panel: Panel) -> Any:
    """Colours of the cells, float ``[rows, columns, 3]``: the mean of the parts in a cell, paler where less is kept."""
    from matplotlib.colors import to_rgb

    def colour(name: str) -> Tensor:
        return torch.tensor(to_rgb(name))

    shares = torch.stack(list(panel.cells.values()), -1)
    kept = shares.sum(-1, keepdim=True)
    ink = shares @ torch.stack([colour(panel.colours[label]) for label in panel.cells]) / kept.clamp(min=1e-12)
    # The square root lifts thin lines, which large cells would wash out.
    image = colour(LEFT_OUT) + (ink - colour(LEFT_OUT)) * kept.clamp(max=1).sqrt()
    if panel.causal:
        rows, columns = kept.shape[:2]
        future = torch.arange(columns) * rows > (torch.arange(rows)[:, None] + 0.999) * columns
        image[future & (kept[..., 0] == 0)] = colour(FUTURE)
    return image.clamp(0, 1).numpy()


def _legend(figure: Any, panels: Sequence[Panel]) -> None:
    from matplotlib.patches import Patch

    entries = {label: colour for panel in panels for label, colour in panel.colours.items()}
    entries["left out"] = LEFT_OUT
    if any(panel.causal for panel in panels):
        entries["future"] = FUTURE
    handles = [
        Patch(facecolor=colour, edgecolor="#888888", linewidth=0.5, label=label) for label, colour in entries.items()
    ]
    # An entry's words and its patch must not stand over the figure's edges.
    widths = [len(label) + LEGEND_PATCH for label in entries]
    room = int(figure.get_figwidth() * LEGEND_CHARACTERS)
    columns = len(widths) if sum(widths) <= room else max(1, room // max(widths))
    figure.legend(handles=handles, loc="outside lower center", ncols=columns, fontsize=7.5, frameon=False)


draw_by(Drawing(preview_pattern, plot))
