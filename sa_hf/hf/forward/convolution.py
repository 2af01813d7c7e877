"""LogSparse's convolutional queries and keys in a pretrained layer (Li et al., NeurIPS 2019, section 4.1).

A causal convolution of width k over the layer's input replaces the pointwise projections of Q and K. Tap 0 is the
model's own projection, left where it is; taps 1 .. k - 1 are bare parameters that start at 0 and whose output a hook
adds to the projection's, before any q/k norm and rotary embedding. Inputs before a sequence's start are 0.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from sa_hf.errors import SparseAttentionError
from sa_hf.hf.caches.layer import LayerMemory
from sa_hf.hf.state.activity import place_of
from sa_hf.hf.state.layers import active_child
from sa_hf.hf.state.threads import Running
from sa_hf.layer import LayerSpec
from sa_hf.ops.sequences import Sequences

SEPARATE = (("q_proj", "k_proj"), ("query", "key"), ("q_lin", "k_lin"), ("q", "k"))
# Projections that make queries, keys and values at once: as three thirds, or as thirds of each head.
THIRDS = ("c_attn", "Wqkv")
THIRDS_OF_HEADS = ("query_key_value",)
MEMORY = "conv_inputs"


class ConvTaps(nn.Module):
    """Taps 1 .. k - 1 of one layer: ``query [k - 1, heads * head_dim, hidden]``, ``key [k - 1, key heads * ...]``."""

    def __init__(self, kernel_size: int, spec: LayerSpec) -> None:
        super().__init__()
        for name, heads in (("query", spec.num_heads), ("key", spec.num_key_value_heads)):
            shape = kernel_size - 1, heads * spec.head_dim, spec.hidden_size
            setattr(self, name, nn.Parameter(torch.zeros(shape, dtype=spec.dtype, device=spec.device)))
        self._earlier = Running()

    def prepare(self, hidden: Tensor, sequences: Sequences, memory: LayerMemory | None) -> None:
        """Take the layer's input ``[batch, queries, hidden]`` of this call; extra tokens in front have no past."""
        extra = sequences.extra_tokens
        self._earlier.set(earlier_inputs(hidden[:, extra:], self.taps, sequences, memory))

    @property
    def taps(self) -> int:
        weight: Tensor = self.query  # type: ignore[assignment]  # a Parameter
        return weight.shape[0]

    def forward(self, name: str, length: int) -> Tensor:
        """What the taps add to the projection of "query" or "key", ``[batch, length, heads * head_dim]``."""
        weight: Tensor = getattr(self, name)
        total = sum(nn.functional.linear(x, w) for x, w in zip(self._earlier.get(), weight, strict=True))
        assert isinstance(total, Tensor)  # a kernel has at least two taps
        return nn.functional.pad(total, (0, 0, length - total.shape[1], 0))

    def forget(self) -> None:
        self._earlier.set(None)

    @property
    def prepared(self) -> bool:
        """Whether this call has given its input."""
        return self._earlier.get() is not None


def earlier_inputs(hidden: Tensor, taps: int, sequences: Sequences, memory: LayerMemory | None) -> list[Tensor]:
    """The inputs ``t = 1 .. taps`` positions before each query of its sequence, each ``[batch, queries, hidden]``."""
    new = hidden.shape[1]
    joined, start = hidden, sequences.key_length - sequences.extra_tokens - new
    if memory is not None:
        joined, start = memory.recent(MEMORY, hidden, need=taps)
    if sequences.is_full:
        padded = nn.functional.pad(joined, (0, 0, max(0, taps - (joined.shape[1] - new)), 0))
        end = padded.shape[1]
        return [padded[:, end - new - t : end - t] for t in range(1, taps + 1)]
    found = []
    for slots in earlier_slots(sequences, taps):
        at = slots[:, -new:].to(hidden.device)
        missing = at < 0
        if bool((~missing & (at < start)).any()):
            raise SparseAttentionError(
                "the convolution needs an input that lies behind padding, further back than the cache keeps; "
                "pad the prompts on the left"
            )
        index = (at - start).clamp(min=0)[..., None].expand(-1, -1, hidden.shape[-1])
        found.append(joined.gather(1, index).masked_fill(missing[..., None], 0))
    return found


def earlier_slots(sequences: Sequences, taps: int) -> list[Tensor]:
    """For ``t = 1 .. taps`` the slot of the token ``t`` positions earlier in its sequence, int64 ``[batch, keys]``;
    -1 where there is none. Slots do not count extra tokens."""
    extra, length = sequences.extra_tokens, sequences.key_length - sequences.extra_tokens
    before = torch.full((sequences.batch_size, length), -1)
    for span in sequences.spans:
        slots = torch.arange(span.key_start, span.key_start + span.key_length)
        if sequences.key_gather is not None:
            slots = sequences.key_gather[span.row].cpu()[slots]
        slots = slots - extra
        before[span.row, slots[1:]] = slots[:-1]
    found = [before]
    for _ in range(taps - 1):
        last = found[-1]
        found.append(torch.where(last >= 0, before.gather(1, last.clamp(min=0)), -1))
    return found


