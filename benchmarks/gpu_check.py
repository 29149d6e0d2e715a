"""Everything that only a GPU can tell, in one command: build, tests on the device, sanitizers, benchmarks.

    make gpu-check            or, without make:  python -m benchmarks.gpu_check

Runs from a checkout, with what is installed, and needs no network. Each part that passed is remembered (with a digest
of the sources) and skipped by the next call; a part that does not fit into what is left of `--minutes` is left for it.
Writes <device>-<date>.json with the environment, every part's outcome and every figure. Without a GPU it says so and
stops; `--rehearse` runs the same parts on the CPU, cut down to seconds, into a temporary folder.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.measure import environment, slug, write_json

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
STATE = ROOT / ".cache" / "gpu-check"
TAIL = 6000


@dataclass(frozen=True)
class Part:
    """One thing to run.

    Attributes:
        name: also of its log.
        command: after the interpreter.
        seconds: what it is expected to take on a GPU; the limit is three times that.
        alone: whether nothing else may run beside it, because it measures time.
        needs: names of parts that have to pass before.
        output: the JSON file that it writes, if any.
        tool: a program that runs the interpreter, with its options; a part without its tool is skipped, saying so.
    """

    name: str
    command: tuple[str, ...]
    seconds: int
    alone: bool = False
    needs: tuple[str, ...] = ("build",)
    output: str | None = None
    tool: tuple[str, ...] = ()


def parts(device: str, folder: Path, rehearse: bool) -> list[Part]:
    """What there is to run, in order."""
    pytest = ("-m", "pytest", "-q", "-x" if rehearse else "--maxfail=25", "-p", "no:cacheprovider")
    engine = ("-m", "device") if not rehearse else ("-m", "device", "-k", "mlp_batchnorm")
    some = ("-k", "opcheck") if rehearse else ()
    sanitizer = ("--error-exitcode", "9", "--launch-timeout", "120")
    cases = ("-m", "benchmarks.gpu_check", "--sanitizer-cases", device)
    quick = ("--quick",) if rehearse else ()
    compiled = () if rehearse else ("--models", "wrn-34-10", "--compile", "--no-memory")
    profile = ("-m", "benchmarks.throughput", "--device", device, "--sections", "training", "--profile")
    profile += ("--figures", str(folder))

    def throughput(name: str, seconds: int, *options: str) -> Part:
        output = str(folder / f"throughput-{name}.json")
        command = ("-m", "benchmarks.throughput", "--device", device, "--output", output, "--resume", *options)
        return Part(f"throughput-{name}", (*command, *quick), seconds, alone=True, output=output)

    micro = str(folder / "micro.json")
    measure = ("-m", "benchmarks.micro", "--device", device, "--output", micro, *quick)
    return [
        Part("build", ("-m", "benchmarks.gpu_check", "--build", device), 120, alone=True, needs=()),
        Part("operators", (*pytest, "tests/ops", *some), 120),
        Part("engine-zoo", (*pytest, "tests/engine/test_zoo.py", *engine), 150),
        Part("engine-other", (*pytest, "tests/engine", "--ignore=tests/engine/test_zoo.py", *engine), 150),
        Part("memcheck", cases, 60, tool=("compute-sanitizer", "--tool", "memcheck", *sanitizer)),
        Part("racecheck", cases, 60, tool=("compute-sanitizer", "--tool", "racecheck", *sanitizer)),
        throughput("penalty", 120, "--sections", "penalty"),
        throughput("attacks", 90, "--sections", "attacks"),
        throughput("training", 120, "--sections", "training"),
        Part("micro", measure, 90, alone=True, output=micro),
        throughput("weights", 60, "--sections", "effective_weights", "margins", "energy", "parallel"),
        throughput("compiled-penalty", 150, "--sections", "penalty", *compiled),
        throughput("compiled-training", 180, "--sections", "training", *compiled),
        throughput("scaling", 90, "--sections", "scaling", "--no-memory"),
        throughput("autoattack", 60, "--sections", "autoattack"),
        Part("profile", (*profile, *quick), 60, alone=True),
    ]


def digest() -> str:
    """Of every source that a part may run."""
    found = hashlib.sha256()
    for folder in ("emr_kernels", "csrc", "tests", "benchmarks"):
        for file in sorted((ROOT / folder).rglob("*")):
            if file.suffix in {".py", ".cpp", ".h", ".inc", ".cu", ".cuh"}:
                found.update(str(file.relative_to(ROOT)).encode() + file.read_bytes())
    return found.hexdigest()[:16]


class State:
    """What passed already, on disk after every part."""

    def __init__(self, folder: Path, key: str) -> None:
        self.file = folder / "state.json"
        self.key = key
        self.outcomes: dict[str, dict[str, Any]] = {}
        if self.file.exists():
            try:
                kept = json.loads(self.file.read_text())
            except json.JSONDecodeError:
                print(f"{self.file} is damaged: starting over")
                kept = {}
            if kept.get("key") == key:
                self.outcomes = kept["outcomes"]

    def passed(self, part: Part) -> bool:
        """Whether the part passed with these sources, and what it wrote is still there."""
        outcome = self.outcomes.get(part.name)
        written = part.output is None or Path(part.output).exists()
        return outcome is not None and outcome["status"] == "passed" and written and part.name != "build"

    def record(self, part: Part, outcome: dict[str, Any]) -> None:
        """Remember an outcome."""
        self.outcomes[part.name] = outcome
        self.file.parent.mkdir(parents=True, exist_ok=True)
        new = self.file.with_suffix(".new")
        new.write_text(json.dumps({"key": self.key, "outcomes": self.outcomes}, indent=2))
        new.replace(self.file)


def run_part(part: Part, folder: Path, variables: dict[str, str], limit: float) -> dict[str, Any]:
    """Run one part to its end, or to its limit; its output goes to <name>.log."""
    if part.tool and shutil.which(part.tool[0]) is None:
        return {"status": "skipped", "why": f"no {part.tool[0]} on PATH", "seconds": 0.0}
    start = time.monotonic()
    log = folder / f"{part.name}.log"
    with log.open("w") as sink:
        command = [*part.tool, sys.executable, *part.command]
        process = subprocess.Popen(
            command, cwd=ROOT, env={**os.environ, **variables}, stdout=sink, stderr=subprocess.STDOUT,
            start_new_session=True,
        )  # fmt: skip
        try:
            code: int | None = process.wait(timeout=limit)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            code = None
    taken = round(time.monotonic() - start, 1)
    if code == 0:
        return {"status": "passed", "seconds": taken, "tail": log.read_text()[-400:]}
    why = f"over its limit of {limit:.0f} s" if code is None else f"exit status {code}"
    return {"status": "failed", "why": why, "seconds": taken, "tail": log.read_text()[-TAIL:]}


def run_all(
    todo: list[Part],
    state: State,
    runner: Callable[[Part, float], dict[str, Any]],
    minutes: float,
    workers: int,
) -> bool:
    """Run what has not passed yet: tests beside each other, measurements alone. Whether everything passed."""
    deadline = time.monotonic() + 60 * minutes

    def one(part: Part) -> None:
        left = deadline - time.monotonic()
        missing = [n for n in part.needs if state.outcomes.get(n, {}).get("status") != "passed"]
        if state.passed(part):
            print(f"{part.name:16} passed before", flush=True)
            return
        if missing:
            outcome = {"status": "left", "why": f"needs {', '.join(missing)}", "seconds": 0.0}
        elif left < part.seconds:
            outcome = {"status": "left", "why": f"{part.seconds} s expected, {left:.0f} s left", "seconds": 0.0}
        else:
            outcome = runner(part, min(3.0 * part.seconds, left))
        state.record(part, outcome)
        print(f"{part.name:16} {outcome['status']} {outcome.get('why', '')} ({outcome['seconds']} s)", flush=True)
        if outcome["status"] == "failed":
            print(outcome["tail"], flush=True)

    first = [part for part in todo if part.alone and not part.needs]
    together = [part for part in todo if not part.alone]
    for part in first:
        one(part)
    with ThreadPoolExecutor(workers) as pool:
        list(pool.map(one, together))
    for part in todo:
        if part.alone and part not in first:
            one(part)
    return all(state.outcomes.get(p.name, {}).get("status") in ("passed", "skipped") for p in todo)


def write_record(todo: list[Part], state: State, folder: Path, device: torch.device) -> Path:
    """The one file that is kept: environment, outcomes and every part's figures."""
    where = environment(device)
    figures = {p.name: json.loads(Path(p.output).read_text()) for p in todo if p.output and Path(p.output).exists()}
    record = {"environment": where, "sources": state.key, "parts": state.outcomes, "figures": figures}
    file = folder / f"{slug(device)}-{where['date']}.json"
    write_json(file, record)
    return file


