"""A contest: contenders that compute the same in one setting, checked against each other and then timed in turns."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from benchmarks.measure import (
    Step,
    ceilings,
    environment,
    in_own_process,
    interleaved,
    memory_of,
    peak_of_tensors,
    synchronize,
    write_json,
)
from benchmarks.models import build, input_shape
from benchmarks.products import Passes, alone, roofline
from benchmarks.setting import PRECISIONS, Setting
from emr_kernels import keep_memory

#: What a contender found, in groups; the worst group counts.
Answer = Mapping[str, "list[Tensor]"]
BOUND = "products alone"


@dataclass(frozen=True)
class Runner:
    """A contender that is ready: its step, and what the step found, from what it returned."""

    step: Step
    answer: Callable[[Any], Answer]


@dataclass(frozen=True)
class Contender:
    """One way to compute what the contest is about.

    kind: "ours"; "theirs"; "approximate": another answer by design, which is told and not held against it.
    compiled: it compiles first, which takes long; only with --compile, and only in the last memory format, as the
        compiler chooses those inside.
    """

    make: Callable[[Setting, str], Runner]
    kind: Literal["ours", "theirs", "approximate"] = "theirs"
    compiled: bool = False


@dataclass(frozen=True)
class Contest:
    """What is compared.

    ways: by name; each is run in every memory format, as "name, layout".
    others: further contenders, by full name, for this setting alone (as "as shipped").
    reference: name of the way whose answer is right, in the first layout.
    passes: of the products that nobody can do without, for this setting.
    tolerance: of an answer's relative difference, by precision.
    exact: whether the ways are also compared in float64, on few images, up to 1e-8: what is small beside the rest of an
        answer, as the penalty's part of a training step's gradient, hides behind the tolerance of lower precisions.
    """

    name: str
    title: str
    ways: Mapping[str, Contender]
    reference: str
    passes: Callable[[Setting], Passes]
    tolerance: Mapping[str, float]
    others: Callable[[Setting], Mapping[str, tuple[Contender, str]]] = lambda setting: {}
    exact: bool = True

    def contenders(self, setting: Setting) -> dict[str, tuple[Contender, str]]:
        """Every contender and its memory format, by full name."""
        found = {
            f"{name}, {layout}": (way, layout)
            for name, way in self.ways.items()
            for layout in (setting.layouts[-1:] if way.compiled else setting.layouts)
        }
        return {**found, **self.others(setting)}


@dataclass(frozen=True)
class Options:
    """How to measure."""

    repetitions: int = 5
    compile: bool = False
    memory: bool = True


def difference(found: Answer, right: Answer) -> float:
    """Largest relative difference of a group, in the Euclidean norm."""
    worst = 0.0
    for group, expected in right.items():
        pairs = list(zip(found[group], expected, strict=True))
        gap = sum(float((a.double() - b.double()).square().sum()) for a, b in pairs)
        size = sum(float(b.double().square().sum()) for _, b in pairs)
        worst = max(worst, (gap / size) ** 0.5 if size else float(gap > 0))
        if gap != gap:
            return float("nan")
    return worst


def reason(error: BaseException) -> str:
    """An error in a line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0][:300] if lines else ''}"


def _first(runner: Runner) -> Answer:
    found = runner.answer(runner.step())
    return {group: [t.detach().clone() for t in tensors] for group, tensors in found.items()}


def exact_differences(contest: Contest, setting: Setting, compile: bool = False) -> dict[str, float]:
    """Relative difference from the reference in float64, on at most four images, by way.

    Of what computes the same by design. Others than ours that fail here are left out: the reason is told where they
    are to be timed.
    """
    small = setting.with_(batch=min(setting.batch, 4), precision="fp64")
    right = _first(contest.ways[contest.reference].make(small, "nchw"))
    found: dict[str, float] = {}
    for name, way in contest.ways.items():
        if name == contest.reference or way.kind == "approximate" or (way.compiled and not compile):
            continue
        try:
            found[name] = difference(_first(way.make(small, "nchw")), right)
        except Exception:
            if way.kind == "ours":
                raise
    return found


def _ready(contest: Contest, setting: Setting, options: Options, found: dict[str, dict[str, Any]]) -> dict[str, Step]:
    """The steps of the contenders that agree; the others' reasons go to `found`."""
    right: Answer | None = None
    steps: dict[str, Step] = {}
    for name, (way, layout) in contest.contenders(setting).items():
        if way.compiled and not options.compile:
            continue
        entry: dict[str, Any] = {"kind": way.kind}
        found[name] = entry
        try:
            runner = way.make(setting, layout)
            begin = time.perf_counter()
            answer = _first(runner)
            synchronize(setting.place)
            entry["first"] = time.perf_counter() - begin
            if setting.place.type == "cuda":
                torch.cuda.empty_cache()  # each contender has the memory to itself, but for captured graphs
        except Exception as error:
            entry["failed"] = reason(error)
            continue
        if right is None:
            if not name.startswith(contest.reference):
                raise RuntimeError(f"{contest.reference} comes first in {contest.name}, and it failed")
            right = answer
        entry["difference"] = difference(answer, right)
        allowed = contest.tolerance[setting.precision]
        if way.kind != "approximate" and not entry["difference"] <= allowed:
            entry["failed"] = f"another answer: it differs by {entry['difference']:.1e}, {allowed:.0e} is allowed"
            continue
        steps[name] = runner.step
    return steps


