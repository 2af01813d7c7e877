"""The engines: who can run a part, and why not."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from sa_hf.errors import SparseAttentionError
from sa_hf.ops.parts import Part, ScoreOptions


@dataclass(frozen=True, eq=False)
class Gradients:
    """Gradients of one part, in the shapes of its inputs; None where the input was None."""

    query: Tensor
    key: Tensor
    value: Tensor
    distance_bias: Tensor | None = None
    spans: Tensor | None = None


class Engine(Protocol):
    """Runs one part. Inputs are already in the part's slot order: query ``[G, H, query_slots, D]``, key and value
    ``[G, Hkv | H, key_slots, D]``; ``part.query_index`` and ``part.key_index`` are there for positions alone
    (distance bias, spans, dropout), and for the empty slots (-1) of a tensor index: those keys, which must be finite,
    are left out and those rows are 0 with log-sum-exp -inf.
    """

    name: str
    own_rows: bool
    """Whether it has kernels that bring slots together and put them back (``triton.sums``), a whole part at a time."""

    def in_place(self, query: Tensor) -> bool:
        """Whether it reads a part's rows where they lie and merges what it writes (``native.sums``)."""
        ...

    def unsupported(self, query: Tensor, options: ScoreOptions) -> str | None:
        """Why this engine cannot serve the input, or None."""
        ...

    def forward(
        self, part: Part, query: Tensor, key: Tensor, value: Tensor, options: ScoreOptions
    ) -> tuple[Tensor, Tensor]:
        """Returns output ``[G, H, query_slots, D]`` in the query's dtype, log-sum-exp ``[G, H, query_slots]`` fp32
        (fp64 for fp64 inputs); empty rows are 0 and -inf."""
        ...

    def backward(
        self, part: Part, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor, grad_out: Tensor,
        options: ScoreOptions,
    ) -> Gradients:  # fmt: skip
        """Gradients through this part of a plan. ``out`` and ``lse`` are those of the whole plan (its parts merged):
        with ``p = exp(s - lse)`` and ``delta = sum(out * grad_out)`` the flash backward of each part is exact and
        the mixing weights between the parts get their gradient."""
        ...


ENGINES = ("auto", "triton", "native", "reference")


def choose_engine(name: str, query: Tensor, options: ScoreOptions) -> Engine:
    """The engine for a call: ``auto`` is triton on a GPU and native elsewhere.

    Raises:
        SparseAttentionError: the named engine cannot serve the input; the message lists the reasons of each.
    """
    from sa_hf.ops.native import NativeEngine
    from sa_hf.ops.triton import TritonEngine

    if name not in ENGINES:
        raise SparseAttentionError(f"engine={name!r} must be one of {list(ENGINES)}")
    candidates: list[Engine] = [TritonEngine(), NativeEngine()]
    if name == "auto":
        # On CPU tensors the kernels could only be interpreted, which is for tests that ask for it.
        for engine in candidates if query.device.type != "cpu" else candidates[1:]:
            if engine.unsupported(query, options) is None:
                return engine
    chosen = next((e for e in candidates if e.name == name), candidates[-1])
    reason = chosen.unsupported(query, options)
    if reason is None:
        return chosen
    raise SparseAttentionError(
        f"engine {name!r} cannot serve query {tuple(query.shape)} {query.dtype} on {query.device}: {reason}; "
        "use engine='auto' or 'native'"
    )
