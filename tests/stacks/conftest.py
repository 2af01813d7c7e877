"""Writes what the marked tests found, where SA_HF_USED_INSIDE names a file for it."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

FOUND: list[dict[str, str]] = []


def pytest_configure(config: Any) -> None:
    config.addinivalue_line("markers", "used_inside(library, what): a row of the table 'used inside'")


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: Any, call: Any) -> Iterator[None]:
    outcome = yield
    report = outcome.get_result()
    mark = item.get_closest_marker("used_inside")
    if mark is not None and (report.when == "call" or report.outcome != "passed"):
        FOUND.append({**mark.kwargs, "test": item.nodeid, "result": report.outcome})


def pytest_sessionfinish(session: Any) -> None:
    target = os.environ.get("SA_HF_USED_INSIDE")
    if target:
        Path(target).write_text(json.dumps(FOUND, indent=1), "utf-8")
