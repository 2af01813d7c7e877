"""Star-Transformer against a plain-loop fp64 oracle written from the paper's equations."""

from __future__ import annotations

import math
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModel, AutoModelForSequenceClassification, AutoModelForTokenClassification

import sa_hf
from sa_hf import (
    SparseAttentionError,
    StarTransformerConfig,
    StarTransformerForSequenceClassification,
    StarTransformerForTokenClassification,
    StarTransformerModel,
)
from sa_hf.distributed import sequence_parallel_longnet
from sa_hf.models.star_transformer import StarAttention, StarCycle
from sa_hf.tools.convert import convert_bigbird

TINY = {
    "vocab_size": 60,
    "hidden_size": 12,
    "num_hidden_layers": 3,
    "num_attention_heads": 3,
    "max_position_embeddings": 64,
    "initializer_range": 0.5,
}


def tiny(model_class: type = StarTransformerModel, **fields: object) -> torch.nn.Module:
    torch.manual_seed(0)
    return model_class(StarTransformerConfig(**{**TINY, **fields})).double().eval()


def attention(module: StarAttention, query: Tensor, context: list[Tensor]) -> Tensor:
    """MHA(query [hidden], list of vectors), head by head."""
    width = query.shape[0] // module.num_heads
    heads = []
    for h in range(module.num_heads):
        at = slice(h * width, (h + 1) * width)
        q = module.query(query)[at]
        scores = [float("-inf")] * len(context)
        scores = torch.stack([(q * module.key(c)[at]).sum() / math.sqrt(width) for c in context])
        weights = scores.softmax(0)
        heads.append(sum(w * module.value(c)[at] for w, c in zip(weights, context, strict=True)))
    return module.output(torch.cat(heads))


def oracle(model: StarTransformerModel, ids: list[int]) -> tuple[Tensor, Tensor]:
    """Satellites [n, hidden] and relay [hidden] of one unpadded sequence."""
    n = len(ids)
    e = [model.word_embeddings.weight[t] + model.position_embeddings.weight[i] for i, t in enumerate(ids)]
    h, s = list(e), sum(e) / n
    for t in range(model.config.num_hidden_layers):
        cycle: StarCycle = model.cycles[0 if model.config.share_cycles else t]
        new = []
        for i in range(n):
            five = [h[(i - 1) % n], h[i], h[(i + 1) % n], e[i], s]
            new.append(cycle.satellite_norm(torch.relu(attention(cycle.satellite_attention, h[i], five))))
        h = new
        s = cycle.relay_norm(torch.relu(attention(cycle.relay_attention, s, [s, *h])))
    return torch.stack(h), s


@pytest.mark.parametrize("length", [1, 2, 3, 9])
@pytest.mark.parametrize("share", [False, True])
def test_equals_the_equations(length: int, share: bool) -> None:
    model = tiny(share_cycles=share)
    ids = torch.randint(1, 60, (1, length))
    got = model(input_ids=ids)
    satellites, relay = oracle(model, ids[0].tolist())
    torch.testing.assert_close(got.last_hidden_state[0], satellites)
    torch.testing.assert_close(got.relay_state[0], relay)
    torch.testing.assert_close(got.pooler_output[0], (relay + satellites.amax(0)) / 2)


def test_gradients_equal_those_of_the_equations() -> None:
    model = tiny(StarTransformerForSequenceClassification, num_labels=4)
    ids = torch.randint(1, 60, (1, 5))
    label = torch.tensor([2])
    model(input_ids=ids, labels=label).loss.backward()
    got = {n: p.grad.clone() for n, p in model.named_parameters()}
    model.zero_grad()
    h, s = oracle(model.star_transformer, ids[0].tolist())
    logits = model.classifier((s + h.amax(0)) / 2)
    torch.nn.functional.cross_entropy(logits[None], label).backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(got[name], parameter.grad, msg=name)
        # The key bias of an attention shifts every score alike: its gradient is 0 in exact arithmetic.
        if not name.endswith("key.bias"):
            assert parameter.grad.abs().max() > 1e-8, name


