"""ConvTrans: likelihoods, causality, padding, decoding, and forecasts that beat the seasonal naive one."""

from __future__ import annotations

import math
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig
from transformers.models.auto.modeling_auto import AutoModelForTimeSeriesPrediction

import sa_hf
from sa_hf import LogSparseAttentionConfig, SparseAttentionError
from sa_hf.models import ConvTransConfig, ConvTransForForecasting
from sa_hf.models.conv_trans import ConvSelfAttention
from sa_hf.tasks.metrics import quantile_loss

TINY = {
    "context_length": 6,
    "max_position_embeddings": 32,
    "num_covariates": 2,
    "num_series": 3,
    "hidden_size": 8,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 16,
    "initializer_range": 0.4,
}
KEYS = ("values", "covariates", "series_ids", "attention_mask")


def tiny(**fields: object) -> ConvTransForForecasting:
    torch.manual_seed(0)
    return ConvTransForForecasting(ConvTransConfig(**{**TINY, **fields})).double().eval()


def inputs(length: int = 11, batch: int = 2) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {
        "values": torch.rand(batch, length, generator=generator, dtype=torch.float64) * 9,
        "covariates": torch.randn(batch, length, 2, generator=generator, dtype=torch.float64),
        "series_ids": torch.arange(batch) % 3,
    }


@pytest.mark.parametrize("distribution", ["gaussian", "student_t", "negative_binomial"])
def test_the_loss_is_the_likelihood_of_the_values(distribution: str) -> None:
    """Against the densities, written out."""
    model, x = tiny(distribution=distribution), inputs()
    x["values"] = x["values"].round()
    got = model(**x, labels=x["values"])
    scale = 1 + x["values"][:, :6].mean(1)
    torch.testing.assert_close(got.scale, scale)
    total = 0.0
    for b in range(2):
        for t in range(11):
            raw, s, y = got.logits[b, t].tolist(), float(scale[b]), float(x["values"][b, t])
            soft = [math.log1p(math.exp(r)) for r in raw]
            if distribution == "gaussian":
                mean, deviation = raw[0] * s, (soft[1] + 1e-4) * s
                total += 0.5 * ((y - mean) / deviation) ** 2 + math.log(deviation * math.sqrt(2 * math.pi))
            elif distribution == "student_t":
                v, z, w = 2 + soft[2], y / s - raw[0], soft[1] + 1e-4
                norm = math.lgamma((v + 1) / 2) - math.lgamma(v / 2) - 0.5 * math.log(v * math.pi) - math.log(w * s)
                total -= norm - (v + 1) / 2 * math.log1p((z / w) ** 2 / v)
            else:
                mean, r = (soft[0] + 1e-4) * s, 1 / (soft[1] + 1e-4)
                total -= math.lgamma(y + r) - math.lgamma(r) - math.lgamma(y + 1)
                total -= r * math.log(r / (r + mean)) + y * math.log(mean / (r + mean))
    assert got.loss.item() == pytest.approx(total / 22, rel=1e-4)


def test_labels_of_nan_and_padding_do_not_count() -> None:
    model, x = tiny(), inputs()
    labels = x["values"].clone()
    labels[0, :4] = torch.nan
    mask = torch.ones(2, 11)
    mask[1, 5:] = 0
    got = model(**x, attention_mask=mask, labels=labels)
    likelihood = -model.distribution(got.logits, got.scale).log_prob(x["values"].float())
    torch.testing.assert_close(got.loss, torch.cat([likelihood[0, 4:], likelihood[1, :5]]).mean())
    got.loss.backward()
    assert all(bool(p.grad.isfinite().all()) for p in model.parameters())


def test_a_value_changes_only_what_comes_after_it() -> None:
    model, x = tiny(), inputs()
    before = model(**x).logits
    x["values"][:, 7] += 1  # behind the context, whose mean is the scale
    after = model(**x).logits
    assert torch.equal(before[:, :8], after[:, :8])
    assert bool((before[:, 8] != after[:, 8]).any())


@pytest.mark.parametrize("where", ["left", "right", "inside"])
def test_missing_steps_are_as_if_cut_out(where: str) -> None:
    model, x = tiny(), inputs()
    real = {"left": [4, 5, 6, 7, 8, 9, 10], "right": [0, 1, 2, 3, 4, 5, 6], "inside": [0, 2, 3, 4, 7, 8, 10]}[where]
    mask = torch.zeros(2, 11)
    mask[0, real] = 1
    mask[1] = 1
    x["values"][0, mask[0] == 0] = torch.nan
    got = model(**x, attention_mask=mask).logits
    alone = model(x["values"][:1, real], x["covariates"][:1, real], x["series_ids"][:1]).logits
    torch.testing.assert_close(got[:1, real], alone, rtol=1e-9, atol=1e-12)
    assert bool((got[0, mask[0] == 0] == 0).all())


