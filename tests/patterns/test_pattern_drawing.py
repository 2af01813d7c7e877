"""Previews and plots show the mask."""

from __future__ import annotations

import re
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from sa_hf import (
    DenseAttentionConfig,
    LogSparseAttentionConfig,
    NotStaticError,
    SlidingWindowAttentionConfig,
    SparseAttentionConfig,
    StarAttentionConfig,
)
from sa_hf.config import available_patterns
from sa_hf.patterns.base import StaticPatternConfig
from sa_hf.patterns.drawing import (
    Panel,
    _legend,
    mask_cells,
    part_cells,
    part_colours,
    pattern_cells,
    plot_mask,
    preview,
)
from sa_hf.patterns.palette import COLOURS, OTHER, brightness, colour_of, shades


def body(text: str) -> list[str]:
    """The lines between the frame."""
    return [line[1:-1] for line in text.splitlines() if line.startswith("│")]


@pytest.mark.parametrize("columns", [1, 2, 4])
@pytest.mark.parametrize("prefix", ["", "sparse_transformer: "])
def test_a_legend_stands_inside_its_picture(columns: int, prefix: str) -> None:
    figures = pytest.importorskip("matplotlib.figure")
    cells = {f"{prefix}{part}": torch.ones(2, 2) for part in ("window", "random", "global")}
    figure = figures.Figure(figsize=(3.4 * columns + 0.4, 4), layout="constrained")
    figure.subplots(1, columns)
    _legend(figure, [Panel("", 2, True, cells, part_colours("bigbird", cells))])
    figure.canvas.draw()
    drawn = figure.legends[0].get_window_extent()
    assert drawn.x0 >= 0
    assert drawn.x1 <= figure.bbox.width


def test_a_cell_is_the_share_of_its_pairs() -> None:
    mask = torch.tensor([[1, 0, 0], [1, 1, 0], [1, 1, 1]], dtype=torch.bool)
    assert mask_cells(mask, 3, 3).tolist() == mask.float().tolist()
    # Rows {0, 1} and {2}, columns {0, 1} and {2}.
    assert mask_cells(mask, 2, 2).tolist() == [[0.75, 0.0], [1.0, 1.0]]


def test_preview_of_a_small_mask() -> None:
    mask = torch.eye(4, dtype=torch.bool)
    assert preview(mask, "four") == "\n".join(
        ["four", "┌────┐", "│▒▒  │", "│  ▒▒│", "└────┘", "rows: queries, columns: keys"]
    )


