"""Previews and plots show the mask."""

from __future__ import annotations

from pathlib import Path

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
from sa_hf.patterns.drawing import mask_cells, pattern_cells, preview


def body(text: str) -> list[str]:
    """The lines between the frame."""
    return [line[1:-1] for line in text.splitlines() if line.startswith("│")]


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
    blue = (abs(one[..., :3] - torch.tensor([0x17, 0x40, 0x7A]).numpy() / 255) < 0.02).all(-1)
    # The kept share of the whole square, which fills about half of the figure.
    kept = float(config.mask(256, causal=True).float().mean())
    assert blue.mean() == pytest.approx(kept * 0.62, rel=0.35)
    config.plot(tmp_path / "vector.svg", 64)
    assert (tmp_path / "vector.svg").read_text().lstrip().startswith("<?xml")


def test_a_learned_pattern_has_no_picture(tmp_path: Path) -> None:
    config = SparseAttentionConfig.from_dict({"name": "expire_span"})
    with pytest.raises(NotStaticError):
        config.preview(16)
    with pytest.raises(NotStaticError):
        config.plot(tmp_path / "none.png", 16)
    assert not list(tmp_path.iterdir())
