"""What happens inside a layer's own forward: whether it changes its mask, read in its source; and, proved on the layer
without its weights, that a convolution's taps reach queries or keys alone, and that turning back what the rotary
embedding has turned gives what went in.

For the proofs the layer is called as the probe has seen it called, each time with the same noise for what its weights
would make.
"""

from __future__ import annotations

import ast
import inspect
import re
import textwrap
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from sa_hf.hf.caches.layer import is_cache
from sa_hf.hf.forward.convolution import ConvHook
from sa_hf.hf.forward.layer_input import Carried
from sa_hf.hf.forward.masks import MaskRequest
from sa_hf.hf.forward.rotary import before_rotary
from sa_hf.layer import LayerSpec

# Relative to the largest entry; what is wrong is off by tenths.
_TOLERANCE = 1e-3


@dataclass(eq=False)
class Replay:
    """Calls of one attention layer with the same input: its queries, keys and values ``[1, heads, tokens, width]``.

    Args: call: runs the module on arguments and returns what its attention function was given.
    """

    module: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    call: Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], tuple[Tensor, Tensor, Tensor]]

    def __post_init__(self) -> None:
        self.args, self.kwargs = self._mapped(lambda x: None if is_cache(x) else x)

    def _mapped(self, change: Callable[[Any], Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return tuple(change(x) for x in self.args), {key: change(x) for key, x in self.kwargs.items()}

    def again(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.call(self.module, self.args, self.kwargs)

    def without_mask(self) -> tuple[Tensor, Tensor, Tensor]:
        args, kwargs = self._mapped(lambda x: None if isinstance(x, MaskRequest) else x)
        return self.call(self.module, args, kwargs)

    def at_angle_zero(self, angles: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        zero = torch.ones_like(angles[0]), torch.zeros_like(angles[1])
        args, kwargs = self._mapped(lambda x: zero if x is angles else x)
        return self.call(self.module, args, kwargs)


def changes_its_mask(attention: nn.Module) -> bool:
    """Whether an attention layer's ``forward`` computes another ``attention_mask`` from its own (indexers of top-k
    tokens, compressed keys). Taking the encoder's instead is no such change."""
    kind: Any = type(attention)
    changes = _mask_changes(kind)
    return any(all(getattr(attention, part, None) is not None for part in needed) for needed in changes)


@lru_cache(maxsize=256)
def _mask_changes(attention: Any) -> list[frozenset[str]]:
    """For each place where ``forward`` changes its mask the parts that a layer must have to come there."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(inspect.unwrap(attention.forward))))
    except (OSError, TypeError):
        return []
    return list(_changes_below(tree, frozenset()))


def _changes_below(node: ast.AST, needed: frozenset[str]) -> Iterator[frozenset[str]]:
    changed = node.targets if isinstance(node, ast.Assign) and not isinstance(node.value, ast.Name | ast.IfExp) else []
    if "attention_mask" in [ast.unparse(target) for target in changed]:
        yield needed
    inside: list[ast.stmt] = []
    if isinstance(node, ast.If):
        found = re.fullmatch(r"self\.(\w+) is not None", ast.unparse(node.test))
        inside = node.body if found else []
        for child in inside:
            yield from _changes_below(child, needed | {found[1]} if found else needed)
    for other in ast.iter_child_nodes(node):
        if other not in inside:
            yield from _changes_below(other, needed)


def lacks(attention: nn.Module, carried: Carried, *, rotary: bool, taps: bool) -> str | None:
    """Why what a layer is given does not go with what a pattern does to it, or None."""
    if taps and carried.cut is not None:
        return (
            "cuts its row into sequences by itself, over whose ends a convolution would reach; use conv_kernel_size=1"
        )
    if rotary and getattr(attention, "has_place_channels", False):
        return "has channels of its tokens' places, which routing would cluster; use another pattern"
    return None


def rotation_stays(replay: Replay, angles: tuple[Tensor, Tensor] | None) -> str | None:
    """Why queries and keys from before the rotary embedding cannot be had from those after it, or None."""
    if angles is None:
        return None
    query, key, _ = replay.again()
    if key.shape[2] != query.shape[2]:  # a cache of a form that is not known, which the probe refuses
        return None
    plain = replay.at_angle_zero(angles)
    if any(x.is_meta for x in (query, key, *plain, *angles)):
        return "is too wide for a proof that its rotary embedding can be undone"
    for name, back, wanted in zip(
        ("queries", "keys"), before_rotary(replay.module, angles, query, key), plain, strict=False
    ):
        off = float((back - wanted).abs().max() / wanted.abs().max().clamp(min=1e-6))
        if off > _TOLERANCE:
            return (
                f"does more to its {name} than turn them (a norm after the rotary embedding, or in another order): "
                f"turned back they are {off:.1g} off, so what routing compares cannot be had; use another pattern"
            )
    return None


def taps_astray(replay: Replay, spec: LayerSpec) -> str | None:
    """Why a convolution's taps do not make queries and keys alone, or None."""
    before = replay.again()
    for name, reached in (("query", 0), ("key", 1)):
        hook = _Taps(replay.module, spec, name)
        handles = hook.register()
        try:
            after = replay.again()
        except RuntimeError as error:
            return f"has projections that are not of its queries and keys alone, which a convolution joins: {error}"
        finally:
            for handle in handles:
                handle.remove()
        if any(x.is_meta for x in (*before, *after)):
            return "is too wide for a proof that a convolution reaches its queries and keys"
        changed = [(new - old).abs().amax((0, 2, 3)) for new, old in zip(after, before, strict=True)]
        if not bool((changed[reached] > 0).all()):
            return f"does not make its {name} of the projection that a convolution joins; use conv_kernel_size=1"
        if any(bool((heads > 0).any()) for at, heads in enumerate(changed) if at != reached):
            return (
                f"makes more than its {name} of the channels that a convolution adds to for it; use conv_kernel_size=1"
            )
    return None


class _Taps(ConvHook):
    """A hook as of a convolution that adds one to all channels of the queries, or of the keys."""

    def __init__(self, attention: nn.Module, spec: LayerSpec, name: str) -> None:
        super().__init__(attention, spec)
        self.name = name

    def _taps(self) -> Any:
        def added(name: str, length: int) -> Tensor:
            width = self.query_width if name == "query" else self.key_width
            # Unlike in its channels: a norm takes out what is alike in all.
            steps = torch.linspace(1, 2, width, device="cpu").expand(1, length, width)
            return steps if name == self.name else torch.zeros_like(steps)

        return added
