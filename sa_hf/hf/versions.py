"""Which transformers this package runs on, checked when a model is first touched."""

from __future__ import annotations

import transformers
from packaging.version import Version

from sa_hf.errors import UnsupportedModelError

# 5.5 closes CVE-2026-5241; what lies above the tested range is tried, and the probe guards it.
FLOOR = "5.5"
BELOW = "6"


def check_transformers() -> None:
    """Raise ``UnsupportedModelError`` where the installed transformers is out of range; says what to install."""
    version = Version(transformers.__version__)
    if not Version(FLOOR) <= version < Version(BELOW):
        raise UnsupportedModelError(
            f"transformers {version} is installed; sa_hf runs on {FLOOR} or newer, below {BELOW}: "
            f"pip install 'transformers>={FLOOR},<{BELOW}'"
        )
