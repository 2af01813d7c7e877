"""Launch configurations: tile, warps and stages per kernel, head_dim, element width and architecture.

The shipped table comes from ahead-of-time compilation (``scripts/compile_gate.py``: no spills, then most resident
blocks and the widest matrix instruction); ``tune`` measures on a GPU and writes ``tuned.json`` beside this file, which
is read first. A JSON file named by ``SA_HF_TRITON_CONFIGS`` takes its place. Its form:
``{"forward|128|16|90": {"rows": 64, "columns": 64, "warps": 4, "stages": 2}}``.

Variants of a kernel's name: ``forward`` is the plain one; ``forward+`` has one or two options that cost registers
(softcap, bias, spans, dropout, gathered slots, key ranges), ``forward++`` more; ``forward@128`` is plain on tiles of
128 rows. What a variant lacks it takes from the simpler one.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path

from sa_hf.errors import SparseAttentionError

# 192 is for those that run as chunks of 128 and 16 to 64; what it lacks is taken from 256.
HEAD_DIMS = (64, 128, 192, 256)
TUNED = Path(__file__).with_name("tuned.json")


@dataclass(frozen=True)
class Launch:
    """``rows`` are the tile's own side (queries; keys in dK/dV), ``columns`` the side it loops over."""

    rows: int
    columns: int
    warps: int
    stages: int


