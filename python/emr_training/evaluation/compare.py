"""`emr compare`: evaluations of several runs side by side, in a table, two figures and a JSON file."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.measure import Measurement

from emr_training.costs import Costs
from emr_training.evaluation.names import epsilon_text
from emr_training.evaluation.record import Record
from emr_training.evaluation.subject import record_path
from emr_training.reporting import accuracy_bars, comparison_table, margin_distributions, write_json

#: What evaluations have to share before their numbers may stand in one column.
_SHARED = ("data", "images", "norm", "margin_norm")
#: What may differ, but is told.
_TOLD = ("seed", "precision")


@dataclass(frozen=True)
class Comparison:
    """Records by the names of their rows, and the runs that have none."""

    records: dict[str, Record]
    missing: tuple[Path, ...]


def gather(runs: Sequence[Path]) -> Comparison:
    """The records of these runs (folders, weights, or the JSON files themselves).

    Raises ValueError if none has one, if one stands there twice, or if they are of other images or norms: which.
    """
    found: dict[Path, Record] = {}
    missing = []
    for run in runs:
        path = record_path(run)
        if path in found:
            raise ValueError(f"runs has {path} twice; expected different ones")
        if path.is_file():
            found[path] = Record.load(path)
        elif run.exists():
            missing.append(run)
        else:
            raise FileNotFoundError(f"no run at {run}")
    if not found:
        raise ValueError("\n".join(f"{run} has no evaluation; {_how(run, found)}" for run in missing))
    first_path, first = next(iter(found.items()))
    for path, record in found.items():
        for name in _SHARED:
            if record.belongs_to[name] != first.belongs_to[name]:
                both = " and ".join(_shown(name, r) for r in (first, record))
                raise ValueError(
                    f"{first_path} and {path} are of different {name.replace('_', ' ')}: {both}; expected evaluations "
                    "of the same images in the same norm"
                )
    return Comparison(dict(zip(_row_names(found), found.values(), strict=True)), tuple(missing))


def compare(runs: Sequence[Path], output: Path, console: Console) -> Comparison:
    """Print the table of `runs`, and write comparison.json and two figures into `output`; see `gather`."""
    comparison = gather(runs)
    records = comparison.records
    evaluations = {name: record.evaluation for name, record in records.items()}
    first = next(iter(records.values()))
    images = f"{first.subject['data']}, {_images(first)}"
    title = f"{images}, ε in {first.evaluation.norm}"
    table = comparison_table(
        evaluations,
        before={
            "data": [record.subject["data"] for record in records.values()],
            "model": [record.subject["model"] for record in records.values()],
            "defense": [record.subject["method"] for record in records.values()],
        },
        after=_costs(list(records.values())),
        title=title,
    )
    # In its own width: a number that is cut off is of no use.
    table.width = Measurement.get(console, console.options.update(max_width=10_000), table).maximum
    console.print(table, crop=False, soft_wrap=True)
    notes = [
        "± is one binomial standard error; worst case: right under every attack of that ε. Margins and weight norms "
        "are medians, with an ε at end points of PGD-20. A pass is an image once forward or backward."
    ]
    sets = {name: _attacks(record) for name, record in records.items()}
    if len(set(sets.values())) > 1:
        notes.append("Not every run was evaluated by the same attacks: a worst case is that of the run's own attacks.")
    for name in _TOLD:
        values = {row: record.belongs_to[name] for row, record in records.items()}
        if len(set(values.values())) > 1:
            notes.append(f"The {name} differs: {', '.join(f'{row} {value}' for row, value in values.items())}.")
    notes += [f"Left out: {run} has no evaluation; {_how(run, records)}" for run in comparison.missing]
    figures = ["robust_accuracy.png"]
    subtitle = f"{title}, bars: 95% intervals"
    accuracy_bars(output / figures[0], evaluations, subtitle)
    margins = {n: e.margins_at(0.0) for n, e in evaluations.items()}
    measured = {n: m.margins for n, m in margins.items() if m is not None and bool(m.margins.isfinite().any())}
    if measured:
        figures.append("effective_margins.png")
        norm = str(first.belongs_to["margin_norm"])
        margin_distributions(
            output / figures[1], measured, f"Clean images: {images}. Vertical line: median. Right is safer.", norm
        )
    write_json(output / "comparison.json", _as_dict(comparison))
    notes.append(f"{', '.join(figures)} and comparison.json are in {output}.")
    for note in notes:
        console.print(note, style="dim", highlight=False)
    return comparison


def _row_names(records: dict[Path, Record]) -> list[str]:
    """Names of the runs; of those that share one, the paths of their records."""
    names = [record.subject["name"] for record in records.values()]
    return [
        name if names.count(name) == 1 else str(path.parent if path.name == "evaluation.json" else path)
        for name, path in zip(names, records, strict=True)
    ]


def _costs(records: Sequence[Record]) -> dict[str, list[str]]:
    """Rows of costs: seconds and images through the network, of training and of evaluation."""
    trained = [None if r.training is None else Costs(**r.training) for r in records]
    measured = [r.evaluation.total_costs for r in records]
    return {
        "training, seconds": ["-" if c is None else f"{c.seconds:.0f}" for c in trained],
        "training, million passes": ["-" if c is None else _millions(c) for c in trained],
        "evaluation, seconds": [f"{c.seconds:.0f}" for c in measured],
        "evaluation, million passes": [_millions(c) for c in measured],
    }


def _millions(costs: Costs) -> str:
    return f"{(costs.forwards + costs.backwards) / 1e6:.3g}"


def _attacks(record: Record) -> frozenset[tuple[str, float]]:
    return frozenset((a.name, a.epsilon) for a in record.evaluation.attacks)


def _images(record: Record) -> str:
    images, total = record.subject["images"], record.subject["test_images"]
    return f"all {images} test images" if record.whole else f"the first {images} of {total} test images"


def _shown(name: str, record: Record) -> str:
    if name in ("data", "images"):
        return f"{record.subject['data']} ({_images(record)})"
    return str(record.belongs_to[name])


def _how(run: Path, others: Any) -> str:
    """The command that evaluates `run` as the others were."""
    record: Record | None = next(iter(others.values()), None)
    options = ""
    if record is not None:
        pairs = dict.fromkeys(a.name for a in record.evaluation.attacks)
        options = f" --attacks {','.join(pairs) or 'clean'}"
        options += "".join(f" --eps {epsilon_text(e)}" for e in record.evaluation.epsilons)
        options += f" --norm {record.evaluation.norm}" if record.evaluation.norm != "Linf" else ""
        options += "" if record.whole else f" --images {record.subject['images']}"
    return f"make one with: emr evaluate {run}{options}"


def _as_dict(comparison: Comparison) -> dict[str, Any]:
    rows = {}
    for name, record in comparison.records.items():
        found = record.evaluation
        rows[name] = {
            "subject": record.subject,
            "belongs_to": record.belongs_to,
            "clean": found.clean.as_dict(),
            "attacks": [
                {"name": a.name, "epsilon": a.epsilon, "accuracy": a.accuracy.as_dict(), "costs": vars(a.costs)}
                for a in found.attacks
            ],
            "worst_case": [{"epsilon": e, "accuracy": found.worst(e).as_dict()} for e in found.epsilons],
            "margins": [{"epsilon": m.epsilon, "norm": m.norm, **m.quartiles()} for m in found.margins],
            "costs": {"training": record.training, "evaluation": vars(found.total_costs)},
        }
    return {"runs": rows, "without_evaluation": [str(run) for run in comparison.missing]}
