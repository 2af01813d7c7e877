"""What the rows of the CPU benchmark are: pattern, options and direction, for tables and pictures.

Result files hold the short labels by which ``scripts/benchmark.py --pattern`` chooses.
"""

from __future__ import annotations

from dataclasses import dataclass

FLEX = "flex: "  # before the label of a pattern that FlexAttention ran


@dataclass(frozen=True)
class Named:
    """A row's pattern, the options that are not its defaults or that grow with the length, and whether it is causal."""

    pattern: str
    options: str
    causal: bool

    def __str__(self) -> str:
        direction = "causal" if self.causal else "bidirectional"
        return f"{self.pattern}{' ' if self.options else ''}{self.options}, {direction}"


NAMES = {
    "bigbird": Named("bigbird", "", False),
    "bigbird causal": Named("bigbird", "", True),
    "window": Named("sliding_window", "window=256", False),
    "window causal": Named("sliding_window", "window=512", True),
    "longnet": Named("longnet", "", True),
    "logsparse": Named("logsparse", "", True),
    "fixed": Named("sparse_transformer", "kind=fixed, stride=√n, summary=stride/16", True),
    "fixed, constant summary": Named("sparse_transformer", "kind=fixed, stride=√n, summary=8", True),
    "strided": Named("sparse_transformer", "kind=strided, stride=√n", True),
    "star": Named("star", "", False),
    "star causal": Named("star", "", True),
    "sparsebert": Named("sparsebert", "frozen=False (mask set by hand)", True),
    "sparsebert frozen": Named("sparsebert", "frozen=True (mask set by hand)", True),
    "expire_span": Named("expire_span", "max_span=512", True),
    "routing": Named("routing", "num_clusters=√n", False),
    "routing causal": Named("routing", "num_clusters=√n, window=√n", True),
    "block_topk": Named("block_topk", "", True),
    "block_topk query": Named("block_topk", "selection=query", True),
}
LEGEND = (
    "The names are the patterns', with the options that differ from the defaults; √n is the square root of the length "
    "(of strides the power of two next to it). A sparsebert mask is learned; this one is set by hand to the 16 nearest "
    "distances and every 32nd one up to 512, and frozen. expire_span and routing are untrained: spans of 502 tokens "
    "(0.98 max_span), random centroids and inputs."
)


def row_title(label: str) -> str:
    """A row's full name; labels that are none of ours ("dense") as they are."""
    if label.startswith(FLEX):
        return f"FlexAttention: {row_title(label.removeprefix(FLEX))}"
    return str(NAMES[label]) if label in NAMES else label
