"""Class labels as they stand in data, and their numbers in a model."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from sa_hf.config import did_you_mean, shown
from sa_hf.errors import SparseAttentionError

# A class name is not a document: a longer one is text in the wrong column.
MAX_NAME = 200
# Past as many classes, more than one for two rows are values and no classes.
MANY_CLASSES = 20
SHOWN_CLASSES = 12
SHOWN_VALUE = 120  # characters of a value in a message
_DEFAULT_NAME = re.compile(r"LABEL_\d+")


def in_a_line(value: Any) -> str:
    """A value of the user's data for a message, cut to a line whatever it holds."""
    text = shown(value)
    return text if len(text) <= SHOWN_VALUE else f"{text[:SHOWN_VALUE]}..."


def check_label(value: Any, where: Callable[[], str], column: str) -> str | None:
    """What is wrong with a label, as a message; None where it is one class."""
    if value is None or value != value or (isinstance(value, str) and not value.strip()):
        problem = "is missing"
    elif isinstance(value, list | tuple | dict):
        problem = f"is {in_a_line(value)}; a row has one class, a text or an integer"
    elif isinstance(value, float) and not value.is_integer():
        problem = f"is {in_a_line(value)}, a number and no class; classification takes texts or integers"
    elif isinstance(value, str) and len(value) > MAX_NAME:
        problem = f"is {in_a_line(value)}, {len(value)} characters: no class name; are text and label swapped?"
    elif not isinstance(value, str | int | float):
        problem = f"is {in_a_line(value)}, a {type(value).__name__}; classes are texts or integers"
    else:
        return None
    return f"{where()}: column {column!r} {problem}"


def name_of(value: Any) -> str:
    """The class name of a label: texts without blanks around them, integers as they are written, 1.0 as 1."""
    if isinstance(value, float):
        value = int(value)
    return str(value).strip()


def names_of(values: Sequence[Any]) -> list[str]:
    """The class names of labels: integers by their size, then texts by the alphabet."""
    numbers = sorted({int(v) for v in values if isinstance(v, int | float) and not isinstance(v, bool)})
    texts = sorted({name_of(v) for v in values if isinstance(v, str | bool)})
    return [str(n) for n in numbers] + texts


def number_of(name: str, label2id: Mapping[str, int]) -> int | None:
    """A class name's number in a model: by the name, or an integer as itself where the model's names are words."""
    if name in label2id:
        return label2id[name]
    if re.fullmatch(r"\d+", name) and not any(re.fullmatch(r"-?\d+", known) for known in label2id):
        return int(name) if int(name) in label2id.values() else None
    return None


def numbers_of(
    values: Iterable[Any], label2id: Mapping[str, int], names: Sequence[str] | None, where: Callable[[int], str]
) -> list[int]:
    """Labels as the model numbers its classes.

    Args:
        names: of a ``ClassLabel`` column, whose values number them.
        where: the place of a row and its column, for a message.

    Raises:
        SparseAttentionError: the model does not know a label.
    """
    # A model without names of its own is numbered as the data is.
    unnamed = all(_DEFAULT_NAME.fullmatch(known) for known in label2id)
    by_value: dict[Any, int] = {}
    numbers = []
    for row, value in enumerate(values):
        if value not in by_value:
            name = name_of(value if names is None or unnamed else names[value])
            found = number_of(name, label2id)
            if found is None:
                known = sorted(label2id, key=label2id.__getitem__)
                raise SparseAttentionError(
                    f"{where(row)}: label {shown(name)} is no class of the model{did_you_mean(name, known)}; its "
                    f"classes: {listed(known)}"
                )
            by_value[value] = found
        numbers.append(by_value[value])
    return numbers


def check_classes(names: Sequence[str], values: Sequence[Any], column: str, dataset: str) -> None:
    """Raise ``SparseAttentionError`` where the training rows are of one class, or their labels are no classes."""
    counted = Counter(name_of(v) for v in values)
    if len(counted) < 2:
        raise SparseAttentionError(
            f"all {len(values)} rows for training in {dataset!r} have the label {listed(list(counted))} in column "
            f"{column!r}; classification needs at least 2 classes"
        )
    if len(names) > MANY_CLASSES and 2 * len(counted) > len(values):
        raise SparseAttentionError(
            f"column {column!r} of {dataset!r} holds {len(counted)} different values in {len(values)} rows, such as "
            f"{listed(list(counted)[:2])}: no classes; set label_column to the column that holds them"
        )


def listed(names: Sequence[str]) -> str:
    """Class names for a message, the first few of many, each cut to a line."""
    more = f", and {len(names) - SHOWN_CLASSES} more" if len(names) > SHOWN_CLASSES else ""
    return ", ".join(shown(name) for name in names[:SHOWN_CLASSES]) + more
