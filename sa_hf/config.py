"""The base of every pattern's configuration, and the registry that finds a pattern by its name.

A configuration is a frozen dataclass, checked whole at construction. It knows no model: the same object
describes one layer of any of them. ``sa_hf.patterns`` registers one class per published system.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
import reprlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, NoReturn, Self, TypeVar

import torch
from torch import Tensor, nn

from sa_hf.errors import ConfigVersionError, NotStaticError, SparseAttentionError
from sa_hf.layer import AttentionInputs, Geometry, LayerSpec
from sa_hf.ops.cpp.steps import PreparedStep
from sa_hf.ops.transforms import JIT_SCRIPT

CONFIG_VERSION = 1
MAX_SEED = 2**63 - 1
# Config files come from anywhere: no integer field may be large enough to make a layout of absurd size.
MAX_INTEGER = 2**31 - 1
MAX_NUMBER = 1e30  # coefficients are used in fp32
SHOWN_CHARACTERS = 100  # of a value in an error message

_REGISTRY: dict[str, type[SparseAttentionConfig]] = {}
_Config = TypeVar("_Config", bound="SparseAttentionConfig")


@dataclass(frozen=True, kw_only=True)
class SparseAttentionConfig:
    """What every pattern's configuration shares.

    Args:
        seed: the seed of everything random in the pattern, ``0 <= seed < 2**63``.
        drop_diagonal: leave out each query's own position, unless it is the row's only key (SparseBERT, section 4.3).

    Raises:
        SparseAttentionError: a field is out of its range.
    """

    name: ClassVar[str] = ""
    reads_before_rotary: ClassVar[bool] = False  # needs queries and keys from before the rotary embedding

    seed: int = 0
    drop_diagonal: bool = False

    def __post_init__(self) -> None:
        check_integer(self, "seed", minimum=0, maximum=MAX_SEED)
        check_bool(self, "drop_diagonal")
        self.validate()
        # Names the pattern in the arguments of the registered operator, which cannot carry objects.
        object.__setattr__(self, "_key", json.dumps(self.to_dict(), sort_keys=True))

    @property
    def key(self) -> str:
        """The configuration as one line of JSON."""
        key: str = self._key  # type: ignore[attr-defined]  # set in __post_init__, no field of its own
        return key

    def validate(self) -> None:
        """Check the fields of the concrete class; raise ``SparseAttentionError`` at the first that is wrong."""

    # -- serialisation ---------------------------------------------------------------------------------------------

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready dict: ``name``, ``version`` and every field."""
        fields = {f.name: _jsonable(getattr(self, f.name)) for f in dataclasses.fields(self)}
        return {"name": self.name, "version": CONFIG_VERSION, **fields}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """Rebuild a configuration from :meth:`to_dict`.

        On ``SparseAttentionConfig`` the class is found by ``data["name"]``; on a concrete class the name, when
        given, must be its own.

        Raises:
            ConfigVersionError: the dict has a newer version, or a key that this version does not know.
            SparseAttentionError: the name is unknown or a value is out of its range.
        """
        if not isinstance(data, Mapping):
            raise SparseAttentionError(f"a config must be a mapping of field names to values, not {shown(data)}")
        values = dict(data)
        name = values.pop("name", cls.name)
        version = values.pop("version", CONFIG_VERSION)
        target = pattern_class(name)
        if not issubclass(target, cls):
            raise SparseAttentionError(
                f"the config names pattern {name!r}, but {cls.__name__} is pattern {cls.name!r}; "
                f"use SparseAttentionConfig.from_dict or {target.__name__}.from_dict"
            )
        known = {f.name for f in dataclasses.fields(target)}
        unknown = sorted(str(k) for k in values if k not in known)
        if not isinstance(version, int) or isinstance(version, bool) or not 1 <= version <= CONFIG_VERSION:
            raise ConfigVersionError(
                f"the {name!r} config has version {shown(version)}"
                + (f" with the unknown keys {shown(unknown)}" if unknown else "")
                + f"; this sa_hf reads versions 1 to {CONFIG_VERSION}: update it (`git pull`, then `pip install .`)"
            )
        if unknown:
            raise ConfigVersionError(
                f"{target.__name__} has no field {shown(unknown[0])}{did_you_mean(unknown[0], known)}; "
                f"fields are {sorted(known)}. If a newer sa_hf wrote this config, update yours (`git pull`, then "
                "`pip install .`)"
            )
        return target(**values)

    # -- presets ---------------------------------------------------------------------------------------------------

    @classmethod
    def presets(cls) -> dict[str, dict[str, Any]]:
        """The named presets of this pattern: ``{name: fields}``."""
        return {}

    @classmethod
    def preset(cls, name: str, **overrides: Any) -> Self:
        """The configuration of a named preset, with single fields replaced by ``overrides``."""
        presets = cls.presets()
        if name not in presets:
            listed = sorted(presets) or "none"
            raise SparseAttentionError(
                f"{cls.__name__} has no preset {shown(name)}{did_you_mean(name, presets)}; presets: {listed}"
            )
        check_fields(cls, overrides)
        return cls(**{**presets[name], **overrides})

    # -- what the pattern is ---------------------------------------------------------------------------------------

    @property
    def extra_tokens(self) -> int:
        """How many learned tokens join each sequence in front of its own (ETC, the virtual relay)."""
        return 0

    def check_layer(self, spec: LayerSpec) -> None:
        """Raise ``SparseAttentionError`` where this pattern cannot serve the layer (before anything is changed)."""

    def check_layers(self, specs: Sequence[LayerSpec]) -> None:
        """Check all the layers of one stack that get this configuration; raises as :meth:`check_layer`, and warns."""
        for spec in specs:
            self.check_layer(spec)

    def build(self, spec: LayerSpec) -> SparseAttention:
        """The module that runs this pattern in one attention layer; it holds the learned state, if any."""
        raise NotImplementedError

    # -- the predicate and what derives from it --------------------------------------------------------------------

    def mask(self, length: int, num_heads: int = 1, layer_idx: int = 0, causal: bool = False) -> torch.Tensor:
        """The set of kept pairs as bool ``[num_heads, length, length]`` (query, key).

        Raises:
            NotStaticError: the pattern depends on data or learned state.
        """
        raise NotStaticError(
            f"pattern {self.name!r} has no mask of its own: what a query attends depends on learned state or data. "
            "Patch a model and use `sa_hf.summary(model)`, or preview a static pattern such as 'bigbird'"
        )

    def preview(self, length: int, causal: bool = False, *, num_heads: int = 1, layer_idx: int = 0) -> str:
        """The mask of head 0 drawn for the terminal, at most 64 characters wide: one line per row of cells."""
        return _drawing().preview(self, length, causal, num_heads, layer_idx)

    def density(self, length: int, num_heads: int = 1, layer_idx: int = 0, causal: bool = False) -> float:
        """Kept pairs divided by the pairs of dense attention (``length**2``, causal: ``length*(length+1)/2``)."""
        kept = int(self.mask(length, num_heads, layer_idx, causal).sum())
        dense = length * (length + 1) // 2 if causal else length * length
        return kept / (dense * num_heads)

    def plot(self, path: Any, length: int, causal: bool = False, *, num_heads: int = 1, layer_idx: int = 0) -> None:
        """Draw the mask to an image file (format by its suffix); needs matplotlib (extra ``tools``)."""
        _drawing().plot(self, path, length, causal=causal, num_heads=num_heads, layer_idx=layer_idx)


