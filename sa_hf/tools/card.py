"""A model card for a sparse checkpoint, written anew: ``sa-hf card``."""

from __future__ import annotations

from pathlib import Path

from sa_hf.errors import SparseAttentionError
from sa_hf.hf.checkpoints.card import CARD_FILE, card_text, is_ours, known_of
from sa_hf.tasks.load import check_place
from sa_hf.tools.inspect import inspect_checkpoint


def write_card(
    folder: str | Path,
    *,
    base_model: str | None = None,
    license: str | None = None,
    dataset: str | None = None,
    force: bool = False,
) -> Path:
    """Write ``README.md`` into a checkpoint folder; returns its path.

    Args:
        base_model, license, dataset: what the folder itself does not say.
        force: replace a card that is not ours.

    Raises:
        SparseAttentionError: the folder is no sparse checkpoint, or has a README.md of its own and ``force`` is False.
    """
    folder = Path(folder)
    check_place(str(folder))
    found = inspect_checkpoint(folder)
    if not found.layers:
        raise SparseAttentionError(f"{folder} is not a sparse checkpoint: {'; '.join(found.problems) or 'no layers'}")
    path = folder / CARD_FILE
    if path.exists() and not is_ours(path) and not force:
        raise SparseAttentionError(f"{path} is there already; pass --force to replace it")
    given = {"base_model": base_model, "license": license, "datasets": None if dataset is None else [dataset]}
    known = {**known_of("", path), **{name: value for name, value in given.items() if value is not None}}
    path.write_text(card_text(folder, known), encoding="utf-8")
    return path


def renew_card(folder: Path) -> None:
    """Write our card of a folder anew; one of a sparse model that a dense one has taken the place of goes."""
    if inspect_checkpoint(folder).layers:
        write_card(folder)
    else:
        (folder / CARD_FILE).unlink()
