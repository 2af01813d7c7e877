"""The one colour of each pattern, in every picture and table; and the shades of its parts.

Paul Tol's "muted" scheme, made to be told apart under the common forms of colour blindness, with a brown of his for the
tenth pattern and grey for dense attention. Causal and bidirectional are one colour: lines tell them apart by dashes.
"""

from __future__ import annotations

COLOURS = {
    "dense": "#777777",
    "sliding_window": "#44AA99",
    "longnet": "#332288",
    "logsparse": "#882255",
    "sparse_transformer": "#999933",
    "sparsebert": "#AA4499",
    "expire_span": "#117733",
    "routing": "#DDCC77",
    "bigbird": "#CC6677",
    "star": "#88CCEE",
    "block_topk": "#661100",
}
OTHER = "#000000"  # patterns that a user has registered
LEFT_OUT, FUTURE = "#ffffff", "#e8e6e1"
# Of several parts the first is darkest, the last lightest; black and white would be the axes and what is left out.
DARKEST, LIGHTEST = 0.45, 0.5


def colour_of(pattern: str) -> str:
    """The colour of a pattern by its name, as ``#rrggbb``."""
    return COLOURS.get(pattern, OTHER)


def shades(colour: str, count: int) -> list[str]:
    """``count`` shades of one colour from dark to light, evenly apart; one alone is the colour itself."""
    if count == 1:
        return [colour]
    steps = [-DARKEST + (DARKEST + LIGHTEST) * at / (count - 1) for at in range(count)]
    return [_mixed(colour, step) for step in steps]


def _mixed(colour: str, step: float) -> str:
    """A colour on the way to black (``step`` -1) or to white (1)."""
    target = 255 if step > 0 else 0
    parts = [int(colour[at : at + 2], 16) for at in (1, 3, 5)]
    return "#" + "".join(f"{round(part + (target - part) * abs(step)):02x}" for part in parts)
