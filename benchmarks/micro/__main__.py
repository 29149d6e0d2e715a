"""Runs the micro-benchmarks and writes what they found.

    python -m benchmarks.micro [--device cpu|cuda] [--threads N] [--scale N] [-k EXPRESSION] [--output FOLDER]

Leaves in the folder micro-<device>.json, the environment and one row for each benchmark, and pytest-benchmark's own
micro-<device>-rounds.json with every round; and prints a table. Memory that is given back is kept for the next
allocation, for every contender alike: a fresh large one costs a page fault for every 4 KiB (see benchmarks.fused).
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

import torch

from benchmarks.environment import ROOT, WARM_ALLOCATOR
from benchmarks.micro import table


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, help="on the CPU; torch's own choice")
    parser.add_argument("--scale", type=int, help="largest sizes: 0 small, 1 medium, 2 large, 3 for a GPU")
    parser.add_argument("-k", help="pytest's expression for a part of the benchmarks")
    parser.add_argument("--output", type=Path, default=ROOT / ".benchmarks")
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    stem = options.output / f"micro-{options.device}"
    lines = stem.with_suffix(".jsonl")
    lines.unlink(missing_ok=True)
    command = [sys.executable, "-m", "pytest", "-q", str(ROOT / "benchmarks" / "micro" / "operators.py")]
    command += ["--device", options.device, "--rows", str(lines)]
    command += ["--benchmark-quiet", "--benchmark-json", f"{stem}-rounds.json"]
    for name in ("threads", "scale", "k"):
        value = getattr(options, name)
        command += [] if value is None else ["-k" if name == "k" else f"--{name}", str(value)]
    code = subprocess.run(command, env={**os.environ, **WARM_ALLOCATOR}, cwd=ROOT).returncode
    if not lines.exists():
        return code or 1
    about, rows = table.read(lines)
    stem.with_suffix(".json").write_text(json.dumps({**about, "rows": rows}, indent=1) + "\n")
    lines.unlink()
    print(f"\n{table.heading(about)}\n\n{table.table(rows)}\n\n{stem.with_suffix('.json')}")
    return code


if __name__ == "__main__":
    sys.exit(main())
