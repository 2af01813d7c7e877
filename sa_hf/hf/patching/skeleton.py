"""A model without its weights that runs all the same: what the probe calls.

Weights are shapes alone, on "meta"; all else that is small has values: token ids, masks, positions, rotary angles,
routing. So code that asks for a number (a router's counts, a padded row) gets one, nothing large is allocated, and the
user's weights may be sharded or offloaded. Where a weight enters, what comes out of it is noise.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import math
import traceback
from collections.abc import Iterable, Iterator
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PreTrainedConfig, PreTrainedModel

from sa_hf.hf.patching.families import switch_over
from sa_hf.hf.state.activity import IMPLEMENTATION
from sa_hf.hf.state.classes import dense_class

# Elements of the largest tensor that has values: 24 tokens of a layer 43,000 wide.
LARGEST = 2**20
# What is read may be larger: a mask of pairs of one head, say.
LARGEST_READ = 2**24
_SHIFTS = 2**16
# Operators whose result depends on values: what has none gets some.
_READING = {
    "_local_scalar_dense", "bincount", "equal", "histc", "is_nonzero", "masked_select", "nonzero", "repeat_interleave",
    "_unique", "_unique2", "unique_consecutive", "unique_dim",
}  # fmt: skip
_FROM_DATA = {torch.tensor, torch.as_tensor, torch.asarray}
_DEVICE = "cpu"


class PartlyKnown(TorchDispatchMode):
    """Operators on tensors of which the large ones, and weights, are on "meta" and all others on the CPU.

    The noise depends on how many tensors were made of it since :meth:`again`: a call that is repeated gets the same.
    """

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator(device=_DEVICE).manual_seed(0)
        self._noise = torch.randn(LARGEST + _SHIFTS, generator=generator, device=_DEVICE)
        self._generator = generator
        self._made = 0
        self.building = False

    def again(self) -> None:
        self._made = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        schema = func._schema
        name = schema.name.partition("::")[2]
        draws = torch.Tag.nondeterministic_seeded in func.tags
        if draws and any(argument.name == "generator" for argument in schema.arguments):
            kwargs["generator"], draws = self._generator, False  # never the process's own
        if "device" in kwargs and kwargs["device"] is not None:
            kwargs["device"] = torch.device(_DEVICE)
        tensors: list[Tensor] = []
        _mapped(tensors.append, (args, kwargs))
        unknown = any(x.is_meta for x in tensors)
        first = schema.arguments[0].alias_info if schema.arguments else None
        written = first is not None and first.is_write
        aliased = any(x.alias_info is not None for x in schema.returns)
        if not tensors:
            return self._made_of_nothing(func, args, kwargs, draws or "empty" in name)
        if unknown and (_reads_values(name, args) or (written and not tensors[0].is_meta)):
            args, kwargs = _mapped(lambda x: self._filled(x) if x.is_meta else x, (args, kwargs))
            return func(*args, **kwargs)
        if unknown or draws:
            out = _shapes(func, args, kwargs)
            return out if aliased else _mapped(self._valued, out)
        if aliased or (torch.Tag.pointwise in func.tags and _broadcast(tensors) <= LARGEST):
            return func(*args, **kwargs)
        return self._if_small(func, args, kwargs)

    def _made_of_nothing(self, func: Any, args: Any, kwargs: Any, noise: bool) -> Any:
        """A new tensor: a weight where the model is being built and it has two dimensions of floats."""
        shape = func(*args, **{**kwargs, "device": torch.device("meta")})
        if not isinstance(shape, Tensor):
            return func(*args, **kwargs)
        weight = self.building and shape.dim() > 1 and shape.is_floating_point()
        if weight or shape.numel() > LARGEST:
            return shape
        return self._valued(shape) if noise else func(*args, **kwargs)

    def _if_small(self, func: Any, args: Any, kwargs: Any) -> Any:
        try:
            out = _shapes(func, args, kwargs)
        except (NotImplementedError, RuntimeError):  # no such operator on shapes: as it is, or with its own error
            return func(*args, **kwargs)
        sizes: list[int] = []
        _mapped(lambda x: sizes.append(x.numel()), out)
        return out if any(size > LARGEST for size in sizes) else func(*args, **kwargs)

    def _valued(self, x: Tensor) -> Tensor:
        return self._filled(x) if x.is_meta and x.numel() <= LARGEST else x

    def _filled(self, x: Tensor) -> Tensor:
        """Noise in the form of ``x``; whole numbers are 0, and so is what is not finite in few bits."""
        if x.numel() > LARGEST_READ:
            raise NotImplementedError(f"the values of a tensor of shape {tuple(x.shape)} are asked for")
        out = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=_DEVICE)
        if not x.is_floating_point():
            return out.zero_()
        self._made += 1
        shift, count = self._made * 7919 % _SHIFTS, x.numel()
        noise = self._noise if count <= LARGEST else self._noise.repeat(1 + count // LARGEST)
        return out.copy_(noise[shift : shift + count].view(x.shape))


class _FromData(TorchFunctionMode):
    """What would not be seen, or not be served, below this: tensors from Python's numbers, which have values whatever
    the device is, and normalised weights (of encoders of sound)."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func in _FROM_DATA:
            kwargs["device"] = _DEVICE
        if func == Tensor.data.__set__ and args[0].is_meta != args[1].is_meta:  # type: ignore[attr-defined]
            return None  # a weight set to another's (VisualBERT): it has no values in any case
        if func is torch._weight_norm:  # which wants both on one device before it dispatches
            direction, length, dim = args
            return direction * (length / torch.norm_except_dim(direction, 2, dim))
        if func is torch.nn.functional.scaled_dot_product_attention:  # which does so too: pooling by a learned query
            query, key, value = args[:3]
            if len({x.device for x in (query, key, value)}) > 1:
                return query.new_empty(*query.shape[:-1], value.shape[-1])
        return func(*args, **kwargs)


