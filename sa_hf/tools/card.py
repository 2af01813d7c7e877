"""A model card for a sparse checkpoint, through huggingface_hub's card classes."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from sa_hf.errors import SparseAttentionError
from sa_hf.tools.inspect import Inspection, inspect_checkpoint
from sa_hf.tools.load import auto_class, read_config

TEMPLATE = """# {title}

{architecture} with sparse attention by sa_hf: {patterns}.

## How to load

```python
from transformers import {auto}

model = {auto}.from_pretrained("{name}", trust_remote_code=True)
```

The checkpoint carries the code that it needs; where `sa_hf` is installed in the same version (`pip install .` in a
clone of its repository), that is used instead. Load it through an Auto class: a concrete class raises.
Without `trust_remote_code=True` loading raises: the weights were trained for this attention, not for the dense one.

## Attention, layer by layer

{table}

Sparse state in the weights: {state}.
"""


def write_card(folder: str | Path, *, base_model: str | None = None, force: bool = False) -> Path:
    """Write ``README.md`` into a checkpoint folder; returns its path.

    Raises:
        SparseAttentionError: the folder is no sparse checkpoint, or has a README.md and ``force`` is False.
    """
    from huggingface_hub import ModelCard, ModelCardData

    folder = Path(folder)
    found = inspect_checkpoint(folder)
    if not found.layers:
        raise SparseAttentionError(f"{folder} is not a sparse checkpoint: {'; '.join(found.problems) or 'no layers'}")
    path = folder / "README.md"
    if path.exists() and not force:
        raise SparseAttentionError(f"{path} is there already; pass --force to replace it")
    names = sorted({name for _, _, name, _ in found.layers})
    data = ModelCardData(library_name="transformers", base_model=base_model, tags=["sparse-attention", *names])
    content = TEMPLATE.format(
        title=folder.resolve().name,
        name=folder.resolve().name,
        architecture=found.architecture,
        auto=auto_class(read_config(str(folder))).__name__,
        patterns=_pattern_counts(found),
        table=_layer_table(found),
        state=f"{len(found.state)} tensors" if found.state else "none (static patterns)",
    )
    ModelCard(f"---\n{data.to_yaml()}\n---\n\n{content}").save(path)
    return path


def _pattern_counts(found: Inspection) -> str:
    counts = Counter(name for _, _, name, _ in found.layers)
    return ", ".join(f"`{name}` in {count} layers" for name, count in counts.items())


def _layer_table(found: Inspection) -> str:
    lines = ["| stack | layer | pattern | config |", "| --- | --- | --- | --- |"]
    for stack, index, name, fields in found.layers:
        shown = ", ".join(f"{k}={v}" for k, v in fields.items() if k not in {"name", "version"})
        lines.append(f"| {stack} | {index} | {name} | {shown} |")
    return "\n".join(lines)
