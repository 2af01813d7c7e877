"""Models and tokenizers for the scripts: pretrained ones by name or folder, and freshly initialised toys for tests."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from huggingface_hub.errors import StrictDataclassError

from sa_hf.config import did_you_mean, shown
from sa_hf.errors import SparseAttentionError, UnsupportedModelError
from sa_hf.hf.state.positions import position_tables
from sa_hf.hf.state.sites import root_model
from sa_hf.tasks.load import check_trust, read_config, resolve, tokenizer_of
from sa_hf.tasks.ranks import say

AUTO_CLASSES = {
    "causal-lm": "AutoModelForCausalLM",
    "masked-lm": "AutoModelForMaskedLM",
    "sequence-classification": "AutoModelForSequenceClassification",
    "forecasting": "AutoModelForTimeSeriesPrediction",
    "question-answering": "AutoModelForQuestionAnswering",
    "summarization": "AutoModelForSeq2SeqLM",
}
# Freshly initialised, for tests: they read bytes, so no vocabulary file is needed.
TOYS = ("tiny-llama", "tiny-gpt2", "tiny-bert", "tiny-t5")
# The forecaster of this package, freshly initialised: its pattern is a field of its config.
CONV_TRANS = "convtrans"


def load_for_task(
    name: str,
    task: str,
    *,
    max_length: int,
    labels: list[str] | None = None,
    vocab_size: int | None = None,
    model_options: Mapping[str, Any] | None = None,
    trust_remote_code: bool = False,
) -> tuple[Any, Any]:
    """A model with the task's head, and its tokenizer (None for the forecaster), of :func:`load_tokenizer`.

    Args:
        name: a hub name, a folder, "minilm" (the embedded pretrained BERT), "convtrans" or one of ``TOYS``.
        max_length: tokens per row; a toy is made for it.
        labels: the class names, for classification.
        vocab_size: of a toy on synthetic token ids (None: bytes).
        model_options: fields of the model's config to set before it is made or loaded.

    Raises:
        SparseAttentionError: the task, or a field of ``model_options``, is unknown, the model does not serve the task,
            or it is a sparse checkpoint and ``trust_remote_code`` is False.
    """
    auto_class = auto_class_of(task)
    options = dict(model_options or {})
    if labels is not None:
        options |= {"id2label": dict(enumerate(labels)), "label2id": {label: i for i, label in enumerate(labels)}}
    if name == CONV_TRANS:
        from sa_hf.models import ConvTransConfig

        with _options_named(options):
            return auto_class.from_config(ConvTransConfig(max_position_embeddings=max_length, **options)), None
    if name in TOYS:
        tokenizer = load_tokenizer(name, max_length)
        config = _toy_config(name, vocab_size or len(tokenizer), max_length, options)
        check_head(config, task)
        with _options_named(options):
            model = auto_class.from_config(config)
        check_causality(model, task)
        return model, tokenizer
    folder = resolve(name)
    config = read_config(name, trust_remote_code=trust_remote_code)
    check_trust(config, name, trust_remote_code, "--trust_remote_code")
    before = _classes(config)
    _set(config, options)
    check_head(config, task)
    tokenizer = load_tokenizer(name, max_length)
    if config.pad_token_id is None:
        config.pad_token_id = tokenizer.pad_token_id
    new_head = labels is not None and before is not None and list(before) != labels
    if new_head:
        say(
            f"model: its classes {list(before or {})} are not the data's, {labels}: its head is made anew where sizes "
            "differ"
        )
    with _options_named(model_options or {}):
        model = auto_class.from_pretrained(
            folder, config=config, trust_remote_code=trust_remote_code, ignore_mismatched_sizes=new_head
        )
    check_causality(model, task)
    return model, tokenizer


def load_tokenizer(name: str, max_length: int) -> Any:
    """The tokenizer of a model by its name as :func:`load_for_task` takes it, with a padding token; None for the
    forecaster. A toy's is made for ``max_length``."""
    import transformers

    if name == CONV_TRANS:
        return None
    if name in TOYS:
        return transformers.ByT5Tokenizer(mask_token="<extra_id_0>", model_max_length=max_length)
    tokenizer = tokenizer_of(name)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def check_model(name: str, task: str, trust_remote_code: bool) -> None:
    """Raise ``SparseAttentionError`` where a model may not be loaded, or has no head for the task; loads its config
    alone."""
    auto_class_of(task)
    if name != CONV_TRANS and name not in TOYS:
        try:
            config = read_config(name, trust_remote_code=trust_remote_code)
        except SparseAttentionError as error:
            # The others are of this module alone.
            hint = did_you_mean(name, (*TOYS, CONV_TRANS))
            raise SparseAttentionError(f"{error}{hint}") from error
        check_trust(config, name, trust_remote_code, "--trust_remote_code")
        check_head(config, task)


def trained_classes(name: str, task: str, trust_remote_code: bool) -> dict[str, int] | None:
    """The classes of a model that has a trained classification head, numbered; None for every other model and task."""
    if task != "sequence-classification" or name == CONV_TRANS or name in TOYS:
        return None
    return _classes(read_config(name, trust_remote_code=trust_remote_code))


