"""Entry point of the command line ``sa-hf``; what it can do stands in ``commands.py``."""

from __future__ import annotations

import sys
from typing import Any

from sa_hf.errors import SparseAttentionError
from sa_hf.tasks.homes import spare_caches

# What the commands cannot start without; the extra "tools" holds them.
EXTRA = {"typer", "rich"}
NO_MEMORY = "can't allocate memory"  # in torch's error on the CPU, a plain RuntimeError


def main() -> None:
    """Bad input, a missing file or package end with one line and exit code 2."""
    try:
        # Imported here: without the extra it fails, and that is one line, too.
        import typer

        spare_caches()
        from sa_hf.tools.commands import app

        # Terminals that cannot write a character of a picture or a name get another in its place.
        for stream in (sys.stdout, sys.stderr):
            if hasattr(stream, "reconfigure"):
                stream.reconfigure(errors="replace")
        try:
            # Returns the code of typer.Exit, and raises what is wrong with the words.
            code = app(prog_name="sa-hf", standalone_mode=False)
        except typer.Abort:
            code = 130
        raise SystemExit(code if isinstance(code, int) else 0)
    except ModuleNotFoundError as error:
        name = (error.name or "").partition(".")[0]
        needed = f"the command line needs {name}: run `pip install '.[tools]'` in a clone of sa_hf's repository"
        stop(needed if name in EXTRA else error)
    except (SparseAttentionError, OSError, ImportError) as error:
        stop(error)
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError) and "out of memory" not in str(error) and NO_MEMORY not in str(error):
            raise
        stop("the memory of this machine does not suffice; take a smaller --length, --heads or --head-dim")
    except Exception as error:
        # The usage errors of typer, whose classes it keeps to itself.
        if not hasattr(error, "format_message"):
            raise
        stop_usage(error)


def stop_usage(error: Any) -> None:
    """What is wrong with the words typed, and where the right ones stand; without any words, those themselves."""
    message, context = error.format_message(), error.ctx
    command = "sa-hf" if context is None else context.command_path
    if context is not None and message == context.get_help():
        print(message)
        raise SystemExit(2)
    stop(f"{message.rstrip('.')}; see `{command} --help`")


def stop(message: object) -> None:
    print(f"sa-hf: {' '.join(str(message).split())}", file=sys.stderr)
    raise SystemExit(2)


if __name__ == "__main__":
    main()
