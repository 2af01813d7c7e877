"""How the input that a model takes is lengthened, and made short again.

Learned tables of absolute positions are lengthened by tiling: row ``p`` beyond the end starts as row ``p mod n`` (as
Longformer and BigBird do with RoBERTa's). Sinusoidal tables go on by the model's own formula (Marian's, Pegasus's,
DistilBERT's option): Transformers computes many of them anew at each load. RoPE computes its angles and needs no
table; ``rope_parameters`` sets the scaling. Of several towers (``EncoderDecoderModel``) each has a limit of its own.

What else a model reads off its limit stays (:func:`left_to_the_limit`): the loaded model is the one that was saved.
"""

from __future__ import annotations

import copy
import re
import sys
import warnings
import weakref
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from sa_hf.config import did_you_mean
from sa_hf.errors import SparseAttentionError, UnsupportedModelError
from sa_hf.hf.state.positions import (
    LIMIT,
    TABLES,
    Table,
    config_limits,
    configs_of,
    configs_of_table,
    position_limit,
    position_tables,
)
from sa_hf.hf.state.towers import language_modules

TRAINED_LIMIT = "original_max_position_embeddings"
DISTANCES = ("relative_attention", "alibi")  # fields of configs
# Buffers with one entry per position, and what stands at position p.
BUFFERS = ("position_ids", "token_type_ids")
# Models that were lengthened with their tokenizer, or without it and with a warning: one is enough.
_told_of_tokenizer: weakref.WeakSet[PreTrainedModel] = weakref.WeakSet()


def grows_by_itself(root: PreTrainedModel) -> bool:
    """Whether a model computes its table of sinusoids anew where an input is longer (M2M100, XGLM)."""
    return any(hasattr(m, "make_weights") for name, m in language_modules(root) if name.rpartition(".")[2] in TABLES)


def knows_distances_alone(root: PreTrainedModel) -> bool:
    """Whether nothing but its config bounds the input of a model without a table: its attention has buckets of
    distances (DeBERTa-v3), or ALiBi."""
    return any(getattr(config, name, False) is True for config in configs_of(root) for name in DISTANCES)


def computed_rows(root: PreTrainedModel, table: Table, rows: int) -> Tensor | None:
    """A table of ``rows`` rows ``[rows, dim]`` by the formula that the model fills its own with; None where it learns.

    Raises:
        UnsupportedModelError: Transformers computes the table anew at each load, by a formula that is not known here.
    """
    module: Any = root.get_submodule(table.name)
    dim = int(module.weight.shape[1])
    if hasattr(module, "create_weight"):  # Marian, Pegasus, Informer and their kin
        longer = copy.copy(module)
        longer._parameters = {"weight": nn.Parameter(torch.empty(rows, dim), requires_grad=False)}
        result: Tensor = longer.create_weight()
        return result
    if hasattr(module, "get_embedding"):  # FSMT
        return cast(Tensor, module.get_embedding(rows, dim, module.padding_idx))
    config: Any = root.config
    if getattr(config, "sinusoidal_pos_embds", False) or getattr(config, "sinusoidal_embeddings", False):
        fill = getattr(sys.modules[type(root).__mro__[0].__module__], "create_sinusoidal_embeddings", None)
        if fill is not None:  # DistilBERT, XLM, FlauBERT
            weight = torch.empty(rows, dim)
            fill(n_pos=rows, dim=dim, out=weight)
            return weight
    else:
        patterns = getattr(root, "_keys_to_ignore_on_load_missing", None) or ()
        if not any(re.search(pattern, f"{table.name}.weight") for pattern in patterns):
            return None
    raise UnsupportedModelError(
        f"Transformers computes the table {table.name!r} of {type(root).__name__} anew at each load, by a formula that "
        "sa_hf does not know; its positions cannot be lengthened"
    )


def own_configs(root: PreTrainedModel) -> list[tuple[str, str, PreTrainedConfig]]:
    """Give a model copies of its configs, shared inside it as the originals are; returns ``(module, attribute,
    original)`` for each place."""
    memo: dict[int, Any] = {}
    originals = []
    for name, module in root.named_modules():
        for attribute, value in list(vars(module).items()):
            if isinstance(value, PreTrainedConfig):
                originals.append((name, attribute, value))
                setattr(module, attribute, copy.deepcopy(value, memo))
    return originals


