"""Every architecture of the installed Transformers, tiny: patched, and held against its own eager attention.

python scripts/families.py                          # all, resumable; model_cards/families.md and its JSON
python scripts/families.py --only bert --only LlamaForCausalLM --jobs 1     # shown alone
python scripts/families.py --again refused          # after a change of the code: those that were refused
"""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))


def main() -> None:
    # Read at the imports: code of saved checkpoints goes to a folder of this run, and no process starts threads.
    with tempfile.TemporaryDirectory() as folder:
        os.environ.update(
            HF_MODULES_CACHE=folder, HF_HUB_OFFLINE="1", OMP_NUM_THREADS="1", TRANSFORMERS_VERBOSITY="error"
        )
        import typer

        from sa_hf.tools.families.main import main as command

        typer.run(command)


if __name__ == "__main__":
    main()
