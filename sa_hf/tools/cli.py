"""Entry point of the command line ``sa-hf``; what it can do stands in ``commands.py``."""

from __future__ import annotations

import sys

from sa_hf.errors import SparseAttentionError

# What the commands cannot start without; the extra "tools" holds them.
EXTRA = {"typer", "rich"}


def main() -> None:
    """Bad input, a missing file or package end with their message and exit code 2."""
    try:
        # Imported here: without the extra it fails, and that is one line, too.
        from sa_hf.tools.commands import app

        app()
    except ModuleNotFoundError as error:
        name = (error.name or "").partition(".")[0]
        needed = f"the command line needs {name}: run `pip install '.[tools]'` in a clone of sa_hf's repository"
        stop(needed if name in EXTRA else error)
    except (SparseAttentionError, OSError, ImportError) as error:
        stop(error)


def stop(message: object) -> None:
    print(f"sa-hf: {message}", file=sys.stderr)
    raise SystemExit(2)


if __name__ == "__main__":
    main()
