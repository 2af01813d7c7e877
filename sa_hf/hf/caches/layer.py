"""What one attention layer keeps beside its keys and values, and where the received keys stand.

Per-token state of a pattern (spans, clusters, inputs of a convolution) lives on the Transformers cache layer, whose
class is swapped for a subclass that lets it follow reorder, repeat, select, crop and reset.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

from torch import Tensor
from transformers.cache_utils import Cache

from sa_hf.config import SparseAttention
from sa_hf.errors import SparseAttentionError
from sa_hf.hf.caches.room import Room
from sa_hf.hf.state.layers import leaves, remembers
from sa_hf.layer import AttentionInputs

# Tokens that a limited memory keeps beyond its need, so that assisted generation can take back its rejected guesses
# (Transformers proposes at most a few dozen at once).
SLACK = 64


@dataclass(eq=False)
class Remembered:
    """One per-token tensor of a layer: its values from slot ``start`` on, along ``dim``; ``need`` limits how many
    of the last slots are kept (and a crop may leave no fewer), None keeps all."""

    tensor: Tensor
    dim: int
    start: int = 0
    need: int | None = None
    room: Room = field(init=False)

    def __post_init__(self) -> None:
        self.room = Room(self.dim)
        self._trim(0)

    def append(self, new: Tensor) -> tuple[Tensor, int]:
        """All entries with the new ones, and the slot of the first; what is kept may be fewer afterwards."""
        joined, start = self.room.joined(self.tensor, new), self.start
        self.tensor = joined
        if self.need is not None:
            self._trim(self.need + SLACK)
        return joined, start

    def _trim(self, more: int) -> None:
        """Keep the last ``need + SLACK`` entries alone, once there are ``more`` beyond them."""
        beyond = 0 if self.need is None else self.tensor.shape[self.dim] - self.need - SLACK
        if beyond > more:
            length = self.tensor.shape[self.dim] - beyond
            self.tensor, self.start = self.tensor.narrow(self.dim, beyond, length).clone(), self.start + beyond

    @property
    def end(self) -> int:
        return self.start + self.tensor.shape[self.dim]

    def cut(self, end: int) -> None:
        """Forget the slots from ``end`` on."""
        if self.end <= end:
            return
        left = max(0, end - self.start)
        if self.need is not None and left < min(self.need, end):
            raise SparseAttentionError(
                f"the cache was cropped to {end} tokens, which needs inputs from before slot {self.start}"
                f"; crop by at most {SLACK} tokens, or start again from the prompt"
            )
        self.tensor = self.tensor.narrow(self.dim, 0, left)


class KeyInputs(Remembered):
    """The last inputs of a layer whose keys are made of several: no other pattern reads these keys."""


class Made(Remembered):
    """What a pattern has made of the keys so far, for later steps; a crop forgets it, and it is made anew."""

    def _trim(self, more: int) -> None:
        """Nothing: it is no tensor by token."""

    def cut(self, end: int) -> None:
        self.tensor = self.tensor.narrow(self.dim, 0, 0)


@lru_cache(maxsize=64)
def _remembering(base: Any) -> Any:
    """A cache layer's class whose remembered tensors follow what happens to its keys."""

    class Remembering(base):
        # Transformers would enter a class with a layer type into its tables.
        _layer_type = None
        sa_hf_memory: dict[str, Remembered]

        def _each(self, change: Any) -> None:
            for entry in self.sa_hf_memory.values():
                entry.tensor = change(entry.tensor)

        def reorder_cache(self, beam_idx: Tensor) -> None:
            super().reorder_cache(beam_idx)
            self._each(lambda x: x.index_select(0, beam_idx.to(x.device)))

        def batch_repeat_interleave(self, repeats: int) -> None:
            super().batch_repeat_interleave(repeats)
            self._each(lambda x: x.repeat_interleave(repeats, dim=0))

        def batch_select_indices(self, indices: Tensor) -> None:
            super().batch_select_indices(indices)
            self._each(lambda x: x[indices, ...])

        def crop(self, *args: Any, **kwargs: Any) -> None:
            super().crop(*args, **kwargs)
            for entry in self.sa_hf_memory.values():
                entry.cut(int(self.get_seq_length()))

        def reset(self) -> None:
            super().reset()
            self.sa_hf_memory.clear()

        def __reduce__(self) -> tuple[Any, ...]:
            # The class has no name of its own that a pickle could find.
            return _restored, (base, dict(vars(self)))

    Remembering.__name__ = Remembering.__qualname__ = base.__name__
    return Remembering


def _restored(base: type, state: dict[str, Any]) -> Any:
    """A pickled or copied cache layer with what it remembers."""
    kind = _remembering(base)
    layer = kind.__new__(kind)
    vars(layer).update(state)
    return layer