class SparseAttention(nn.Module):
    """The ``sparse`` child of a patched attention module: runs one layer's pattern and holds its learned state.

    Learned state is bare Parameters and buffers, never ``nn.Linear`` (LoRA's "all-linear" would wrap it).
    """

    # Whether a causal layer keeps tensors of its own for every token so far (``AttentionInputs.remember``).
    remembers: bool = False
    # What ``figures`` gives after a forward, and cannot give before one.
    figure_names: ClassVar[tuple[str, ...]] = ()
    # How many training forwards ago the running call began: above 0 where a checkpointed layer is recomputed after a
    # later forward, and has to draw the noise of its own.
    steps_back: int = 0

    def __init__(self, config: SparseAttentionConfig, spec: LayerSpec, heads: Sequence[int] | None = None) -> None:
        super().__init__()
        self.config = config
        self.spec = spec
        served = spec.heads if heads is None else heads
        self.heads = tuple(range(spec.num_heads)) if served is None else tuple(served)

    def forward(self, inputs: AttentionInputs) -> Tensor:
        """Attend; returns ``[B, H, Nq, D]``, rows of padding 0."""
        raise NotImplementedError

    def __prepare_scriptable__(self) -> NoReturn:
        """What torch.jit.script asks every module for first."""
        raise SparseAttentionError(JIT_SCRIPT)

    def aux_losses(self) -> dict[str, Tensor]:
        """The live auxiliary losses of the last forward, scaled as they join the model's loss (fp32 scalars)."""
        return {}

    def unscaled_losses(self) -> dict[str, Tensor]:
        """The same without their coefficients, detached: figures to report."""
        return {}

    def figures(self) -> dict[str, float]:
        """Figures of the last forward to report: spans, cluster sizes, mask density."""
        return {}

    def repeated(self, earlier: SparseAttention, step: PreparedStep, inputs: AttentionInputs) -> PreparedStep | None:
        """This layer's step of decoding by that of an earlier one, whose call was the same but for its tensors; None:
        the call ``inputs`` has to run for itself."""
        return None

    def reads_listed_keys(self, inputs: AttentionInputs) -> bool:
        """Whether this call can take the keys that a cache kept, by their slots, without those that it dropped."""
        return False

    def expired_keys(self, noted: Any = None) -> Tensor | None:
        """Key slots that no later query can read, bool ``[B, Nk]`` (padding too), or None.

        Args: noted: what the module has noted of the call that is meant (``AttentionInputs.note``); None: the last.
        """
        return None

    def tie(self, layers: Sequence[SparseAttention]) -> None:
        """Called once all layers are built (again is harmless), on each module of a stack that runs this config, with
        all of them in layer order: what layers share is set up here."""

    def advance_step(self) -> None:
        """Called once per outer training forward, before it, and never in a recomputation."""

    def repeat_step(self) -> None:
        """Called in place of :meth:`advance_step` before an outer forward that is a recomputation."""

    def drop_graph(self) -> None:
        """Forget graph tensors of the last forward: a kept one breaks deepcopy and holds memory."""

    def geometry(self, inputs: AttentionInputs, query_length: int, key_length: int) -> Geometry:
        return Geometry(
            key_length, query_length, self.heads, self.spec.num_heads, self.spec.layer_idx, inputs.causal, inputs.band
        )  # fmt: skip


