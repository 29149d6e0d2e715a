"""The sections: what each measures, at which sizes, and how its record is shown."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from rich.table import Table

from benchmarks import attacks, autoattack, effective_weights, energy, margins, parallel, penalty, scaling, training
from benchmarks.contest import Contest, Options, run
from benchmarks.setting import Setting
from benchmarks.throughput import tables
from benchmarks.throughput.sizes import SIZES, Scale

Record = dict[str, Any]


@dataclass(frozen=True)
class Wanted:
    """What the command line asks for; None and empty leave the choice to the sizes of `scale`."""

    scale: Scale
    device: str
    options: Options
    models: tuple[str, ...] = ()
    batch: int | None = None
    precision: str | None = None


@dataclass(frozen=True)
class Section:
    """cases: by identity, each a function that measures it. tables: of one case's record."""

    title: str
    cases: Callable[[Wanted], Mapping[str, Callable[[], Record]]]
    tables: Callable[[str, Record], list[Table]]
    contest: Contest | None = None


def settings(name: str, wanted: Wanted) -> list[Setting]:
    """Of a contest: its sizes, or those that the command line names."""
    sizes = SIZES[wanted.scale].contests[name]
    known = {model: (batch, precision) for model, batch, precision in sizes}
    usual = sizes[-1][1:]
    return [
        Setting(
            model,
            wanted.batch or known.get(model, usual)[0],
            wanted.device,
            wanted.precision or known.get(model, usual)[1],
            resolution=SIZES[wanted.scale].resolution,
        )
        for model in wanted.models or known
    ]


def identity(setting: Setting) -> str:
    """Of a contest's case, in files."""
    return f"{setting.model}, {setting.batch}, {setting.precision}"


def _contest(contest: Contest) -> Section:
    def cases(wanted: Wanted) -> dict[str, Callable[[], Record]]:
        return {identity(s): partial(run, contest, s, wanted.options) for s in settings(contest.name, wanted)}

    return Section(contest.title, cases, lambda _, record: [tables.contest_table(contest.title, record)], contest)


def _autoattack(wanted: Wanted) -> dict[str, Callable[[], Record]]:
    plan = autoattack.Plan(device=wanted.device, **SIZES[wanted.scale].autoattack)
    cases = {"digits": partial(autoattack.measure, plan)}
    folder = Path(os.environ.get("EMR_DATA", "")) / "mnist"
    if wanted.scale != "quick" and folder.is_dir():
        cases["MNIST"] = partial(
            autoattack.measure,
            autoattack.Plan(folder, contenders=("pyautoattack", "emr_training"), device=wanted.device),
        )
    return cases


def _with_precision(name: str, precision: str) -> str:
    """A case's name, float32 understood."""
    return name if precision == "fp32" else f"{name}, {precision}"


def _scaling(wanted: Wanted) -> dict[str, Callable[[], Record]]:
    sizes = SIZES[wanted.scale]
    precision = wanted.precision or sizes.precision
    return {
        _with_precision(name, precision): partial(
            scaling.measure_axis, axis, sizes.seconds, min(3, wanted.options.repetitions), sizes.scaling_points
        )
        for name, axis in scaling.axes(wanted.device, precision).items()
    }


def _energy(wanted: Wanted) -> dict[str, Callable[[], Record]]:
    return {"digits": lambda: energy.measure(SIZES[wanted.scale].epochs, wanted.device)}


def _parallel(wanted: Wanted) -> dict[str, Callable[[], Record]]:
    model, batch, precision, steps = SIZES[wanted.scale].parallel
    model, batch, precision = next(iter(wanted.models), model), wanted.batch or batch, wanted.precision or precision
    name = _with_precision(f"{model}, {batch}", precision)
    return {name: lambda: parallel.measure(model, batch, wanted.device, precision, steps)}


SECTIONS: dict[str, Section] = {
    "penalty": _contest(penalty.CONTEST),
    "attacks": _contest(attacks.CONTEST),
    "training": _contest(training.CONTEST),
    "effective_weights": _contest(effective_weights.CONTEST),
    "margins": _contest(margins.CONTEST),
    "autoattack": Section("AutoAttack", _autoattack, lambda _, r: [tables.autoattack_table(r)]),
    "scaling": Section("Scaling", _scaling, lambda name, r: tables.scaling_tables({name: r})),
    "energy": Section("Cost of robustness", _energy, lambda _, r: [tables.energy_table(r)]),
    "parallel": Section("Data parallel", _parallel, lambda _, r: [tables.parallel_table(r)]),
}
