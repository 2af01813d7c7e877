"""Pictures and figures of a model's own attention: what is drawn is what the layers read."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from older_releases import REFUSED_THERE, older_releases_may
from transformers import BertConfig, BertForMaskedLM, GPT2Config, GPT2LMHeadModel, T5Config, T5ForConditionalGeneration
from typer.testing import CliRunner

import sa_hf
from sa_hf import patch_model
from sa_hf.errors import SparseAttentionError
from sa_hf.hf.state.layers import sparse_children
from sa_hf.patterns.block_topk import read_pairs
from sa_hf.tools.commands import app
from sa_hf.tools.plot import attended, plot_model

runner = CliRunner()


def gpt2(pattern: object, **options: object) -> GPT2LMHeadModel:
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=2, n_positions=64))
    return patch_model(model, pattern, **options).eval()


def bert(pattern: object, **options: object) -> BertForMaskedLM:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
        max_position_embeddings=64,
    )  # fmt: skip
    return patch_model(BertForMaskedLM(config), pattern, **options).eval()


def first_layer(model: torch.nn.Module) -> Any:
    names = [name.removesuffix(".sparse") for name, _ in model.named_modules() if name.endswith(".sparse")]
    return sparse_children(model, names)[0]


def weights_of(model: torch.nn.Module, ids: torch.Tensor) -> torch.Tensor:
    child, seen = first_layer(model), []
    handle = child.register_forward_pre_hook(lambda module, given: seen.append(given[0]))
    model(input_ids=ids)
    handle.remove()
    return attended(child, seen[0])


def test_the_gates_of_spans_are_seen_as_the_formula_gives_them() -> None:
    model = gpt2("expire_span", max_span=12, ramp=4, per_head=True)
    ids = torch.arange(40)[None]
    child = first_layer(model)
    with torch.no_grad():
        child.weight.normal_(std=0.3)
    weights = weights_of(model, ids)
    spans = child._seen.spans[0]  # [S, n]
    i, j = torch.arange(40)[:, None], torch.arange(40)[None, :]
    gate = (1 + (spans[:, None, :] - (i - j)) / 4).clamp(0, 1) * (j <= i)
    gate[:, range(40), range(40)] = 1
    assert torch.allclose(weights, gate, atol=1e-5)
    assert float((gate[0] != gate[1]).float().mean()) > 0


def test_clusters_are_seen_as_routing_reads_them() -> None:
    model = gpt2("routing", num_clusters=3, window=64)
    weights = weights_of(model, torch.arange(40)[None]) > 0
    clusters = first_layer(model)._seen[0]
    assert torch.equal(weights, weights & torch.ones(40, 40, dtype=torch.bool).tril())
    assert bool(weights.diagonal(dim1=1, dim2=2).all())
    for head in range(2):
        for i in range(40):
            read = {int(clusters[0, head, j]) for j in range(i) if weights[head, i, j]}
            assert len(read) <= 1  # one cluster
            if read:
                everyone = {j for j in range(i) if int(clusters[0, head, j]) in read}
                assert everyone == {j for j in range(i) if weights[head, i, j]}


def test_a_model_is_drawn_row_by_row(tmp_path: Path) -> None:
    image = pytest.importorskip("matplotlib.image")
    model = gpt2({"0": "expire_span", "1": "sliding_window"})
    assert plot_model(model, tmp_path / "blank.png", length=32) == ["expire_span, decoder layer 0"]
    assert plot_model(model, tmp_path / "drawn.png", length=32, input_ids=torch.arange(32)[None]) == []
    assert plot_model(gpt2("sliding_window"), tmp_path / "one.png", length=32) == []
    blank, drawn, one = (image.imread(tmp_path / f"{n}.png") for n in ("blank", "drawn", "one"))
    assert drawn.shape == blank.shape
    assert (drawn != blank).any()
    assert drawn.shape[0] > 1.2 * one.shape[0] * 200 / 300  # equal layers share a row, others do not


def test_a_learned_mask_is_drawn_without_a_text_and_what_needs_one_asks_for_it(tmp_path: Path) -> None:
    model = bert("sparsebert", structure="unstructured", mask_length=48)
    assert plot_model(model, tmp_path / "mask.png", heads=2) == []
    with pytest.raises(SparseAttentionError, match="nearest: 48"):
        plot_model(model, tmp_path / "long.png", length=64)
    with pytest.raises(SparseAttentionError, match="add --text FILE"):
        plot_model(gpt2("expire_span"), tmp_path / "spans.png")
    with pytest.raises(SparseAttentionError, match="nothing to draw"):
        plot_model(bert({"0-": "dense"}), tmp_path / "dense.png")


def test_figures_are_those_of_each_layer_and_none_before_a_forward() -> None:
    model = gpt2({"0": "expire_span", "1": "routing"})
    before = sa_hf.figures(model)
    assert before[0] == {"mean_span": None, "max_span": None, "tokens_kept": None}
    assert before[1]["cluster_sizes"] is None
    model(input_ids=torch.arange(40)[None])
    found = sa_hf.figures(model)
    assert found[0]["mean_span"] == pytest.approx(0.982 * 1024, rel=1e-3)
    assert found[0]["max_span"] == pytest.approx(found[0]["mean_span"])
    sizes = found[1]["cluster_sizes"]
    assert [sum(of_head) for of_head in sizes] == [80, 80]  # queries and keys
    assert max(map(max, sizes)) == found[1]["cluster_max"]
    entropy = sum(-(c / 80) * math.log(c / 80) for of_head in sizes for c in of_head if c) / 2
    assert found[1]["cluster_entropy"] == pytest.approx(entropy, rel=1e-4)


@pytest.mark.parametrize("pattern", ["routing", {"heads": {"0": "sliding_window", "1": "routing"}}])
def test_a_picture_of_a_text_leaves_the_figures_of_clusters(pattern: object, tmp_path: Path) -> None:
    """A bidirectional forward in eval mode finds none by itself."""
    for model in (bert(pattern), gpt2(pattern)):
        plot_model(model.eval(), tmp_path / "clusters.png", input_ids=torch.arange(2, 26)[None] % 32)
        for of_layer in sa_hf.figures(model).values():
            (sizes,) = (value for name, value in of_layer.items() if name.endswith("cluster_sizes"))
            heads = 2 if pattern == "routing" else 1
            assert [sum(of_head) for of_head in sizes] == [2 * 24] * heads  # queries and keys


def test_a_masks_density_needs_no_forward() -> None:
    model = bert("sparsebert", mask_length=8)
    child = first_layer(model)
    with torch.no_grad():
        child.logits[:, 3:] = -1  # distances 0, 1, 2 of 8 tokens: 8 + 2 * 7 + 2 * 6 of 64 pairs
    assert sa_hf.figures(model) == {layer: {"mask_density": pytest.approx(34 / 64)} for layer in (0, 1)}
    causal = gpt2("sparsebert", mask_length=8)
    assert sa_hf.figures(causal)[0] == {"mask_density": 1.0}


def test_figures_name_stacks_and_parts_and_leave_static_layers_out() -> None:
    t5 = T5ForConditionalGeneration(
        T5Config(vocab_size=32, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_decoder_layers=1, num_heads=2)
    )
    with older_releases_may(REFUSED_THERE):
        patch_model(t5, {"encoder": "sparsebert", "decoder": "expire_span"})
    assert set(sa_hf.figures(t5)) == {"encoder.0", "decoder.0"}
    mixed = sa_hf.figures(gpt2({"heads": {"0": "sliding_window", "1": "expire_span"}}))
    assert mixed[0] == {"part1_mean_span": None, "part1_max_span": None, "part1_tokens_kept": None}
    assert sa_hf.figures(bert("bigbird")) == {}
    with pytest.raises(SparseAttentionError, match="figures"):
        sa_hf.figures(BertForMaskedLM(BertConfig(hidden_size=32, num_attention_heads=2, num_hidden_layers=1)))


def test_plot_from_the_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    bert("sparsebert", mask_length=32).save_pretrained(tmp_path / "model")
    words = ["plot", str(tmp_path / "model"), "--trust-remote-code"]
    result = runner.invoke(app, words, catch_exceptions=False)
    assert result.exit_code == 0
    assert "wrote attention.png" in result.output
    assert (tmp_path / "attention.png").read_bytes().startswith(b"\x89PNG")
    assert ["0", "mask_density", "1"] in [line.split() for line in result.output.splitlines()]
    (tmp_path / "text.txt").write_text("a text")
    for more, message in (
        (["plot", "bigbird"], "sa-hf preview bigbird --plot"),
        (["plot", str(tmp_path)], "a folder without config.json"),
        ([*words, "--text", "text.txt"], "has no tokenizer"),
        ([*words, "--out", "x.foo"], "no image format"),
    ):
        with pytest.raises(SparseAttentionError, match=message):
            runner.invoke(app, more, catch_exceptions=False)
    # A folder may have the name of a pattern, as those of scripts/configs have.
    (tmp_path / "model").rename(tmp_path / "sparsebert")
    assert runner.invoke(app, ["plot", "sparsebert", "--trust-remote-code"], catch_exceptions=False).exit_code == 0


def test_chosen_blocks_are_seen_as_the_definition_reads_them() -> None:
    model = gpt2("block_topk", block_size=4, top_k=2, num_window_blocks=1)
    seen: list[Any] = []
    first_layer(model).register_forward_pre_hook(lambda module, given: seen.append(given[0]))
    weights = weights_of(model, torch.arange(40)[None]) > 0
    expected = read_pairs(first_layer(model).config, seen[0].query, seen[0].key)
    assert torch.equal(weights, expected[0])