def build(device: torch.device) -> None:
    """Compile what the device needs, and say which backend serves which operator."""
    from emr_kernels import _extension, info

    _extension.prepare()
    print(info())
    if device.type == "cuda" and _extension.cuda_library is None:
        sys.exit(f"no CUDA kernels: {_extension.cuda_reason}")


def sanitizer_cases(device: torch.device) -> None:
    """Every operator once or twice, with odd sizes, on every backend of the device that has it."""
    from benchmarks.sanitize import run

    run(device)


def main() -> None:
    """Run what is left to run, and write the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=8.5, help="no part is started that does not fit (8.5)")
    parser.add_argument("--only", nargs="*", help="names of parts")
    parser.add_argument("--rehearse", action="store_true", help="on the CPU, cut down, into a temporary folder")
    parser.add_argument("--state", type=Path, default=STATE, help="folder of logs and of what passed")
    parser.add_argument("--build", type=torch.device, help=argparse.SUPPRESS)
    parser.add_argument("--sanitizer-cases", type=torch.device, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.build:
        return build(options.build)
    if options.sanitizer_cases:
        return sanitizer_cases(options.sanitizer_cases)
    if not options.rehearse and not torch.cuda.is_available():
        sys.exit("gpu-check needs a CUDA device, and torch sees none here; --rehearse runs its parts on the CPU")
    device = torch.device("cpu" if options.rehearse else "cuda")
    folder = Path(tempfile.mkdtemp(prefix="gpu-check-")) if options.rehearse else options.state
    folder.mkdir(parents=True, exist_ok=True)
    todo = [p for p in parts(device.type, folder, options.rehearse) if not options.only or p.name in options.only]
    variables = {
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "python"), os.environ.get("PYTHONPATH", "")]),
        "EMR_TEST_DEVICE": device.type,
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "2"),
    }
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability()
        variables["TORCH_CUDA_ARCH_LIST"] = os.environ.get("TORCH_CUDA_ARCH_LIST", f"{major}.{minor}")
    state = State(folder, digest())
    workers = max(1, min(5, (os.cpu_count() or 1) // 2))
    passed = run_all(todo, state, lambda p, limit: run_part(p, folder, variables, limit), options.minutes, workers)
    file = write_record(todo, state, folder, device)
    targets = [] if options.rehearse else [RESULTS]
    if os.environ.get("OUT") and not options.rehearse:
        targets.append(Path(os.environ["OUT"]))
    for target in targets:
        target.mkdir(parents=True, exist_ok=True)
        shutil.copy2(file, target)
        if target != RESULTS:
            shutil.copy2(state.file, target)
    print(f"written: {file}", *(target / file.name for target in targets))
    sys.exit(0 if passed else 1)


if __name__ == "__main__":
    main()
