"""A model's attention as patching sees it: stacks of self-attention layers, and the names of what is left as it is."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace

import torch
from torch import nn
from transformers import PreTrainedModel

from sa_hf.errors import UnsupportedModelError
from sa_hf.layer import LayerSpec
from sa_hf.ops.parts import Band


@dataclass(frozen=True)
class Site:
    """One self-attention layer: its module's name in the model, the name of the block around it, and its shape."""

    name: str
    block: str
    stack: str
    spec: LayerSpec


@dataclass(frozen=True)
class Left:
    """A stack that is left as it is: where it lies, its attention modules, and why no pattern can go there (None: it
    can, and was not asked for). ``half`` names the half of an encoder-decoder whose masks are its own, too."""

    path: str
    names: tuple[str, ...]
    reason: str | None = None
    half: str | None = None


@dataclass(frozen=True)
class Sites:
    """All attention of a model: ``{stack: [site, ...]}`` in order, of the stacks that get patterns; the names of its
    cross-attention modules; its towers, which get one only where they are named, with their sites; and what is left as
    it is, by name."""

    stacks: dict[str, list[Site]]
    cross: list[str] = field(default_factory=list)
    towers: dict[str, list[Site]] = field(default_factory=dict)
    left: dict[str, Left] = field(default_factory=dict)

    @property
    def num_heads(self) -> dict[str, list[int]]:
        return {stack: [site.spec.num_heads for site in sites] for stack, sites in self.stacks.items()}

    @property
    def all_sites(self) -> list[Site]:
        return [site for sites in self.stacks.values() for site in sites]

    @property
    def bystanders(self) -> list[str]:
        """The attention modules that get no pattern."""
        return [*self.cross, *(name for one in self.left.values() for name in one.names)]

    @property
    def halves(self) -> list[str]:
        """The names of the halves of an encoder-decoder that keep the attention which they have."""
        return [one.half for one in self.left.values() if one.half is not None]

    @property
    def with_towers(self) -> Sites:
        """The same with every tower among the stacks."""
        return self.taking(self.towers)

    def taking(self, stacks: Iterable[str]) -> Sites:
        """The same with the towers of these names among the stacks, and no longer among what is left."""
        taken = {name: self.towers[name] for name in stacks if name in self.towers}
        left = {name: one for name, one in self.left.items() if name not in taken}
        return replace(self, stacks={**self.stacks, **taken}, towers={}, left=left)


def root_model(model: nn.Module) -> PreTrainedModel:
    """The Transformers model in ``model`` (which may be wrapped by PEFT, DDP, ``torch.compile`` or a module of yours).

    Raises:
        UnsupportedModelError: there is none, or there are several beside each other.
    """
    if isinstance(model, PreTrainedModel):
        return model
    found = list(_outermost_models(model, "")) if isinstance(model, nn.Module) else []
    if not found:
        raise UnsupportedModelError(
            f"{type(model).__name__} is no Transformers model; patch a model from `AutoModel....from_pretrained(...)`"
        )
    if len({id(module) for _, module in found}) > 1:
        names = [name for name, _ in found]
        raise UnsupportedModelError(
            f"{type(model).__name__} holds several Transformers models, {names}; give them one by one, e.g. "
            f"patch_model(model.get_submodule({names[0]!r}), ...)"
        )
    return found[0][1]


def _outermost_models(module: nn.Module, name: str) -> Iterator[tuple[str, PreTrainedModel]]:
    for child_name, child in module.named_children():
        path = f"{name}.{child_name}".removeprefix(".")
        if isinstance(child, PreTrainedModel):
            yield path, child
        else:
            yield from _outermost_models(child, path)


def own_index(name: str, module: nn.Module) -> int | None:
    """The model's own number of an attention module's layer, which places it in caches (a hybrid counts its other
    layers, too); None where the model numbers none."""
    index = getattr(module, "layer_idx", None)
    if isinstance(index, int) and index >= 0:
        return index
    found = re.search(r"\.(\d+)(?=\.|$)", name)
    return int(found[1]) if found else None


def computes_in(module: nn.Module) -> tuple[torch.device, torch.dtype]:
    """Where a layer computes, and in which dtype: weights that Accelerate has offloaded are on "meta" between calls."""
    parameter = next(module.parameters(), torch.empty(0))
    dtype = parameter.dtype if parameter.dtype.is_floating_point else torch.float32
    if parameter.is_meta:
        for part in module.modules():
            device = getattr(getattr(part, "_hf_hook", None), "execution_device", None)
            if device is not None:
                return torch.device(device), dtype
    return parameter.device, dtype


def window_band(window: int | None, causal: bool) -> Band:
    """A window as models count it, the own position included; None is no window."""
    return Band() if window is None else Band(window - 1, None if causal else window - 1)