@pytest.mark.parametrize("where", ["left", "right", "inside", "both"])
def test_padding_takes_no_part(where: str) -> None:
    model = tiny()
    slots = {"left": range(4, 9), "right": range(5), "both": range(2, 7), "inside": (0, 2, 3, 6, 8)}[where]
    ids = torch.randint(1, 60, (2, 9))
    mask = torch.zeros(2, 9, dtype=torch.long)
    mask[0, list(slots)] = 1
    mask[1] = 1
    padded = model(input_ids=ids, attention_mask=mask)
    real = list(slots)
    satellites, relay = oracle(model, ids[0, real].tolist())
    torch.testing.assert_close(padded.last_hidden_state[0, real], satellites)
    torch.testing.assert_close(padded.relay_state[0], relay)
    torch.testing.assert_close(padded.pooler_output[0], (relay + satellites.amax(0)) / 2)
    assert bool((padded.last_hidden_state[0, mask[0] == 0] == 0).all())
    changed = ids.clone()
    changed[0, mask[0] == 0] = 59
    again = model(input_ids=changed, attention_mask=mask)
    assert torch.equal(padded.last_hidden_state, again.last_hidden_state)
    assert torch.equal(padded.pooler_output, again.pooler_output)


def test_a_row_of_padding_is_finite() -> None:
    mask = torch.tensor([[0, 0, 0], [1, 1, 1]])
    got = tiny()(input_ids=torch.ones(2, 3, dtype=torch.long), attention_mask=mask)
    assert bool(got.pooler_output.isfinite().all())
    assert bool((got.last_hidden_state[0] == 0).all())


def test_cost_is_linear_in_the_length() -> None:
    """The largest tensor of the forward grows with n, not with n x n."""
    largest: dict[int, int] = {}

    class Watch(torch.overrides.TorchFunctionMode):
        def __init__(self, length: int) -> None:
            super().__init__()
            self.length = length

        def __torch_function__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            result = func(*args, **(kwargs or {}))
            if isinstance(result, Tensor):
                largest[self.length] = max(largest.get(self.length, 0), result.numel())
            return result

    model = tiny(max_position_embeddings=512)
    for length in (128, 512):
        with torch.no_grad(), Watch(length):
            model(input_ids=torch.randint(1, 60, (1, length)))
    assert largest[512] == 4 * largest[128]


def test_shared_cycles_hold_one_set_of_weights() -> None:
    shared, separate = tiny(share_cycles=True), tiny(share_cycles=False)
    assert len(shared.cycles) == 1
    assert len(separate.cycles) == 3


def test_checkpointing_gives_the_same_gradients() -> None:
    ids = torch.randint(1, 60, (2, 6))
    grads = []
    for checkpointing in (False, True):
        model = tiny(StarTransformerForTokenClassification, num_labels=3, hidden_dropout_prob=0.0).train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        model(input_ids=ids, labels=ids % 3).loss.backward()
        grads.append([p.grad for p in model.parameters()])
    for plain, checkpointed in zip(*grads, strict=True):
        torch.testing.assert_close(plain, checkpointed)


def test_token_loss_ignores_minus_100() -> None:
    model = tiny(StarTransformerForTokenClassification, num_labels=3)
    ids = torch.randint(1, 60, (1, 5))
    labels = torch.tensor([[0, -100, 2, -100, 1]])
    got = model(input_ids=ids, labels=labels)
    expected = torch.nn.functional.cross_entropy(got.logits[0, [0, 2, 4]], labels[0, [0, 2, 4]])
    torch.testing.assert_close(got.loss, expected.float())  # transformers' loss is fp32


@pytest.mark.parametrize(
    ("auto", "model_class"),
    [
        (AutoModel, StarTransformerModel),
        (AutoModelForSequenceClassification, StarTransformerForSequenceClassification),
        (AutoModelForTokenClassification, StarTransformerForTokenClassification),
    ],
)
def test_auto_classes_save_and_load(auto: type, model_class: type, tmp_path: Path) -> None:
    model = tiny(model_class)
    assert type(auto.from_config(AutoConfig.for_model("star_transformer", **TINY))) is model_class
    model.save_pretrained(tmp_path / "once")
    auto.from_pretrained(tmp_path / "once").save_pretrained(tmp_path / "twice")
    loaded = auto.from_pretrained(tmp_path / "twice", dtype=torch.float64)
    assert type(loaded) is model_class
    ids = torch.randint(1, 60, (1, 4))
    assert torch.equal(model(input_ids=ids)[0], loaded(input_ids=ids)[0])


