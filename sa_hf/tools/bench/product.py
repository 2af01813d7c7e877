"""The machine's own product of matrices, timed beside attention, and what share of its rate a row reaches."""

from __future__ import annotations

import time
from typing import Any

import torch

PRODUCT_SIZE, TOY_PRODUCT_SIZE = 2048, 64
# Operations of a kept pair of one head, by head_dim: two products forward, five more backward.
FORWARD_OPERATIONS, BOTH_OPERATIONS = 4, 14


def product_rate(dtype: torch.dtype, toy: bool) -> float:
    """Operations a second of the machine's own product of two square matrices, the best of three."""
    size = TOY_PRODUCT_SIZE if toy else PRODUCT_SIZE
    a, b = torch.ones(2, size, size, dtype=dtype)
    seconds = []
    for _ in range(3):
        begin = time.perf_counter()
        torch.mm(a, b)
        seconds.append(time.perf_counter() - begin)
    return float(2 * size**3 / min(seconds))


def of_product(row: dict[str, Any], name: str, elements: int) -> float | None:
    """The rate of a contender on the pairs that it keeps, over the machine's own product in the same run; None where
    its pairs are not counted, or the product was not timed.

    Args: elements: of all heads of a query.
    """
    found, pairs = row["rows"][name], row["rows"][name].get("pairs")
    if name == "dense":
        pairs = row["length"] * (row["length"] + 1) / 2 if row["causal"] else row["length"] ** 2
    if pairs is None or not row.get("product"):
        return None
    operations = BOTH_OPERATIONS if row["backward"] else FORWARD_OPERATIONS
    return float(operations * elements * pairs / found["median_s"] / row["product"])