# (kernel, head_dim up to, bits of an element) -> by architecture: compute capability times 10 or "hip"; 0 is the rest.
_SHIPPED: dict[tuple[str, int, int], dict[int | str, Launch]] = {
    ("forward", 64, 16): {0: Launch(64, 64, 4, 2), 90: Launch(64, 64, 4, 3)},
    ("forward", 128, 16): {0: Launch(64, 64, 4, 2), 90: Launch(64, 64, 4, 3)},
    ("forward", 192, 16): {0: Launch(64, 32, 8, 2), 80: Launch(32, 32, 4, 2), 90: Launch(64, 32, 4, 2)},
    ("forward", 256, 16): {0: Launch(64, 32, 8, 2), 90: Launch(64, 32, 4, 2)},
    ("forward@128", 64, 16): {0: Launch(128, 64, 8, 2), 90: Launch(64, 128, 4, 3)},
    ("forward@128", 128, 16): {0: Launch(128, 64, 8, 2), 80: Launch(64, 64, 4, 2), 90: Launch(64, 64, 4, 3)},
    ("forward+", 64, 16): {0: Launch(64, 32, 4, 2), 90: Launch(64, 32, 4, 3)},
    ("forward+", 128, 16): {0: Launch(64, 32, 4, 2), 90: Launch(64, 32, 4, 3)},
    ("forward+", 256, 16): {0: Launch(64, 32, 8, 2), 90: Launch(64, 16, 4, 2)},
    ("forward++", 64, 16): {0: Launch(64, 32, 4, 2), 80: Launch(32, 32, 4, 2)},
    ("forward++", 128, 16): {0: Launch(64, 16, 4, 2)},
    ("forward++", 256, 16): {0: Launch(64, 16, 8, 2)},
    ("query", 64, 16): {0: Launch(64, 64, 4, 2), 90: Launch(64, 64, 4, 3)},
    ("query", 128, 16): {0: Launch(64, 32, 4, 2), 90: Launch(64, 64, 4, 2)},
    ("query", 192, 16): {0: Launch(64, 32, 8, 2), 80: Launch(32, 32, 8, 2), 90: Launch(64, 16, 4, 2)},
    ("query", 256, 16): {0: Launch(32, 16, 4, 2), 90: Launch(64, 16, 4, 2)},
    ("query@128", 64, 16): {0: Launch(128, 64, 8, 2), 90: Launch(64, 128, 4, 3)},
    ("query@128", 128, 16): {0: Launch(128, 32, 8, 2), 90: Launch(128, 64, 8, 3)},
    ("query+", 64, 16): {0: Launch(64, 32, 4, 2), 90: Launch(64, 32, 4, 3)},
    ("query+", 128, 16): {0: Launch(64, 32, 4, 2), 90: Launch(64, 32, 4, 3)},
    ("query+", 256, 16): {0: Launch(32, 16, 4, 2), 80: Launch(32, 16, 8, 2)},
    ("query++", 128, 16): {0: Launch(64, 16, 4, 2)},
    ("key", 64, 16): {0: Launch(64, 32, 4, 2), 80: Launch(64, 32, 8, 2), 90: Launch(64, 64, 4, 3)},
    ("key", 128, 16): {0: Launch(64, 32, 8, 2), 90: Launch(64, 32, 4, 3)},
    ("key", 192, 16): {0: Launch(64, 16, 8, 2), 80: Launch(16, 16, 4, 1)},
    ("key", 256, 16): {0: Launch(32, 32, 8, 1), 90: Launch(32, 32, 4, 1)},
    ("key+", 256, 16): {0: Launch(32, 32, 8, 1)},
    ("key@128", 64, 16): {0: Launch(128, 32, 8, 2), 80: Launch(64, 32, 8, 2), 90: Launch(64, 64, 4, 3)},
    ("key@128", 128, 16): {0: Launch(128, 32, 8, 2), 80: Launch(64, 32, 8, 2), 90: Launch(64, 32, 4, 3)},
    ("key+", 64, 16): {0: Launch(64, 16, 8, 2), 90: Launch(64, 16, 4, 3)},
    ("key+", 128, 16): {0: Launch(64, 16, 8, 2), 90: Launch(64, 16, 4, 3)},
    ("key++", 64, 16): {0: Launch(64, 16, 8, 2), 80: Launch(32, 32, 8, 2)},
    ("key++", 128, 16): {0: Launch(32, 32, 8, 2)},
    ("bias", 64, 16): {0: Launch(64, 64, 8, 1)},
    ("bias", 128, 16): {0: Launch(64, 64, 8, 1), 80: Launch(32, 32, 8, 1)},
    ("bias", 256, 16): {0: Launch(16, 16, 8, 1)},
    ("offsets", 64, 16): {0: Launch(64, 1, 4, 1), 90: Launch(32, 1, 4, 1)},
    ("offsets", 128, 16): {0: Launch(32, 1, 4, 1), 80: Launch(16, 1, 4, 1), 90: Launch(16, 1, 4, 1)},
    ("offsets", 256, 16): {0: Launch(16, 1, 4, 1)},
    ("offsets_query", 64, 16): {0: Launch(64, 1, 4, 1), 90: Launch(16, 1, 4, 1)},
    ("offsets_query", 128, 16): {0: Launch(32, 1, 4, 1), 90: Launch(8, 1, 4, 1)},
    ("offsets_query", 256, 16): {0: Launch(16, 1, 4, 1)},
    ("offsets_key", 64, 16): {0: Launch(32, 1, 4, 1)},
    ("offsets_key", 128, 16): {0: Launch(16, 1, 4, 1)},
    ("offsets_key", 256, 16): {0: Launch(16, 1, 8, 1)},
    ("offsets_key++", 64, 16): {0: Launch(32, 1, 8, 1)},
    ("offsets_key++", 128, 16): {0: Launch(16, 1, 8, 1)},
    ("decode", 64, 16): {0: Launch(16, 64, 4, 2)},
    ("decode", 128, 16): {0: Launch(16, 64, 4, 2)},
    ("decode+", 128, 16): {0: Launch(16, 32, 4, 2)},
    ("decode", 256, 16): {0: Launch(16, 32, 4, 2)},
    # fp32 has no matrix units at ieee precision: small tiles, one stage.
    ("forward", 64, 32): {0: Launch(32, 32, 8, 1)},
    ("forward", 128, 32): {0: Launch(32, 16, 8, 1)},
    ("forward", 256, 32): {0: Launch(16, 16, 8, 1)},
    ("query", 64, 32): {0: Launch(32, 32, 8, 1)},
    ("query", 128, 32): {0: Launch(32, 16, 8, 1)},
    ("query", 256, 32): {0: Launch(32, 16, 8, 1)},
    ("key", 64, 32): {0: Launch(32, 32, 8, 1)},
    ("key", 128, 32): {0: Launch(32, 16, 8, 1)},
    ("key", 256, 32): {0: Launch(16, 16, 4, 1)},
    ("bias", 64, 32): {0: Launch(32, 32, 8, 1)},
    ("bias", 128, 32): {0: Launch(16, 16, 4, 1)},
    ("bias", 256, 32): {0: Launch(16, 16, 4, 1)},
    ("offsets", 64, 32): {0: Launch(32, 1, 4, 1)},
    ("offsets", 128, 32): {0: Launch(16, 1, 4, 1)},
    ("offsets", 256, 32): {0: Launch(16, 1, 8, 1)},
    ("offsets_query", 64, 32): {0: Launch(32, 1, 4, 1)},
    ("offsets_query", 128, 32): {0: Launch(16, 1, 4, 1)},
    ("offsets_query", 256, 32): {0: Launch(16, 1, 8, 1)},
    ("offsets_key", 64, 32): {0: Launch(16, 1, 4, 1)},
    ("offsets_key", 128, 32): {0: Launch(16, 1, 8, 1)},
    ("offsets_key", 256, 32): {0: Launch(16, 1, 8, 1)},
    ("decode", 64, 32): {0: Launch(16, 32, 4, 2)},
    ("decode", 128, 32): {0: Launch(16, 32, 4, 1)},
    ("decode", 256, 32): {0: Launch(16, 16, 4, 1)},
}  # fmt: skip