def test_queries_and_keys_are_convolved_and_the_set_is_logsparse() -> None:
    """One layer of attention, row by row."""
    config = ConvTransConfig(**TINY, attention=LogSparseAttentionConfig(local_window=2, conv_kernel_size=3))
    torch.manual_seed(0)
    layer = ConvSelfAttention(config).double()
    x = torch.randn(1, 12, 8, dtype=torch.float64)
    got, _ = layer(x, torch.ones(1, 12, dtype=torch.bool), 0)

    def convolved(conv: torch.nn.Conv1d, t: int) -> Tensor:
        taps = [conv.weight[:, :, 2 - back] @ x[0, t - back] for back in range(3) if t >= back]
        return sum(taps) + conv.bias

    rows = []
    for i in range(12):
        keys = [j for j in range(i + 1) if i - j in {0, 1, 1 + 1, 1 + 2, 1 + 4, 1 + 8}]
        heads = []
        for h in (slice(0, 4), slice(4, 8)):
            scores = [convolved(layer.query, i)[h] @ convolved(layer.key, j)[h] / 2 for j in keys]
            weights = torch.stack(scores).softmax(0)
            heads.append(sum(w * layer.value(x[0, j])[h] for w, j in zip(weights, keys, strict=True)))
        rows.append(layer.output(torch.cat(heads)))
    torch.testing.assert_close(got[0], torch.stack(rows), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("kernel", [1, 3])
@pytest.mark.parametrize("padded", [False, True])
def test_sampling_step_by_step_follows_the_whole_forward(kernel: int, padded: bool) -> None:
    """Under a Gaussian of almost no width every sample is the mean: the forward on it must give it back."""
    model = tiny(distribution="gaussian", attention=LogSparseAttentionConfig(conv_kernel_size=kernel))
    model.head.weight.data[1] = 0
    model.head.bias.data[1] = -50
    x = inputs(length=13)
    past = x["values"][:, :9]
    mask = torch.ones(2, 9)
    if padded:
        mask[0, [0, 4]] = 0
    samples = model.forecast(past, x["covariates"], x["series_ids"], mask, num_samples=2)
    assert samples.shape == (2, 2, 4)
    whole = torch.cat([past, samples[:, 0]], dim=1)
    wide = torch.cat([mask, torch.ones(2, 4)], dim=1)
    out = model(whole, x["covariates"], x["series_ids"], wide)
    mean = out.logits[:, 9:, 0] * out.scale[:, None]
    assert (samples[:, 0] - mean).abs().max() < 2e-3 * out.scale.max()


def test_save_and_load(tmp_path: Path) -> None:
    model, x = tiny(attention=LogSparseAttentionConfig(restart_length=4, conv_kernel_size=2)), inputs()
    model.save_pretrained(tmp_path)
    assert AutoConfig.from_pretrained(tmp_path).attention["restart_length"] == 4
    loaded = AutoModelForTimeSeriesPrediction.from_pretrained(tmp_path, dtype=torch.float64)
    assert type(loaded) is ConvTransForForecasting
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), loaded.parameters(), strict=True))
    torch.testing.assert_close(model(**x).logits, loaded(**x).logits, rtol=1e-12, atol=1e-12)


def test_loads_without_the_package(tmp_path: Path) -> None:
    """In a process where sa_hf cannot be imported the checkpoint brings its own code, and saves it on."""
    model, x = tiny(attention=LogSparseAttentionConfig(restart_length=4, conv_kernel_size=2)), inputs()
    folder, again = tmp_path / "model", tmp_path / "again"
    model.save_pretrained(folder)
    torch.save({"inputs": x, "logits": model(**x).logits}, tmp_path / "expected.pt")
    script = textwrap.dedent(f"""
        import sys
        sys.modules["sa_hf"] = None
        import torch
        from transformers.models.auto.modeling_auto import AutoModelForTimeSeriesPrediction
        expected = torch.load({str(tmp_path / "expected.pt")!r}, weights_only=True)
        for folder in ({str(folder)!r}, {str(again)!r}):
            model = AutoModelForTimeSeriesPrediction.from_pretrained(
                folder, trust_remote_code=True, dtype=torch.float64)
            torch.testing.assert_close(model(**expected["inputs"]).logits, expected["logits"], rtol=1e-12, atol=1e-12)
            model.save_pretrained({str(again)!r})
        model(**expected["inputs"], labels=expected["inputs"]["values"]).loss.backward()
        try:
            AutoModelForTimeSeriesPrediction.from_pretrained(folder)
        except ValueError as error:
            print(error)
    """)
    env = {"HF_HOME": str(tmp_path / "hf"), "PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", script], env=env, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    assert "trust_remote_code=True" in done.stdout
    first, second = ({p.name: p.read_bytes() for p in f.iterdir()} for f in (folder, again))
    assert first.keys() == second.keys()
    assert all(first[name] == second[name] for name in first if name.endswith(".py"))
    # Where the package is, its own classes run.
    loaded = AutoModelForTimeSeriesPrediction.from_pretrained(again, trust_remote_code=True, dtype=torch.float64)
    assert type(loaded) is ConvTransForForecasting
    loaded.save_pretrained(tmp_path / "third")
    assert {p.name for p in (tmp_path / "third").iterdir()} == first.keys()
    assert sa_hf.ConvTransConfig is ConvTransConfig


