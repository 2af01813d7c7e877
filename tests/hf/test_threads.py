"""Several threads run one model in evaluation, as a server does: each gets what it would get alone.

Here a whole forward of another thread runs before and after every module that the first thread's forward calls.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import transformers as tf
from generation_cases import PATTERNS, patched
from hf_cases import tiny_model, tokens
from torch import Tensor

import sa_hf
from sa_hf.hf.caches import sparse
from sa_hf.hf.state.threads import Running


@contextmanager
def other_forwards(model: Any, run: Callable[[], Any]) -> Iterator[list[str]]:
    """Inside, ``run`` is called in a thread of its own around each module's call in this one; the names of these."""
    here, names = threading.get_ident(), list[str]()
    failed: list[BaseException] = []

    def elsewhere() -> None:
        try:
            run()
        except BaseException as error:
            failed.append(error)

    def hook(name: str) -> Callable[..., None]:
        def between(*_: Any) -> None:
            if threading.get_ident() == here:
                names.append(name)
                thread = threading.Thread(target=elsewhere)
                thread.start()
                thread.join()

        return between

    handles = []
    for name, module in model.named_modules():
        handles += [module.register_forward_pre_hook(hook(name)), module.register_forward_hook(hook(name))]
    try:
        yield names
    finally:
        for handle in handles:
            handle.remove()
    assert not failed


def steps(model: Any, cache: Any) -> Tensor:
    ids = tokens(2, 17)
    with torch.no_grad():
        out = [model(ids[:, :12], past_key_values=cache).logits]
        out += [model(ids[:, at : at + 1], past_key_values=cache).logits for at in range(12, 17)]
    return torch.cat(out, 1)


@pytest.mark.parametrize("kind", ["dynamic", "sparse"])
@pytest.mark.parametrize("pattern", sorted(PATTERNS))
def test_steps_beside_forwards_of_another_thread(pattern: str, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sparse, "LEAST_EVICTED", 2)
    model = patched("llama", pattern)
    new: Callable[[], Any] = {
        "dynamic": lambda: tf.DynamicCache(config=model.config), "sparse": lambda: sa_hf.sparse_cache(model)
    }[kind]  # fmt: skip
    others, mask = tokens(3, 9, seed=5), torch.ones(3, 9, dtype=torch.long)
    mask[1, :4] = 0

    def run() -> None:
        with torch.no_grad():
            model(others, attention_mask=mask, past_key_values=new())

    expected, cache = steps(model, new()), new()
    with other_forwards(model, run) as names:
        got = steps(model, cache)
    assert "model.layers.0.self_attn.q_proj" in names
    assert torch.equal(got, expected)


@pytest.mark.parametrize("inner", [False, True])
def test_packed_rows_beside_forwards_of_another_thread(inner: bool) -> None:
    model = sa_hf.patch_model(tiny_model("llama"), PATTERNS["window"])
    row, ids = tokens(1, 12), torch.tensor([[0] * 5 + [1] * 7])

    def called() -> Tensor:
        with torch.no_grad():
            out = model.model(row, sequence_ids=ids) if inner else model(row, sequence_ids=ids)
        first: Tensor = out[0]
        return first

    expected = called()
    with other_forwards(model, lambda: model(tokens(2, 6))):
        got = called()
    assert torch.equal(got, expected)
    assert model.sa_hf_patch.activity.within.get() is None


def test_dense_blocks_that_overlap_end_with_the_last() -> None:
    """As those of two threads do, neither inside the other."""
    model, ids = sa_hf.patch_model(tiny_model("llama"), PATTERNS["window"]), tokens(2, 12)
    blocks = sa_hf.dense(model), sa_hf.dense(model)
    with torch.no_grad():
        sparse = model(ids).logits
        for block in blocks:
            block.__enter__()
        dense = model(ids).logits
        blocks[0].__exit__(None, None, None)
        assert torch.equal(model(ids).logits, dense)
        blocks[1].__exit__(None, None, None)
        assert torch.equal(model(ids).logits, sparse)
    assert not torch.equal(sparse, dense)


def test_figures_are_those_of_the_last_forward_of_any_thread() -> None:
    model = patched("llama", "expire_span")
    thread = threading.Thread(target=lambda: model(tokens(1, 9)))
    thread.start()
    thread.join()
    assert all("mean_span" in figures for figures in sa_hf.figures(model).values())


def test_a_running_forwards_value_is_of_its_thread_and_of_no_copy() -> None:
    running, seen = Running(), list[Any]()
    running.set("here")
    thread = threading.Thread(target=lambda: (seen.append(running.get()), running.set("there"), running.set(None)))
    thread.start()
    thread.join()
    assert seen == [None]
    assert running.get() == "here"
    assert copy.deepcopy(running).get() is None
    running.set(None)
    assert running.get() is None
    assert not running.by_thread  # threads come and go
