"""Hugging Face's own BigBird, converted: the same outputs wherever both attend the same set of keys."""

from __future__ import annotations

import math
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import (
    AutoModelForMaskedLM,
    BertConfig,
    BertModel,
    BigBirdConfig,
    BigBirdForCausalLM,
    BigBirdForMaskedLM,
    BigBirdForMultipleChoice,
    BigBirdForPreTraining,
    BigBirdForQuestionAnswering,
    BigBirdForSequenceClassification,
    BigBirdForTokenClassification,
    BigBirdModel,
    PreTrainedModel,
)
from transformers.models.big_bird.modeling_big_bird import BigBirdBlockSparseAttention, BigBirdSelfAttention

import sa_hf
from sa_hf import BigBirdAttentionConfig, SparseAttentionError, UnsupportedModelError
from sa_hf.tools.convert import convert_bigbird

BLOCK, RANDOM, HEADS = 16, 1, 4
LENGTHS = (128, 150)  # in whole blocks, and not


def tiny(model_class: type = BigBirdForMaskedLM, **fields: object) -> PreTrainedModel:
    torch.manual_seed(0)
    defaults = {
        "vocab_size": 80, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": HEADS,
        "intermediate_size": 48, "max_position_embeddings": 256, "block_size": BLOCK, "num_random_blocks": RANDOM,
        "initializer_range": 0.3, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0,
    }  # fmt: skip
    return model_class(BigBirdConfig(**{**defaults, **fields})).double().eval()


def tokens(length: int, batch: int = 2) -> Tensor:
    return torch.randint(3, 80, (batch, length), generator=torch.Generator().manual_seed(length))


def random_block(layer: int, head: int, row: int, count: int) -> int:
    """The one random block of a row, drawn as the specification says, with plain integers."""
    mask = 2**64 - 1

    def mix(x: int) -> int:
        z = (x + 0x9E3779B97F4A7C15) & mask
        z = ((z ^ z >> 30) * 0xBF58476D1CE4E5B9) & mask
        z = ((z ^ z >> 27) * 0x94D049BB133111EB) & mask
        return z ^ z >> 31

    state = mix(mix(mix(mix(0) ^ layer) ^ head) ^ row)
    taken = {0, row - 1, row, row + 1, count - 1}
    return next(b for b in (mix(state ^ t) % count for t in range(10_000)) if b not in taken)


@pytest.fixture
def shared_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hugging Face's model with our random blocks in place of its own draw, so that both attend the same set."""

    def table(self: BigBirdBlockSparseAttention, from_seq_length: int, **kwargs: object) -> list[np.ndarray]:
        count = from_seq_length // BLOCK
        rows = range(1, count - 1)
        return [np.array([[random_block(self.seed, h, row, count)] for row in rows]) for h in range(HEADS)]

    monkeypatch.setattr(BigBirdBlockSparseAttention, "_bigbird_block_rand_mask_with_head", table)


@pytest.mark.usefixtures("shared_blocks")
@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("fields", [{}, {"rescale_embeddings": True, "use_bias": False}], ids=["plain", "rescaled"])
def test_outputs_and_gradients_agree_block_sparse(length: int, fields: dict[str, object]) -> None:
    source, ids = tiny(**fields), tokens(length)
    model = convert_bigbird(source)
    grads = []
    for m in (source, model):
        out = m(ids, labels=ids)
        out.loss.backward()
        grads.append((out.logits.detach(), {n: p.grad for n, p in m.named_parameters() if p.grad is not None}))
    assert source.bert.attention_type == "block_sparse"
    (expected, theirs), (got, ours) = grads
    assert (got - expected).norm() < 1e-6 * expected.norm()
    assert theirs.keys() == ours.keys()
    for name, gradient in theirs.items():
        # A key bias shifts all scores of a row alike: its gradient is rounding noise around 0.
        assert (ours[name] - gradient).norm() < 1e-5 * gradient.norm().clamp(min=1e-3), name


