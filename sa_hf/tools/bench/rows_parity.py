"""Rows of parity with the fp64 oracle: patterns, options, and lists that depend on data."""

from __future__ import annotations

from typing import Any

import torch

from sa_hf.tools.bench import learned
from sa_hf.tools.bench.cases import parity_configs
from sa_hf.tools.bench.parity import PARITY_DTYPES, PARITY_SHAPES, ParityResult, Shape, option_parity, parity, row_key
from sa_hf.tools.bench.suite import Suite

TOY_SHAPE = Shape(1, 2, 1, 40, 16)


def parity_row(result: ParityResult, names: tuple[str, ...]) -> dict[str, Any]:
    row: dict[str, Any] = {"pass": result.passed, "deterministic": result.deterministic}
    return row | dict(zip(names, result.errors, strict=False))


def _dtypes(suite: Suite, first: bool) -> tuple[torch.dtype, ...]:
    """That of the timings, or the others: a speed-up waits for the parity of its own dtype alone."""
    return tuple(d for d in ((torch.float32,) if suite.dry else PARITY_DTYPES) if (d == suite.dtype) == first)


def parity_section(suite: Suite, first: bool = True) -> None:
    for number, shape in enumerate((TOY_SHAPE,) if suite.dry else PARITY_SHAPES):
        for dtype in _dtypes(suite, first):
            for label, config in parity_configs():
                for causal in (True, False):

                    def measured(
                        c: Any = config, s: Any = shape, d: Any = dtype, k: bool = causal, p: bool = number == 0
                    ) -> dict[str, Any]:
                        r = parity(c, d, suite.device, causal=k, engine=suite.engine, shape=s, padded=p)
                        names = ("out", "dq", "dk", "dv")
                        dense = {f"dense {n}": e for n, e in zip(names, r.dense_errors, strict=True)}
                        return parity_row(r, names) | dense

                    suite.row("parity", row_key(label, causal, dtype, shape), measured)


def option_parity_section(suite: Suite, first: bool = True) -> None:
    """Soft cap, distance table, spans and dropout, with the gradients of the table and the spans."""
    shape = TOY_SHAPE if suite.dry else PARITY_SHAPES[0]
    for dtype in _dtypes(suite, first):
        for option in ("softcap", "bias", "spans", "dropout"):

            def measured(o: str = option, d: torch.dtype = dtype) -> dict[str, Any]:
                r = option_parity(o, d, suite.device, engine=suite.engine, shape=shape)
                return parity_row(r, ("out", "dq", "dk", "dv", f"d {o}"))

            suite.row("parity", row_key(option, True, dtype, shape), measured)


def data_parity_section(suite: Suite, first: bool = True) -> None:
    """Lists that depend on data (spans, clusters): parity, and CUDA graphs replayed with other data."""
    shape = TOY_SHAPE if suite.dry else PARITY_SHAPES[0]
    for case in learned.CASES:
        for dtype in _dtypes(suite, first):

            def measured(c: learned.DataCase = case, d: torch.dtype = dtype) -> dict[str, Any]:
                r = learned.data_parity(c, d, suite.device, engine=suite.engine, shape=shape)
                return parity_row(r, ("out", "dq", "dk", "dv", "d spans"))

            def replayed(c: learned.DataCase = case, d: torch.dtype = dtype) -> dict[str, Any]:
                return {"pass": learned.replay_equals_a_new_run(c, d, suite.device, engine=suite.engine, shape=shape)}

            key = row_key(case.label, case.label != "routing", dtype, shape)
            suite.row("parity", key, measured)
            if not suite.dry or case is learned.CASES[0]:  # nothing is captured there
                suite.row("parity", f"{key}/replay", replayed)