@dataclass(eq=False)
class Extension:
    """What lengthening changed, to be undone: table rows, buffers, rotary modules, the tokenizer's limit.

    ``changed`` holds the new values of config fields; ``limits`` maps each old limit of a config to its new one.
    """

    tables: list[Table] = field(default_factory=list)
    buffers: list[tuple[str, str, int]] = field(default_factory=list)
    rotary: dict[str, nn.Module] = field(default_factory=dict)
    tokenizers: list[tuple[Any, int]] = field(default_factory=list)
    changed: dict[str, Any] = field(default_factory=dict)
    limits: dict[int, int] = field(default_factory=dict)

    def undo(self, root: PreTrainedModel) -> None:
        """Cut the tables back (trained rows stay) and put back the rest; the configs are restored by the caller."""
        for table in self.tables:
            _set_table(root.get_submodule(table.name), root.get_submodule(table.name).weight[: table.rows])
        for name, buffer, length in self.buffers:
            module = root.get_submodule(name)
            setattr(module, buffer, getattr(module, buffer)[..., :length].clone())
        for name, module in self.rotary.items():
            _set_submodule(root, name, module)
        for tokenizer, limit in self.tokenizers:
            tokenizer.model_max_length = limit

    def merge(self, before: Extension | None) -> Extension:
        """Undo back to where the earlier of two lengthenings started."""
        if before is None:
            return self
        known = {table.name for table in before.tables}
        before.tables += [table for table in self.tables if table.name not in known]
        kept = {(name, buffer) for name, buffer, _ in before.buffers}
        before.buffers += [entry for entry in self.buffers if entry[:2] not in kept]
        before.rotary = {**self.rotary, **before.rotary}
        before.tokenizers = [*self.tokenizers, *before.tokenizers]
        before.changed = {**before.changed, **self.changed}
        through = {old: self.limits.get(new, new) for old, new in before.limits.items()}
        before.limits = {**self.limits, **through}
        return before


@dataclass(frozen=True, eq=False)
class ExtensionPlan:
    """A lengthening that has been checked."""

    limit: int | None
    max_length: int | None
    tokenizer: Any
    rope_parameters: dict[str, Any] | None
    tables: list[Table]

    def apply(self, root: PreTrainedModel, before: Extension | None) -> Extension:
        done = Extension()
        if self.max_length is not None and self.limit is not None:
            self._lengthen(root, done)
        if self.rope_parameters is not None:
            self._scale_rope(root, done)
        if self.tokenizer is not None and self.max_length is not None:
            done.tokenizers.append((self.tokenizer, self.tokenizer.model_max_length))
            self.tokenizer.model_max_length = self.max_length
        return done.merge(before)

    def _lengthen(self, root: PreTrainedModel, done: Extension) -> None:
        assert self.max_length is not None
        limits = config_limits(root, self.tables)
        for table in self.tables:
            module = root.get_submodule(table.name)
            if table.positions >= self.max_length:  # of another tower, longer already
                continue
            weight: Tensor = module.weight
            formula = computed_rows(root, table, table.first + self.max_length)
            if formula is None:
                index = torch.arange(self.max_length, device=weight.device) % table.positions + table.first
                rows = torch.cat([weight[: table.first], weight[index]])
            else:
                rows = torch.cat([weight, formula[table.rows :].to(weight)])
            _set_table(module, rows)
            done.tables.append(table)
        for config, limit in limits:
            old = getattr(config, LIMIT)
            if limit < self.max_length and not _is_dynamic(self._rope_of(config)):
                for name, value in left_to_the_limit(config).items():
                    done.changed[name] = value
                    setattr(config, name, value)
                # RoBERTa counts the rows before its first position into the limit of its config, BERT has none.
                done.limits[old] = self.max_length + old - limit
                setattr(config, LIMIT, done.limits[old])
        for old, new in done.limits.items():
            done.changed[LIMIT] = new
            self._lengthen_buffers(root, old, new, done)

    def _lengthen_buffers(self, root: PreTrainedModel, old: int, new: int, done: Extension) -> None:
        for name, module in language_modules(root):
            for buffer, value in list(module.named_buffers(recurse=False)):
                if buffer in BUFFERS and value.shape[-1] == old:
                    rest = torch.arange(old, new, device=value.device) if buffer == "position_ids" else 0
                    longer = value.new_zeros(*value.shape[:-1], new)
                    longer[..., :old] = value
                    longer[..., old:] = rest
                    setattr(module, buffer, longer)
                    done.buffers.append((name, buffer, old))

    def _rope_of(self, config: Any) -> Any:
        """A config's ``rope_parameters`` after the lengthening."""
        own = getattr(config, "rope_parameters", None)
        given = isinstance(own, dict) and self.rope_parameters is not None
        return scaled_rope(config, self.rope_parameters or {}, self.limit) if given else own

    def _scale_rope(self, root: PreTrainedModel, done: Extension) -> None:
        for config in configs_of(root):
            if isinstance(getattr(config, "rope_parameters", None), dict):
                merged = self._rope_of(config)
                config.rope_parameters = merged
                done.changed["rope_parameters"] = merged
        for name, module in rotary_modules(root).items():
            fresh = type(module)(config=module.config).to(next(module.buffers()).device)
            done.rotary[name] = module
            _set_submodule(root, name, fresh)


