"""What an install asks for; .ci/resolve.sh shows, over the network, that it has a solution from the plain index."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
CONSTRAINTS = {
    requirement.name: requirement
    for line in (ROOT / ".ci" / "constraints.txt").read_text().splitlines()
    if not line.startswith("#")
    for requirement in [Requirement(line)]
}
TABLE = ROOT / ".ci" / "triton_of_torch.py"


def test_triton_is_never_pinned_beside_torch() -> None:
    assert "torch" in CONSTRAINTS
    assert "triton" not in CONSTRAINTS
    extras = [line for lines in PROJECT["optional-dependencies"].values() for line in lines]
    asked = [Requirement(line) for line in [*PROJECT["dependencies"], *extras] if line.startswith("triton")]
    # The oldest torch that we support requires triton 3.5.0: no lower bound above it, no upper one.
    assert all(r.specifier.contains("3.5.0") and r.specifier.contains("99.0") for r in asked)


def test_constraints_lie_within_what_the_package_asks_for() -> None:
    extras = [line for lines in PROJECT["optional-dependencies"].values() for line in lines]
    asked = {r.name: r for r in map(Requirement, [*PROJECT["dependencies"], *extras])}
    for name, pin in CONSTRAINTS.items():
        (exact,) = pin.specifier
        assert asked[name].specifier.contains(exact.version), name


def test_table_names_the_triton_of_the_constrained_torch() -> None:
    (exact,) = CONSTRAINTS["torch"].specifier
    found = subprocess.run([sys.executable, TABLE, exact.version], capture_output=True, text=True, check=True).stdout
    assert found.strip() == "3.7.1"
    unknown = subprocess.run([sys.executable, TABLE, "1.0"], capture_output=True, text=True, check=True).stdout
    assert unknown.strip() == ""


def fake_torch(folder: Path, version: str, *required: str) -> None:
    info = folder / f"torch-{version}.dist-info"
    info.mkdir()
    lines = ["Metadata-Version: 2.1", "Name: torch", f"Version: {version}", *(f"Requires-Dist: {r}" for r in required)]
    (info / "METADATA").write_text("\n".join(lines) + "\n")


@pytest.mark.parametrize(
    ("version", "required", "asked"),
    [
        ("2.13.0+cpu", [], "triton==3.7.1"),
        ("2.9.0+cpu", ["filelock"], "triton==3.5.0"),
        ("2.13.0", ['triton==3.7.1; platform_system == "Linux"'], ""),
        ("2.99.0+cpu", [], ""),
    ],
)
def test_triton_is_asked_for_beside_a_torch_that_brings_none(
    tmp_path: Path, version: str, required: list[str], asked: str
) -> None:
    fake_torch(tmp_path, version, *required)
    command = [sys.executable, TABLE]
    found = subprocess.run(command, capture_output=True, text=True, check=True, env={"PYTHONPATH": str(tmp_path)})
    assert found.stdout.strip() == asked
