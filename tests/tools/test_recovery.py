"""scripts/recovery.py in toy sizes: what a killed run keeps, the splits, the scores, the densities, the intervals."""

from __future__ import annotations

import hashlib
import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import sa_hf
from sa_hf.tools.recovery import decoder, encoder, grid, intervals, main, report, run, texts
from sa_hf.tools.recovery.decoder import Decoder
from sa_hf.tools.recovery.grid import Cell
from sa_hf.tools.recovery.needles import Needles
from sa_hf.tools.recovery.pooled import BY_MEAN, NO, YES, pooled
from sa_hf.tools.recovery.rows import Rows, packed, unpacked
from sa_hf.tools.recovery.run import Run

NEEDLES = Needles(50)
TEXT = list(range(50)) * 20


@pytest.fixture(scope="module")
def small_corpus(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Thirty files of the standard library, so that a tokenizer is trained in a moment."""
    with pytest.MonkeyPatch.context() as patch:
        kept = texts.stdlib_sources()[:600:20]
        patch.setattr(texts, "stdlib_sources", lambda: kept)
        yield kept


@pytest.fixture(scope="module")
def toy(small_corpus: Any, tmp_path_factory: pytest.TempPathFactory) -> Decoder:
    made = Decoder(tmp_path_factory.mktemp("base"), decoder.QUICK)
    made.train_base()
    return made


# -- splits ----------------------------------------------------------------------------------------------------------


def test_no_file_is_in_two_splits() -> None:
    paths = {split: {source.path for source in texts.sources_of(split)} for split in texts.SPLITS}
    assert all(len(found) > 20 for found in paths.values())
    assert sum(map(len, paths.values())) == len(set().union(*paths.values())) == len(texts.stdlib_sources())
    with pytest.raises(sa_hf.SparseAttentionError, match=r"split='reports'.*'report'"):
        texts.sources_of("reports")


def test_training_reads_the_training_files_alone(toy: Decoder, small_corpus: Any) -> None:
    allowed = {tuple(toy.tokenizer.encode(source.text).ids) for source in texts.sources_of("train")}
    stream = [token for source in texts.sources_of("train") for token in toy.tokenizer.encode(source.text).ids]
    assert toy.tokens("train") == stream
    held_out = {tuple(toy.tokenizer.encode(source.text).ids) for source in texts.sources_of("report")}
    assert not allowed & held_out
    lengths = sum(len(ids) for ids in held_out)
    assert len(toy.tokens("report")) == lengths > 0


# -- intervals -------------------------------------------------------------------------------------------------------


def test_an_interval_of_a_mean_is_that_of_its_standard_error() -> None:
    values = np.random.default_rng(1).normal(3.0, 2.0, 400)
    found = intervals.mean_interval(values)
    half = 1.96 * values.std() / 400**0.5
    assert found.value == pytest.approx(values.mean())
    assert found.low == pytest.approx(values.mean() - half, abs=0.1 * half)
    assert found.high == pytest.approx(values.mean() + half, abs=0.1 * half)
    assert intervals.mean_interval(values) == found
    assert intervals.mean_interval([1.0] * 5) == (1.0, 1.0, 1.0)


def test_a_share_is_of_pairs() -> None:
    dense = np.random.default_rng(2).uniform(1.0, 5.0, 300)
    found = intervals.ratio_interval(0.9 * dense, dense)  # unpaired, the interval would be wide
    assert found == pytest.approx((0.9, 0.9, 0.9))
    assert np.isnan(intervals.ratio_interval([1.0], [0.0]).low)
    with pytest.raises(ValueError, match="2 items against 1"):
        intervals.ratio_interval([1.0, 2.0], [1.0])
    with pytest.raises(ValueError, match="needs items"):
        intervals.mean_interval([])


# -- rows and runs ---------------------------------------------------------------------------------------------------


def test_hits_are_packed_without_loss() -> None:
    rng = random.Random(0)
    for count in (1, 3, 4, 29, 500):
        hits = [rng.random() < 0.5 for _ in range(count)]
        assert unpacked(packed(hits)) == hits


def test_a_line_that_was_cut_off_is_dropped_and_another_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    rows, cell = Rows(path), Cell("decoder", "bigbird", "plain", 0, 30)
    rows.add(cell, {"density": 0.2})
    whole = path.read_text()
    path.write_text(whole + whole[:20])
    again = Rows(path)
    assert cell in again
    assert len(again) == 1
    assert path.read_text() == whole
    path.write_text(whole[:20] + "\n" + whole)
    with pytest.raises(sa_hf.SparseAttentionError, match="line 1"):
        Rows(path)


class Killed(Exception):
    pass


def test_a_killed_run_goes_on_behind_its_last_cell(
    toy: Decoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = grid.chains("decoder", ["bigbird", "sliding_window"], ["plain"], [0], [0, 2, 4], "report")

    def new(name: str) -> Run:
        return Run("decoder", toy, Rows(tmp_path / name / "rows.jsonl"), tmp_path / name)

    monkeypatch.setitem(grid.PATTERNS, "decoder", {
        "dense": grid.DECODER["dense"],
        "sliding_window": sa_hf.SlidingWindowAttentionConfig(window=8),
        "bigbird": sa_hf.BigBirdAttentionConfig(block_size=16, num_random_blocks=1),
    })  # fmt: skip
    whole = new("whole")
    whole.run(wanted)
    original, added = Rows.add, []

    def add_then_die(self: Rows, cell: Cell, row: dict[str, Any]) -> None:
        original(self, cell, row)
        added.append(cell)
        if len(added) == 4:  # dense, both untrained, step 2 of the first training
            raise Killed

    monkeypatch.setattr(Rows, "add", add_then_die)
    with pytest.raises(Killed):
        new("cut").run(wanted)
    monkeypatch.setattr(Rows, "add", original)
    before = (tmp_path / "cut" / "rows.jsonl").read_text()
    assert added[-1].step == 2
    new("cut").run(wanted)
    after = (tmp_path / "cut" / "rows.jsonl").read_text()
    assert after.startswith(before)
    for mine, other in zip(Rows(tmp_path / "cut" / "rows.jsonl"), whole.rows, strict=True):
        for key in ("part", "pattern", "method", "seed", "step", "density", "figures", "kept", "items"):
            assert mine[key] == other[key], (key, mine["pattern"], mine["step"])
    steps = {
        row["step"]: row["figures"]["bits per byte"][0] for row in whole.rows if row["pattern"] == "sliding_window"
    }
    assert len(set(steps.values())) == 3  # training moves it
    trained: list[str] = []
    monkeypatch.setattr(run, "train", lambda *args, **kwargs: trained.append("again"))
    new("cut").run(wanted)
    assert not trained


@pytest.mark.parametrize("method", ["distill", "lora", "lora distill"])
def test_each_method_trains_a_decoder(toy: Decoder, method: str, tmp_path: Path) -> None:
    one = Run("decoder", toy, Rows(tmp_path / "rows.jsonl"), tmp_path, split="tuning")
    one.run(grid.chains("decoder", ["expire_span"], [method], [1], [0, 2], "tuning"))
    rows = {row["step"]: row for row in one.rows if row["pattern"] == "expire_span"}
    assert rows[2]["settings"]["lora"] == ("lora" in method)
    assert rows[2]["split"] == "tuning"
    assert rows[2]["figures"]["bits per byte"] != rows[0]["figures"]["bits per byte"]
    assert rows[2]["machine"]["torch"] == torch.__version__
    assert not pooled(one.rows, "decoder")  # rows of the tuning split are reported nowhere


def test_a_search_for_masks_ends_at_its_step(
    toy: Decoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    monkeypatch.setitem(grid.PATTERNS, "decoder", {
        "dense": grid.DECODER["dense"], "sparsebert": sa_hf.SparseBertAttentionConfig(mask_length=16),
    })  # fmt: skip
    monkeypatch.setitem(grid.FROZEN_AFTER, "sparsebert", 2)
    learned: list[int] = []

    def measure(self: Run, model: Any) -> tuple[dict[str, list[float]], None]:
        learned.append(sum("logits" in name for name, _ in model.named_parameters()))
        return {"bits per byte": [1.0]}, None

    monkeypatch.setattr(Run, "_items", measure)
    one = Run("decoder", toy, Rows(tmp_path / "rows.jsonl"), tmp_path, split="tuning")
    one.run(grid.chains("decoder", ["sparsebert"], ["distill"], [0], [1, 2, 4], "tuning"))
    assert learned == [0, 1, 1, 0]  # dense; in the search; at its end; without one
    assert {row["settings"].get("frozen_after") for row in one.rows if row["step"]} == {2}


def test_the_base_is_not_taken_for_another(toy: Decoder, small_corpus: Any, tmp_path: Path) -> None:
    other = Decoder(toy.folder, decoder.Sizes())
    with pytest.raises(sa_hf.SparseAttentionError, match="other sizes"):
        other.model()
    rows = Rows(tmp_path / "rows.jsonl")
    rows.add(Cell("decoder", "star", "none", 0, 0), {"base": "0123456789ab"})
    with pytest.raises(sa_hf.SparseAttentionError, match=f"base 0123456789ab, not of {toy.digest()}.*--cards"):
        Run("decoder", toy, rows, tmp_path)


def test_the_base_ends_dense_and_is_measured_as_it_was_saved(toy: Decoder) -> None:
    model = toy.model()
    assert not any("sparse" in name for name, _ in model.named_modules())
    assert all(torch.equal(p, p.bfloat16().float()) for p in model.parameters())


# -- the card --------------------------------------------------------------------------------------------------------


def row_of(pattern: str, method: str, step: int, seed: int, hits: list[bool], density: float = 0.2) -> dict[str, Any]:
    found = intervals.mean_interval([float(hit) for hit in hits])
    return {
        "part": "encoder", "pattern": pattern, "method": method, "seed": seed, "step": step, "split": "report",
        "density": density, "figures": {"recall@10": list(found), "agreement": [0.9, 0.8, 0.95]},
        "n": {"recall@10": len(hits), "agreement": len(hits)}, "items": {"recall@10": packed(hits)},
        "machine": {"device": "this", "torch": "1", "transformers": "2", "date": "today"},
    }  # fmt: skip


def test_seeds_are_pooled_and_98_percent_is_said_outright(tmp_path: Path) -> None:
    n = 400
    rows = Rows(tmp_path / "results" / "recovery.jsonl")
    for row in (
        row_of("dense", "none", 0, 0, [True] * 300 + [False] * 100),
        row_of("bigbird", "none", 0, 0, [True] * 100 + [False] * 300),
        row_of("bigbird", "plain", 30, 0, [True] * 296 + [False] * 104),
        row_of("bigbird", "plain", 30, 1, [True] * 292 + [False] * 108),
        row_of("star", "plain", 30, 0, [True] * 310 + [False] * 90),
    ):
        rows.add(Cell(*(row[key] for key in ("part", "pattern", "method", "seed", "step"))), row)
    found = {(e.pattern, e.step): e for e in pooled(rows, "encoder")}
    assert found["bigbird", 30].figures["recall@10"].value == pytest.approx((296 + 292) / 2 / n)
    assert found["bigbird", 30].kept["recall@10"].value == pytest.approx(294 / 300)
    assert found["bigbird", 30].seeds == (0, 1)
    assert [found[key].reached for key in (("bigbird", 0), ("bigbird", 30), ("star", 30))] == [NO, BY_MEAN, YES]
    assert not found["bigbird", 30].kept_trained
    report.write(rows, tmp_path)
    card = (tmp_path / "recovery.md").read_text()
    assert "| bigbird | 20.0% | no; at step 0: 33.3% recall@10 | step 30 (by the mean alone) |" in card
    assert "| star | 20.0% | not measured | step 30 (yes) |" in card
    assert "| expire_span | | not served: causal only | |" in card
    assert "5 of the" in card
    drawn = sorted(path.name for path in (tmp_path / "results").glob("*.png"))
    assert drawn == ["recovery_encoder.png", "recovery_encoder_untrained.png"]
    assert all(f"(results/{name})" in card for name in drawn)


def test_the_headline_counts_the_systems_that_are_back_at_a_quarter_of_the_pairs(tmp_path: Path) -> None:
    rows = Rows(tmp_path / "rows.jsonl")
    assert report.headline(rows) == "Not measured yet."

    def add(pattern: str, step: int, hits: int, density: float = 0.25, method: str = "distill") -> None:
        found = packed([n < hits for n in range(100)])
        items = {"bits per byte": [2.0] * 4, "passkey": found, "multi-needle": found}
        figures = {name: [1.0] * 3 for name in items}
        cell = Cell("decoder", pattern, method if step else "none", 0, step, "report")
        rows.add(cell, {"density": density, "figures": figures, "items": items})

    add("dense", 0, 90, 1.0)
    for pattern, last, density in (
        ("bigbird", 90, 0.2), ("star", 80, 0.1), ("longnet", 90, 0.3), ("sliding_window", 90, 0.2)
    ):  # fmt: skip
        for step, hits in ((0, 45), (30, last)):
            add(f"{pattern}, one layer dense", step, hits, density)
    add("star, one layer dense", 30, 90, method="plain")
    add("sparse_transformer, fixed, one layer dense", 100, 90)
    add("sparse_transformer, strided, one layer dense", 30, 90)
    add("routing", 0, 90)
    table = report.headline(rows)
    assert "| bigbird, one layer dense | 20.0% | 100.0% / 50.0% / 50.0% | 100.0% / 100.0% / 100.0% |  |" in table
    assert "| star, one layer dense | 10.0% | 100.0% / 50.0% / 50.0% | 100.0% / 88.9% / 88.9% |  |" in table
    assert "routing" not in table
    assert table.endswith("is kept by 2 of the eight systems (sparse_transformer at 30, bigbird at 30 steps).")


def test_the_committed_card_is_that_of_the_committed_rows() -> None:
    rows = Rows(main.CARDS / "results" / "recovery.jsonl")
    assert report.markdown(rows) == (main.CARDS / "recovery.md").read_text("utf-8"), "run scripts/recovery.py --report"
    weights = (main.COMMITTED / "base" / "model.safetensors").read_bytes()
    base = {"decoder": hashlib.sha256(weights).hexdigest()[:12], "encoder": None}
    for row in rows:
        assert row.get("base") == base[row["part"]]
        assert row["density"] <= grid.MAX_DENSITY or row["pattern"] == grid.DENSE or row["step"] > 0
        assert all(count >= 64 for count in row["n"].values())
        assert json.dumps(row["settings"])


# -- the encoder -----------------------------------------------------------------------------------------------------


def test_a_query_finds_its_own_document_by_the_nearest() -> None:
    similarity = torch.tensor([[0.9, 0.1, 0.3], [0.8, 0.7, 0.75], [0.2, 0.2, 0.2]])
    assert encoder.rank_of_own(similarity).tolist() == [0, 2, 2]  # a tie is not won


@pytest.fixture(scope="module")
def minilm(small_corpus: Any) -> encoder.Encoder:
    return encoder.Encoder(encoder.QUICK)


def test_documents_lack_the_passage_that_is_asked_for(minilm: encoder.Encoder, small_corpus: Any) -> None:
    data = minilm.documents("report")
    assert data.documents.shape == (12, 128)
    assert data.queries.shape == (12, 18)
    streams = [minilm.tokenizer(s.text, add_special_tokens=False)["input_ids"] for s in texts.sources_of("report")]
    for document, query, depth in zip(data.documents.tolist(), data.queries.tolist(), data.depths, strict=True):
        cut = round(depth * 126)
        whole = document[1 : 1 + cut] + query[1:-1] + document[1 + cut : -1]
        text = " ".join(map(str, whole))
        assert any(text in " ".join(map(str, stream)) for stream in streams)
    again = encoder.Encoder(encoder.QUICK).documents("report")
    assert torch.equal(again.documents, data.documents)


@pytest.mark.parametrize("method", ["plain", "distill", "lora", "lora distill"])
def test_each_method_trains_an_encoder(minilm: encoder.Encoder, method: str, tmp_path: Path) -> None:
    one = Run("encoder", minilm, Rows(tmp_path / "rows.jsonl"), tmp_path)
    one.run(grid.chains("encoder", ["star"], [method], [0], [0, 2], "report"))
    rows = {row["step"]: row for row in one.rows if row["pattern"] == "star"}
    assert rows[2]["figures"]["agreement"] != rows[0]["figures"]["agreement"]
    dense = next(row for row in one.rows if row["pattern"] == "dense")
    assert dense["figures"]["agreement"][0] == pytest.approx(1.0, abs=1e-4)
    assert dense["kept"]["recall@10"] == [1.0, 1.0, 1.0]