@pytest.mark.usefixtures("shared_blocks")
@pytest.mark.parametrize(
    "model_class",
    [
        BigBirdModel, BigBirdForPreTraining, BigBirdForSequenceClassification, BigBirdForTokenClassification,
        BigBirdForQuestionAnswering, BigBirdForMultipleChoice,
    ],
)  # fmt: skip
def test_every_head_agrees(model_class: type) -> None:
    source = tiny(model_class)
    ids = tokens(LENGTHS[0])
    if model_class is BigBirdForMultipleChoice:
        ids = ids[None]
    model = convert_bigbird(source)
    expected, got = source(ids).to_tuple(), model(ids).to_tuple()
    assert type(model).__name__ == model_class.__name__
    for a, b in zip(got, expected, strict=True):
        assert (a - b).norm() < 1e-6 * b.norm()


def test_evaluation_of_the_original_reads_block_0_once_more_for_each_random_block() -> None:
    """The trap: what Hugging Face's model computes in evaluation is not its own pattern, nor ours."""
    source = tiny(BigBirdModel, num_hidden_layers=1, num_random_blocks=2)
    attention: BigBirdBlockSparseAttention = source.encoder.layer[0].attention.self
    n = 12 * BLOCK
    x = torch.randn(1, n, 32, dtype=torch.float64)
    masks = source.create_masks_for_block_sparse_attn(torch.ones(1, n, dtype=torch.float64), BLOCK)
    blocked, band, from_mask, to_mask = masks
    got = attention(x, band, from_mask, to_mask, blocked, blocked)[0]
    counts = torch.zeros(12, 12)
    for row in range(12):
        if row in (0, 11):
            counts[row] = 1
        else:
            counts[row, [row - 1, row, row + 1]] = 1
            counts[row, [0, 11]] = 1
            counts[row, 0] += 2
    weight = counts.repeat_interleave(BLOCK, 0).repeat_interleave(BLOCK, 1).double()
    q, k, v = (p(x)[0].view(n, HEADS, 8).transpose(0, 1) for p in (attention.query, attention.key, attention.value))
    p = weight * (q @ k.transpose(1, 2) / math.sqrt(8)).exp()
    expected = (p / p.sum(-1, keepdim=True) @ v).transpose(0, 1).reshape(n, 32)
    torch.testing.assert_close(got[0], expected, rtol=1e-4, atol=1e-5)
    ours = convert_bigbird(source)
    once = convert_bigbird(source, num_random_blocks=0)
    ids = tokens(n, 1)
    assert (ours(ids)[0] - source(ids)[0]).norm() > 1e-3
    assert (once(ids)[0] - source(ids)[0]).norm() > 1e-3