def run(contest: Contest, setting: Setting, options: Options) -> dict[str, Any]:
    """One setting's record: every contender's times, memory, difference and first call, and the bounds.

    Raises RuntimeError where the reference itself fails.
    """
    record: dict[str, Any] = {"title": setting.title(), "setting": setting.as_dict()}
    torch.backends.cudnn.benchmark = True  # for all alike, in the first call
    exact = exact_differences(contest, setting, options.compile) if contest.exact else {}
    found: dict[str, dict[str, Any]] = {}
    steps = _ready(contest, setting, options, found)
    mine = [exact[way] for way in exact if contest.ways[way].kind == "ours"]
    if mine:
        record["float64 difference"] = max(mine)
    for name in list(steps):
        # Variants of ours that are no ways of their own, as with CUDA graphs, stand and fall with ours.
        of_way = exact.get(name.rpartition(", ")[0], max(mine, default=0.0) if found[name]["kind"] == "ours" else 0.0)
        if not of_way <= 1e-8:
            found[name]["failed"] = f"another answer: in float64 it differs by {of_way:.1e}"
            del steps[name]
    passes = contest.passes(setting)
    bounds = {f"{BOUND}, {layout}": alone(setting, layout, passes) for layout in setting.layouts}
    ceilings(setting.place, setting.dtype)
    times = interleaved({**bounds, **steps}, options.repetitions, setting.place)
    reached = ceilings(setting.place, setting.dtype)
    for name, seconds in times.items():
        found.setdefault(name, {"kind": "bound"})["seconds"] = seconds
    if options.memory:
        for name in steps:
            if setting.place.type == "cuda":
                found[name]["memory"] = {"tensors": peak_of_tensors(steps[name], setting.place)}
            elif not contest.contenders(setting)[name][0].compiled:
                found[name]["memory"] = _memory(contest, setting, name)
    record["contenders"] = {name: found[name] for name in (*bounds, *(n for n in found if n not in bounds))}
    record["bound"] = min(times[name]["median"] for name in bounds)
    record["limit"] = roofline(setting, passes, reached)
    record["ceilings"] = reached
    return record


def _memory(contest: Contest, setting: Setting, name: str) -> dict[str, int] | None:
    module = f"benchmarks.{contest.name}"
    try:
        told = in_own_process(module, "--memory-of", json.dumps([name, setting.as_dict()]))
    except RuntimeError:
        return None
    return {str(kind): int(value) for kind, value in told.items()}


def tell_memory(contest: Contest, told: str) -> None:
    """Print the peak memory of one contender's call, this process's first of its size, as JSON."""
    name, fields = json.loads(told)
    setting = Setting(**fields)
    way, layout = contest.contenders(setting)[name]
    small = way.make(setting.with_(batch=2), layout)
    print(json.dumps(memory_of(way.make(setting, layout).step, small.step, setting.place)))


def main(contest: Contest, doc: str | None, model: str, batch: int) -> None:
    """The contest alone: measure, print, and with --output write JSON."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=model)
    parser.add_argument("--batch", type=int, default=batch)
    parser.add_argument("--classes", type=int, default=10)
    parser.add_argument("--resolution", type=int)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--precision", choices=[p for p in PRECISIONS if p != "fp64"], default="fp32")
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--compile", action="store_true", help="with the contenders of torch.compile (minutes)")
    parser.add_argument("--no-memory", action="store_true", help="leave out peak memory")
    parser.add_argument("--quick", action="store_true", help="a tiny network, twice: whether it works")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)
    options = parser.parse_args()
    for name in ("batch", "classes", "repetitions"):
        if getattr(options, name) < 1:
            parser.error(f"--{name} is {getattr(options, name)}; expected at least 1")
    try:
        with torch.device("meta"):
            build(options.model, input_shape(options.model, options.resolution))
    except ValueError as error:
        parser.error(str(error))
    if options.memory_of:
        return tell_memory(contest, options.memory_of)
    keep_memory()
    setting = Setting(
        options.model, options.batch, options.device, options.precision, options.classes, options.resolution
    )
    repetitions = options.repetitions
    if options.quick:
        setting, repetitions = setting.with_(model="cnn-4", batch=4, resolution=8), 2
    from benchmarks.throughput.tables import contest_table, print_tables

    record = run(contest, setting, Options(repetitions, options.compile, not options.no_memory))
    record["environment"] = environment(setting.place)
    print_tables([contest_table(contest.title, record)])
    if options.output:
        write_json(options.output, record)


def gradients(model: torch.nn.Module) -> list[Tensor]:
    """Of every parameter; zeros where there is none."""
    return [torch.zeros_like(p) if p.grad is None else p.grad for p in model.parameters()]
