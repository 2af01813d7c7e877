"""How long an input a model takes: its tables of absolute positions, and what its configs say; towers aside."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from sa_hf.hf.state.towers import language_modules

LIMIT = "max_position_embeddings"
# Module names of learned or sinusoidal tables of absolute positions.
TABLES = ("position_embeddings", "wpe", "embed_positions")


@dataclass(frozen=True)
class Table:
    """An embedding of positions: position ``p`` is its row ``p + first``."""

    name: str
    first: int
    rows: int

    @property
    def positions(self) -> int:
        return self.rows - self.first


def position_tables(model: PreTrainedModel) -> list[Table]:
    """The tables of absolute positions of a model."""
    found = []
    for name, module in language_modules(model):
        if name.rpartition(".")[2] in TABLES and isinstance(module, nn.Embedding):
            first = getattr(module, "offset", 0)
            if module.padding_idx is not None and first == 0:
                first = module.padding_idx + 1
            found.append(Table(name, int(first), int(module.weight.shape[0])))
    return found


def position_limit(model: PreTrainedModel) -> int | None:
    """The longest input of a model in tokens; None where nothing bounds it (T5) or its inputs are no tokens (ViT)."""
    tables = position_tables(model)
    if tables:
        return min(table.positions for table in tables)
    limit = getattr(model.config, LIMIT, None)
    if isinstance(limit, int) and limit > 0:  # XLNet has none and says -1
        return limit
    return min((limit for _, limit in config_limits(model, [])), default=None)


def config_limits(root: PreTrainedModel, tables: list[Table]) -> list[tuple[PreTrainedConfig, int]]:
    """The configs of a model that say how long its input is, each with the tokens that what it describes takes."""
    said = [(config, getattr(config, LIMIT, None)) for config in configs_of(root)]
    found = {id(config): (config, limit) for config, limit in said if isinstance(limit, int) and limit > 0}
    own: dict[int, int] = {}
    for table in tables:
        for config in configs_of_table(root, table):
            own[id(config)] = min(own.get(id(config), table.positions), table.positions)
    # A config that is no table's own (of a model whose tables stand under a copy of it) goes with the equal ones.
    alike = {getattr(found[key][0], LIMIT): limit for key, limit in own.items()}
    return [(config, own.get(key, alike.get(limit, limit))) for key, (config, limit) in found.items()]


def configs_of_table(root: PreTrainedModel, table: Table) -> list[PreTrainedConfig]:
    """The config with a limit that stands nearest above a table."""
    name = table.name
    while True:
        config = getattr(root.get_submodule(name), "config", None)
        if isinstance(getattr(config, LIMIT, None), int):
            return [config]
        if not name:
            return []
        name = name.rpartition(".")[0]


def lengthening(model: PreTrainedModel, length: int | None) -> int | None:
    """The ``max_length`` that ``patch_model`` needs for inputs of ``length`` tokens; None where the model takes them.

    The config's number is not the limit: RoBERTa's counts rows of its table that no token has.
    """
    limit = position_limit(model)
    return length if length is not None and limit is not None and length > limit else None


def configs_of(root: PreTrainedModel) -> list[PreTrainedConfig]:
    """The distinct config objects of a model, towers of images and sound left out."""
    found: dict[int, PreTrainedConfig] = {}
    for _, module in language_modules(root):
        found.update({id(v): v for v in vars(module).values() if isinstance(v, PreTrainedConfig)})
    return list(found.values())