@pytest.mark.parametrize("length", [1, 2, 3, 61, 62, 63, 200, 3000])
def test_preview_is_at_most_64_wide_and_every_pair_shows(length: int) -> None:
    text = LogSparseAttentionConfig().preview(length, causal=True)
    assert max(map(len, text.splitlines())) <= 64
    lines = body(text)
    assert len({len(line) for line in lines}) == 1
    density = LogSparseAttentionConfig().density(length, causal=True)
    assert f"n = {length}, causal, {density:.2%} of dense" in text
    for row, line in enumerate(lines):
        diagonal = line[row * len(line) // len(lines)]
        assert diagonal != " "
    assert length < 60 or lines[0][-1] == " "


def test_the_picture_of_a_long_pattern_is_that_of_its_mask() -> None:
    """Above the dense limit cells come from the rows' key lists: the same shares as from the mask."""
    for config in (SlidingWindowAttentionConfig(window=40, num_sink_tokens=2), StarAttentionConfig()):
        for causal in (False, True):
            (cells,) = pattern_cells(config, 1100, (31, 62), causal, 1, 0)
            torch.testing.assert_close(cells, mask_cells(config.mask(1100, causal=causal)[0], 31, 62))


def test_dense_is_all_dark() -> None:
    assert set("".join(body(DenseAttentionConfig().preview(100)))) == {"█"}


def test_plot_writes_one_panel_per_head(tmp_path: Path) -> None:
    image = pytest.importorskip("matplotlib.image")
    config = SparseAttentionConfig.from_dict({"name": "bigbird", "block_size": 16})
    config.plot(tmp_path / "one.png", 256, causal=True)
    config.plot(tmp_path / "two.png", 256, num_heads=2)
    one, two = (image.imread(tmp_path / f"{name}.png") for name in ("one", "two"))
    assert two.shape[1] > 1.7 * one.shape[1]
    inked = [painted(one, colour) for colour in shades(colour_of("bigbird"), 3)]
    # The kept share of the whole square, which fills about half of the figure.
    kept = float(config.mask(256, causal=True).float().mean())
    assert sum(inked) == pytest.approx(kept * 0.62, rel=0.35)
    assert min(inked) > 0.01  # window, random and global blocks
    assert one.shape[1] >= 2 * 480  # a card shows it 480 points wide
    config.plot(tmp_path / "vector.svg", 64)
    assert (tmp_path / "vector.svg").read_text().lstrip().startswith("<?xml")


def painted(image: Any, colour: str) -> float:
    """Share of a picture's points that have a colour."""
    wanted = torch.tensor([int(colour[at : at + 2], 16) for at in (1, 3, 5)]).numpy() / 255
    return float((abs(image[..., :3] - wanted) < 0.02).all(-1).mean())


@pytest.mark.parametrize("length", [200, 1100])
@pytest.mark.parametrize("causal", [False, True])
def test_the_parts_of_a_pattern_make_the_whole(length: int, causal: bool) -> None:
    """Every kept pair belongs to one part; window, random and global blocks are those of the definition."""
    named = 0
    for name, cls in available_patterns().items():
        if not issubclass(cls, StaticPatternConfig):
            continue
        config = cls(block_size=16) if name == "bigbird" else cls()
        (parts,) = part_cells(config, length, (length, length), causal, 1, 0)
        mask = config.mask(length, causal=causal)[0].float()
        assert torch.allclose(sum(parts.values()), mask, atol=1e-6), name
        assert max(float(cells.max()) for cells in parts.values()) <= 1
        named += len(parts) > 1
        if name == "bigbird":
            block = torch.arange(length) // 16
            near = (block[:, None] - block[None, :]).abs() <= 1
            assert torch.equal(parts["window"] > 0, (mask > 0) & near)
            assert not bool(((parts["random"] > 0) & ((block < 1)[None, :] | near)).any())
            assert all(bool((cells > 0).any()) for cells in parts.values())
    assert named >= 4


def test_dilation_shows_at_a_small_length() -> None:
    config = SparseAttentionConfig.from_dict(
        {"name": "longnet", "segment_length": [16, 32, 64], "dilated_ratio": [1, 2, 4]}
    )
    (parts,) = part_cells(config, 64, (512, 512), False, 1, 0)
    assert list(parts) == ["r = 1", "r = 2", "r = 4"]
    # The widest branch keeps every fourth position of a row, and these pairs alone are in the corner.
    corner = parts["r = 4"][:16, 48:]
    assert torch.nonzero(corner[0]).flatten().tolist() == [0, 4, 8, 12]
    lines = body(config.preview(62))
    assert len(set(lines[0])) > 1


def test_each_pattern_has_one_colour_of_its_own() -> None:
    colours = [colour_of(name) for name in available_patterns()]
    assert len(set(colours)) == len(colours)
    assert OTHER not in colours
    for colour in COLOURS.values():
        steps = [brightness(shade) for shade in shades(colour, 3)]
        assert min(b - a for a, b in pairwise(steps)) > 0.2  # told apart without hue


def test_no_other_file_names_a_colour() -> None:
    root = Path(__file__).parents[2]
    named = {
        path.relative_to(root).as_posix()
        for folder in ("sa_hf", "scripts")
        for path in (root / folder).rglob("*.py")
        if set(re.findall(r"#[0-9A-Fa-f]{6}\b", path.read_text())) - {"#888888"}  # the frame of a legend's patch
    }
    assert named == {"sa_hf/patterns/palette.py"}


def test_a_long_title_stays_in_the_picture(tmp_path: Path) -> None:
    image = pytest.importorskip("matplotlib.image")
    plot_mask(torch.ones(1, 8, 8), tmp_path / "long.png", "a title of many words " * 6, causal=True, pattern="star")
    drawn = image.imread(tmp_path / "long.png")[..., :3]
    assert (drawn[:, :12] == 1).all()
    assert (drawn[:, -12:] == 1).all()
    assert painted(drawn, colour_of("star")) > 0.2


def test_a_learned_pattern_has_no_picture(tmp_path: Path) -> None:
    config = SparseAttentionConfig.from_dict({"name": "expire_span"})
    with pytest.raises(NotStaticError):
        config.preview(16)
    with pytest.raises(NotStaticError):
        config.plot(tmp_path / "none.png", 16)
    assert not list(tmp_path.iterdir())
