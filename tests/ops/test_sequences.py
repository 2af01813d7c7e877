"""Where the sequences lie: padding on both sides and inside, packing, queries behind a cache."""

from __future__ import annotations

import pytest
import torch

from sa_hf.errors import SparseAttentionError
from sa_hf.ops.sequences import Sequences, Span


def spans(mask: list[list[int]] | None, queries: int | None = None, ids: list[list[int]] | None = None) -> Sequences:
    rows = mask or ids
    assert rows is not None
    length = len(rows[0])
    return Sequences.from_mask(
        len(rows), queries or length, length, None if mask is None else torch.tensor(mask),
        None if ids is None else torch.tensor(ids),
    )  # fmt: skip


def test_no_mask_or_all_ones_is_full() -> None:
    for sequences in (Sequences.full(2, 3, 4), spans([[1, 1, 1, 1], [1, 1, 1, 1]], queries=3)):
        assert sequences.is_full
        assert sequences.spans == (Span(0, 0, 3, 0, 4), Span(1, 0, 3, 0, 4))
        assert sequences.groups == (((3, 4), (0, 1)),)


def test_padding_on_either_side() -> None:
    found = spans([[0, 0, 1, 1], [1, 1, 1, 0], [1, 1, 1, 1], [0, 1, 1, 0]])
    assert found.spans == (Span(0, 2, 2, 2, 2), Span(1, 0, 3, 0, 3), Span(2, 0, 4, 0, 4), Span(3, 1, 2, 1, 2))
    assert found.key_gather is None
    assert not found.is_full
    assert max(span.key_length for span in found.spans) == 4
    assert found.groups == (((2, 2), (0, 3)), ((3, 3), (1,)), ((4, 4), (2,)))


def test_padding_inside_is_cut_out() -> None:
    found = spans([[1, 0, 1, 1, 0], [0, 1, 1, 1, 1]])
    assert found.spans == (Span(0, 0, 3, 0, 3), Span(1, 0, 4, 0, 4))
    assert found.key_gather is not None
    assert found.key_gather[0, :3].tolist() == [0, 2, 3]
    assert found.key_gather[1, :4].tolist() == [1, 2, 3, 4]
    assert found.query_gather is not None
    assert found.query_gather[0, :3].tolist() == [0, 2, 3]


def test_a_row_of_padding_has_no_sequence() -> None:
    found = spans([[0, 0, 0], [1, 1, 0]])
    assert found.spans == (Span(1, 0, 2, 0, 2),)


def test_packing_cuts_at_changes_of_the_id() -> None:
    found = spans(None, ids=[[7, 7, 3, 3, 3, 7]])
    assert found.spans == (Span(0, 0, 2, 0, 2), Span(0, 2, 3, 2, 3), Span(0, 5, 1, 5, 1))


def test_packing_with_padding() -> None:
    found = spans([[0, 1, 1, 1, 1]], ids=[[0, 0, 1, 1, 2]])
    assert found.spans == (Span(0, 1, 1, 1, 1), Span(0, 2, 2, 2, 2), Span(0, 4, 1, 4, 1))


def test_queries_are_the_last_slots() -> None:
    """Left padding reaches into the queries; a packed sequence before them has keys but no query."""
    found = spans([[0, 0, 0, 1, 1], [0, 1, 1, 1, 1]], queries=3)
    assert found.spans == (Span(0, 1, 2, 3, 2), Span(1, 0, 3, 1, 4))
    packed = spans(None, queries=2, ids=[[0, 0, 1, 1, 1]])
    assert packed.spans == (Span(0, 0, 0, 0, 2), Span(0, 0, 2, 2, 3))
    assert packed.groups == (((2, 3), (1,)),)


def test_extra_tokens_move_the_rest_and_refuse_packing() -> None:
    moved = spans([[0, 1, 1], [1, 1, 1]]).with_extra_tokens(2)
    assert moved.spans == (Span(0, 3, 2, 3, 2), Span(1, 2, 3, 2, 3))
    assert moved.key_length == 5
    assert Sequences.full(2, 3, 3).with_extra_tokens(2).is_full
    with pytest.raises(SparseAttentionError, match="packed"):
        spans(None, ids=[[0, 1]]).with_extra_tokens(1)


@pytest.mark.parametrize(
    ("mask", "message"), [([[0.5, 1.0]], "1 .real. and 0"), ([[1, 1, 1]], "must be"), ([[-1e9, 0.0]], "additive")]
)
def test_bad_masks_raise(mask: list[list[float]], message: str) -> None:
    with pytest.raises(SparseAttentionError, match=message):
        Sequences.from_mask(1, 2, 2, torch.tensor(mask))


def test_more_queries_than_keys_raise() -> None:
    with pytest.raises(SparseAttentionError, match="query_length=3"):
        Sequences.full(1, 3, 2)
