"""Rows of other sparse attentions: compiled FlexAttention, Hugging Face's BigBird."""

from __future__ import annotations

from typing import Any

from sa_hf.tools.bench.baselines import Run, flex_run, hugging_face_bigbird
from sa_hf.tools.bench.cases import FLEX_CASES, Case, timing_cases
from sa_hf.tools.bench.compare import faster_than
from sa_hf.tools.bench.suite import Suite, first_call, inputs, timed
from sa_hf.tools.bench.timing import attention_calls


def flex_section(suite: Suite, lengths: list[int]) -> None:
    """Compiled FlexAttention, on few cases: a row is mostly compilation."""
    head_dim = 16 if suite.dry else 64
    cases = {c.key: c for c in timing_cases(toy=suite.dry)}
    for length in lengths:
        for case, block in FLEX_CASES:
            for backward in (True, False):
                if backward and suite.device.type == "cpu":
                    continue  # compiled FlexAttention has no backward on CPU
                tail = f"/D{head_dim}/n{length}/{'fwd+bwd' if backward else 'fwd'}"

                def measured(
                    c: Case = cases[case], n: int = length, b: bool = backward, bs: int = block, t: str = tail
                ) -> dict[str, Any]:
                    sets = inputs(suite, n, head_dim, 2)
                    runs: list[Run] = []

                    def cold_run() -> None:
                        runs.append(flex_run(c.config, n, sets[0][0].shape[1], c.causal, suite.device, bs))
                        attention_calls(runs[0], sets[:1], b)[0]()

                    cold = first_call(suite, cold_run)
                    row = timed(suite, runs[0], sets, b) | {"cold ms": cold}
                    return row | faster_than(suite, row, c.key, t)

                suite.row("flex", f"{case}{tail}/block{block}", measured)


def bigbird_section(suite: Suite, lengths: list[int]) -> None:
    """Hugging Face's own BigBird, forward and backward; it plans on the host, so there is nothing to capture."""
    head_dim = 64
    for length in lengths:

        def measured(n: int = length) -> dict[str, Any]:
            sets = inputs(suite, n, head_dim, 2)
            q = sets[0][0]
            run = hugging_face_bigbird(q.shape[1], head_dim, 64, suite.device, q.dtype)
            row = timed(suite, run, sets, True, graph=False)
            return row | faster_than(suite, row, "bigbird/full", f"/D{head_dim}/n{n}/fwd+bwd")

        suite.row("hf-bigbird", f"n{length}/fwd+bwd", measured)