def scaled_rope(config: Any, rope_parameters: dict[str, Any], limit: int | None) -> dict[str, Any]:
    """A config's ``rope_parameters`` with a user's on top; one entry per kind of layer where it has several.

    The length that the model was trained on is its own where it says one: ``limit`` may have been raised since.
    """
    own, given = config.rope_parameters, rope_parameters
    trained: dict[str, Any] = {}
    if given.get("rope_type", "default") not in ("default", "linear", "proportional") and limit is not None:
        trained[TRAINED_LIMIT] = getattr(config, TRAINED_LIMIT, None) or limit
    if any(isinstance(value, dict) for value in own.values()):
        if any(isinstance(value, dict) for value in given.values()):
            return {**own, **given}
        return {
            kind: {**trained, **value, **given} if isinstance(value, dict) else value for kind, value in own.items()
        }
    return {**trained, **own, **given}


def left_to_the_limit(config: PreTrainedConfig) -> dict[str, Any]:
    """What a config leaves to its limit, said outright: fields with the values that they have by it now.

    A model that is built under a longer limit has others: DeBERTa's longest distance (its buckets, the size of their
    table), the factor of YaRN and LongRoPE that is the limit over the length of the training.
    """
    limit, found = getattr(config, LIMIT), {}
    if getattr(config, "relative_attention", False) and getattr(config, "max_relative_positions", 1) < 1:
        found["max_relative_positions"] = limit
    rope = getattr(config, "rope_parameters", None)
    if isinstance(rope, dict):
        said = {kind: _with_factor(part, limit) for kind, part in _by_kind(rope).items()}
        if said != _by_kind(rope):
            found["rope_parameters"] = said if said.keys() != {None} else said[None]
    return found


def _with_factor(rope: Any, limit: int) -> Any:
    trained = rope.get(TRAINED_LIMIT) if isinstance(rope, dict) else None
    if trained is None or rope.get("rope_type") not in ("yarn", "longrope") or rope.get("factor") is not None:
        return rope
    return {**rope, "factor": limit / trained}


def _is_dynamic(rope: Any) -> bool:
    """Whether rotary angles are scaled as soon as an input is longer than the config's limit, which then has to stay
    that of the training ("dynamic", of any kind of layer)."""
    parts = _by_kind(rope).values() if isinstance(rope, dict) else ()
    return any(isinstance(part, dict) and "dynamic" in str(part.get("rope_type")) for part in parts)


def _by_kind(rope: dict[Any, Any]) -> dict[Any, Any]:
    """``rope_parameters`` by the kind of layer; under None where all layers have the same."""
    return rope if any(isinstance(value, dict) for value in rope.values()) else {None: rope}


def rotary_modules(root: PreTrainedModel) -> dict[str, nn.Module]:
    """The modules that compute rotary angles."""
    return {
        name: module
        for name, module in language_modules(root)
        if "RotaryEmbedding" in type(module).__name__ and hasattr(module, "config")
    }


