"""The rotary embedding of an attention layer, undone by the layer's own function.

Models turn queries and keys in different conventions: halves (Llama), neighbours (Cohere, GLM), a part of the
dimensions (GPT-NeoX, Phi). The function that turned them by an angle turns them back by the opposite angle, whatever
the convention. What cannot be undone so is refused: a layer that turns at times only, or by another function.
"""

from __future__ import annotations

import ast
import inspect
import sys
import textwrap
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from sa_hf.errors import SparseAttentionError

ROTARY_FUNCTION = "apply_rotary_pos_emb"  # of transformers: (query, key, cos, sin) -> (query, key)

RotaryFunction = Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


def before_rotary(
    module: nn.Module, angles: tuple[Tensor, Tensor] | None, query: Tensor, key: Tensor
) -> tuple[Tensor, Tensor]:
    """Queries and keys ``[B, heads, N, D]`` of an attention module's new tokens as they were before the embedding.

    Args: angles: the layer's ``(cos, sin)`` ``[B, N, R]``; the first R of the D dimensions are turned, or the first 2 R
        where the layer's function takes an angle for each pair (GPT-OSS).
    """
    function = rotary_function(module)
    if function is None:
        return query, key
    if angles is None:
        raise _refused(type(module), "was given no position_embeddings")
    cos, sin = (x.to(query.dtype) for x in angles)
    size = cos * cos + sin * sin  # 1, but for embeddings that scale (YaRN)
    turned = cos.shape[-1] * _dimensions_of_an_angle(function)
    back = function(query[..., :turned], key[..., :turned], cos / size, -sin / size)
    whole = [torch.cat([b, x[..., turned:]], dim=-1) for b, x in zip(back, (query, key), strict=True)]
    return whole[0], whole[1]


def turned_halves(module: nn.Module, angles: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor] | None:
    """The angles ``(cos, sin)`` ``[B, N, R]`` by which an attention module has turned the halves of the first R
    dimensions against each other; None where it turns otherwise, or not at all."""
    function = rotary_function(module)
    if function is None or angles is None:
        return None
    if function not in _HALVES:
        _HALVES[function] = _turns_halves(function)
    return angles if _HALVES[function] else None


_HALVES: dict[RotaryFunction, bool] = {}


def _turns_halves(function: RotaryFunction) -> bool:
    x = torch.arange(2 * 3 * 8, dtype=torch.float32, device="cpu").view(1, 2, 3, 8).cos()
    angle = (torch.arange(3.0, device="cpu")[:, None] + torch.arange(4.0, device="cpu") / 4).repeat(1, 2)[None]
    cos, sin = angle.cos(), angle.sin()
    try:
        turned = function(x, x, cos, sin)
    except (TypeError, RuntimeError, ValueError):
        return False
    first, second = x.chunk(2, dim=-1)
    want = x * cos[:, None] + torch.cat([-second, first], dim=-1) * sin[:, None]
    return all(torch.allclose(y, want, atol=1e-6) for y in turned)


def rotary_function(module: nn.Module) -> RotaryFunction | None:
    """The function by which an attention module turns queries and keys; None where it does not.

    Raises:
        SparseAttentionError: it turns them in a way that cannot be undone.
    """
    kind: Any = getattr(module, "own", type(module))  # below a class that asks the interface for it
    if kind not in _FUNCTIONS:
        _FUNCTIONS[kind] = _function_of(kind)
    return _FUNCTIONS[kind]


# Patching asks for each layer's. A plain dict: torch.compile would trace into a cached function, and not get far in
# one that reads source.
_FUNCTIONS: dict[type, RotaryFunction | None] = {}


def _function_of(attention: Any) -> RotaryFunction | None:
    try:
        source = textwrap.dedent(inspect.getsource(attention.forward))
    except (OSError, TypeError) as error:
        raise _refused(attention, "has no source to read") from error
    calls = list(_rotary_calls(ast.parse(source), conditional=False))
    if not calls:
        return None
    function: RotaryFunction | None = getattr(sys.modules[attention.__module__], ROTARY_FUNCTION, None)
    named = [ast.unparse(call.func) for call, _ in calls]
    if named != [ROTARY_FUNCTION] or function is None:
        raise _refused(attention, f"turns queries and keys by {named}, not by one call of {ROTARY_FUNCTION}")
    call, conditional = calls[0]
    if conditional:
        raise _refused(attention, f"calls {ROTARY_FUNCTION} in some layers or cases alone")
    if [ast.unparse(argument) for argument in call.args[2:4]] != ["cos", "sin"] or not _dimensions_of_an_angle(
        function
    ):
        raise _refused(attention, f"has an {ROTARY_FUNCTION} that the opposite angle does not undo")
    return function


def _rotary_calls(node: ast.AST, conditional: bool) -> Iterator[tuple[ast.Call, bool]]:
    """The calls of functions named after the embedding, and whether each stands under a condition or in a loop."""
    if isinstance(node, ast.Call):
        name = ast.unparse(node.func).rpartition(".")[2].lower()
        if "rotary" in name or "rope" in name:
            yield node, conditional
    inside = conditional or isinstance(node, ast.If | ast.IfExp | ast.For | ast.While | ast.Try)
    for child in ast.iter_child_nodes(node):
        yield from _rotary_calls(child, inside)


def _dimensions_of_an_angle(function: RotaryFunction) -> int:
    """How many dimensions the function turns by each angle that it is given, 1 or 2, where the opposite angle undoes
    it; 0 where it does not. On a sample that every convention turns."""
    if function not in _DIMENSIONS:
        _DIMENSIONS[function] = next((count for count in (1, 2) if _is_undone(function, count)), 0)
    return _DIMENSIONS[function]


_DIMENSIONS: dict[RotaryFunction, int] = {}


def _is_undone(function: RotaryFunction, dimensions: int) -> bool:
    # On the CPU whatever the default device is: models are built on "meta" while they load.
    x = torch.arange(2 * 3 * 8, dtype=torch.float32, device="cpu").view(1, 2, 3, 8).cos()
    angle = torch.tensor([0.5, 1.0, 2.0], device="cpu")[None, :, None].expand(1, 3, 8 // dimensions)
    try:
        turned = function(x, x, angle.cos(), angle.sin())
        back = function(*turned, angle.cos(), -angle.sin())
    except (TypeError, RuntimeError, ValueError):
        return False
    return all(torch.allclose(b, x, atol=1e-4) and not torch.allclose(t, x) for b, t in zip(back, turned, strict=True))


def _refused(attention: type, reason: str) -> SparseAttentionError:
    return SparseAttentionError(
        f"routing compares queries and keys from before the rotary embedding, and {attention.__name__} {reason}, so it "
        "cannot be undone exactly; use another pattern on this model, for example 'bigbird'"
    )
