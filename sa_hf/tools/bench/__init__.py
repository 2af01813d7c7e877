"""Parity, timing and roofline of the engines: the parts of ``scripts/gpu_suite.py`` and ``sa-hf bench``."""