def is_cache(x: Any) -> bool:
    """Whether this is a cache: by its class, or by the methods that a model calls on one of another make."""
    if x is None or isinstance(x, Tensor | tuple):
        return False
    return isinstance(x, Cache) or (hasattr(type(x), "update") and hasattr(type(x), "get_seq_length"))


def cache_in(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """The cache that a call carries, or None; found by what it is, since releases of transformers name it differently
    (``layer_past``, ``past_key_values``, from 5.24 on ``cache``)."""
    return next((x for x in (*kwargs.values(), *args) if is_cache(x)), None)


def memory_of(layer: Any) -> dict[str, Remembered]:
    """The remembered tensors of a cache layer; its class is swapped at the first call."""
    if "sa_hf_memory" not in vars(layer):
        kind: Any = type(layer)
        # A plain subclass: with a mixin in front, the layouts would differ and the class could not be swapped.
        layer.__class__ = _remembering(kind)
        layer.sa_hf_memory = {}
    memory: dict[str, Remembered] = layer.sa_hf_memory
    return memory


def pattern_of(child: Any) -> tuple[Any, ...]:
    """What a layer's pattern is, to be compared; empty where it is left dense."""
    return tuple((leaf.config, leaf.heads) for leaf in leaves(child)) if isinstance(child, SparseAttention) else ()


def name_of(pattern: tuple[Any, ...] | None) -> str:
    return " + ".join(repr(config) for config in dict.fromkeys(config for config, _ in pattern or ())) or "dense"


def _not_remembered(name: str, seen: int) -> SparseAttentionError:
    return SparseAttentionError(
        f"the cache holds {seen} tokens without {name!r}, which this layer's pattern needs for each: they are keys "
        "and values alone, of another model, from before patching, or learned ones (PEFT's prefix tuning). Start again "
        "from the prompt, or use prompt tuning or LoRA; prefix tuning goes with patterns without state of their own "
        "per token, such as 'sliding_window' or 'bigbird'"
    )


def _left_out(name: str, known: int, seen: int) -> SparseAttentionError:
    return SparseAttentionError(
        f"the cache holds {seen} tokens, but {name!r}, which this layer's pattern needs for each, of {known} alone: "
        "the others joined it inside dense(model), in the other mode (training or evaluation), or by another model. "
        "Start again from the prompt, and give what runs in between a cache of its own (copy.deepcopy(cache))"
    )


@dataclass(eq=False)
class LayerMemory:
    """The cache of one attention layer in one call."""

    cache: Cache
    layer_idx: int
    pending: dict[str, Remembered] = field(default_factory=dict)
    child: Any = None  # the pattern's module of the layer whose call it is

    @classmethod
    def of(cls, cache: Any, layer_idx: int | None) -> LayerMemory | None:
        """What a layer, by the model's own number of it, keeps in this cache; None without one, or where the cache has
        no layers to keep it on."""
        cache = getattr(cache, "self_attention_cache", cache)
        if layer_idx is None:
            return None
        return cls(cache, layer_idx) if is_cache(cache) and hasattr(cache, "layers") else None

    @property
    def layer(self) -> Any:
        """The cache's own of this layer; None where it has none (yet)."""
        return self.cache.layers[self.layer_idx] if self.layer_idx < len(self.cache.layers) else None

    def _memory(self) -> dict[str, Remembered]:
        """What the layer remembers; of this call's pattern from the first on."""
        memory = memory_of(self.layer)
        if not memory:
            self.layer.sa_hf_pattern = pattern_of(self.child)
        return memory

    def _check_holds_keys(self, name: str) -> None:
        """That the keys of this call are in the cache's layer of this one, and not in another's whose keys it reads."""
        length = getattr(self.layer, "get_seq_length", None)
        if length is None or not self.layer.is_initialized or int(length()) == 0:
            raise SparseAttentionError(
                f"layer {self.layer_idx} reads the keys of another layer (they are shared), so the cache has no place "
                f"for the {name!r} that its pattern needs of each token; use a static pattern there (a learned one may "
                "stand in the layer whose keys they are), or use_cache=False"
            )

    def remember(
        self, name: str, tensor: Tensor, dim: int, need: int | None = None, whole: bool = True
    ) -> Tensor:  # fmt: skip
        """``AttentionInputs.remember``: called after the keys joined the cache; batch is dimension 0 of the tensor."""
        self._check_holds_keys(name)
        memory = self._memory()
        total = int(self.layer.get_seq_length())
        seen = total - tensor.shape[dim]
        old = memory.get(name)
        if old is None or seen == 0:
            if seen:
                raise _not_remembered(name, seen)
            memory[name] = Remembered(tensor, dim, 0, need)
            return tensor
        old.cut(seen)
        slots = getattr(self.layer, "slots", None)
        before = seen if slots is None or need is not None else len(slots) - tensor.shape[dim]
        if old.end < before:
            raise _left_out(name, old.end, before)
        joined, _ = old.append(tensor)
        if need is not None or not whole:
            return joined
        return joined if slots is None else placed(joined, slots, total, dim)

    def beside(self, name: str, tensor: Tensor | None = None) -> Tensor | None:
        """``AttentionInputs.beside``: called after the keys joined the cache; nothing is kept where they are in the
        cache's layer of another one."""
        length = getattr(self.layer, "get_seq_length", None)
        if length is None or not self.layer.is_initialized or int(length()) == 0:
            return None
        memory = self._memory()
        if tensor is not None:
            memory[name] = Made(tensor, 2, 0, 0)
        return memory[name].tensor if name in memory else None

    def recent(self, name: str, tensor: Tensor, need: int) -> tuple[Tensor, int]:
        """The last inputs of the layer and the new ones, ``[batch, tokens, ...]``, and the slot of the first.

        Called before the keys join the cache; ``need`` older tokens belong to it (and ``SLACK`` more stay, for crops).
        """
        started = self.layer is not None and self.layer.is_initialized
        seen = int(self.cache.get_seq_length(self.layer_idx)) if started else 0
        if not started:
            # The layer comes to be when its keys do; until then the new inputs wait here.
            self.pending[name] = KeyInputs(tensor, 1, 0, need)
            return tensor, 0
        memory = self._memory()
        old = memory.get(name)
        if seen == 0 or old is None:
            if seen:
                raise _not_remembered(name, seen)
            old = memory[name] = KeyInputs(tensor[:, :0], 1, 0, need)
        old.cut(seen)
        if old.end < seen:
            raise _left_out(name, old.end, seen)
        return old.append(tensor)

    def announce(self, child: Any) -> None:
        """Tell the cache which pattern reads the keys that it hands out next; a ``sparse_cache`` may refuse that one.
        What another pattern has made of the keys is made anew.

        Raises:
            SparseAttentionError: another pattern has remembered what this one needs of each token, or made the keys of
                several tokens each.
        """
        layer, self.child = self.layer, child
        announce = getattr(layer, "announce", None)
        if announce is not None:
            announce(child)
        memory: dict[str, Remembered] = getattr(layer, "sa_hf_memory", {})
        if not memory or layer.sa_hf_pattern == pattern_of(child):
            return
        for name in [name for name, entry in memory.items() if isinstance(entry, Made)]:
            del memory[name]
        bound = any(isinstance(entry, KeyInputs) for entry in memory.values())
        needed = bound or (memory and isinstance(child, SparseAttention) and remembers(child))
        if needed and int(layer.get_seq_length()):
            raise SparseAttentionError(
                f"the cache holds what {name_of(layer.sa_hf_pattern)} has made of each token, and this layer's pattern "
                f"is now {name_of(pattern_of(child))}: start again from the prompt, with a new cache"
            )

    def settle(self) -> None:
        """Put inputs that waited for the layer onto it; called once its keys have joined."""
        if self.pending:
            self._check_holds_keys(next(iter(self.pending)))
            self._memory().update(self.pending)
            self.pending.clear()

    def kept_slots(self, length: int) -> Tensor | None:
        """The slots of the keys that a sparse cache handed out; None where it dropped none, or is no sparse cache."""
        slots: Tensor | None = getattr(self.layer, "slots", None)
        if getattr(self.layer, "announced", False):
            raise SparseAttentionError(
                f"layer {self.layer_idx} reads keys that did not pass through its place in the sparse_cache: layers of "
                "this model share keys in a way that sa_hf does not know; use a DynamicCache"
            )
        return None if slots is None or len(slots) == length else slots

    def evicts(self, new: int) -> bool:
        """Whether a ``sparse_cache`` would look for what it can drop after a call of ``new`` queries."""
        evicts = getattr(self.layer, "evicts", None)
        return evicts is not None and evicts(new)

    def evict(self, child: SparseAttention, inputs: AttentionInputs) -> None:
        """Let a ``sparse_cache`` drop what the layer's pattern can no longer read."""
        evict = getattr(self.layer, "evict", None)
        if evict is not None:
            evict(child, inputs)


def placed(x: Tensor, slots: Tensor, length: int, dim: int) -> Tensor:
    """``x`` with its entries along ``dim`` at their slots; tokens that a sparse cache dropped are 0, or -1 where the
    tensor counts something (no cluster)."""
    if x.shape[dim] == length:
        return x
    shape = list(x.shape)
    shape[dim] = length
    empty = x.new_full(shape, 0 if x.is_floating_point() else -1)
    return empty.index_copy(dim, slots.to(x.device), x)
