"""Packed rows: what goes in comes out, slices are views, and a token costs bytes and not objects."""

from __future__ import annotations

import tracemalloc

import pytest
import torch

from sa_hf.tasks.packed import PackedRows


def packed() -> PackedRows:
    rows = PackedRows()
    for length, label in ((3, 7), (0, 0), (2, 5)):
        rows.add({"input_ids": range(100_000, 100_000 + length), "token_type_ids": [1] * length}, label)
    return rows


def test_rows_come_out_as_they_went_in() -> None:
    rows = packed()
    assert (len(rows), rows.lengths()) == (3, [3, 0, 2])
    assert [row["input_ids"].tolist() for row in rows] == [[100_000, 100_001, 100_002], [], [100_000, 100_001]]
    assert [row["labels"] for row in rows] == [7, 0, 5]
    assert {row[name].dtype for row in rows for name in ("input_ids", "token_type_ids")} == {torch.int64}
    assert rows[-1]["token_type_ids"].tolist() == [1, 1]
    with pytest.raises(IndexError):
        rows[3]


def test_slices_of_slices() -> None:
    part = packed()[1:][-1:]
    assert (len(part), part.lengths(), part[0]["labels"]) == (1, [2], 5)
    assert not packed()[3:]


def test_what_a_row_gives_is_its_own() -> None:
    rows = packed()
    rows[0]["input_ids"].zero_()
    assert rows[0]["input_ids"].tolist() == [100_000, 100_001, 100_002]


def test_five_bytes_a_token() -> None:
    tokens = 1_000_000
    tracemalloc.start()
    rows = PackedRows()
    for begin in range(0, tokens, 1000):
        rows.add({"input_ids": range(begin, begin + 1000), "attention_mask": [1] * 1000})
    held, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(rows) == 1000
    assert held < 7 * tokens  # arrays grow ahead by an eighth
