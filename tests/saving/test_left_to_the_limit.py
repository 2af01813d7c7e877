"""What a model reads off its limit stays as it is where the limit is raised: in memory, saved and loaded."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from hf_cases import roughened, tokens
from older_releases import OLDER

import sa_hf

SIZES = {"vocab_size": 99, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 32}
SHORT, LONG = 64, 256  # of configs, and of what is lengthened
SOME = 60  # at the limit itself dynamic angles stay those of a longer input before
HALF = [1.0] * 8, [2.0] * 8
YARN = {"rope_type": "yarn", "factor": None, "original_max_position_embeddings": 32}
LONGROPE = {
    "rope_type": "longrope", "original_max_position_embeddings": 32, "short_factor": HALF[0], "long_factor": HALF[1]
}  # fmt: skip
ALIBI = {"vocab_size": 99, "num_hidden_layers": 2, "num_attention_heads": 4, "alibi": True, "multi_query": False}
DYNAMIC = {"rope_type": "dynamic", "factor": 2.0}


def deberta(kind: str, buckets: int = -1, table: bool = True) -> Any:
    fields = {"hidden_size": 32, "relative_attention": True, "pos_att_type": ["c2p", "p2c"], **SIZES}
    config, model = getattr(tf, f"{kind}Config"), getattr(tf, f"{kind}Model")
    if buckets > 0:
        fields["position_buckets"] = buckets
    return model(config(max_position_embeddings=SHORT, position_biased_input=table, **fields))


def llama(rope: dict[str, Any] | None, limit: int = SHORT) -> Any:
    rope = {"rope_theta": 10000.0, **(rope or {"rope_type": "default"})}
    fields = {"hidden_size": 64, "num_key_value_heads": 2, "bos_token_id": 1, "eos_token_id": 2, **SIZES}
    return tf.LlamaModel(tf.LlamaConfig(max_position_embeddings=limit, rope_parameters=copy.deepcopy(rope), **fields))


MODELS: dict[str, Any] = {
    "deberta": lambda: deberta("Deberta"),
    "deberta_v2": lambda: deberta("DebertaV2"),
    "deberta_v2 by buckets": lambda: deberta("DebertaV2", 16),
    "deberta_v3": lambda: deberta("DebertaV2", 16, table=False),
    "alibi": lambda: tf.FalconModel(tf.FalconConfig(max_position_embeddings=SHORT, hidden_size=32, **ALIBI)),
    "yarn": lambda: llama(YARN),
    "longrope": lambda: llama(LONGROPE),
    "dynamic": lambda: llama(DYNAMIC),
}


def made(name: str) -> Any:
    torch.manual_seed(0)
    return roughened(MODELS[name]())


def run(model: Any, n: int) -> torch.Tensor:
    with torch.no_grad():
        out: torch.Tensor = model(input_ids=tokens(1, n))[0]
    return out


@pytest.mark.parametrize("for_good", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_a_lengthened_model_loads_as_it_was(tmp_path: Path, name: str, for_good: bool) -> None:
    if OLDER and name == "dynamic":
        pytest.skip(f"transformers {tf.__version__}: its dynamic angles, dense too, stay those of the longest input")
    model = made(name)
    before, short = model.config.to_dict(), run(model, SOME)
    if for_good:
        sa_hf.extend_positions(model, LONG)
        sa_hf.patch_model(model, "sliding_window", window=2 * LONG)
    else:
        sa_hf.patch_model(model, "sliding_window", window=2 * LONG, max_length=LONG)
    assert torch.allclose(run(model, SOME), short, atol=1e-4)
    expected = run(model, LONG)
    model.save_pretrained(tmp_path)
    loaded = tf.AutoModel.from_pretrained(tmp_path, trust_remote_code=True)
    assert torch.allclose(run(loaded, LONG), expected, atol=1e-4)
    assert torch.allclose(run(loaded, SOME), short, atol=1e-4)

    sa_hf.unpatch_model(model)
    assert torch.equal(run(model, SOME), short)
    written = {name: before[name] for name in ("architectures", "dtype")}  # by save_pretrained
    assert for_good or {**model.config.to_dict(), **written} == before
    if for_good:
        model.save_pretrained(tmp_path / "dense")
        dense = tf.AutoModel.from_pretrained(tmp_path / "dense")
        assert torch.allclose(run(dense, LONG), expected, atol=1e-4)


@pytest.mark.parametrize("own", [True, False])
def test_dynamic_angles_are_scaled_from_the_length_of_the_training(tmp_path: Path, own: bool) -> None:
    """Their rule is for inputs beyond the config's limit, so that one that is raised would leave them unscaled."""
    torch.manual_seed(0)
    model, dense = (roughened(llama(rope)) for rope in (DYNAMIC if own else None, DYNAMIC))
    dense.load_state_dict(model.state_dict())
    plain = roughened(llama(None))
    plain.load_state_dict(model.state_dict())
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*extrapolates")
        sa_hf.patch_model(
            model, "sliding_window", window=2 * LONG, max_length=LONG, rope_parameters=None if own else DYNAMIC
        )
    expected = run(dense, LONG)
    assert (expected - run(plain, LONG)).abs().max() > 1e-2
    assert torch.allclose(run(model, LONG), expected, atol=1e-4)
    assert sa_hf.summary(model).length == LONG
    model.save_pretrained(tmp_path)
    loaded = tf.AutoModel.from_pretrained(tmp_path, trust_remote_code=True)
    assert torch.allclose(run(loaded, LONG), expected, atol=1e-4)


@pytest.mark.parametrize("longer", [LONG, 2 * LONG])
def test_a_length_for_good_outlasts_that_of_the_patch(longer: int) -> None:
    model = made("deberta_v2")
    sa_hf.patch_model(model, "sliding_window", window=4 * LONG, max_length=LONG)
    sa_hf.extend_positions(model, longer)
    expected = run(model, longer)
    sa_hf.unpatch_model(model)
    assert model.config.max_position_embeddings == longer
    assert torch.allclose(run(model, longer), expected, atol=1e-4)
    sa_hf.patch_model(model, "star", max_length=4 * LONG)
    sa_hf.unpatch_model(model)
    assert torch.allclose(run(model, longer), expected, atol=1e-4)
