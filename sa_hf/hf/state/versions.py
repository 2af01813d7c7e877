"""Which transformers this package runs on, checked when a model is first touched."""

from __future__ import annotations

import warnings
from functools import cache

import transformers
from packaging.version import Version

from sa_hf.errors import UnsupportedModelError

# 5.5 closes CVE-2026-5241. The tests run on both ends of the tested range; above it the probe guards what we rely on.
FLOOR = "5.5"
NEWEST_TESTED = "5.24.0"
BELOW = "6"


def check_transformers() -> None:
    """Raise ``UnsupportedModelError`` where the installed transformers is out of range; says what to install. Warn,
    once, where it is newer than the newest that was tested."""
    version = Version(transformers.__version__)
    if not Version(FLOOR) <= version < Version(BELOW):
        raise UnsupportedModelError(
            f"transformers {version} is installed; sa_hf runs on {FLOOR} or newer, below {BELOW}: "
            f"pip install 'transformers>={FLOOR},<{BELOW}'"
        )
    if is_untested():
        _warn_of_untested(str(version))


def is_untested() -> bool:
    """Whether the installed transformers is newer than the newest that was tested."""
    return Version(transformers.__version__) > Version(NEWEST_TESTED)


def tested_range() -> str:
    """What an error says of the versions."""
    return f"tested: {FLOOR} to {NEWEST_TESTED}"


def more_may_ask() -> str:
    """What the refusal of a model that computes its attention itself adds on an older release; else nothing."""
    version = Version(transformers.__version__)
    if version >= Version(NEWEST_TESTED):
        return ""
    return f" (transformers {version} is installed; later ones, tested up to {NEWEST_TESTED}, let more models ask)"


@cache
def _warn_of_untested(version: str) -> None:
    warnings.warn(
        f"transformers {version} is newer than {NEWEST_TESTED}, the newest that this sa_hf was tested with. Each model "
        "is checked when it is patched or loaded, and refused where this release hands it something else; for a tested "
        f"release: pip install 'transformers>={FLOOR},<={NEWEST_TESTED}'",
        stacklevel=4,
    )
