"""The command line: `emr train`, `emr presets`, `emr demo`, `emr evaluate` and `emr info`."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from emr_training.config import ConfigError, make_config, merge, parse_override, presets, read_config

# Commands import torch, scikit-learn and matplotlib themselves, so that help and usage errors come at once.

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Train, attack and evaluate robust classifiers with Effective Margin Regularization.",
)
console = Console()


@app.command()
def train(
    changes: Annotated[
        list[str] | None,
        typer.Argument(metavar="KEY.SUB=VALUE...", help="Options, such as trainer.epochs=10; they override all else."),
    ] = None,
    preset: Annotated[str | None, typer.Option(help="A configuration by name; `emr presets` lists them.")] = None,
    config: Annotated[Path | None, typer.Option(help="YAML file of options; they override the preset's.")] = None,
    output: Annotated[Path, typer.Option(help="Folder for checkpoints, metrics and config.yaml.")] = Path("runs/train"),
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run in OUTPUT.")] = False,
    seed: Annotated[int | None, typer.Option(min=0, help="Short for trainer.seed.")] = None,
    devices: Annotated[int | None, typer.Option(min=1, help="Short for trainer.devices.")] = None,
) -> None:
    """Train a classifier, printing a line of metrics per epoch, and save it as OUTPUT/best.pt and last.pt.

    Without options an MLP learns scikit-learn's digits. An interrupted run goes on with --resume.
    """
    options: dict[str, Any] = {}
    if resume and config is None and preset is None:
        if not (output / "config.yaml").is_file():
            raise FileNotFoundError(f"no run to resume in {output}: config.yaml is not there")
        options = read_config(output / "config.yaml")
    if preset is not None:
        options = presets.preset(preset)
    if config is not None:
        options = merge(options, read_config(config))
    for change in changes or ():
        key, value = parse_override(change)
        options = merge(options, {key: value})
    for key, given in (("trainer.seed", seed), ("trainer.devices", devices)):
        if given is not None:
            options = merge(options, {key: given})
    settings = make_config(options)

    from emr_training.training.command import run

    stopped = run(settings, output, console, resume=resume)
    if stopped in ("SIGTERM", "SIGINT"):
        sys.exit({"SIGTERM": 143, "SIGINT": 130}[stopped])


@app.command(name="presets")
def list_presets(
    containing: Annotated[list[str] | None, typer.Argument(help="Only those with all of these in their names.")] = None,
) -> None:
    """List the configurations that `emr train --preset` knows."""
    shown = [p for p in presets.presets().values() if all(part in p.name for part in containing or ())]
    if not shown:
        raise ConfigError(f"no preset has {' and '.join(containing or ())} in its name")
    width = max(len(p.name) for p in shown)
    for p in shown:
        console.print(f"{p.name:{width}}  {p.summary}", highlight=False, soft_wrap=True)


@app.command()
def demo(
    output: Annotated[Path, typer.Option(help="Folder for figures, checkpoints and results.json.")] = Path("runs/demo"),
    seed: Annotated[int, typer.Option(min=0, help="Seed of everything random.")] = 0,
    epochs: Annotated[int, typer.Option(min=1, help="Epochs of every run, also while choosing settings.")] = 40,
) -> None:
    """Compare standard, EMR, AT and AT-EMR training on real digits: one table, three figures."""
    from emr_training.demo import DemoSettings, run_demo

    run_demo(output, console, DemoSettings(seed=seed, epochs=epochs))


@app.command()
def evaluate(
    checkpoint: Annotated[Path, typer.Argument(help="A checkpoint of `emr train` or `emr demo`, or a run's folder.")],
    epsilon: Annotated[list[float], typer.Option(help="Linf radius, in [0, 1] pixel units; repeatable.")] = (
        0.1,
        0.2,
    ),  # type: ignore[assignment]
    steps: Annotated[int, typer.Option(min=1, help="PGD steps.")] = 50,
    restarts: Annotated[int, typer.Option(min=1, help="PGD restarts.")] = 10,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the attack's random starts.")] = 0,
    output: Annotated[Path | None, typer.Option(help="Also write the results to this JSON file.")] = None,
    trust: Annotated[bool, typer.Option("--trust", help="Import the model that the checkpoint names.")] = False,
) -> None:
    """Report a checkpoint's clean and robust accuracy and effective margins on its test split."""
    from emr_training import evaluation
    from emr_training.attacks import PGD
    from emr_training.checkpoint import load_checkpoint
    from emr_training.reporting import environment, evaluation_table, write_json
    from emr_training.training.command import load_splits

    attack = PGD(0.0, steps, restarts=restarts, seed=seed)
    if checkpoint.is_dir():
        best = checkpoint / "best.pt"
        checkpoint = best if best.is_file() else checkpoint / "last.pt"
    loaded = load_checkpoint(checkpoint, trust=trust)
    test = load_splits(loaded.config).test
    result = evaluation.evaluate(loaded.model, test, epsilon, attack)
    console.print(evaluation_table({loaded.config.method: result}, f"PGD-{steps}"))
    low, high = result.clean.interval()
    intervals = [f"clean {100 * low:.1f} to {100 * high:.1f}%"]
    for radius, accuracy in result.robust.items():
        low, high = accuracy.interval()
        intervals.append(f"ε = {radius:g} {100 * low:.1f} to {100 * high:.1f}%")
    console.print(
        f"{len(test)} test images, {restarts} restarts; 95% intervals: {', '.join(intervals)}",
        style="dim",
        highlight=False,
    )
    if output is not None:
        record = {
            "checkpoint": str(checkpoint),
            "config": loaded.config.model_dump(mode="json"),
            "attack": {"name": "PGD", "steps": steps, "restarts": restarts, "seed": seed},
            "environment": environment(),
            "test": result.as_dict(),
        }
        write_json(output, record)


@app.command()
def info() -> None:
    """Show versions, the build and which backend serves which op."""
    import emr_kernels
    from emr_training.reporting import environment

    console.print(str(emr_kernels.info()), highlight=False)
    for name, value in environment().items():
        console.print(f"{name}: {value}", highlight=False, soft_wrap=True)


def main() -> None:
    """Entry point of the `emr` command: faults of the user's input end in one line each and exit status 2."""
    # A user's own models and data sets, by their import paths; last, so that nothing there hides an installed package.
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    try:
        app()
    except (ValueError, OSError, ArithmeticError) as error:
        for line in str(error).splitlines():
            Console(stderr=True).print(f"error: {line}", style="red", highlight=False, soft_wrap=True)
        sys.exit(2)
