"""A Markdown table of the rows that the micro-benchmarks left.

    python -m benchmarks.micro.table FILE [--dtype float32] [--operator sq_norms]

One line for each operator, size, dtype and memory format: the time of each contender, and for our best backend what it
moves or computes a second, the part of the ceiling, and how many times faster it is than eager PyTorch.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.measure import time_text
from benchmarks.micro.rows import KEY, read

OURS = ("cpu", "cuda", "triton")
OTHERS = {"eager": "eager PyTorch", "compile": "torch.compile"}


def cell(row: dict[str, Any] | None) -> str:
    if row is None:
        return ""
    return "failed" if row["error"] else time_text(row["seconds"])


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The rows as a Markdown table."""
    groups: dict[tuple[Any, ...], dict[str, dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault(tuple(row[field] for field in KEY[:-1]), {})[row["contender"]] = row
    ours = [name for name in OURS if any(name in group for group in groups.values())]
    header = ["operator", "size", "dtype", "layout", *ours, *OTHERS.values(), "rate", "of ceiling", "over eager"]
    lines = ["| " + " | ".join(header) + " |", "|---" * len(header) + "|"]
    for (operator, case, shape, dtype, layout), group in groups.items():
        timed = [group[name] for name in ours if "seconds" in group.get(name, {})]
        best = min(timed, key=lambda row: row["seconds"]) if timed else None
        rate = ceiling = over = ""
        if best is not None:
            scale, unit = (1e-9, "GB/s") if best["unit"] == "B/s" else (1e-12, "TFLOP/s")
            rate = f"{best['rate'] * scale:.3g} {unit}"
            ceiling = f"{best['fraction']:.0%}"
            if "seconds" in group.get("eager", {}):
                over = f"{group['eager']['seconds'] / best['seconds']:.1f}x"
        cells = [" ".join(filter(None, (operator.removesuffix("_out"), case))), shape, dtype, layout]
        cells += [cell(group.get(name)) for name in (*ours, *OTHERS)]
        lines.append("| " + " | ".join([*cells, rate, ceiling, over]) + " |")
    return "\n".join(lines)


def heading(about: dict[str, Any]) -> str:
    """The environment in a line."""
    found, copy = about["environment"], about["ceilings"]["copy"] * 1e-9
    parts = [found["device"], f"torch {found['torch']}", f"{found['threads']} threads", found["date"]]
    return ", ".join([*parts, f"a large copy at {copy:.3g} GB/s"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path)
    parser.add_argument("--dtype", help="this one only")
    parser.add_argument("--operator", help="this one only")
    options = parser.parse_args()
    about, rows = read(options.file)
    wanted = [
        row
        for row in rows
        if options.dtype in (None, row["dtype"]) and options.operator in (None, row["operator"].removesuffix("_out"))
    ]
    print(f"{heading(about)}\n\n{table(wanted)}")


if __name__ == "__main__":
    main()
