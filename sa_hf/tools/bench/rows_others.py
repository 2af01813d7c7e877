"""Rows of other sparse attentions: compiled FlexAttention, Hugging Face's BigBird."""

from __future__ import annotations

from functools import partial
from typing import Any

from sa_hf.tools.bench.baselines import Run, flex_run, fresh_compiler, hugging_face_bigbird
from sa_hf.tools.bench.cases import FLEX_CASES, Case, timing_cases
from sa_hf.tools.bench.compare import faster_than
from sa_hf.tools.bench.suite import Suite, first_call, inputs, timed
from sa_hf.tools.bench.timing import attention_calls


def flex_section(suite: Suite, lengths: list[int], block: int, passes: tuple[bool, ...] = (False, True)) -> None:
    """Compiled FlexAttention with masks of a block, on few cases: a row is mostly compilation.

    Args: passes: backward or not.
    """
    head_dim = 16 if suite.dry else 64
    cases = {c.key: c for c in timing_cases(toy=suite.dry)}
    for length in lengths:
        for case in FLEX_CASES:
            for backward in passes:
                if backward and suite.device.type == "cpu":
                    continue  # compiled FlexAttention has no backward on CPU
                tail = f"/D{head_dim}/n{length}/{'fwd+bwd' if backward else 'fwd'}"
                measured = partial(flexed, suite, cases[case], length, head_dim, backward, block, tail)
                suite.row("flex", f"{case}{tail}/block{block}", measured)


def flexed(
    suite: Suite, case: Case, length: int, head_dim: int, backward: bool, block: int, tail: str
) -> dict[str, Any]:
    sets = inputs(suite, length, head_dim)
    runs: list[Run] = []

    def cold_run() -> None:
        runs.append(flex_run(case.config, length, sets[0][0].shape[1], case.causal, suite.device, block))
        attention_calls(runs[0], sets[:1], backward)[0]()

    with fresh_compiler():
        cold = first_call(suite, cold_run)
        row = timed(suite, runs[0], sets, backward) | {"cold ms": cold}
    return row | faster_than(suite, row, case.key, tail)


def bigbird_section(suite: Suite, lengths: list[int]) -> None:
    """Hugging Face's own BigBird, forward and backward; it plans on the host, so there is nothing to capture."""
    head_dim = 64
    for length in lengths:

        def measured(n: int = length) -> dict[str, Any]:
            sets = inputs(suite, n, head_dim)
            q = sets[0][0]
            run = hugging_face_bigbird(q.shape[1], head_dim, 64, suite.device, q.dtype)
            row = timed(suite, run, sets, True, graph=False)
            return row | faster_than(suite, row, "bigbird/full", f"/D{head_dim}/n{n}/fwd+bwd")

        suite.row("hf-bigbird", f"n{length}/fwd+bwd", measured)
