"""Reading what the throughput benchmarks have written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from benchmarks.contest import reason


def read(path: Path) -> dict[str, Any]:
    """A file of `python -m benchmarks.throughput`, or of `make gpu-check`, in the form of the former.

    Raises ValueError for a file that is neither.
    """
    try:
        record: dict[str, Any] = json.loads(path.read_text())
        if "figures" in record:
            parts = [part["sections"] for name, part in record["figures"].items() if name.startswith("throughput")]
            record = {"sections": {}}
            for part in parts:
                for name, section in part.items():
                    known = record["sections"].setdefault(name, {"title": section["title"], "cases": {}})
                    known["cases"].update(section["cases"])
        for section in record["sections"].values():
            section["title"], section["cases"].items()
    except (OSError, json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is no file of the throughput benchmarks: {reason(error)}") from error
    return record