@contextlib.contextmanager
def partly_known() -> Iterator[PartlyKnown]:
    """Inside, models are built and run on shapes, and on values where they are small."""
    mode = PartlyKnown()
    with torch.device("meta"), _FromData(), mode, torch.no_grad():
        yield mode


def skeleton_of(
    model: PreTrainedModel, mode: PartlyKnown, attention: str, experts: str, halves: Iterable[str] = ()
) -> PreTrainedModel:
    """The model's architecture from a copy of its config, with other implementations of attention and experts.

    Args: halves: the parts that keep an attention of Transformers.
    """
    config = copy.deepcopy(model.config)
    config.__dict__.pop("sa_hf", None)
    _forget_ours(config)
    mode.building = True
    skeleton: PreTrainedModel = dense_class(type(model))(config)
    mode.building = False
    skeleton.eval()
    switch_over(skeleton)
    for module in skeleton.modules():
        if isinstance(getattr(module, "config", None), PreTrainedConfig):  # a number in some layers of Idefics
            module.config._attn_implementation = attention
            module.config._experts_implementation = experts
    for config in configs_apart(skeleton, halves):
        config._attn_implementation_internal = "eager"
    # Norms that multiply by ones would look like norms that commute with a rotation.
    for parameter in skeleton.parameters():
        if not parameter.is_meta and parameter.is_floating_point():
            parameter.copy_(1 + 0.3 * mode._filled(torch.empty_like(parameter, device="meta")))
    return skeleton


def configs_apart(root: PreTrainedModel, halves: Iterable[str]) -> list[Any]:
    """The configs that the modules of these parts of a model have and no other module does."""
    inside: dict[int, Any] = {}
    outside: set[int] = set()
    prefixes = tuple(f"{half}." for half in halves)
    for name, module in root.named_modules():
        config = getattr(module, "config", None)
        if f"{name}.".startswith(prefixes) and config is not None:
            inside[id(config)] = config
        else:
            outside.add(id(config))
    return [config for key, config in inside.items() if key not in outside]


def _forget_ours(config: Any) -> None:
    """Let a patched model's config name an attention of Transformers: some models choose their layers' class by it."""
    for one in [config, *(getattr(config, name, None) for name in config.sub_configs)]:
        if one is not None and one._attn_implementation == IMPLEMENTATION:
            one._attn_implementation_internal = "eager"


def failed_line(error: BaseException) -> str:
    """The line of the model's code at which it failed: ``file.py:12, `its text```."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if _is_of_a_model(Path(frame.filename))]
    if not frames:
        return "a place outside its code"
    return f"{Path(frames[-1].filename).name}:{frames[-1].lineno}, `{frames[-1].line}`"


def _is_of_a_model(path: Path) -> bool:
    """Whether code lies in Transformers' models, or in none of the packages that call them."""
    library, torch_folder, own = (
        Path(transformers.__file__).parent,
        Path(torch.__file__).parent,
        Path(__file__).parents[2],
    )
    if library / "models" in path.parents:
        return True
    around = {library, torch_folder, own} & {*path.parents}
    return not around and str(path) not in (contextlib.__file__, functools.__file__) and path.suffix == ".py"


def _shapes(func: Any, args: Any, kwargs: Any) -> Any:
    """What an operator returns in shapes alone."""
    kept = {key: x for key, x in kwargs.items() if key not in ("device", "pin_memory", "generator")}
    args, kept = _mapped(_shape, (args, kept))
    return func(*args, **kept)


def _shape(x: Tensor) -> Tensor:
    return x if x.is_meta else torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="meta")


def _mapped(function: Any, x: Any) -> Any:
    """``x`` with ``function`` of the tensors in it: an operator's arguments, or what it returns."""
    if isinstance(x, Tensor):
        return function(x)
    if isinstance(x, tuple | list):
        return type(x)([_mapped(function, item) for item in x])
    return {key: _mapped(function, item) for key, item in x.items()} if isinstance(x, dict) else x


def _broadcast(tensors: list[Tensor]) -> int:
    """The elements of what tensors broadcast to."""
    shapes = [tuple(reversed(x.shape)) for x in tensors]
    return math.prod(max(sizes) for sizes in zip_longest(*shapes, fillvalue=1))


def _reads_values(name: str, args: Any) -> bool:
    """Whether what comes out has a shape, or is a number, that depends on values."""
    if name in _READING:
        return True
    # Indexing by a mask.
    return name in ("index", "index_put", "index_put_") and any(
        isinstance(x, Tensor) and x.dtype in (torch.bool, torch.uint8) for x in args[1]
    )
