"""Which engine runs a call: those that there are, and which of them is asked for."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from sa_hf.errors import SparseAttentionError
from sa_hf.ops.cpp import CppEngine
from sa_hf.ops.engine import Engine
from sa_hf.ops.parts import ScoreOptions
from sa_hf.ops.tiles import TileEngine
from sa_hf.ops.triton import TritonEngine

TRITON, CPP, TILES = TritonEngine(), CppEngine(), TileEngine()
# By name, those that are tried in turn.
CANDIDATES: dict[str, tuple[Engine, ...]] = {
    "auto": (TRITON, CPP, TILES),
    "triton": (TRITON,),
    "native": (CPP, TILES),
    "torch": (TILES,),
}
# "reference" is the dense oracle of the bare operator (``ops.reference``) and no engine: no model runs by it.
REFERENCE = "reference"
ENGINES = (*CANDIDATES, REFERENCE)


def check_engine(name: str) -> None:
    """Raise ``SparseAttentionError`` for what is the name of no engine that runs a model."""
    if name == REFERENCE:
        raise SparseAttentionError(
            f"engine={name!r} is the dense fp64 oracle of sa_hf.sparse_attention and runs no model; choose one of "
            f"{list(CANDIDATES)}, or compare with `with sa_hf.dense(model):`"
        )
    if name not in CANDIDATES:
        raise SparseAttentionError(f"engine={name!r} must be one of {list(CANDIDATES)}; nearest: 'auto'")


def choose_engine(name: str, query: Tensor, options: ScoreOptions) -> Engine:
    """The engine for a call: ``auto`` is triton on a GPU and native elsewhere; ``native`` is the C++ kernels on the
    CPU, and torch's operators where those do not serve.

    Raises:
        SparseAttentionError: the named engine cannot serve the input; the message lists the reasons of each.
    """
    return _first(name, query, lambda engine: engine.unsupported(query, options))


def choose_decoder(name: str, query: Tensor, key: Tensor, value: Tensor, options: ScoreOptions) -> Engine:
    """The engine for a step of decoding; as :func:`choose_engine`."""
    return _first(name, query, lambda engine: engine.cannot_decode(query, key, value, options))


def _first(name: str, query: Tensor, unsupported: Callable[[Engine], str | None]) -> Engine:
    if name not in ENGINES:
        raise SparseAttentionError(f"engine={name!r} must be one of {list(ENGINES)}")
    check_engine(name)
    candidates = CANDIDATES[name]
    if name == "auto" and query.device.type == "cpu":
        candidates = candidates[1:]  # interpreted, as on CPU tensors, kernels are for tests that ask for them
    reasons = []
    for engine in candidates:
        reason = unsupported(engine)
        if reason is None:
            return engine
        reasons.append(reason)
    raise SparseAttentionError(
        f"engine {name!r} cannot serve query {tuple(query.shape)} {query.dtype} on {query.device}: "
        f"{'; '.join(reasons)}; use engine='auto' or 'native'"
    )
