"""Goes through the grid: what is there already is left, the rest is trained, measured and written, cell by cell."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sa_hf.errors import SparseAttentionError
from sa_hf.tools.bench.report import machine
from sa_hf.tools.recovery import grid
from sa_hf.tools.recovery.decoder import Decoder
from sa_hf.tools.recovery.density import densities
from sa_hf.tools.recovery.encoder import Encoder
from sa_hf.tools.recovery.grid import DENSE, UNTRAINED, Cell, Chain, Part
from sa_hf.tools.recovery.intervals import Interval, mean_interval
from sa_hf.tools.recovery.pooled import kept_of
from sa_hf.tools.recovery.rows import Rows, packed
from sa_hf.tools.recovery.train import sparse, train

OF_HITS = frozenset({"passkey", "multi-needle", "recall@10"})  # a figure of each item is 1 or 0
DIGITS = 5


@dataclass
class Run:
    """One part of the grid.

    Args:
        task: what is trained and measured; it gives the dense model, its batches and its figures.
        cache: a folder of this machine for what the dense model gives.
        device: where models run, e.g. "cuda".
    """

    part: Part
    task: Decoder | Encoder
    rows: Rows
    cache: Path
    split: str = "report"
    device: str = "cpu"

    def __post_init__(self) -> None:
        self.dense_items: dict[str, list[float]] = {}
        self.dense_embeddings: Tensor | None = None
        self.base = {"base": self.task.digest()} if isinstance(self.task, Decoder) else {}
        for row in self.rows:
            if row["part"] == self.part and row.get("base") != self.base.get("base"):
                raise SparseAttentionError(
                    f"{self.rows.path} holds rows of the base {row.get('base')}, not of {self.base['base']}, which was "
                    "trained anew; give these figures a folder of their own by --cards"
                )

    def reference(self) -> None:
        """What the untrained dense model gives: measured once for a folder, and a row of its own."""
        kind = "_".join(["dense", self.part, self.split, *self.base.values()])
        path = self.cache / f"{kind}.pt"
        cell = Cell(self.part, DENSE, UNTRAINED, 0, 0, self.split)
        if path.exists() and cell in self.rows:
            kept = torch.load(path, weights_only=True)
            self.dense_items, self.dense_embeddings = kept["items"], kept["embeddings"]
            return
        started, model = time.perf_counter(), self.task.model().to(self.device).eval()
        self.dense_items, self.dense_embeddings = self._items(model)
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save({"items": self.dense_items, "embeddings": self.dense_embeddings}, path)
        if cell not in self.rows:
            self._add(cell, model, self.dense_items, started, {})

    def run(self, chains: Sequence[Chain]) -> None:
        """All the cells of the chains that have no row yet; a chain that was cut off is trained again, and its rows
        that are there stay."""
        todo = [chain for chain in chains if any(cell not in self.rows for cell in chain.cells)]
        if not todo:
            return
        self.reference()
        for number, chain in enumerate(todo, 1):
            print(f"{number} of {len(todo)}: {chain.pattern}, {chain.method}, seed {chain.seed}", flush=True)
            missing = {cell.step: cell for cell in chain.cells if cell not in self.rows}
            if missing:
                self._train(chain, missing)

    def _train(self, chain: Chain, missing: dict[int, Cell]) -> None:
        started = time.perf_counter()
        assigned = grid.PATTERNS[self.part][chain.pattern]
        model = sparse(self.task.model().to(self.device), chain.pattern, assigned)

        def measure(step: int, trained: Any) -> None:
            items, _ = self._items(trained)
            self._add(missing[step], trained, items, started, settings)

        if chain.method == UNTRAINED:
            settings: dict[str, Any] = {}
            measure(0, model.eval())
            return
        method = grid.METHODS[self.part][chain.method]
        settings = method.settings()
        if chain.pattern in grid.FROZEN_AFTER:
            settings["frozen_after"] = grid.FROZEN_AFTER[chain.pattern]
        train(
            model, chain.pattern, method, self._batches(chain.seed), sorted(missing), chain.seed, measure,
            embeddings=self.part == "encoder",
        )  # fmt: skip

    def _batches(self, seed: int) -> Callable[[], Iterator[dict[str, Tensor]]]:
        task = self.task
        if isinstance(task, Encoder):
            return lambda: task.batches(f"recovery {seed}")
        sizes = task.sizes

        def batches() -> Iterator[dict[str, Tensor]]:
            for ids in task.rows(sizes.length, sizes.batch, sizes.lines, f"recovery {seed}"):
                yield {"input_ids": ids, "labels": ids}

        return batches

    def _items(self, model: Any) -> tuple[dict[str, list[float]], Tensor | None]:
        if isinstance(self.task, Encoder):
            return self.task.measure(model, self.split, self.dense_embeddings)
        return self.task.measure(model, self.split), None

    def _sequence(self) -> Tensor:
        """One whole held-out sequence ``[1, length]``, to count the pairs of."""
        if isinstance(self.task, Encoder):
            return self.task.documents(self.split).documents[:1]
        return torch.tensor([self.task.tokens(self.split)[: self.task.sizes.length]])

    def _add(
        self, cell: Cell, model: Any, items: dict[str, list[float]], started: float, settings: dict[str, Any]
    ) -> None:
        by_layer = densities(model, self._sequence().to(self.device))
        figures = {name: _rounded(mean_interval(values)) for name, values in items.items()}
        row = {
            "assigned": grid.described(grid.PATTERNS[self.part][cell.pattern]),
            "density": round(sum(by_layer) / len(by_layer), DIGITS),
            "figures": figures,
            "n": {name: len(values) for name, values in items.items()},
            "kept": {name: _rounded(kept_of(name, values, self.dense_items[name])) for name, values in items.items()},
            "items": {name: _items_of(name, values) for name, values in items.items() if name != "agreement"},
            **({"lengths": list(self.task.sizes.retrieval_lengths)} if isinstance(self.task, Decoder) else {}),
            **self.base,
            "settings": settings,
            "seconds": round(time.perf_counter() - started, 1),
            "machine": machine(torch.device(self.device)),
        }
        self.rows.add(cell, row)
        shown = ", ".join(f"{name} {value[0]:.4g}" for name, value in figures.items())
        print(f"  step {cell.step}: density {row['density']:.1%}, {shown} ({row['seconds']:.0f} s)", flush=True)


def _rounded(interval: Interval) -> list[float | None]:
    return [round(x, DIGITS) if math.isfinite(x) else None for x in interval]


def _items_of(name: str, values: Sequence[float]) -> Any:
    if name in OF_HITS:
        return packed([value > 0.5 for value in values])
    return [round(value, 4) for value in values]
