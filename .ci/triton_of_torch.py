"""Prints what to ask pip for beside torch, so that the kernels' tests run on the Triton of the public torch.

python .ci/triton_of_torch.py            # for the installed torch: nothing where it requires a Triton itself
python .ci/triton_of_torch.py 2.13.0     # what the public Linux wheel of this torch requires
"""

from __future__ import annotations

import sys
from importlib.metadata import PackageNotFoundError, requires, version

# From the metadata of the wheels in the registry.
TRITON_OF_TORCH = {
    "2.9.0": "3.5.0",
    "2.9.1": "3.5.1",
    "2.10.0": "3.6.0",
    "2.11.0": "3.6.0",
    "2.12.0": "3.7.0",
    "2.12.1": "3.7.1",
    "2.13.0": "3.7.1",
    "2.14.1": "3.8.0",
    "2.15.0": "3.9.0",
}


def beside_installed() -> str:
    """A requirement, or nothing: torch brings its own, it is not installed, or this release is not in the table."""
    try:
        if any(line.startswith(("triton", "pytorch-triton")) for line in requires("torch") or ()):
            return ""
    except PackageNotFoundError:
        return ""
    release = version("torch").partition("+")[0]
    return f"triton=={TRITON_OF_TORCH[release]}" if release in TRITON_OF_TORCH else ""


if __name__ == "__main__":
    print(TRITON_OF_TORCH.get(sys.argv[1], "") if len(sys.argv) > 1 else beside_installed())