def _classes(config: Any) -> dict[str, int] | None:
    if not any(name.endswith("ForSequenceClassification") for name in config.architectures or ()):
        return None
    found: dict[str, int] = config.label2id
    return dict(sorted(found.items(), key=lambda item: item[1]))


def auto_class_of(task: str) -> Any:
    """The Auto class of a task; raises ``SparseAttentionError`` for an unknown task."""
    import transformers
    from transformers.models.auto.modeling_auto import AutoModelForTimeSeriesPrediction

    import sa_hf.models  # noqa: F401  (registers the models of this package with the Auto classes)

    if task not in AUTO_CLASSES:
        raise SparseAttentionError(
            f"unknown task {task!r}{did_you_mean(task, AUTO_CLASSES)}; tasks: {sorted(AUTO_CLASSES)}"
        )
    # Transformers does not export this one at its top.
    return AutoModelForTimeSeriesPrediction if task == "forecasting" else getattr(transformers, AUTO_CLASSES[task])


def check_head(config: Any, task: str) -> None:
    """Raise ``SparseAttentionError`` where a model of this config has no head for the task."""
    wanted = auto_class_of(task)

    def has(auto: Any) -> bool:
        # A model with code of its own names its Auto classes in the config.
        return type(config) in auto._model_mapping or auto.__name__ in (getattr(config, "auto_map", None) or {})

    if not has(wanted):
        fitting = [name for name in AUTO_CLASSES if has(auto_class_of(name))]
        raise SparseAttentionError(
            f"a model of type {config.model_type!r} has no head for --task {task} ({wanted.__name__}); "
            + (f"nearest: --task {fitting[0]}; its tasks: {fitting}" if fitting else "no task here fits it")
        )


def check_causality(model: Any, task: str) -> None:
    """Raise ``SparseAttentionError`` for a causal language model whose attention sees the tokens that it predicts."""
    from sa_hf.hf.patching.families import find_sites

    if task != "causal-lm":
        return
    try:
        sites = find_sites(model).all_sites
    except UnsupportedModelError:  # patch_model says so where it matters; --pattern none trains any model
        return
    if not all(site.spec.causal for site in sites):
        raise SparseAttentionError(
            f"--task causal-lm trains the next token, but the attention of {type(model).__name__} is bidirectional and "
            "sees it; nearest: --task masked-lm, or --model_set is_decoder=true where the model knows this field"
        )


def check_length(model: Any, length: int) -> None:
    """Raise ``SparseAttentionError`` where rows of ``length`` tokens need more positions than a model's table has."""
    root = root_model(model)
    limit = min((table.positions for table in position_tables(root)), default=length)
    if length > limit:
        raise SparseAttentionError(
            f"--max_length {length} is above the {limit} positions of {type(root).__name__}; nearest: {limit}, or "
            "train with a --pattern, which lengthens it"
        )


def _set(config: Any, options: Mapping[str, Any]) -> None:
    for field, value in options.items():
        if not hasattr(config, field):
            known = sorted(config.to_dict())
            raise SparseAttentionError(
                f"{type(config).__name__} has no field {field!r}{did_you_mean(field, known)}; fields: {known}"
            )
        try:
            setattr(config, field, value)
        except (StrictDataclassError, TypeError, ValueError) as error:
            raise SparseAttentionError(f"--model_set {field}={shown(value)}: {_last_line(error)}") from error


@contextmanager
def _options_named(options: Mapping[str, Any]) -> Iterator[None]:
    """What Transformers says of fields that do not go together, with the fields that were set."""
    try:
        yield
    except SparseAttentionError:
        raise
    except (StrictDataclassError, AssertionError, RuntimeError, TypeError, ValueError, ZeroDivisionError) as error:
        if not options:
            raise
        fields = ", ".join(f"{field}={shown(value)}" for field, value in options.items())
        raise SparseAttentionError(f"no model is made with --model_set {fields}: {_last_line(error)}") from error


def _last_line(error: Exception) -> str:
    """The last line of an error: the first of those of several lines say where it was."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__


def _toy_config(name: str, vocab_size: int, max_length: int, options: Mapping[str, Any]) -> Any:
    import transformers

    hidden, layers, heads, inner = 64, 2, 4, 128
    given = {"vocab_size": vocab_size, "pad_token_id": 0}
    ends = {"bos_token_id": None, "eos_token_id": 1}
    usual = {
        "hidden_size": hidden, "num_hidden_layers": layers, "num_attention_heads": heads, "intermediate_size": inner,
        "max_position_embeddings": max_length,
    }  # fmt: skip
    if name == "tiny-llama":
        config: Any = transformers.LlamaConfig(**given, **usual, **ends, num_key_value_heads=heads // 2)
    elif name == "tiny-gpt2":
        config = transformers.GPT2Config(
            **given, **ends, n_embd=hidden, n_layer=layers, n_head=heads, n_positions=max_length
        )
    elif name == "tiny-t5":
        config = transformers.T5Config(
            **given, d_model=hidden, d_kv=hidden // heads, d_ff=inner, num_layers=layers, num_heads=heads,
            eos_token_id=1, decoder_start_token_id=0,
        )  # fmt: skip
    else:
        config = transformers.BertConfig(**given, **usual)
    _set(config, options)
    return config
