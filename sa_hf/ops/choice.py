"""Which engine runs a call: those that there are, and which of them is asked for."""

from __future__ import annotations

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
    if name not in ENGINES:
        raise SparseAttentionError(f"engine={name!r} must be one of {list(ENGINES)}")
    check_engine(name)
    candidates = CANDIDATES[name]
    if name == "auto" and query.device.type == "cpu":
        candidates = candidates[1:]  # interpreted, as on CPU tensors, kernels are for tests that ask for them
    reasons = []
    for engine in candidates:
        reason = engine.unsupported(query, options)
        if reason is None:
            return engine
        reasons.append(reason)
    raise SparseAttentionError(
        f"engine {name!r} cannot serve query {tuple(query.shape)} {query.dtype} on {query.device}: "
        f"{'; '.join(reasons)}; use engine='auto' or 'native'"
    )
