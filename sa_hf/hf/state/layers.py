"""The ``sparse`` children of a patched model, also where PEFT has wrapped them for training."""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from typing import Any, cast

from torch import nn

from sa_hf.config import SparseAttention
from sa_hf.errors import SparseAttentionError
from sa_hf.patterns.learned import LearnedAttention

_OF_ANY_MODULE = frozenset(vars(nn.Module()))


def active_child(module: nn.Module) -> Any:
    """The ``sparse`` child that acts: PEFT's ``modules_to_save`` keeps a frozen one beside the one it trains."""
    # Asked at every layer of a step: from torch's own table, since a missing attribute of a module takes 2 us.
    child: Any = module._modules.get("sparse")
    copies = None if child is None else child._modules.get("modules_to_save")
    if not isinstance(copies, nn.ModuleDict):
        return child
    wrapper: Any = child
    name = next((a for a in wrapper.active_adapters if a in copies), None)
    return wrapper.original_module if wrapper.disable_adapters or name is None else copies[name]


def sparse_children(root: nn.Module, names: list[str]) -> list[SparseAttention]:
    """The acting pattern modules of the attention layers named, in order; dense layers have none."""
    children = [active_child(_submodule(root, name)) for name in names]
    return [child for child in children if isinstance(child, SparseAttention)]


@lru_cache(maxsize=4096)
def _atoms(name: str) -> tuple[str, ...]:
    return tuple(name.split("."))


def _submodule(root: nn.Module, name: str) -> nn.Module:
    """``root.get_submodule(name)`` of a name that is not empty, in a tenth of its time."""
    found: Any = root
    try:
        for atom in _atoms(name):
            found = found._modules[atom]
    except KeyError:
        raise SparseAttentionError(
            f"the patched layer {name!r} of {type(root).__name__} is gone: layers were taken out after patching, and "
            "patterns are kept by a layer's place. Take them out first, and patch what is left"
        ) from None
    return cast(nn.Module, found)


def leaves(child: SparseAttention) -> Iterator[SparseAttention]:
    """A pattern module, or the parts of a mixture."""
    parts = child._modules.get("parts")
    if not isinstance(parts, nn.ModuleList):
        yield child
        return
    for part in parts:
        if isinstance(part, SparseAttention):
            yield part


def noted(children: list[SparseAttention]) -> list[tuple[SparseAttention, dict[str, Any]]]:
    """What pattern modules have noted of their forwards, outside of parameters and buffers, to be put back."""
    return [
        (leaf, {key: _kept(value) for key, value in vars(leaf).items() if key not in _OF_ANY_MODULE})
        for child in children
        for leaf in leaves(child)
    ]


def _kept(value: Any) -> Any:
    return value.copy() if isinstance(value, list | dict) else value  # a copied tensor would be the transform's


def remembers(child: SparseAttention) -> bool:
    """Whether a pattern keeps values of its own for each token, beside keys and values: with a cache it needs them of
    the earlier tokens, too (spans, clusters, inputs of a convolution)."""
    return child._modules.get("conv") is not None or any(leaf.remembers for leaf in leaves(child))


def learned_leaves(children: list[SparseAttention]) -> list[LearnedAttention]:
    """The pattern modules with learned state, also as parts of a mixture by heads."""
    return [leaf for child in children for leaf in leaves(child) if isinstance(leaf, LearnedAttention)]


def tie_layers(children: list[SparseAttention]) -> None:
    """Let the layers of a stack that run one config on the same heads set up what they share."""
    groups: dict[Any, list[SparseAttention]] = {}
    for child in children:
        for leaf in leaves(child):
            # Of an encoder-decoder model the decoder alone is causal, so this keeps the stacks apart.
            groups.setdefault((leaf.config, leaf.heads, leaf.spec.causal), []).append(leaf)
    for group in groups.values():
        for leaf in group:
            leaf.tie(group)