def plan_extension(
    root: PreTrainedModel, max_length: int | None, tokenizer: Any, rope_parameters: dict[str, Any] | None
) -> ExtensionPlan:
    """Check a lengthening, before anything is changed."""
    rotary = bool(rotary_modules(root))
    if rope_parameters is not None and not rotary:
        raise UnsupportedModelError(
            f"rope_parameters are given, but {type(root).__name__} has no rotary embedding; leave them out"
        )
    tables, limit = position_tables(root), position_limit(root)
    check_tokenizer(tokenizer)
    if rope_parameters is not None:
        _check_rope(root, rope_parameters, limit)
    if max_length is None:
        return ExtensionPlan(limit, None, tokenizer, rope_parameters, [])
    if isinstance(max_length, bool) or not isinstance(max_length, int) or max_length < 1:
        raise no_length(max_length, limit)
    if limit is not None and max_length < limit:
        raise SparseAttentionError(
            f"max_length={max_length} is below the {limit} tokens that {type(root).__name__} takes already; "
            f"nearest: {limit}. To cut inputs, truncate in the tokenizer"
        )
    if root.main_input_name == "pixel_values" and not root.config.is_encoder_decoder:
        raise UnsupportedModelError(
            f"{type(root).__name__} has a position per image patch; give it larger images with "
            "interpolate_pos_encoding=True instead of max_length"
        )
    if limit is not None and max_length > limit:
        if not (tables or rotary or grows_by_itself(root) or knows_distances_alone(root)):
            raise UnsupportedModelError(
                f"{type(root).__name__} takes {limit} tokens, and neither a table of absolute positions nor a rotary "
                "embedding that could be lengthened was found"
            )
        if any(root.get_submodule(table.name).weight.is_meta for table in tables):
            raise SparseAttentionError("the position table is offloaded; lengthen the model before it is dispatched")
        for table in tables:
            computed_rows(root, table, 1)
            if table.positions < max_length and not configs_of_table(root, table):
                raise UnsupportedModelError(
                    f"no config of {type(root).__name__} has a {LIMIT} that sizes its table {table.name!r}, so a "
                    "longer one could not be loaded again; its positions cannot be lengthened"
                )
        scales = any(_is_dynamic(getattr(config, "rope_parameters", None)) for config in configs_of(root))
        if rotary and not tables and rope_parameters is None and not scales:
            warnings.warn(
                f"max_length={max_length} is above the {limit} tokens that the rotary embedding was trained on; "
                "without rope_parameters (e.g. {'rope_type': 'yarn', 'factor': 4.0}) it extrapolates",
                stacklevel=3,
            )
    if limit is None or max_length > limit:
        _tell_of_tokenizer(root, max_length, tokenizer)
    return ExtensionPlan(limit, max_length, tokenizer, rope_parameters, tables)


def _tell_of_tokenizer(root: PreTrainedModel, max_length: int, tokenizer: Any) -> None:
    """Warn where a model is lengthened for the first time and its tokenizer would cut the longer inputs in silence."""
    if tokenizer is None and root not in _told_of_tokenizer:
        warnings.warn(
            f"max_length={max_length} lengthens the model alone: its tokenizer keeps its own limit, at which "
            "truncation=True and pipelines cut. Give tokenizer=tokenizer beside max_length, or set "
            f"tokenizer.model_max_length = {max_length}",
            stacklevel=4,
        )
    _told_of_tokenizer.add(root)


def check_tokenizer(tokenizer: Any) -> None:
    """Raise ``SparseAttentionError`` where a tokenizer is given that has no limit to set."""
    if tokenizer is not None and not hasattr(tokenizer, "model_max_length"):
        raise SparseAttentionError(
            f"tokenizer={tokenizer!r} has no model_max_length to set; give the model's own tokenizer, or leave it out"
        )


def no_length(value: Any, limit: int | None) -> SparseAttentionError:
    return SparseAttentionError(f"max_length={value!r} must be an integer >= 1; nearest: {limit or 1}")


def _check_rope(root: PreTrainedModel, rope_parameters: Any, limit: int | None) -> None:
    """Build the scaled rotary embeddings on the side: what they lack shows before the model is changed."""
    if not isinstance(rope_parameters, dict):
        raise SparseAttentionError(
            f"rope_parameters={rope_parameters!r} must be a dict, e.g. {{'rope_type': 'yarn', 'factor': 4.0}}"
        )
    kinds = sorted({"default", *ROPE_INIT_FUNCTIONS})
    for module in rotary_modules(root).values():
        config: Any = copy.deepcopy(module.config)
        try:
            config.rope_parameters = scaled_rope(config, rope_parameters, limit)
            type(module)(config=config)
            getattr(config, "validate", lambda: None)()  # as its save does
        except Exception as error:  # whatever the model's own code raises on values that it cannot read
            asked = rope_parameters.get("rope_type", "default")
            raise SparseAttentionError(
                f"rope_parameters={rope_parameters!r} do not fit {type(root).__name__}: {type(error).__name__}: "
                f"{' '.join(str(error).split())}; each rope_type needs its own fields, and the types are {kinds}"
                f"{did_you_mean(str(asked), kinds) if asked not in kinds else ''}"
            ) from error


def _set_table(module: nn.Module, rows: Tensor) -> None:
    old: Any = module.weight
    module.weight = nn.Parameter(rows.detach().clone(), requires_grad=old.requires_grad)
    module.num_embeddings = rows.shape[0]  # type: ignore[assignment]  # an Embedding's number


def _set_submodule(root: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(root.get_submodule(parent), child, module)
