"""The one colour of each pattern, in every picture and table; and the shades of its parts.

Paul Tol's "muted" scheme, made to be told apart under the common forms of colour blindness, with a brown of his for the
tenth pattern and grey for dense attention. Causal and bidirectional are one colour: lines tell them apart by dashes.
"""

from __future__ import annotations

COLOURS = {
    "dense": "#777777",
    "sliding_window": "#88CCEE",
    "longnet": "#332288",
    "logsparse": "#882255",
    "sparse_transformer": "#999933",
    "sparsebert": "#AA4499",
    "expire_span": "#117733",
    "routing": "#DDCC77",
    "bigbird": "#CC6677",
    "star": "#44AA99",
    "block_topk": "#661100",
}
OTHER = "#000000"  # patterns that a user has registered
INTERVAL = "#E69F00"  # of error bars: seen on each of the colours
LEFT_OUT, FUTURE = "#ffffff", "#e8e6e1"
# Brightness (0 black, 1 white) of the parts of a pattern, the first darkest: black and white would be the axes and what
# is left out.
DARKEST, LIGHTEST = 0.2, 0.75


def colour_of(pattern: str) -> str:
    """The colour of a pattern by its name, as ``#rrggbb``."""
    return COLOURS.get(pattern, OTHER)


def shades(colour: str, count: int) -> list[str]:
    """``count`` shades of one colour from dark to light, evenly apart; one alone is the colour itself."""
    if count == 1:
        return [colour]
    return [_as_bright(colour, DARKEST + (LIGHTEST - DARKEST) * at / (count - 1)) for at in range(count)]


def brightness(colour: str) -> float:
    """How bright a colour is to the eye, 0 to 1 (the luma of ITU-R BT.601)."""
    red, green, blue = _channels(colour)
    return (0.299 * red + 0.587 * green + 0.114 * blue) / 255


def _as_bright(colour: str, wanted: float) -> str:
    """A colour mixed with black or white until it is as bright as wanted."""
    is_now = brightness(colour)
    target, share = (255, (wanted - is_now) / (1 - is_now)) if wanted > is_now else (0, 1 - wanted / is_now)
    return "#" + "".join(f"{round(part + (target - part) * share):02x}" for part in _channels(colour))


def _channels(colour: str) -> tuple[int, int, int]:
    return int(colour[1:3], 16), int(colour[3:5], 16), int(colour[5:7], 16)
