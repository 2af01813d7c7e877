"""Which forward a recomputation repeats.

Under gradient checkpointing of a layer its mask says so (``MaskRequest.given``). Of a ``torch.utils.checkpoint`` of the
user's own, around the model or a part of it, nothing reaches us but the inputs: it calls the model in ``backward()``
with the tensors of the forward, which it has kept. So every forward in training is noted with its tensors, and a call
in ``backward()`` is the forward that has most of them in common.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from sa_hf.errors import SparseAttentionError
from sa_hf.hf.state.step import Delivery
from sa_hf.patterns.learned import LearnedAttention

# Forwards that one optimizer step may have; of older ones nothing is known.
KEPT = 4096

StoragePlace = tuple[StorageWeakRef, int, tuple[int, ...]]


def in_backward() -> bool:
    """Whether this code runs inside ``backward()``: a forward there is a recomputation, by whatever checkpointing."""
    # What torch.utils.checkpoint asks, too; there is no public form.
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


@dataclass(eq=False)
class Started:
    """A forward in training: the count of its forwards in each learned layer (by id), where its tensors lie, and how
    its auxiliary losses are delivered."""

    numbers: dict[int, int]
    places: frozenset[StoragePlace]
    delivery: Delivery
    recomputed: bool = False


@dataclass(eq=False)
class Forwards:
    """The forwards of a model since the last optimizer step."""

    started: deque[Started] = field(default_factory=lambda: deque(maxlen=KEPT))

    def note(self, learned: Iterable[LearnedAttention], inputs: Iterable[Any], delivery: Delivery) -> Started:
        one = Started({id(leaf): leaf.forwards for leaf in learned}, frozenset(_places(inputs)), delivery)
        self.started.append(one)
        return one

    def repeated(self, learned: Iterable[LearnedAttention], inputs: Iterable[Any]) -> Started:
        """The forward that a call in ``backward()`` repeats.

        Raises:
            SparseAttentionError: its inputs do not tell, and what the layers draw depends on it.
        """
        places = frozenset(_places(inputs))
        most = max((len(places & one.places) for one in self.started), default=0)
        alike = [one for one in self.started if len(places & one.places) == most]
        waiting = [one for one in alike if not one.recomputed]
        found = waiting or (alike[-1:] if most or len(alike) == 1 else [])
        drawing = [leaf for leaf in learned if leaf.draws_by_forward]
        if len(found) > 1 and not drawing:
            found = found[-1:]
        if len(found) != 1:
            name = drawing[0].config.name if drawing else "learned attention"
            raise SparseAttentionError(
                f"backward() recomputes a forward of a model with {name!r}, and of {len(found)} forwards since the "
                "last optimizer step that had these inputs it does not say which, so it would draw other noise. Call "
                "torch.utils.checkpoint with the model's input tensors themselves as arguments, another tensor "
                "(`.clone()`) for each forward; or use model.gradient_checkpointing_enable()"
            )
        found[0].recomputed = True
        return found[0]

    def forget(self) -> None:
        """After an optimizer step no earlier forward is recomputed: its weights have changed."""
        self.started.clear()


def _places(inputs: Iterable[Any]) -> Iterator[StoragePlace]:
    for value in inputs:
        if not isinstance(value, Tensor):
            continue
        try:
            yield StorageWeakRef(value.untyped_storage()), int(value.storage_offset()), tuple(value.shape)
        except (NotImplementedError, RuntimeError):  # a tensor without storage: of a transform, sharded, fake
            continue
