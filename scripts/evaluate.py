#!/usr/bin/env python
"""Evaluate a saved model from a clone; the code is sa_hf/tools/evaluate.py, as of `sa-hf evaluate`."""

from sa_hf.tasks.flags import run_script
from sa_hf.tools.evaluate import main

if __name__ == "__main__":
    run_script(main)
