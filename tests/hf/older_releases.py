"""What a release of Transformers older than the one that all tests run on may do instead: refuse, or its own errors."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import transformers as tf
from packaging.version import Version

from sa_hf.hf.state.versions import NEWEST_TESTED
from sa_hf.tools.families.compare import REFUSED, Result
from sa_hf.tools.families.registry import Entry, entries

# Whether the installed release is older than the one that all tests run on.
OLDER = Version(tf.__version__) < Version(NEWEST_TESTED)
REFUSED_THERE = "gets a ready-made mask|computes its attention itself"
WRITTEN_OTHERWISE = "has no attribute 'scaling'"  # the layer that an adapter asks in the stead of


def skip_refused(found: Result) -> None:
    """Skips the test of a class that is refused for what an older release's own code does."""
    reasons = f"{REFUSED_THERE}|{WRITTEN_OTHERWISE}|has two (en|de)coder stacks|'token_type_ids_mask_function'"
    if OLDER and found.status == REFUSED and re.search(reasons, found.reason):
        pytest.skip(f"transformers {tf.__version__}: {found.reason}")


def skip_without_reference(name: str) -> None:
    """The layers of an older release add a mask to scores by themselves, and take none from a pattern."""
    if OLDER and "Wav2Vec2Bert" in name:
        pytest.skip(f"transformers {tf.__version__}: {name}'s own layers ask for no mask to be compared under")


def listed(name: str) -> Entry:
    """A model class of the families' table; skips the test where an older release's auto classes do not name it."""
    found = next((entry for entry in entries() if entry.name == name), None)
    if found is None and OLDER:
        pytest.skip(f"transformers {tf.__version__} has no {name} in its auto classes")
    assert found is not None, name
    return found


@contextmanager
def older_releases_may(reasons: str) -> Iterator[None]:
    """Skips the test where an error of an older release's own, or our refusal of it, is one of the ``reasons`` (a
    regular expression); nothing is skipped on the release that all tests run on."""
    try:
        yield
    except Exception as error:
        said = f"{type(error).__name__}: {error}"
        if not OLDER or not re.search(reasons, said):
            raise
        pytest.skip(f"transformers {tf.__version__}: {said}")