def test_loads_without_the_package(tmp_path: Path) -> None:
    """In a process where sa_hf cannot be imported the checkpoint brings its own code, for every Auto class."""
    model = tiny(StarTransformerForSequenceClassification)
    folder = tmp_path / "model"
    model.save_pretrained(folder)
    ids = torch.randint(1, 60, (1, 4))
    torch.save({"ids": ids, "logits": model(input_ids=ids).logits}, tmp_path / "expected.pt")
    script = textwrap.dedent(f"""
        import sys
        sys.modules["sa_hf"] = None
        import torch
        from transformers import AutoConfig, AutoModel, AutoModelForSequenceClassification
        expected = torch.load({str(tmp_path / "expected.pt")!r}, weights_only=True)
        model = AutoModelForSequenceClassification.from_pretrained(
            {str(folder)!r}, trust_remote_code=True, dtype=torch.float64)
        assert torch.equal(model(input_ids=expected["ids"]).logits, expected["logits"])
        base = AutoModel.from_pretrained({str(folder)!r}, trust_remote_code=True)
        assert type(base).__name__ == "StarTransformerModel"
        model.save_pretrained({str(tmp_path / "again")!r})
        try:
            AutoConfig.for_model("star_transformer")
        except ValueError:
            print("unregistered")
    """)
    env = {"HF_HOME": str(tmp_path / "hf"), "PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", script], env=env, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    assert "unregistered" in done.stdout
    assert (tmp_path / "again" / "star_transformer.py").exists()


def test_importing_the_package_registers_nothing() -> None:
    script = "import sys, sa_hf; assert 'transformers' not in sys.modules; assert 'sa_hf.models' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("fields", "nearest"),
    [
        ({"num_attention_heads": 5}, "nearest: 4"),
        ({"hidden_size": 0}, "nearest: 1"),
        ({"num_hidden_layers": -1}, "nearest: 1"),
        ({"vocab_size": 2.5}, "integer"),
        ({"hidden_dropout_prob": 1.0}, "[0, 1)"),
        ({"hidden_dropout_prob": "x"}, "[0, 1)"),
        ({"classifier_dropout": -0.5}, "[0, 1)"),
        ({"type_vocab_size": -2}, "nearest: 0"),
    ],
)
def test_bad_fields_are_refused(fields: dict[str, object], nearest: str) -> None:
    with pytest.raises(SparseAttentionError) as error:
        StarTransformerConfig(**{**TINY, **fields})
    assert nearest in str(error.value)
    assert str(next(iter(fields.values()))) in str(error.value)


def test_bad_inputs_are_refused() -> None:
    model = tiny()
    ids = torch.ones(1, 65, dtype=torch.long)
    with pytest.raises(SparseAttentionError, match="max_position_embeddings=64"):
        model(input_ids=ids)
    with pytest.raises(SparseAttentionError, match="attention_mask has shape"):
        model(input_ids=ids[:, :4], attention_mask=torch.ones(1, 5))
    with pytest.raises(SparseAttentionError, match="type_vocab_size=0"):
        model(input_ids=ids[:, :4], token_type_ids=ids[:, :4])
    with pytest.raises(SparseAttentionError, match="exactly one"):
        model()


def test_learns_masked_summation() -> None:
    """The paper's toy task (section 4.1), small: sum the marked numbers of a sequence, far apart from each other."""
    torch.manual_seed(0)
    config = StarTransformerConfig(
        vocab_size=8, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=24,
        hidden_dropout_prob=0.0, num_labels=1, problem_type="regression", pad_token_id=None,
    )  # fmt: skip
    model = StarTransformerForSequenceClassification(config)
    generator = torch.Generator().manual_seed(1)

    def batch(size: int) -> tuple[Tensor, Tensor]:
        """Digits 0..3; marked ones are written as 4..7. Four of 24 positions are marked."""
        digits = torch.randint(0, 4, (size, 24), generator=generator)
        marked = torch.rand(size, 24, generator=generator).argsort(1) < 4
        return digits + 4 * marked, (digits * marked).sum(1).float() / 4

    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    for _ in range(400):
        ids, target = batch(32)
        optimizer.zero_grad()
        model(input_ids=ids, labels=target).loss.backward()
        optimizer.step()
    ids, target = batch(512)
    with torch.no_grad():
        error = model(input_ids=ids, labels=target).loss
    assert error < 0.15 * target.var(), (float(error), float(target.var()))


def test_the_public_names_are_these() -> None:
    assert sa_hf.StarTransformerModel is StarTransformerModel
    assert sa_hf.sequence_parallel_longnet is sequence_parallel_longnet
    assert sa_hf.convert_bigbird is convert_bigbird
    assert {"ConvTransForForecasting", "sequence_parallel_longnet", "convert_bigbird"} <= set(dir(sa_hf))
    assert all(getattr(sa_hf, name) is not None for name in sa_hf.__all__)
