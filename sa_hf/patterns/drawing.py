"""Pictures of a pattern: in the terminal, and as an image file in the one style of the model cards."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sa_hf.config import SparseAttentionConfig
from sa_hf.errors import SparseAttentionError
from sa_hf.ops.host import with_host_defaults
from sa_hf.patterns.base import StaticPatternConfig, whole_geometry

if TYPE_CHECKING:
    from matplotlib.axes import Axes

PREVIEW_COLUMNS = 62  # cells of a preview; with the frame 64 characters
PLOT_CELLS = 512  # resolution of an image
# Up to this length the dense mask is drawn; beyond it the rows' key lists are, never an n x n tensor ...
DENSE_LENGTH = 1024
# ... of at most so many rows, spread evenly.
ROWS_SAMPLED = 4096
SHADES = " ░▒▓█"
KEPT, LEFT_OUT, FUTURE = "#17407a", "#ffffff", "#e8e6e1"
MAX_PANELS = 4


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
    rows, columns = min(cells[0], length), min(cells[1], length)
    if length <= DENSE_LENGTH or not isinstance(config, StaticPatternConfig):
        for mask in config.mask(length, num_heads, layer_idx, causal):
            yield mask_cells(mask, rows, columns)
        return
    whole = whole_geometry(length, num_heads, layer_idx, causal)
    sampled = torch.arange(min(length, ROWS_SAMPLED))
    sampled = sampled * length // len(sampled)
    for head in whole.heads:
        geometry = replace(whole, heads=(head,))
        kept = torch.zeros(rows, columns, dtype=torch.float32)
        for position in sampled.tolist():
            keys = torch.unique(config.decode_keys(position, geometry)[0])
            kept[position * rows // length] += torch.bincount(keys * columns // length, minlength=columns)
        queries = torch.bincount(sampled * rows // length, minlength=rows)[:, None]
        yield kept / (queries * torch.bincount(torch.arange(length) * columns // length)).clamp(min=1)


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
    panels = min(num_heads, MAX_PANELS)
    cells = pattern_cells(config, length, (PLOT_CELLS, PLOT_CELLS), causal, num_heads, layer_idx)
    title = _title(config, length, causal, config.density(length, num_heads, layer_idx, causal))
    _draw([drawn for drawn, _ in zip(cells, range(panels), strict=False)], path, title, length, causal)


@with_host_defaults
def plot_mask(mask: Tensor, path: str | os.PathLike[str], title: str, *, causal: bool = False) -> None:
    """Write a picture of given masks or gates, ``[heads, n, n]`` in [0, 1], in the same style.

    Raises:
        ImportError: matplotlib is missing (`pip install '.[tools]'` in a clone).
    """
    length = mask.shape[1]
    cells = min(length, PLOT_CELLS)
    _draw([mask_cells(head, cells, cells) for head in mask[:MAX_PANELS]], path, title, length, causal)


def _draw(cells: list[Tensor], path: str | os.PathLike[str], title: str, length: int, causal: bool) -> None:
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
    panels = len(cells)
    # A Figure of its own, not pyplot: no window, no state that outlives the call.
    figure = Figure(figsize=(3.4 * panels + 0.4, 4.3), dpi=200, layout="constrained", facecolor="white")
    for head, (axes, drawn) in enumerate(zip(figure.subplots(1, panels, squeeze=False)[0], cells, strict=True)):
        _panel(axes, drawn, length, causal)
        if panels > 1:
            axes.set_title(f"head {head}", fontsize=9)
    figure.suptitle(title, fontsize=9.5)
    _legend(figure, causal)
    figure.savefig(path)


def _panel(axes: Axes, cells: Tensor, length: int, causal: bool) -> None:
    from matplotlib.colors import LinearSegmentedColormap, to_rgb

    # The square root lifts thin lines, which large cells would wash out.
    shade = cells.sqrt()
    image = LinearSegmentedColormap.from_list("kept", [LEFT_OUT, KEPT])(shade.numpy())
    if causal:
        rows, columns = cells.shape
        future = torch.arange(columns) * rows > (torch.arange(rows)[:, None] + 0.999) * columns
        image[(future & (cells == 0)).numpy(), :3] = to_rgb(FUTURE)
    axes.imshow(image, extent=(0, length, length, 0), interpolation="nearest")
    ticks = [0, length // 2, length] if length > 1 else [0, 1]
    axes.set_xticks(ticks)
    axes.set_yticks(ticks)
    axes.tick_params(labelsize=7, length=2)
    axes.set_xlabel("key position", fontsize=8)
    axes.set_ylabel("query position", fontsize=8)
    for spine in axes.spines.values():
        spine.set_linewidth(0.6)


def _legend(figure: Any, causal: bool) -> None:
    from matplotlib.patches import Patch

    entries = [("kept", KEPT), ("left out", LEFT_OUT), *([("future", FUTURE)] if causal else [])]
    handles = [Patch(facecolor=colour, edgecolor="#888888", linewidth=0.5, label=label) for label, colour in entries]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), fontsize=8, frameon=False)
