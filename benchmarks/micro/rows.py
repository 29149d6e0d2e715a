"""The rows that the micro-benchmarks leave: reading them, and which GPU backend won."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

Row = dict[str, Any]

#: What tells one benchmark from another.
KEY = ("operator", "case", "shape", "dtype", "layout", "contender")
#: A backend that is not at least this much faster has not won: CUDA C++ stays first.
TIE = 1.02
_NO_LIMIT = 64


def key_of(row: Row) -> tuple[Any, ...]:
    return tuple(row[field] for field in KEY)


def read(path: Path) -> tuple[Row, list[Row]]:
    """What a compact file says of its origin, and its rows; JSON, or JSON lines of an unfinished call."""
    text = path.read_text()
    try:
        whole = json.loads(text)
    except json.JSONDecodeError:
        whole = {}
    if "rows" not in whole:
        lines = []
        for line in text.splitlines():
            try:
                lines.append(json.loads(line))
            except json.JSONDecodeError:
                continue  # cut off while it was written
        whole = {**next((line for line in lines if "environment" in line), {}), "rows": lines}
    rows = {key_of(row): row for row in whole["rows"] if "operator" in row}
    return {field: value for field, value in whole.items() if field != "rows"}, list(rows.values())


def _mean_ratio(pairs: Sequence[tuple[Row, Row]], field: str) -> float:
    """Geometric mean of Triton's time over CUDA C++'s."""
    return math.exp(sum(math.log(triton[field] / cuda[field]) for cuda, triton in pairs) / len(pairs))


def duels(rows: Sequence[Row]) -> list[Row]:
    """Triton's time over CUDA C++'s for each operator and size: over dtypes, layouts and cases, and at the worst.

    `launched` are calls from Python, which count the launch where it takes longer than the kernel; `device` is the
    device's time alone. The winner is that of launched calls.
    """
    found: dict[tuple[str, int], list[tuple[Row, Row]]] = {}
    by_key = {key_of(row): row for row in rows if row.get("error") is None and row["contender"] in ("cuda", "triton")}
    for key, row in by_key.items():
        other = by_key.get((*key[:-1], "triton"))
        if key[-1] == "cuda" and other is not None:
            found.setdefault((row["operator"], row["numel"]), []).append((row, other))
    result = []
    for (operator, numel), pairs in sorted(found.items()):
        launched = _mean_ratio(pairs, "launched_seconds")
        device = [triton["seconds"] / cuda["seconds"] for cuda, triton in pairs]
        result.append(
            {
                "operator": operator,
                "numel": numel,
                "winner": "triton" if launched * TIE < 1 else "cuda",
                "launched": launched,
                "device": _mean_ratio(pairs, "seconds"),
                "device_least": min(device),
                "device_most": max(device),
            }
        )
    return result


def winners(rows: Sequence[Row]) -> dict[str, list[tuple[int, str]]]:
    """The winners as `emr_kernels.ops._winners.MEASURED` takes them: (bits, backend) in rising order of bits.

    Between two measured sizes with different winners the limit is in the middle, in powers of two. An operator that
    was measured writing into a buffer stands for the one that returns its result too.
    """
    found: dict[str, list[tuple[int, str]]] = {}
    sizes: dict[str, list[Row]] = {}
    for duel in duels(rows):
        sizes.setdefault(duel["operator"], []).append(duel)
    for operator, measured in sizes.items():
        limits: list[tuple[int, str]] = []
        for duel, following in zip(measured, [*measured[1:], None], strict=True):
            if following is None:
                limits.append((_NO_LIMIT, duel["winner"]))
            elif following["winner"] != duel["winner"]:
                middle = (duel["numel"].bit_length() + following["numel"].bit_length()) // 2
                limits.append((middle, duel["winner"]))
        found[operator] = limits
    for operator in list(found):
        found.setdefault(operator.removesuffix("_out"), found[operator])
    return found