# -- what stands above and is handed down: the patterns by name, and what draws them -------------------------------


class Drawing(NamedTuple):
    """``patterns.drawing``, as :meth:`SparseAttentionConfig.preview` and :meth:`SparseAttentionConfig.plot` call it."""

    preview: Callable[..., str]
    plot: Callable[..., None]


_DRAWINGS: list[Drawing] = []


def draw_by(drawing: Drawing) -> None:
    """Called once by what draws patterns."""
    _DRAWINGS.append(drawing)


def _drawing() -> Drawing:
    if not _DRAWINGS:
        raise ImportError("a checkpoint does not carry sa_hf.patterns.drawing: install sa_hf")
    return _DRAWINGS[-1]


def register_pattern(cls: type[_Config]) -> type[_Config]:
    """Class decorator: make a configuration known by its ``name``."""
    if not cls.name or cls.name in _REGISTRY:
        raise SparseAttentionError(f"pattern name {cls.name!r} is empty or taken by {_REGISTRY.get(cls.name)}")
    _REGISTRY[cls.name] = cls
    return cls


def available_patterns() -> dict[str, type[SparseAttentionConfig]]:
    """Every registered pattern, ``{name: config class}``: importing ``sa_hf.patterns`` registers the built-in ones."""
    return dict(_REGISTRY)


