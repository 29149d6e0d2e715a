"""Options of the micro-benchmarks, and the file of compact rows they leave."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.measure import environment
from benchmarks.micro import timing
from benchmarks.micro.rows import KEY, key_of, read
from emr_kernels import keep_memory

#: Sizes that are measured on a device: those that differ most.
SIZES = {"cpu": "0,1,2", "cuda": "0,1,3"}


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("micro-benchmarks")
    group.addoption("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    group.addoption("--sizes", help="0 small, 1 medium, 2 large, 3 larger than the cache of a GPU; several with commas")
    group.addoption("--threads", type=int, help="threads on the CPU")
    group.addoption("--rows", type=Path, help="JSON lines: the environment, then a row for each benchmark; goes on")


def pytest_configure(config: pytest.Config) -> None:
    if config.option.sizes is None:
        config.option.sizes = SIZES[config.option.device]
    keep_memory()


class Rows:
    """Appends each row to a file as soon as it is there, and knows those of an earlier call."""

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._before = {key_of(row) for row in read(path)[1]} if path is not None and path.exists() else set()

    def has(self, row: dict[str, Any]) -> bool:
        """Whether the benchmark, told by the row's first fields, was measured before."""
        return tuple(row[field] for field in KEY) in self._before

    def add(self, row: dict[str, Any]) -> None:
        if self._path is not None:
            with self._path.open("a") as file:
                file.write(json.dumps(row) + "\n")


@pytest.fixture(scope="session")
def device(request: pytest.FixtureRequest) -> torch.device:
    return torch.device(request.config.getoption("--device"))


@pytest.fixture(scope="session")
def rows(request: pytest.FixtureRequest, device: torch.device) -> Rows:
    path = request.config.getoption("--rows")
    found = Rows(path)
    if path is not None and not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        found.add({"environment": environment(device), "ceilings": timing.ceilings(device)})
    return found
