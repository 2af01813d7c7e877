"""The result file: one line of JSON for every finished cell, which a second run does not measure again."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from sa_hf.errors import SparseAttentionError
from sa_hf.tools.recovery.grid import Cell

KEYS = ("part", "pattern", "method", "seed", "step", "split")


class Rows:
    """Rows by cell, in the order in which they came.

    Raises:
        SparseAttentionError: a line of the file is no row (the last one alone may be cut off, where a run was killed as
            it wrote; it is dropped, and its cell measured again).
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._rows: dict[Cell, dict[str, Any]] = {}
        lines = path.read_text("utf-8").splitlines() if path.exists() else []
        for number, line in enumerate(lines, 1):
            try:
                row = json.loads(line)
                self._rows[Cell(*(row[key] for key in KEYS))] = row
            except (ValueError, KeyError, TypeError) as error:
                if number < len(lines):
                    raise SparseAttentionError(f"{path}, line {number}, is no row of results ({error})") from error
                self._write()

    def __contains__(self, cell: Cell) -> bool:
        return cell in self._rows

    def __getitem__(self, cell: Cell) -> dict[str, Any]:
        return self._rows[cell]

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return iter(self._rows.values())

    def __len__(self) -> int:
        return len(self._rows)

    def add(self, cell: Cell, row: dict[str, Any]) -> None:
        """One row more, on the disk before this returns."""
        self._rows[cell] = {**asdict(cell), **row}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(self._rows[cell]) + "\n")

    def _write(self) -> None:
        part = self.path.with_suffix(".part")
        part.write_text("".join(json.dumps(row) + "\n" for row in self), "utf-8")
        part.replace(self.path)


def packed(hits: list[bool]) -> str:
    """Hits as hexadecimal digits, four to a digit, the first in the highest bit: ``"n:digits"``."""
    bits = "".join("1" if hit else "0" for hit in hits).ljust(-(-len(hits) // 4) * 4, "0")
    return f"{len(hits)}:" + "".join(f"{int(bits[at : at + 4], 2):x}" for at in range(0, len(bits), 4))


def unpacked(text: str) -> list[bool]:
    """What :func:`packed` was given."""
    count, _, digits = text.partition(":")
    return [bit == "1" for digit in digits for bit in f"{int(digit, 16):04b}"][: int(count)]