def test_checkpointing_gives_the_same_gradients() -> None:
    x, grads = inputs(), []
    for checkpointing in (False, True):
        model = tiny(hidden_dropout_prob=0.0).train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        model(**x, labels=x["values"]).loss.backward()
        grads.append([p.grad for p in model.parameters()])
    for plain, checkpointed in zip(*grads, strict=True):
        torch.testing.assert_close(plain, checkpointed)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"distribution": "cauchy"}, "student_t"),
        ({"distribution": ["gaussian"]}, "student_t"),
        ({"hidden_dropout_prob": 1.5}, "nearest: 0.0"),
        ({"attention_probs_dropout_prob": None}, "nearest: 0.0"),
        ({"attention": {"name": "expire_span"}}, "static pattern"),
        ({"num_attention_heads": 3}, "nearest: 2"),
        ({"num_covariates": -1}, "nearest: 0"),
    ],
)
def test_bad_fields_are_refused(fields: dict[str, object], message: str) -> None:
    with pytest.raises(SparseAttentionError, match=message):
        ConvTransConfig(**{**TINY, **fields})


def test_bad_inputs_are_refused() -> None:
    model, x = tiny(), inputs()
    with pytest.raises(SparseAttentionError, match="num_covariates"):
        model(x["values"], None, x["series_ids"])
    with pytest.raises(SparseAttentionError, match="series_ids"):
        model(x["values"], x["covariates"])
    with pytest.raises(SparseAttentionError, match="max_position_embeddings=32"):
        model(**inputs(length=33))
    with pytest.raises(SparseAttentionError, match="cover 11 steps"):
        model.forecast(x["values"], x["covariates"], x["series_ids"], steps=2)


def planted(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Values ``[count, 40]`` of a season of 8 steps, doubled by events at random steps, which a covariate announces."""
    generator = torch.Generator().manual_seed(seed)
    level = 5 + 5 * torch.rand(count, 1, generator=generator)
    angle = 2 * math.pi * (torch.arange(40) + (8 * torch.rand(count, 1, generator=generator)).long()) / 8
    event = (torch.rand(count, 40, generator=generator) < 0.15).float()
    noise = 0.1 * torch.randn(count, 40, generator=generator)
    values = level * (1 + 0.5 * angle.sin() + event + noise)
    return values, torch.stack([angle.sin(), angle.cos(), event], dim=-1)


def test_learns_the_season_and_the_events() -> None:
    """Against repeating the last season, with the spread of its own error for the upper quantile."""
    torch.manual_seed(0)
    model = ConvTransForForecasting(
        ConvTransConfig(
            context_length=32, max_position_embeddings=40, num_covariates=3, hidden_size=32, num_hidden_layers=2,
            num_attention_heads=4, intermediate_size=64, distribution="gaussian", hidden_dropout_prob=0.0,
        )
    )  # fmt: skip
    optimizer = torch.optim.Adam(model.parameters(), lr=4e-3)
    for step in range(60):
        values, covariates = planted(32, seed=step)
        optimizer.zero_grad()
        model(values, covariates, labels=values).loss.backward()
        optimizer.step()
    values, covariates = planted(64, seed=10_000)
    past, future = values[:, :32], values[:, 32:]
    samples = model.eval().forecast(past, covariates, num_samples=50)
    naive = past[:, -8:]
    spread = (past[:, 8:] - past[:, :-8]).std(1, keepdim=True)
    for quantile, guess in ((0.5, naive), (0.9, naive + 1.2816 * spread)):
        ours = quantile_loss(samples.quantile(quantile, dim=1), future, quantile)
        theirs = quantile_loss(guess, future, quantile)
        assert ours < 0.7 * theirs, (quantile, ours, theirs)