@pytest.mark.parametrize("length", [1, 7, 128])
def test_original_full_stays_dense_and_agrees(length: int) -> None:
    source, ids = tiny(attention_type="original_full"), tokens(length)
    mask = torch.ones_like(ids)
    mask[0, length // 2 + 1 :] = 0
    model = convert_bigbird(source)
    assert model.config.sa_hf["layers"] == {"encoder": {}}  # unlisted layers are dense
    torch.testing.assert_close(model(ids, attention_mask=mask).logits, source(ids, attention_mask=mask).logits)


def test_options_replace_fields_and_a_covering_window_is_dense() -> None:
    source, ids = tiny(attention_type="original_full"), tokens(100)
    model = convert_bigbird(source, num_window_blocks=15, num_random_blocks=0)
    entry = model.config.sa_hf["layers"]["encoder"]["1"]
    assert (entry["name"], entry["block_size"], entry["num_window_blocks"]) == ("bigbird", BLOCK, 15)
    torch.testing.assert_close(model(ids).logits, source(ids).logits)


@pytest.mark.usefixtures("shared_blocks")
def test_a_short_batch_changes_nothing_for_good() -> None:
    source, ids = tiny(), tokens(LENGTHS[0])
    expected = source(ids).logits
    source(tokens(8))
    assert source.bert.attention_type == "original_full"  # what Hugging Face's model does
    model = convert_bigbird(source)
    model(tokens(8))
    assert (model(ids).logits - expected).norm() < 1e-6 * expected.norm()


def test_padding_on_either_side_gives_each_row_alone() -> None:
    model, ids = convert_bigbird(tiny(BigBirdModel)), tokens(150)
    mask = torch.ones_like(ids)
    mask[0, 101:] = 0
    got = model(ids, attention_mask=mask).last_hidden_state
    torch.testing.assert_close(got[:1, :101], model(ids[:1, :101]).last_hidden_state)


@pytest.mark.parametrize("attention_type", ["original_full", "block_sparse"])
@pytest.mark.filterwarnings("ignore:this BigBird is a decoder")
def test_a_decoder_is_causal_and_generates(attention_type: str) -> None:
    source = tiny(BigBirdForCausalLM, is_decoder=True, attention_type=attention_type)
    model, ids = convert_bigbird(source), tokens(100)
    logits = model(ids).logits
    if attention_type == "original_full":
        torch.testing.assert_close(logits, source(ids).logits)
    changed = ids.clone()
    changed[:, 60] = 1
    after = model(changed).logits
    assert torch.equal(logits[:, :60], after[:, :60])
    assert not torch.equal(logits[:, 60:], after[:, 60:])
    made = model.generate(
        ids[:, :90], max_new_tokens=6, do_sample=False, output_logits=True, return_dict_in_generate=True
    )
    whole = model(made.sequences).logits[:, 89:-1]
    torch.testing.assert_close(torch.stack(made.logits, 1), whole.to(made.logits[0].dtype))


def test_a_block_sparse_decoder_warns() -> None:
    with pytest.warns(UserWarning, match="without causality"):
        convert_bigbird(tiny(BigBirdForCausalLM, is_decoder=True))


def test_the_source_stays_as_it_is_and_unpatching_gives_it_back() -> None:
    source, ids = tiny(), tokens(LENGTHS[0])
    before = source(ids).logits
    model = convert_bigbird(source)
    assert torch.equal(source(ids).logits, before)
    assert source.config.attention_type == "block_sparse"
    assert model.state_dict().keys() == source.state_dict().keys()
    sa_hf.unpatch_model(model)
    source.bert.set_attention_type("original_full")
    assert type(model.bert.encoder.layer[0].attention.self) is BigBirdSelfAttention
    assert torch.equal(model(ids).logits, source(ids).logits)


def test_checkpoints_load_with_and_without_the_package(tmp_path: Path) -> None:
    ids = tokens(LENGTHS[1])
    tiny().save_pretrained(tmp_path / "theirs")
    model = convert_bigbird(tmp_path / "theirs", tmp_path / "ours")
    assert type(model).__name__ == "BigBirdForMaskedLM"
    expected = model(ids).logits
    loaded = AutoModelForMaskedLM.from_pretrained(tmp_path / "ours", trust_remote_code=True)
    assert torch.equal(loaded(ids).logits, expected)
    with pytest.raises(ValueError, match="trust_remote_code"):
        BigBirdForMaskedLM.from_pretrained(tmp_path / "ours")
    torch.save({"ids": ids, "logits": expected}, tmp_path / "expected.pt")
    script = textwrap.dedent(f"""
        import sys
        sys.modules["sa_hf"] = None
        import torch
        from transformers import AutoModelForMaskedLM
        expected = torch.load({str(tmp_path / "expected.pt")!r}, weights_only=True)
        model = AutoModelForMaskedLM.from_pretrained({str(tmp_path / "ours")!r}, trust_remote_code=True)
        assert torch.equal(model(expected["ids"]).logits, expected["logits"])
    """)
    env = {"HF_HOME": str(tmp_path / "hf"), "PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", script], env=env, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr


def test_what_is_not_bigbird_is_refused(tmp_path: Path) -> None:
    bert = BertModel(BertConfig(vocab_size=9, hidden_size=8, num_hidden_layers=1, num_attention_heads=1))
    with pytest.raises(SparseAttentionError, match="'big_bird'"):
        convert_bigbird(bert)
    with pytest.raises(SparseAttentionError, match="patched"):
        convert_bigbird(convert_bigbird(tiny()))
    with pytest.raises(SparseAttentionError, match="block_size=12"):
        convert_bigbird(tiny(block_size=12))
    with pytest.raises(UnsupportedModelError, match="convert_bigbird"):
        sa_hf.patch_model(tiny(), BigBirdAttentionConfig())
