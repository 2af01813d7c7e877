"""What a pattern loses of a trained model's quality, and after how many steps it is back.

python scripts/recovery.py --part decoder                    # trains the base first, once
python scripts/recovery.py --part encoder --seeds 0 --steps 0 --steps 30 --patterns bigbird
python scripts/recovery.py --report                          # the card again, from the rows
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import typer

from sa_hf.tools.recovery.main import main

if __name__ == "__main__":
    typer.run(main)
