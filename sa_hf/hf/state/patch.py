"""What was done to a model: :class:`Patch`, kept on it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from sa_hf.config import SparseAttention
from sa_hf.hf.state.activity import PATCH, Activity
from sa_hf.hf.state.assignment import Assignment
from sa_hf.hf.state.extension import Extension
from sa_hf.hf.state.layers import active_child, sparse_children
from sa_hf.hf.state.nested import not_patched
from sa_hf.hf.state.sites import Site, Sites, root_model


@dataclass(eq=False)
class Patch:
    """What was done to a model, kept on it (``model.sa_hf_patch``) to be undone."""

    assignment: Assignment
    engine: str
    sites: Sites
    activity: Activity
    handles: list[Any] = field(default_factory=list)
    # (module name, attribute, the config that stood there)
    originals: list[tuple[str, str, PreTrainedConfig]] = field(default_factory=list)
    # (patched config, its original implementation)
    configs: list[tuple[PreTrainedConfig, str]] = field(default_factory=list)
    extension: Extension | None = None

    @property
    def names(self) -> list[str]:
        """The self-attention modules, in the order of the stacks."""
        return [site.name for site in self.sites.all_sites]

    def children(self, root: nn.Module) -> list[SparseAttention]:
        """The pattern modules of the layers that are not dense."""
        return sparse_children(root, self.names)

    def sparse_sites(self, root: nn.Module) -> list[tuple[Site, SparseAttention]]:
        """The layers that are not dense, each with the pattern module that acts there."""
        found = [(site, active_child(root.get_submodule(site.name))) for site in self.sites.all_sites]
        return [(site, child) for site, child in found if isinstance(child, SparseAttention)]

    def inherit(self, old: Patch) -> None:
        """Take over what patching again leaves as it is: configs already copied, positions already lengthened."""
        self.originals, self.configs, self.extension = old.originals, old.configs, old.extension
        self.activity = old.activity  # inside dense(model), patching again ends no block


def patch_of(model: nn.Module) -> Patch | None:
    """The patch of a model, or None where it has none."""
    patch = getattr(root_model(model), PATCH, None)
    return patch if isinstance(patch, Patch) else None


def required_patch(root: PreTrainedModel, function: str) -> Patch:
    """The patch of a model that ``function`` needs; raises ``SparseAttentionError`` where there is none."""
    patch = patch_of(root)
    if patch is None:
        raise not_patched(root, function)
    return patch
