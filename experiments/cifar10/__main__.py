"""`python -m experiments.cifar10 --max-minutes M --output FOLDER`: train, attack, compare; the same call goes on."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from emr_training.config import RunConfig, parse_override
from emr_training.evaluation import Settings
from emr_training.evaluation import command as evaluation
from emr_training.evaluation.compare import compare
from emr_training.evaluation.record import Record
from emr_training.evaluation.subject import load_subject, record_path
from emr_training.reporting import environment, write_json
from emr_training.training import command as training
from experiments.cifar10.data import TEST
from experiments.cifar10.deadline import TimeUp, deadline
from experiments.cifar10.runs import NAMES, configuration, parse_names

_EPSILON = 8 / 255


def run(
    output: Annotated[Path, typer.Option(help="Folder of all results; what is there is not made again.")],
    changes: Annotated[
        list[str] | None, typer.Argument(help="Changes of every configuration, as key.sub=value.")
    ] = None,
    max_minutes: Annotated[float, typer.Option(min=0, help="Stop after so long; the same call goes on.")] = 1e6,
    models: Annotated[
        str, typer.Option(help=f"Some of {', '.join(NAMES)}.")
    ] = "preactresnet-18-at,preactresnet-18-at-emr",
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    precision: Annotated[str | None, typer.Option(help="Of training; default: bf16-mixed on a GPU, else 32.")] = None,
    epochs: Annotated[int | None, typer.Option(min=1, help="Default: the preset's, 110 or 120.")] = None,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    images: Annotated[int, typer.Option(min=1, help="The first so many test images are attacked.")] = 1000,
    smoke: Annotated[bool, typer.Option("--smoke", help="A few images, two epochs: shows only that it runs.")] = False,
) -> None:
    """Train each model, run PGD-20 and AutoAttack at 8/255, and compare. CIFAR-10's files are below $EMR_DATA."""
    names, console = parse_names(models), Console()
    root = os.environ.get("EMR_DATA")
    if root is None:
        raise ValueError("EMR_DATA is not set; expected the folder that holds the original files of CIFAR-10")
    where = evaluation.pick_device(device)
    given = precision or ("bf16-mixed" if where.type == "cuda" else "32")
    overrides = [parse_override(text) for text in changes or ()]
    configs = {
        name: configuration(
            name,
            root=root,
            seed=seed,
            epochs=epochs,
            smoke=smoke,
            device=where.type,
            precision=given,
            changes=overrides,
        )
        for name in names
    }
    folders = {name: output / "models" / name for name in names}
    for name in names:
        _check_config(folders[name], configs[name])
    settings = Settings(("pgd20", "autoattack"), (_EPSILON,))
    attacked = min(images, TEST) if smoke else images
    try:
        with deadline(max_minutes):
            for name in names:
                _train(configs[name], folders[name], console)
            for name in names:
                subject = load_subject(folders[name], {}, trust=True)
                job = evaluation.Job(settings, where, attacked, record_path(folders[name]))
                evaluation.run(subject, job, console)
    except TimeUp:
        console.print(f"{max_minutes:g} minutes are over; the same command goes on where this one stopped.")
    _report(output, folders, smoke, console)


def _check_config(folder: Path, config: RunConfig) -> None:
    """Keep the configuration beside its run. Raises ValueError if the folder holds a run of another one."""
    path, wanted = folder / "wanted.json", config.model_dump(mode="json")
    if path.exists() and json.loads(path.read_text(encoding="utf-8")) != wanted:
        raise ValueError(f"{folder} holds a run with another configuration; expected the same, or another --output")
    write_json(path, wanted)


def _train(config: RunConfig, folder: Path, console: Console) -> None:
    """Train, or go on. Raises TimeUp if a signal ended it."""
    done = folder / "run.json"
    if done.is_file() and json.loads(done.read_text(encoding="utf-8"))["stopped"] is None:
        return
    stopped = training.run(config, folder, console, resume=(folder / "state.pt").is_file(), overwrite=True)
    if stopped is not None:
        raise TimeUp


def _report(output: Path, folders: dict[str, Path], smoke: bool, console: Console) -> None:
    """What there is so far: results.json, and with evaluations the comparison's table and figures."""
    results: dict[str, Any] = {"smoke": smoke, "environment": environment(), "models": {}}
    evaluated = []
    for name, folder in folders.items():
        trained, attacked = folder / "run.json", record_path(folder)
        entry: dict[str, Any] = {"trained": None, "evaluated": None}
        if trained.is_file():
            found = json.loads(trained.read_text(encoding="utf-8"))
            entry["trained"] = {key: found[key] for key in ("config", "environment", "stopped", "costs", "last")}
        if attacked.is_file():
            evaluated.append(folder)
            record = Record.load(attacked)
            entry["evaluated"] = {
                "images": record.subject["images"],
                "clean": record.evaluation.clean.as_dict(),
                "attacks": {a.name: a.accuracy.as_dict() for a in record.evaluation.attacks},
                "margins": [{"epsilon": m.epsilon, **m.quartiles()} for m in record.evaluation.margins],
            }
        results["models"][name] = entry
    write_json(output / "results.json", results)
    if evaluated:
        compare(evaluated, output / "comparison", console)


def main() -> None:
    """Entry point: faults of the input end in one line and exit status 2."""
    try:
        typer.run(run)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