def pattern_class(name: Any) -> type[SparseAttentionConfig]:
    """The configuration class of a pattern's name; raises ``SparseAttentionError`` for an unknown one."""
    patterns = available_patterns()
    if not isinstance(name, str) or name not in patterns:
        raise SparseAttentionError(
            f"unknown pattern {shown(name)}{did_you_mean(name, patterns)}; patterns: {sorted(patterns)}"
        )
    return patterns[name]


# -- checks shared by the patterns ---------------------------------------------------------------------------------


_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = SHOWN_CHARACTERS
_SHORT.maxlist = _SHORT.maxtuple = 16


def shown(value: Any) -> str:
    """A value for an error message: whatever its size, a line."""
    try:
        return _SHORT.repr(value)
    except ValueError:  # Python prints no integer of more than 4300 digits
        return f"<{type(value).__name__} too long to print>"


def did_you_mean(value: Any, choices: Any) -> str:
    if not isinstance(value, str) or len(value) > SHOWN_CHARACTERS:
        return ""
    close = difflib.get_close_matches(value, [str(c) for c in choices], n=1, cutoff=0.5)
    return f" (did you mean {close[0]!r}?)" if close else ""


def check_fields(cls: type[SparseAttentionConfig], names: Iterable[str]) -> None:
    """Raise ``SparseAttentionError`` at the first name that is no field of a configuration class."""
    known = [field.name for field in dataclasses.fields(cls)]
    for name in names:
        if name not in known:
            raise SparseAttentionError(
                f"{cls.__name__} has no field {name!r}{did_you_mean(name, known)}; fields: {sorted(known)}"
            )


def check_integer(
    config: SparseAttentionConfig, field: str, *, minimum: int, maximum: int = MAX_INTEGER, optional: bool = False
) -> None:
    _check_range(config, field, int, "an integer", minimum, maximum, optional)


def check_number(
    config: SparseAttentionConfig, field: str, *, minimum: float, maximum: float = MAX_NUMBER, optional: bool = False
) -> None:
    # An integer may be too large for isfinite, and is then out of range.
    _check_range(config, field, int | float, "a finite number", minimum, maximum, optional)


def _check_range(
    config: SparseAttentionConfig, field: str, kind: Any, what: str, minimum: float, maximum: float, optional: bool
) -> None:
    value, name = getattr(config, field), f"{config.name}.{field}"
    if optional and value is None:
        return
    if isinstance(value, bool) or not isinstance(value, kind) or value != value:
        raise SparseAttentionError(
            f"{name}={shown(value)} must be {what} >= {minimum}{' or None' * optional}; nearest: "
            f"{_nearest(value, kind, minimum, maximum, getattr(type(config), field, minimum))}"
        )
    if not minimum <= value <= maximum:
        raise SparseAttentionError(
            f"{name}={shown(value)} must lie in [{minimum}, {maximum}]{' or be None' * optional}; nearest: "
            f"{minimum if value < minimum else maximum}"
        )


def _nearest(value: Any, kind: Any, minimum: float, maximum: float, default: Any) -> Any:
    """The valid number next to one of another type, or to a text that says one; else the default."""
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError, RuntimeError):  # the last of tensors
        return default
    if isinstance(value, bool) or not math.isfinite(number):
        return default
    number = min(max(number, minimum), maximum)
    return round(number) if kind is int else number


def check_bool(config: SparseAttentionConfig, field: str) -> None:
    value = getattr(config, field)
    if not isinstance(value, bool):
        raise SparseAttentionError(f"{config.name}.{field}={shown(value)} must be True or False")


def check_choice(config: SparseAttentionConfig, field: str, choices: tuple[Any, ...]) -> None:
    value = getattr(config, field)
    # By type, too: True and 1.0 equal 1.
    if not any(type(value) is type(choice) and value == choice for choice in choices):
        raise SparseAttentionError(
            f"{config.name}.{field}={shown(value)} must be one of {list(choices)}{did_you_mean(value, choices)}"
        )


def _jsonable(value: Any) -> Any:
    return [_jsonable(v) for v in value] if isinstance(value, tuple | list) else value
