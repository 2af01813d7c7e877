"""Compiled decode steps, as `generate` makes them by itself with a static cache on a GPU."""

from __future__ import annotations

import pytest
import torch
import transformers as tf
from generation_cases import check, patched


@pytest.mark.parametrize("pattern", ["window", "expire_span", "convolution"])
def test_compiled_steps_do_not_compile_anew_for_each_token(pattern: str) -> None:
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    counters.clear()
    options = tf.CompileConfig(backend="eager")
    options._compile_all_devices = True
    model = patched("llama", pattern)
    check(model, cache_implementation="static", compile_config=options)
    assert counters["stats"]["unique_graphs"] <= 12  # of 11 compiled steps, several graphs each