def launch(kernel: str, head_dim: int, bits: int, arch: int | str) -> Launch:
    """The configuration of a kernel or variant; ``arch`` 0 is the interpreter."""
    buckets = [d for d in HEAD_DIMS if head_dim <= d]
    tuned = _tuned(os.environ.get("SA_HF_TRITON_CONFIGS", str(TUNED)))
    key = f"{kernel}|{buckets[0]}|{bits}|{arch}"
    for table in (_trial, tuned):
        if key in table:
            return table[key]
    # Ampere and Ada have one matrix unit; what fits sm_80 fits them.
    family = 80 if isinstance(arch, int) and 80 < arch < 90 else arch
    names = (kernel, kernel.replace("++", "+"), kernel.rstrip("+").removesuffix("@128"))
    for bucket in buckets:
        for name in names:
            shipped = _SHIPPED.get((name, bucket, bits))
            if shipped is not None:
                return shipped.get(family, shipped[0])
    raise KeyError(f"no launch configuration for {kernel} at head_dim={head_dim}, {bits} bits")


_trial: dict[str, Launch] = {}


@contextmanager
def trial(table: dict[str, Launch]) -> Iterator[None]:
    """Configurations that go before all others inside the block (the tuner's; not for several threads)."""
    _trial.update(table)
    try:
        yield
    finally:
        _trial.clear()


def write(path: Path, table: dict[str, Launch]) -> None:
    """Write a tuned table, replacing the file whole."""
    text = json.dumps({key: asdict(value) for key, value in sorted(table.items())}, indent=1)
    partial = path.with_suffix(".part")
    partial.write_text(text + "\n")
    partial.replace(path)
    _tuned.cache_clear()


@lru_cache(maxsize=4)
def _tuned(path: str) -> dict[str, Launch]:
    if not Path(path).exists():
        if path != str(TUNED):
            raise SparseAttentionError(f"SA_HF_TRITON_CONFIGS={path!r} does not exist; unset it, or name a JSON file")
        return {}
    try:
        return {key: Launch(**value) for key, value in json.loads(Path(path).read_text()).items()}
    except (TypeError, ValueError, AttributeError) as error:
        raise SparseAttentionError(
            f"{path} is no table of launch configurations ({error}); its form: "
            '{"forward|128|16|90": {"rows": 64, "columns": 64, "warps": 4, "stages": 2}}'
        ) from error
