"""`python -m experiments.mnist --output FOLDER`: everything, or the parts that are asked for."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console

from emr_training.errors import nearest
from emr_training.reporting import write_json
from experiments.jobs import Clock, Job, run_jobs, unique
from experiments.markers import fill
from experiments.mnist.figures import draw
from experiments.mnist.plan import Plan, base_title
from experiments.mnist.results import Collector
from experiments.mnist.settings import QUICK, Settings
from experiments.mnist.spec import splits
from experiments.mnist.tables import tables

PARTS = ("sweep", "runoff", "final", "ablation", "masking", "predict", "report")


def run(
    output: Annotated[Path, typer.Option(help="Folder of all results; what is there is not made again.")],
    quick: Annotated[bool, typer.Option("--quick", help="A few small models on scikit-learn's digits.")] = False,
    parts: Annotated[str, typer.Option(help=f"Some of {','.join(PARTS)}.")] = ",".join(PARTS),
    jobs: Annotated[int, typer.Option(min=1, help="Processes, of one thread each.")] = 1,
    readme: Annotated[Path | None, typer.Option(help="Whose tables `report` fills; default: none.")] = None,
) -> None:
    """Train, attack and compare; see experiments/mnist/README.md. MNIST's files are below $EMR_DATA."""
    chosen = _parts(parts)
    settings = QUICK if quick else Settings()
    console = Console()
    splits(settings)
    _check_settings(output, settings)
    torch.set_num_threads(1)
    plan, clock = Plan(output, settings), Clock()
    _announce(plan, chosen, console)
    for part in chosen:
        if part not in ("predict", "report"):
            for stage, wanted in _stages(plan, part):
                run_jobs(f"{part}, {stage}", wanted, jobs, clock, console)
        if part == "runoff":
            for base, emr in plan.choices().items():
                console.print(f"  {base_title(base)}: {emr}", highlight=False)
    if "predict" in chosen or "report" in chosen:
        collector = Collector(plan, plan.choices())
        if "predict" in chosen:
            write_json(output / "predict.json", collector.predict())
        if "report" in chosen:
            _report(plan, collector, readme, console)


def _report(plan: Plan, collector: Collector, readme: Path | None, console: Console) -> None:
    results = collector.all()
    folder = plan.output / "report"
    write_json(folder / "results.json", results)
    points = {epsilon: collector.points(epsilon) for epsilon in plan.settings.epsilons}
    draw(folder, plan, collector.choices, results, points)
    if readme is not None:
        fill(readme, tables(results))
    missing = len(results["missing"])
    console.print(f"Wrote {folder}{f'; {missing} results are missing' if missing else ''}.", highlight=False)


def _announce(plan: Plan, parts: list[str], console: Console) -> None:
    """How many results there will be."""
    for part in parts:
        if part in ("predict", "report"):
            continue
        counts = {stage: len(unique(wanted)) for stage, wanted in _stages(plan, part, stand_ins=True)}
        console.print(f"planned for {part}: {', '.join(f'{n} of {s}' for s, n in counts.items())}", highlight=False)


def _stages(plan: Plan, part: str, stand_ins: bool = False) -> Iterator[tuple[str, list[Job]]]:
    """A part's jobs; with stand-ins for settings that earlier parts choose, to count them."""
    if part == "sweep":
        return plan.sweep_stages()
    if part == "runoff":
        return plan.runoff_stages(plan.any_finalists() if stand_ins else plan.finalists())
    return plan.stages(part, plan.any_choices() if stand_ins else plan.choices())


def _parts(text: str) -> list[str]:
    names = [name.strip() for name in text.split(",") if name.strip()]
    if not names:
        raise ValueError(f"parts has no name; expected some of {', '.join(PARTS)}")
    for name in names:
        if name not in PARTS:
            raise ValueError(f"parts has {name!r}; {nearest(name, list(PARTS))}")
    return [part for part in PARTS if part in names]


def _check_settings(output: Path, settings: Settings) -> None:
    """Keep the settings beside the results. Raises ValueError if others are there."""
    path, wanted = output / "settings.json", json.loads(json.dumps(asdict(settings)))
    if not path.exists():
        write_json(path, wanted)
        return
    found = json.loads(path.read_text(encoding="utf-8"))
    differ = sorted(name for name in wanted.keys() | found.keys() if wanted.get(name) != found.get(name))
    if differ:
        raise ValueError(f"{output} holds results with other {', '.join(differ)}; expected another --output")


def main() -> None:
    """Entry point: faults of the input end in one line and exit status 2."""
    try:
        typer.run(run)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
