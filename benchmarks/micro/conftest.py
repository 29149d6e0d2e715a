"""Options of the micro-benchmarks, and the file of compact rows they leave."""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import environment
from benchmarks.micro import timing


def pytest_addoption(parser: pytest.Parser) -> None:
    gpu = torch.cuda.is_available()
    group = parser.getgroup("micro-benchmarks")
    group.addoption("--device", choices=("cpu", "cuda"), default="cuda" if gpu else "cpu")
    group.addoption("--scale", type=int, default=3 if gpu else 2, help="largest sizes: 0 small to 3 for a GPU alone")
    group.addoption("--threads", type=int, help="threads on the CPU")
    group.addoption("--rows", type=Path, help="JSON lines to add to: the environment, then a row for each benchmark")


class Rows:
    """Appends each row to a file as soon as it is there."""

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self.last: dict[str, Any] = {}

    def add(self, row: dict[str, Any]) -> None:
        self.last = row
        if self._path is not None:
            with self._path.open("a") as file:
                file.write(json.dumps(row) + "\n")

    @staticmethod
    def figures(step: timing.Step, ceiling: timing.Step, work: int, unit: str) -> dict[str, Any]:
        """What is kept of a benchmark: seconds, rate, and the part of the ceiling that was measured beside it."""
        p20, seconds, p80 = statistics.quantiles(step.seconds, n=10)[1:8:3] if len(step.seconds) > 1 else [0.0] * 3
        limit = statistics.median(ceiling.seconds)
        rate = (
            {"gigabytes_per_second": work / seconds * 1e-9}
            if unit == "bytes"
            else {"teraflops_per_second": work / seconds * 1e-12}
        )
        found = {
            "seconds": seconds,
            "p20": p20,
            "p80": p80,
            "rounds": len(step.seconds),
            unit: work,
            **rate,
            "ceiling_seconds": limit,
            "of_ceiling": limit / seconds,
        }
        if step.captured or torch.cuda.is_available():
            found |= {"captured": step.captured, "launched_seconds": step.launched_seconds()}
        return found


@pytest.fixture(scope="session")
def device(request: pytest.FixtureRequest) -> torch.device:
    return torch.device(request.config.getoption("--device"))


@pytest.fixture(scope="session")
def rows(request: pytest.FixtureRequest, device: torch.device) -> Rows:
    path = request.config.getoption("--rows")
    found = Rows(path)
    if path is not None and not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        found.add({"environment": environment.describe(device), "ceilings": timing.ceilings(device)})
    return found
