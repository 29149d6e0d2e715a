"""Two files of the throughput benchmarks side by side."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from rich.table import Table

from benchmarks.measure import time_text
from benchmarks.throughput.tables import new_table

ALLOWED = 1.1


@dataclass(frozen=True)
class Row:
    """One contender in both files.

    ratio: new seconds over old ones, both in units of what was timed beside it (the products alone, or the contender it
    is held against), so that a machine that was slower as a whole counts for nothing.
    """

    name: str
    old: float
    new: float
    ratio: float
    ours: bool

    @property
    def regressed(self) -> bool:
        """Whether ours takes over 10% longer."""
        return self.ours and self.ratio > ALLOWED


def _times(case: dict[str, Any]) -> Iterator[tuple[str, float, float, bool]]:
    """Name, seconds, the seconds of what was timed beside it, and whether it is ours."""
    for name, contender in case.get("contenders", {}).items():
        if "seconds" in contender and contender["kind"] != "bound":
            yield name, contender["seconds"]["median"], case["bound"], contender["kind"] == "ours"
    for model, ways in case.get("models", {}).items():
        unit = ways.get("pyautoattack", {"processor": 1.0})["processor"]
        for way, found in ways.items():
            yield f"{model} training, {way}", found["processor"], unit, way.startswith("emr")
    for point in case.get("points", ()):
        unit = next(s["median"] for name, s in point["seconds"].items() if name != "emr_kernels")
        for name, seconds in point["seconds"].items():
            yield f"{name}, {point['size']}", seconds["median"], unit, name == "emr_kernels"
    for method, found in case.get("methods", {}).items():
        unit = case["methods"]["AT"]["costs"]["device_seconds"]
        yield method, found["costs"]["device_seconds"], unit, method != "AT"
    for row in case.get("rows", ()):
        if "images per second" in row:
            unit = 1 / case["rows"][0]["images per second"]
            name = f"{row['processes']}, {row['batch']} {row['of']}"
            yield name, 1 / row["images per second"], unit, row["processes"] > 1


def compare(old: dict[str, Any], new: dict[str, Any], sections: Sequence[str]) -> list[Row]:
    """Rows for what both files have in these sections."""
    rows = []
    for section in sections:
        before = old["sections"].get(section, {"cases": {}})["cases"]
        for identity, case in new["sections"].get(section, {"cases": {}})["cases"].items():
            earlier = {name: rest for name, *rest in _times(before.get(identity, {}))}
            for name, seconds, unit, ours in _times(case):
                was, was_unit, _ = earlier.get(name, (0.0, 0.0, False))
                # Zero: less than the clock tells, or not measured.
                if all((seconds, unit, was, was_unit)):
                    ratio = (seconds / unit) / (was / was_unit)
                    rows.append(Row(f"{section}: {identity}: {name}", was, seconds, ratio, ours))
    return rows


def table(rows: Sequence[Row], old: str) -> Table:
    """The rows, regressions marked."""
    found = new_table(f"Against {old}", ("", "old", "new", "ratio"))
    for row in rows:
        style = "bold red" if row.regressed else "bold" if row.ours else ""
        found.add_row(row.name, time_text(row.old), time_text(row.new), f"{row.ratio:.2f}", style=style)
    return found
