"""``sparse_cache``: a Transformers cache that keeps only what each layer's pattern can still read."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer, EncoderDecoderCache

from sa_hf.config import SparseAttention
from sa_hf.errors import SparseAttentionError
from sa_hf.hf.caches.layer import memory_of, name_of, pattern_of
from sa_hf.hf.caches.room import Room
from sa_hf.hf.state.activity import place_of
from sa_hf.hf.state.layers import active_child, leaves
from sa_hf.hf.state.patch import required_patch
from sa_hf.hf.state.sites import root_model
from sa_hf.layer import AttentionInputs, Geometry
from sa_hf.patterns.base import StaticPatternConfig

# Dropping copies what stays, and asks the device what may go. Decode steps do neither until they have added a sixteenth
# of what is held, and 16 keys at least, nor copy until a sixteenth may go: at most 16 keys are copied per token then.
EVICTED_PART = LEAST_EVICTED = 16


def sparse_cache(model: nn.Module) -> Cache:
    """An empty cache for ``generate(..., past_key_values=cache)`` or plain forwards of a patched decoder.

    Lossless: the logits are those of a full cache. ``.report()``: ``{layer: {"pattern", "seen", "kept", "bytes"}}``.
    A pattern that may read any past key (LogSparse without a window of the model's own, random blocks) keeps all. It
    cannot be cropped, so it serves greedy search, sampling and beams, and not assisted generation. Layers whose keys
    other layers read, too (Gemma 3n, Gemma 4), keep all of them. It serves the
    patterns that it was filled under, and raises under others, inside ``dense(model)`` and after ``unpatch_model``.

    Raises:
        SparseAttentionError: the model is not patched, or has no decoder.
    """
    root = root_model(model)
    patch = required_patch(root, "sparse_cache")
    sites = patch.sites.stacks.get("decoder")
    if sites is None:
        raise SparseAttentionError(f"{type(root).__name__} has no causal layers, so nothing to cache")
    takes_caches = getattr(type(root), "_supports_default_dynamic_cache", None)
    if takes_caches is not None and not takes_caches():
        raise SparseAttentionError(
            f"{type(root).__name__} keeps a cache of its own kind and takes no other; generate without `cache=`"
        )
    # What lies between the attention layers of a hybrid, or beside attention in the same layer, stays as it is.
    plain: list[Any] = DynamicCache(config=root.config).layers
    layers: dict[int, Any] = {}
    names: dict[int, str] = {}
    for site in sites:
        module = root.get_submodule(site.name)
        child, index = active_child(module), place_of(module).index
        at = site.spec.layer_idx if index is None else index
        sparse = isinstance(child, SparseAttention)
        if getattr(module, "is_kv_shared_layer", False):
            layers[at] = SharedLayer()
        else:  # what is read by other layers, too, stays whole
            whole = not sparse or getattr(module, "store_full_length_kv", False)
            layers[at] = _layer_like(plain[at] if at < len(plain) else None, DynamicLayer if whole else KeptLayer)
        names[at] = "+".join(leaf.config.name for leaf in leaves(child)) if sparse else "dense"
    for at in range(max(len(plain), max(layers) + 1)):
        if at not in layers:
            layers[at] = plain[at] if at < len(plain) and not isinstance(plain[at], DynamicLayer) else DynamicLayer()
    kept = SparseCache([layers[at] for at in sorted(layers)], names)
    return SparseEncoderDecoderCache(kept, DynamicCache()) if root.config.is_encoder_decoder else kept


def _layer_like(plain: Any, kind: Any) -> Any:
    """A cache layer of a kind; with the states of what runs beside attention in the same layer, where there are any."""
    states = getattr(plain, "number_of_states", None)
    return kind() if states is None else _beside_states(kind)(number_of_states=states)


@lru_cache(maxsize=8)
def _beside_states(kind: Any) -> Any:
    from transformers.cache_utils import LinearAttentionAndFullAttentionLayer  # late: older releases have none

    if kind is DynamicLayer:
        return LinearAttentionAndFullAttentionLayer
    return type(kind.__name__, (kind, LinearAttentionAndFullAttentionLayer), {"__reduce__": _reduced})


def _reduced(layer: Any) -> tuple[Any, ...]:
    # The class has no name of its own that a pickle could find.
    return _beside_states_again, (dict(vars(layer)),)


def _beside_states_again(state: dict[str, Any]) -> Any:
    kind = _beside_states(KeptLayer)
    layer = kind.__new__(kind)
    vars(layer).update(state)
    return layer


class SparseCache(Cache):
    """One :class:`KeptLayer` per sparse layer, a plain growing layer per dense one."""

    def __init__(self, layers: list[Any], names: dict[int, str]) -> None:
        super().__init__(layers=layers)
        self.names = names

    def report(self) -> dict[int, dict[str, Any]]:
        """Per layer: its pattern, the tokens seen, the tokens kept, and the bytes that they take."""
        return {
            at: {
                "pattern": name,
                "seen": int(self.layers[at].get_seq_length()),
                "kept": _held(self.layers[at]),
                "bytes": _bytes(self.layers[at]),
            }
            for at, name in sorted(self.names.items())
        }


class SparseEncoderDecoderCache(EncoderDecoderCache):
    """A sparse cache of the decoder's self-attention beside a plain one of its cross-attention."""

    def report(self) -> dict[int, dict[str, Any]]:
        """As :meth:`SparseCache.report`."""
        found: dict[int, dict[str, Any]] = self.self_attention_cache.report()
        return found


def _held(layer: Any) -> int:
    return int(layer.keys.shape[2]) if layer.is_initialized and layer.keys.numel() else 0


def _bytes(layer: Any) -> int:
    tensors = [x for x in (layer.keys, layer.values) if isinstance(x, Tensor)]
    tensors += [entry.tensor for entry in getattr(layer, "sa_hf_memory", {}).values()]
    return sum(x.untyped_storage().nbytes() for x in tensors)


class SharedLayer(DynamicLayer):
    """In the place of a layer that reads another one's keys and has none of its own; stays empty."""


class KeptLayer(DynamicLayer):
    """Holds the keys at ``slots`` (int64, ascending; None: all) of the ``seen`` tokens so far; the rows of a batch
    share them. A token is written behind the others, and what goes is closed up, in memory that is there already.

    What it dropped, only the pattern that it ``kept_for`` can do without: a layer's pattern announces itself before its
    keys join, and attention that does not (dense, unpatched) reads all keys.
    """

    is_croppable = False

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.keys: Any
        self.values: Any
        self.slots: Tensor | None = None
        self.key_room, self.value_room, self.slot_room = Room(2), Room(2), Room(0)
        self.seen = self.asked_at = 0
        self.kept_for: tuple[Any, ...] | None = None  # None as long as nothing was dropped
        self.announced = False

    def announce(self, child: Any) -> None:
        """Called before ``update`` by the layer whose pattern reads what that returns.

        Raises:
            SparseAttentionError: another pattern said which keys could go.
        """
        if self.kept_for is not None and self.kept_for != pattern_of(child):
            raise self._other_reader(f"this layer's pattern is now {name_of(pattern_of(child))}")
        self.announced = True

    def _other_reader(self, now: str) -> SparseAttentionError:
        return SparseAttentionError(
            f"this sparse_cache holds {_held(self)} of {self.seen} keys, those that {name_of(self.kept_for)} "
            f"reads, but {now}: start again from the prompt, with a new cache"
        )

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if self.kept_for is not None and not self.announced:
            raise self._other_reader("this layer now reads all of them (inside dense(model), or without its pattern)")
        self.announced = False
        new = key_states.shape[-2]
        if self.slots is not None:
            fresh = torch.arange(self.seen, self.seen + new, device=key_states.device)
            self.slots = self.slot_room.joined(self.slots.to(key_states.device), fresh)
        self.seen += new
        if not self.is_initialized or self.keys.numel() == 0:
            first: tuple[Tensor, Tensor] = super().update(key_states, value_states, *args, **kwargs)
            return first
        self.keys = self.key_room.joined(self.keys, key_states)
        self.values = self.value_room.joined(self.values, value_states)
        return self.keys, self.values

    def get_seq_length(self) -> int:
        return self.seen

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.seen + int(query_length), 0

    def crop(self, *args: Any, **kwargs: Any) -> None:
        raise SparseAttentionError(
            "a sparse_cache cannot be cropped: keys that an earlier token reads may be gone; use a DynamicCache"
        )

    def reset(self) -> None:
        super().reset()
        # Older Transformers fill a layer with zeros instead of emptying it.
        self.keys = self.values = None
        self.is_initialized = False
        self.slots, self.seen, self.asked_at = None, 0, 0
        self.kept_for, self.announced = None, False

    def evicts(self, new: int) -> bool:
        """Whether :meth:`evict` looks for keys to drop after a call of ``new`` queries."""
        return new > 1 or self.seen - self.asked_at >= max(LEAST_EVICTED, _held(self) / EVICTED_PART)

    def evict(self, child: SparseAttention, inputs: AttentionInputs) -> None:
        """Drop the keys that no row's next queries can read."""
        decoding = inputs.query.shape[2] == 1
        if not self.evicts(inputs.query.shape[2]):
            return
        self.asked_at = self.seen
        keep = readable_slots(child, inputs)
        if keep is None:
            return
        slots = torch.arange(self.seen, device=self.keys.device) if self.slots is None else self.slots
        chosen = torch.nonzero(keep.to(slots.device)[slots]).flatten()
        dropped = len(slots) - len(chosen)
        if dropped == 0 or (decoding and dropped * EVICTED_PART < len(chosen)):
            return
        self.kept_for = pattern_of(child)
        self.slots = self.slot_room.chosen(slots, chosen)
        self.keys, self.values = self.key_room.chosen(self.keys, chosen), self.value_room.chosen(self.values, chosen)
        for entry in memory_of(self).values():
            if entry.need is None:
                entry.tensor = entry.room.chosen(entry.tensor, chosen)


def readable_slots(child: SparseAttention, inputs: AttentionInputs) -> Tensor | None:
    """Which of the slots so far some later query of some row can read, bool ``[slots]``; None is all."""
    total: Tensor | None = None
    for leaf in leaves(child):
        kept = _readable(leaf, inputs)
        if kept is None:
            return None
        total = kept if total is None else total | kept
    return total


def _readable(leaf: SparseAttention, inputs: AttentionInputs) -> Tensor | None:
    if not isinstance(leaf.config, StaticPatternConfig):
        expired = leaf.expired_keys(None if inputs.noted is None else inputs.noted.get(id(leaf)))
        return None if expired is None else ~expired.all(0).cpu()
    at = Geometry(1, 1, leaf.heads, leaf.spec.num_heads, leaf.spec.layer_idx, True, inputs.band, chunk=inputs.chunk)
    sequences = inputs.sequences
    kept = torch.zeros(sequences.key_length, dtype=torch.bool)
    for span in sequences.spans:
        slots = torch.arange(span.key_start, span.key_start + span.key_length)
        if sequences.key_gather is not None:
            slots = sequences.key_gather[span.row].cpu()[slots]
        kept[slots] |= _kept(leaf.config, at, span.key_length)
    return kept


@lru_cache(maxsize=256)
def _kept(config: StaticPatternConfig, at: Geometry, position: int) -> Tensor:
    return config.keep(position, replace(at, key_length=position + 1))
