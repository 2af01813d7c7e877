"""What this machine can run: versions, devices, engines, and a parity check of each engine that serves it."""

from __future__ import annotations

import importlib.metadata
import platform
import shlex
from dataclasses import dataclass

import torch

from sa_hf.errors import SparseAttentionError
from sa_hf.ops.choice import CPP, TILES, TRITON
from sa_hf.ops.cpp.build import cache_folder, compiler
from sa_hf.ops.cpp.kernels import units
from sa_hf.ops.engine import Engine
from sa_hf.ops.parts import ScoreOptions
from sa_hf.patterns.sliding_window import SlidingWindowAttentionConfig

MULTIPLIES = {
    "amx": "by the matrix unit (AMX)",
    "avx512_bf16": "by dot products of pairs (AVX512-BF16)",
    "none": "widened to fp32 in the tile",
}
PACKAGES = ("torch", "transformers", "accelerate", "datasets", "safetensors", "triton", "peft", "matplotlib")


@dataclass(frozen=True)
class Finding:
    """One line of the report; ``ok`` is None for a plain fact."""

    what: str
    found: str
    ok: bool | None = None
    advice: str = ""


def examine() -> list[Finding]:
    """Everything that decides whether and how fast sparse attention runs here."""
    findings = [Finding("python", platform.python_version())]
    findings += [_package(name) for name in PACKAGES]
    findings.append(_transformers_range())
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    name = (
        torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else f"none (CPU, {torch.get_num_threads()} threads)"
    )
    findings.append(Finding("GPU", name))
    findings += [_engine(engine, device) for engine in (TRITON, CPP, TILES)]
    findings.append(_cpu_kernels())
    return findings


def _package(name: str) -> Finding:
    try:
        return Finding(name, importlib.metadata.version(name))
    except importlib.metadata.PackageNotFoundError:
        optional = name in {"triton", "peft", "matplotlib"}
        return Finding(name, "not installed", None if optional else False, "" if optional else f"pip install {name}")


def _transformers_range() -> Finding:
    from sa_hf.hf.state.versions import check_transformers

    try:
        check_transformers()
    except (SparseAttentionError, ImportError) as error:
        return Finding("transformers range", "unsupported", False, str(error))
    return Finding("transformers range", "supported", True)


def _engine(engine: Engine, device: torch.device) -> Finding:
    from sa_hf.tools.bench.parity import Shape, parity

    name = engine.name
    reason = engine.unsupported(torch.zeros(1, 2, 8, 16, device=device), ScoreOptions(0.25))
    if reason is not None:
        return Finding(f"engine {name}", f"not used here: {reason}")
    config = SlidingWindowAttentionConfig(window=20)
    result = parity(config, torch.float32, device, causal=True, engine=name, shape=Shape(1, 2, 1, 70, 16))
    shown = f"parity with the fp64 oracle: out {result.errors[0]:.1e}, gradients {max(result.errors[1:]):.1e}"
    return Finding(f"engine {name}", shown, result.passed, "" if result.passed else "please report this with the table")


def _cpu_kernels() -> Finding:
    reason = CPP.unsupported(torch.zeros(1, 1, 1, 16), ScoreOptions(0.25))
    if reason is not None:
        return Finding("CPU kernels", f"not compiled: {reason}", advice="torch's own operators serve instead, slower")
    folder = cache_folder() or "a temporary folder, anew in each process (the log says why)"
    by = f"compiled by {shlex.join(compiler())}, in {folder}"
    try:
        return Finding("CPU kernels", f"{by}; bf16 {MULTIPLIES[units()]}, fp16 widened to fp32 in the tile", True)
    except SparseAttentionError as error:
        return Finding("CPU kernels", by, False, str(error))
