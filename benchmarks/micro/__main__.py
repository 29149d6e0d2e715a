"""Runs the micro-benchmarks and writes what they found.

    python -m benchmarks.micro [--device cpu|cuda] [--output FILE.json] [--quick] [--threads N] [-k EXPRESSION]

The file holds the environment, the machine's ceilings, one row for each benchmark, and which GPU backend won. A call
that was cut off is gone on with by the next one for the same file and sources. --rounds FILE.json is pytest-benchmark's
own file, with every round. On the CPU memory that is given back is kept for the next allocation, for every contender
alike: a fresh large one costs a page fault for every 4 KiB (see benchmarks.fused).
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

import torch

from benchmarks.gpu_check import digest
from benchmarks.measure import ROOT
from benchmarks.micro import rows, table


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output", type=Path, help=".benchmarks/micro-<device>.json")
    parser.add_argument("--rounds", type=Path, help="pytest-benchmark's own file")
    parser.add_argument("--quick", action="store_true", help="the smallest sizes only, uncompiled")
    parser.add_argument("--threads", type=int, help="on the CPU; torch's own choice")
    parser.add_argument("-k", help="pytest's expression for a part of the benchmarks")
    options = parser.parse_args()
    output = options.output or ROOT / ".benchmarks" / f"micro-{options.device}.json"
    output.parent.mkdir(parents=True, exist_ok=True)
    unfinished = output.with_suffix(f".{digest()}.jsonl")
    for stale in set(output.parent.glob(f"{output.stem}.*.jsonl")) - {unfinished}:
        stale.unlink()
    expression = " and ".join(f"({e})" for e in (options.k, "not compile" if options.quick else None) if e)
    command = [sys.executable, "-m", "pytest", "-q", "-rfEs", "--benchmark-quiet", "-p", "no:cacheprovider"]
    command += [str(ROOT / "benchmarks" / "micro" / "operators.py")]
    command += ["--device", options.device, "--rows", str(unfinished.resolve())]
    command += ["--sizes", "0"] if options.quick else []
    command += ["--threads", str(options.threads)] if options.threads else []
    command += ["-k", expression] if expression else []
    command += ["--benchmark-json", str(options.rounds.resolve())] if options.rounds else []
    code = subprocess.run(command, cwd=ROOT).returncode
    if not unfinished.exists():
        return code or 1
    about, found = rows.read(unfinished)
    record = {**about, "winners": rows.winners(found), "duels": rows.duels(found), "rows": found}
    output.write_text(json.dumps(record, indent=1) + "\n")
    unfinished.unlink()
    print(f"\n{table.heading(about)}\n\n{table.table(found)}")
    if record["winners"]:
        print(f"\nMEASURED = {record['winners']!r}")
    print(f"\n{output}")
    return code


if __name__ == "__main__":
    sys.exit(main())
