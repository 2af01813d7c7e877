"""The table of families: what is counted, what a second run goes on with, and what the README says of it."""

from __future__ import annotations

import json
from pathlib import Path

from sa_hf.tools.families import report
from sa_hf.tools.families.compare import NOT_BUILT, REFUSED, RIGHT
from sa_hf.tools.families.most_used import MOST_USED
from sa_hf.tools.families.registry import entries

ENTRIES = {entry.name: entry for entry in entries()}


def _written(path: Path) -> report.Table:
    table = report.Table(path)
    table.add(ENTRIES["BertModel"], {"status": RIGHT, "patched": "encoder", "figures": {"reload": 1.23456e-7}})
    table.add(ENTRIES["BertForMaskedLM"], {"status": RIGHT, "patched": "encoder"})
    reason = "BertForTokenClassification cannot be patched: encoder layer 0 (bert.encoder) is odd"
    table.add(ENTRIES["BertForTokenClassification"], {"status": REFUSED, "reason": reason})
    table.add(ENTRIES["ResNetModel"], {"status": NOT_BUILT, "reason": "no a|b"})
    table.save()
    return table


def test_a_second_run_goes_on_where_the_first_was(tmp_path: Path) -> None:
    _written(tmp_path / "found.json")
    again = report.Table(tmp_path / "found.json")
    assert again.is_current(ENTRIES["BertModel"])
    assert not again.is_current(ENTRIES["GPT2Model"])
    again.code = "another"
    assert not again.is_current(ENTRIES["BertModel"])
    kept = json.loads((tmp_path / "found.json").read_text())
    kept["transformers"] = "0.0"
    (tmp_path / "found.json").write_text(json.dumps(kept))
    assert not report.Table(tmp_path / "found.json").results


def test_the_counts_tell_bodies_from_heads(tmp_path: Path) -> None:
    _written(tmp_path / "found.json")
    said = report.sentence(tmp_path / "found.json")
    assert f"{len(ENTRIES) - 4} more were not tried" in said
    assert "**2 right, 0 wrong, 0 errors without a reason**, 1 refused with the reason and 1 not built" in said
    assert "the 2 bodies among them, which the other classes are heads of, 1 are right" in said
    assert "bodies of 1 are right; not right: roberta, " in said
    page = report.markdown(tmp_path / "found.json")
    assert "| bodies | 1 | 0 | 1 | 0 | 0 |" in page
    assert "| heads | 1 | 1 | 0 | 0 | 0 |" in page
    assert "| bert | encoder | BertModel, BertForMaskedLM |" in page
    assert "| the model cannot be patched: encoder a layer is odd | 1: BertForTokenClassification |" in page
    assert "| bert | right | 2 of 3 |" in page
    assert "no a/b" in page
    assert report.sentence(tmp_path / "none.json") == "Not run yet."


def test_the_most_used_are_a_hundred_architectures_that_transformers_has() -> None:
    bodies = {entry.model_type for entry in entries() if entry.is_base}
    assert len(MOST_USED) == len(set(MOST_USED)) == 100
    assert set(MOST_USED) <= bodies
