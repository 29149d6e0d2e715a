"""What the library buys on this machine, against what one would use without it.

    python -m benchmarks.throughput                       # or make bench: every section, minutes
    python -m benchmarks.throughput --sections training --models wrn-16-4 --batch 32 --compile
    python -m benchmarks.throughput --compare benchmarks/results/throughput-....json
    python -m benchmarks.throughput --sections training --profile

Prints tables and writes a JSON file with every case's environment, and figures beside it. Cases join those that the
file holds from earlier calls, under the same name the newer one stays; with --resume those measured with the same
sources, torch and threads are not measured again, so that a call that was cut off goes on. A contender that fails, or
whose answer is not the reference's, is shown with the reason; where it is this library, the command exits with 1.
Method: docs/benchmarks.md.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.contest import Options, reason
from benchmarks.gpu_check import RESULTS, digest
from benchmarks.measure import ROOT, device_name, environment, slug, write_json
from benchmarks.models import build, input_shape
from benchmarks.setting import PRECISIONS
from benchmarks.throughput import compare, figures, profiling
from benchmarks.throughput.files import read
from benchmarks.throughput.sections import SECTIONS, Wanted, settings
from benchmarks.throughput.tables import print_tables
from emr_kernels import keep_memory


def parser() -> argparse.ArgumentParser:
    """The command line."""
    found = argparse.ArgumentParser(
        prog="python -m benchmarks.throughput",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = found.add_argument
    add("--sections", nargs="+", choices=SECTIONS, default=list(SECTIONS), metavar="NAME", help=", ".join(SECTIONS))
    add("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    add("--models", nargs="+", default=[], help="instead of the sections' own (penalty to margins, parallel)")
    add("--batch", type=int, help="instead of the sections' own")
    add("--precision", choices=[p for p in PRECISIONS if p != "fp64"], help="instead of the sections' own")
    add("--repetitions", type=int, default=5)
    add("--compile", action="store_true", help="with the contenders of torch.compile; minutes more, told apart")
    add("--no-memory", action="store_true", help="leave out peak memory, which takes a process a contender")
    add("--quick", action="store_true", help="tiny sizes: whether it works")
    add("--large", action="store_true", help="on a CPU: WRN-28-10, WRN-34-10 and ResNet-50 instead")
    add("--output", type=Path, help="benchmarks/results/throughput-<device>.json; with --quick .benchmarks/quick.json")
    add("--figures", type=Path, help="folder; that of the output, for traces .benchmarks")
    add("--note", help="what a reader has to know of these measurements; kept with each case")
    add("--resume", action="store_true", help="leave out what the output has from these sources")
    add("--compare", type=Path, metavar="OLD", help="an earlier output: ratios, and an error for regressions over 10%%")
    add("--profile", action="store_true", help="trace a training step of each model instead: where its time goes")
    return found


def wanted_of(options: argparse.Namespace) -> Wanted:
    """What the command line asks for; ValueError for what cannot be."""
    if options.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device is cuda; expected cpu, as torch sees no GPU here")
    for name in ("repetitions", "batch"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise ValueError(f"--{name} is {value}; expected at least 1")
    for model in options.models:
        with torch.device("meta"):
            build(model, input_shape(model))
    scale = options.device
    if options.quick:
        scale = "quick"
    elif options.large and options.device == "cpu":
        scale = "cpu-large"
    measuring = Options(
        min(2, options.repetitions) if options.quick else options.repetitions,
        options.compile,
        not (options.no_memory or options.quick),
    )
    return Wanted(scale, options.device, measuring, tuple(options.models), options.batch, options.precision)


def measure(
    wanted: Wanted, sections: list[str], output: Path, record: dict[str, Any], resume: bool, note: str | None
) -> None:
    """Every case of these sections, printed and written as soon as it is there, beside those that `record` has."""
    sources, device = digest(), torch.device(wanted.device)
    for name in sections:
        section = SECTIONS[name]
        kept = record["sections"].setdefault(name, {"title": section.title, "cases": {}})["cases"]
        for identity, function in section.cases(wanted).items():
            about = {"environment": environment(device), "sources": sources, "compile": wanted.options.compile}
            if resume and _measured_alike(kept.get(identity, {}), about):
                continue
            begin = time.perf_counter()
            try:
                case = function()
            except Exception as error:
                print(f"{section.title}, {identity}: failed: {reason(error)}\n", flush=True)
                case = {"title": identity, "failed": reason(error)}
            else:
                print_tables(section.tables(identity, case))
            taken = round(time.perf_counter() - begin, 1)
            kept[identity] = {**case, **about, "seconds taken": taken, **({"note": note} if note else {})}
            write_json(output, record)


def _measured_alike(case: dict[str, Any], about: dict[str, Any]) -> bool:
    """Whether a case was measured with these sources, torch and threads, and with what is to be compiled."""
    then, now = case.get("environment", {}), about["environment"]
    return (
        case.get("sources") == about["sources"]
        and all(then.get(field) == now[field] for field in ("device", "torch", "threads"))
        and (case.get("compile", False) or not about["compile"])
        and not failures(case)
    )


def failures(case: dict[str, Any]) -> list[str]:
    """What went wrong in a case, or with this library's contenders in it."""
    mine = [
        f"{name}: {c['failed']}"
        for name, c in case.get("contenders", {}).items()
        if c["kind"] == "ours" and "failed" in c
    ]
    return [case["failed"], *mine] if "failed" in case else mine


def main(arguments: list[str] | None = None) -> int:
    """Measure, print, write, draw, compare; the exit status."""
    options = parser().parse_args(arguments)
    try:
        wanted = wanted_of(options)
        device = torch.device(options.device)
        usual = ROOT / ".benchmarks" / "quick.json" if options.quick else RESULTS / f"throughput-{slug(device)}.json"
        output = options.output or usual
        record = read(output) if output.exists() else {"sections": {}}
        old = read(options.compare) if options.compare else None
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    keep_memory()
    folder = options.figures or output.parent
    threads = torch.get_num_threads()
    spoken = f"{threads} {'thread' if threads == 1 else 'threads'}"
    print(f"{device_name(device)}, {spoken}, torch {torch.__version__}\n", flush=True)
    if options.profile:
        for setting in settings("training", wanted):
            print_tables([profiling.profile_step(setting, options.figures or ROOT / ".benchmarks")])
        return 0
    measure(wanted, options.sections, output, record, options.resume, options.note)
    drawn = figures.draw(record, folder, output.stem)
    print(f"written: {output}", *drawn)
    wrong = [
        f"failed: {name}: {identity}: {what}"
        for name in options.sections
        for identity in SECTIONS[name].cases(wanted)
        for what in failures(record["sections"][name]["cases"][identity])
    ]
    if wrong:
        print("\n".join(wrong))
    if old is None:
        return 1 if wrong else 0
    found = compare.compare(old, record, options.sections)
    if not found:
        print(f"error: {options.compare} has no case of these sections and sizes to compare with", file=sys.stderr)
        return 1 if wrong else 2
    print_tables([compare.table(found, options.compare.name)])
    worse = [row for row in found if row.regressed]
    print("\n".join(f"regression: {row.name} takes {row.ratio:.2f} times as long" for row in worse) or "no regressions")
    return 1 if worse or wrong else 0


if __name__ == "__main__":
    sys.exit(main())
