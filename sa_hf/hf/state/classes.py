"""The Transformers classes behind sparse ones."""

from __future__ import annotations

from typing import Any

# {sparse class: the class that it was made of}; filled where sparse classes are made.
DENSE: dict[Any, Any] = {}


def dense_class(cls: Any) -> Any:
    """The Transformers class behind a sparse class; any other class as it is."""
    return DENSE.get(cls, cls)