class ConvHook:
    """Adds the taps of one attention layer to the output of its projections.

    They join what the layer calls now: quantisers and PEFT put other modules in the projections' places after patching,
    and those need not call the ones that stood there, or scale what they give.
    """

    def __init__(self, attention: nn.Module, spec: LayerSpec) -> None:
        self.attention = attention
        self.query_width = spec.num_heads * spec.head_dim
        self.key_width = spec.num_key_value_heads * spec.head_dim
        self.num_heads = spec.num_heads
        self.hooked: dict[str, tuple[nn.Module, Any]] = {}  # by a projection's name: what was hooked, and its handle

    def register(self) -> list[Any]:
        """Hook the layer's projections; returns what undoes it.

        Raises:
            AssertionError: the layer has none that are known; ``check_projections`` comes first.
        """
        self._hook()
        return [self]

    def follow(self) -> None:
        """Hook what stands in the projections' places, where it is not what was hooked."""
        if any(self.attention._modules.get(name) is not module for name, (module, _) in self.hooked.items()):
            self._hook_anew()

    def remove(self) -> None:
        for _, handle in self.hooked.values():
            handle.remove()
        self.hooked = {}

    def _hook(self) -> None:
        self.remove()
        modules = dict(self.attention.named_children())
        for name, hook in self._projections(modules).items():
            for part in modules[name].modules():
                _take_out(part, self)  # torch's own quantiser takes the hooks of what it replaces along
            self.hooked[name] = modules[name], modules[name].register_forward_hook(hook)

    _hook_anew = torch.compiler.disable(_hook, reason="a module took the place of a projection that was hooked")

    def _projections(self, modules: dict[str, nn.Module]) -> dict[str, Any]:
        """The names of those that the layer has, each with its hook."""
        for query, key in SEPARATE:
            if query in modules and key in modules:
                return {query: self.query, key: self.key}
        # GPTBigCode names its projection as GPT-2 does; without multi_query it splits each head's.
        by_head = getattr(self.attention, "multi_query", None) is False
        thirds = self.thirds_of_heads if by_head else self.thirds
        for hook, known in ((thirds, THIRDS), (self.thirds_of_heads, THIRDS_OF_HEADS)):
            for name in known:
                if name in modules:
                    return {name: hook}
        raise AssertionError

    def _taps(self) -> ConvTaps | None:
        """The layer's taps, where this call has prepared them; inside ``dense(model)`` none are, but what is left of a
        call that failed."""
        conv = getattr(active_child(self.attention), "conv", None)
        acts = isinstance(conv, ConvTaps) and conv.prepared and place_of(self.attention).activity.on
        return conv if acts else None

    def query(self, module: nn.Module, args: Any, output: Tensor) -> Tensor:
        conv = self._taps()
        return output if conv is None else output + conv("query", output.shape[1])

    def key(self, module: nn.Module, args: Any, output: Tensor) -> Tensor:
        conv = self._taps()
        return output if conv is None else output + conv("key", output.shape[1])

    def thirds(self, module: nn.Module, args: Any, output: Tensor) -> Tensor:
        conv = self._taps()
        if conv is None:
            return output
        length = output.shape[1]
        added = torch.cat([conv("query", length), conv("key", length)], dim=-1)
        return output + nn.functional.pad(added, (0, output.shape[-1] - added.shape[-1]))

    def thirds_of_heads(self, module: nn.Module, args: Any, output: Tensor) -> Tensor:
        conv = self._taps()
        if conv is None:
            return output
        length, shape = output.shape[1], (*output.shape[:2], self.num_heads, -1)
        query, key = (conv(name, length).view(shape) for name in ("query", "key"))
        return output + torch.cat([query, key, torch.zeros_like(key)], dim=-1).view(output.shape)


def refuse_convolved_keys(cache: Any) -> None:
    """Raise ``SparseAttentionError`` where dense attention would read keys that a convolution has made."""
    cache = getattr(cache, "self_attention_cache", cache)
    for layer in getattr(cache, "layers", ()):
        inputs = getattr(layer, "sa_hf_memory", {}).get(MEMORY)
        if inputs is not None and inputs.end > 0:
            raise SparseAttentionError(
                f"the cache holds {inputs.end} keys of a convolution (conv_kernel_size > 1), and inside dense(model) "
                "keys are not convolved: give dense(model) a cache of its own"
            )


def _take_out(module: nn.Module, owner: ConvHook) -> None:
    for key, hook in list(module._forward_hooks.items()):
        if getattr(hook, "__self__", None) is owner:
            del module._forward_hooks[key]


def check_projections(attention: nn.Module) -> None:
    """Raise ``SparseAttentionError`` where the layer's projections of queries and keys are not found."""
    names = {name for name, _ in attention.named_children()}
    known = any(query in names and key in names for query, key in SEPARATE)
    if not known and names.isdisjoint(THIRDS + THIRDS_OF_HEADS):
        raise SparseAttentionError(
            f"{type(attention).__name__} has no projection of queries and keys under a known name ({sorted(names)}), "
            "so conv_kernel_size > 1 cannot join it; use conv_kernel_size=1"
        )
