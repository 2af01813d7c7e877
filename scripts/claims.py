#!/usr/bin/env python
"""Reproduce a claim of a paper, small: minutes on 2 cores, three seeds, into model_cards/results/claims.

    python scripts/claims.py                 # the claims, and where they stand
    python scripts/claims.py longnet_segments
    python scripts/cards.py                  # then the system's card shows it

A run that was stopped goes on. A claim counts as reproduced where its rule holds for every seed.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from sa_hf.config import did_you_mean  # noqa: E402  (the repository is put on the path first)
from sa_hf.errors import SparseAttentionError  # noqa: E402
from sa_hf.tasks.flags import run_script, whole  # noqa: E402
from sa_hf.tools.claims import CLAIMS  # noqa: E402
from sa_hf.tools.claims.claim import SEEDS, claim_section, run_claim  # noqa: E402


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", nargs="?", help=f"one of {', '.join(CLAIMS)}")
    parser.add_argument("--seeds", type=whole(1), default=len(SEEDS), help="how many, from 0 on")
    parser.add_argument("--steps", type=whole(1), help="of training; default: the claim's own")
    parser.add_argument("--out", type=Path, default=ROOT / "model_cards" / "results" / "claims", help="folder")
    args = parser.parse_args(argv)
    if args.name is None:
        for name, claim in CLAIMS.items():
            path = args.out / f"{name}.json"
            verdict = json.loads(path.read_text()).get("verdict", "not finished") if path.exists() else "not run yet"
            print(f"{name} ({claim.system}): {claim.statement} {verdict}")
        return
    if args.name not in CLAIMS:
        raise SparseAttentionError(f"no claim {args.name!r}{did_you_mean(args.name, CLAIMS)}; claims: {sorted(CLAIMS)}")
    result = run_claim(CLAIMS[args.name], args.out / f"{args.name}.json", range(args.seeds), args.steps)
    print(claim_section(result))


if __name__ == "__main__":
    run_script(main)
