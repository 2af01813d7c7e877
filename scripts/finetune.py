#!/usr/bin/env python
"""Fine-tune a model with sparse attention from a clone; the code is sa_hf/tools/finetune.py, as of `sa-hf finetune`."""

from sa_hf.tasks.flags import run_script
from sa_hf.tools.finetune import main

if __name__ == "__main__":
    run_script(main)
