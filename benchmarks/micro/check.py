"""The operators against what they did before; names what is over 10% slower.

    python -m benchmarks.micro.check            # or make bench-check: measures now, against the device's stored rows
    python -m benchmarks.micro.check --new FILE.json --baseline OLD.json
    python -m benchmarks.micro.check --store    # measures now, and keeps that as the device's rows

An operator counts as slower where its time is longer, and longer in units of the ceiling's, too, a copy or a matrix
product that was timed between its rounds: a machine that is slower as a whole slows both, and a copy alone has good
rounds and bad ones. What seems slower is measured twice again, and named if it
stays so. Only this library's backends are held to account. Exits with 1 for regressions, with 2 where nothing can be
compared.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu_check import RESULTS
from benchmarks.measure import ROOT, slug, write_json
from benchmarks.micro.rows import KEY, Row, key_of, read
from benchmarks.micro.table import OURS

ALLOWED = 1.1
AGAIN = 2
#: What a stored row keeps beside its key.
KEPT = ("seconds", "fraction", "numel")


def baseline_of(device: torch.device) -> Path:
    """The stored rows of this kind of device."""
    return RESULTS / f"micro-{slug(device)}.json"


def slower(old: Sequence[Row], new: Sequence[Row]) -> dict[tuple[Any, ...], float]:
    """Our rows that are over 10% slower, by themselves and beside their ceilings, and how many times as slow."""
    before = {key_of(row): row for row in old}
    found = {}
    for row in new:
        key = key_of(row)
        if row["contender"] in OURS and "fraction" in row and "fraction" in before.get(key, {}):
            then = before[key]
            ratio = min(then["fraction"] / row["fraction"], row["seconds"] / then["seconds"])
            if ratio > ALLOWED:
                found[key] = ratio
    return found


def lost(old: Sequence[Row], new: Sequence[Row]) -> list[tuple[Any, ...]]:
    """Our rows that were measured before and now fail or are gone."""
    now = {key_of(row) for row in new if "fraction" in row}
    return [key_of(row) for row in old if row["contender"] in OURS and key_of(row) not in now]


def confirmed(old: Sequence[Row], new: Sequence[Row], measure: Any, times: int = AGAIN) -> dict[tuple[Any, ...], float]:
    """What is slower in every one of `times` further measurements, too, with its least ratio.

    measure: from the keys of rows to rows measured anew.
    """
    found = slower(old, new)
    for _ in range(times):
        if not found:
            break
        again = slower(old, measure(list(found)))
        found = {key: min(ratio, again[key]) for key, ratio in found.items() if key in again}
    return found


def measure_now(device: str, output: Path, expression: str | None = None) -> list[Row]:
    """Run the micro-benchmarks; the rows they leave."""
    output.unlink(missing_ok=True)
    command = [sys.executable, "-m", "benchmarks.micro", "--device", device, "--output", str(output)]
    subprocess.run([*command, *(["-k", expression] if expression else [])], cwd=ROOT)
    return read(output)[1] if output.exists() else []


def main() -> int:
    """Measure if need be, compare, tell; the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--baseline", type=Path, help="benchmarks/results/micro-<device>.json")
    parser.add_argument("--new", type=Path, help="a file of python -m benchmarks.micro, instead of measuring")
    parser.add_argument("--store", action="store_true", help="keep the rows as the baseline instead of comparing")
    options = parser.parse_args()
    baseline = options.baseline or baseline_of(torch.device(options.device))
    if not options.store and not baseline.exists():
        print(f"error: there are no stored rows {baseline}; make them with --store", file=sys.stderr)
        return 2
    if options.new and not options.new.exists():
        print(f"error: --new is {options.new}; expected a file of python -m benchmarks.micro", file=sys.stderr)
        return 2
    output = options.new or ROOT / ".benchmarks" / f"micro-check-{options.device}.json"
    new = read(output)[1] if options.new else measure_now(options.device, output)
    if not new:
        print(f"error: {output} has no rows", file=sys.stderr)
        return 2
    about = read(output)[0]
    if options.store:
        ours = [row for row in new if row["contender"] in OURS and "fraction" in row]
        rows = [{field: row[field] for field in (*KEY, *KEPT)} for row in ours]
        write_json(baseline, {**{name: about[name] for name in ("environment", "ceilings")}, "rows": rows})
        print(f"stored: {baseline}, {len(rows)} rows")
        return 0
    stored, old = read(baseline)
    for path, told in ((baseline, stored), (output, about)):
        if "environment" not in told:
            print(f"error: {path} is no file of python -m benchmarks.micro", file=sys.stderr)
            return 2
    here, there = about["environment"]["device"], stored["environment"]["device"]
    if here != there:
        print(f"error: {baseline} was measured on {there}, this is {here}", file=sys.stderr)
        return 2

    def again(keys: list[tuple[Any, ...]]) -> list[Row]:
        operators = sorted({key[KEY.index("operator")] for key in keys})
        return measure_now(options.device, output.with_name("again.json"), " or ".join(operators))

    found = confirmed(old, new, (lambda keys: []) if options.new else again, 0 if options.new else AGAIN)
    gone = lost(old, new)
    for key, ratio in sorted(found.items(), key=lambda item: -item[1]):
        print(f"regression: {' '.join(map(str, filter(None, key)))} takes {ratio:.2f} times as long")
    for key in gone:
        print(f"regression: {' '.join(map(str, filter(None, key)))} fails or is gone")
    print(f"{len(new)} rows, {len(found) + len(gone)} regressions against {stored['environment']['date']}")
    return 1 if found or gone else 0


if __name__ == "__main__":
    sys.exit(main())
