"""Curves: the same tokens at every length, retrieval by depth, several patterns in one file that a run goes on from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import ByT5Tokenizer, LlamaConfig, LlamaForCausalLM

from sa_hf import SparseAttentionError, patch_model
from sa_hf.tasks.context import sliding_loss
from sa_hf.tools import curves, evaluate
from sa_hf.tools.curves_report import curves_page


def model_of(length: int = 256) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=384, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=length, bos_token_id=None, eos_token_id=1, pad_token_id=0,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


@pytest.mark.parametrize(("n", "length"), [(32, 32), (32, 8), (31, 8), (33, 10), (20, 5), (9, 2)])
def test_every_token_of_the_second_half_is_scored_once_with_enough_before_it(n: int, length: int) -> None:
    model, chunk = model_of(), torch.randint(3, 384, (n,), generator=torch.Generator().manual_seed(n))
    step, total = length // 2, 0.0
    for t in range(n - n // 2, n):
        # The window that scores t ends where its half-window ends, or with the chunk.
        end = min(n, n - n // 2 + ((t - (n - n // 2)) // step + 1) * step)
        context = chunk[end - length : t]
        assert length // 2 <= len(context) <= length - 1
        with torch.no_grad():
            total -= float(model(input_ids=context[None]).logits[0, -1].log_softmax(-1)[chunk[t]])
    for batch in (1, 3):
        assert sliding_loss(model, chunk, length, batch) == pytest.approx(total / (n // 2), rel=1e-4)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    model = patch_model(model_of(), "sliding_window", window=16)
    model.save_pretrained(folder)
    ByT5Tokenizer().save_pretrained(folder)
    return folder


def flags(saved: Path, out: Path, *more: str) -> list[str]:
    words = ["--model", str(saved), "--task", "causal-lm", "--lengths", "256,128", "--eval_rows", "3", "--cpu"]
    words += ["--wording", "short", "--haystack", "noise", "--depths", "2", "--samples", "3", "--out", str(out)]
    return [*words, "--retrieval", "single,multi_value", "--needles", "2", *more]


def test_several_patterns_and_dense_in_one_table(saved: Path, tmp_path: Path) -> None:
    (tmp_path / "mix.yaml").write_text('narrow: {"0": dense, "1": {name: sliding_window, window: 4}}\n')
    out = tmp_path / "out"
    cells = evaluate.main(flags(saved, out, "--patterns", f"star,{tmp_path / 'mix.yaml'}"))
    labels = ["as saved", "dense", "star", "narrow"]
    assert list(dict.fromkeys(key.split("/")[0] for key in cells)) == labels
    assert len(cells) == 4 * 2 * 3
    losses = {label: cells[f"{label}/perplexity/256"]["loss"] for label in labels}
    assert len(set(losses.values())) == 4
    for label in labels:
        cell = cells[f"{label}/perplexity/128"]
        assert cell["perplexity_low"] <= cell["perplexity"] <= cell["perplexity_high"]
        found = cells[f"{label}/retrieval/multi_value/128"]
        assert sum(part["answers"] for part in found["by depth"]) == found["answers"] == 2 * 3 * 2
    page = (out / "curves.md").read_text()
    assert all(f"| {label} | {cells[f'{label}/perplexity/128']['perplexity']:.3f} (" in page for label in labels)
    assert "0.0% (0.0% to 39.0%, n = 6)" in page
    for picture in ("perplexity.png", "retrieval_single.png", "retrieval_multi_value.png"):
        assert (out / picture).read_bytes().startswith(b"\x89PNG")


def test_a_stopped_run_goes_on_and_other_settings_are_refused(
    saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, real, calls = tmp_path / "out", curves._perplexity, []

    def stops(*args: Any) -> Any:
        calls.append(args[2])
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(curves, "_perplexity", stops)
    monkeypatch.setattr(curves, "_retrieval", lambda *args: {"accuracy": 0.5, "low": 0.1, "high": 0.9, "answers": 6,
        "by depth": [{"accuracy": 0.5, "low": 0.1, "high": 0.9, "answers": 3}] * 2})  # fmt: skip
    with pytest.raises(KeyboardInterrupt):
        evaluate.main(flags(saved, out))
    kept = json.loads((out / "curves.json").read_text())["cells"]
    assert [key for key in kept if "perplexity" in key] == ["as saved/perplexity/128", "as saved/perplexity/256"]
    cells = evaluate.main(flags(saved, out, "--patterns", "star"))
    # Only what was missing: two of dense and two of the pattern that came later.
    assert calls == [128, 256, 128, 128, 256, 128, 256]
    assert {key: cells[key] for key in kept} == kept
    with pytest.raises(SparseAttentionError, match="results of samples=3, not 4"):
        evaluate.main([*flags(saved, out), "--samples", "4"])
    (tmp_path / "mix.yaml").write_text("star: {name: star, ring: false}\n")
    with pytest.raises(SparseAttentionError, match="'star' stands for 'star', not"):
        evaluate.main(flags(saved, out, "--patterns", str(tmp_path / "mix.yaml")))
    (saved / "model.safetensors").touch()
    with pytest.raises(SparseAttentionError, match="results of weights="):
        evaluate.main(flags(saved, out))


def test_needles_in_ones_own_text(saved: Path, tmp_path: Path) -> None:
    own = tmp_path / "own.txt"
    own.write_text("some line of mine\n" * 40)
    words = [*flags(saved, tmp_path / "out"), "--lengths", "128", "--haystack", str(own)]
    cells = evaluate.main(words)
    assert cells["dense/retrieval/single/128"]["answers"] == 6
    own.write_text("another line\n" * 40)
    with pytest.raises(SparseAttentionError, match="results of haystack files="):
        evaluate.main(words)
    with pytest.raises(SparseAttentionError, match="must be 'stdlib', 'noise', or a file"):
        evaluate.main([*words, "--haystack", str(tmp_path / "none.txt")])


def test_answers_are_counted_at_the_depth_of_their_needles(monkeypatch: pytest.MonkeyPatch) -> None:
    args = evaluate.build_parser().parse_args(["--lengths", "200", "--depths", "2", "--samples", "4"])
    haystack = curves.Haystack(ByT5Tokenizer())
    # A model that finds what stands in the first half.
    monkeypatch.setattr(
        curves,
        "found_answers",
        lambda model, samples, batch: [tuple(a.depth < 0.5 for a in s.answers) for s in samples],
    )
    for kind in ("single", "multi_value"):
        task = curves.RetrievalTask(kind=kind, needles=2, wording="short")
        cell = curves._retrieval(None, haystack, task, 400, args)
        assert [part["accuracy"] for part in cell["by depth"]] == [1.0, 0.0]
        assert cell["answers"] == sum(part["answers"] for part in cell["by depth"])


def test_the_page_of_cells_that_are_missing_is_drawn() -> None:
    settings = {"lengths": [8], "retrieval": [], "depths": 1, "model": "m", "dataset": "d"}
    cell = {"perplexity": 2.0, "perplexity_low": 1.5, "perplexity_high": 2.5}
    page = curves_page({"device": "x"}, settings, {"dense/perplexity/8": cell})
    assert "| dense | 2.000 (1.500 to 2.500) |" in page
    assert "m, d; device x" in page


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--task", "masked-lm"], "--lengths is for --task causal-lm"),
        (["--patterns", "bigbrid"], "did you mean 'bigbird'"),
        (["--patterns", "nowhere.yaml"], "nowhere.yaml must be a readable YAML file"),
        (["--lengths", "2,512"], "must be at least 4"),
        (["--retrieval", "singel"], "did you mean 'single'"),
    ],
)
def test_wrong_flags_are_said(words: list[str], message: str, saved: Path, tmp_path: Path) -> None:
    with pytest.raises(SparseAttentionError, match=message):
        evaluate.main([*flags(saved, tmp_path / "out"), *words])
    assert not (tmp_path / "out").exists()
