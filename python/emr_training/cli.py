"""The command line: `emr train`, `emr demo`, `emr evaluate` and `emr info`."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from emr_training.config import ConfigError, TrainConfig, make_config, read_config

# Commands import torch, scikit-learn and matplotlib themselves, so that help and usage errors come at once.

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Train, attack and evaluate robust classifiers with Effective Margin Regularization.",
)
console = Console()

ConfigFile = Annotated[
    Path | None,
    typer.Option("--config", help="JSON file of options, by their names here with underscores; flags override it."),
]
Output = Annotated[Path, typer.Option(help="Folder for the checkpoint and metrics.")]


def with_config_options(command: Callable[..., None]) -> Callable[..., None]:
    """Give `command(..., **options)` a flag for each field of TrainConfig; flags not given are left out."""
    own = [p for p in inspect.signature(command, eval_str=True).parameters.values() if p.kind != p.VAR_KEYWORD]
    flags = []
    for name, field in TrainConfig.model_fields.items():
        default = "none" if field.default is None else str(field.default)
        option = typer.Option(help=field.description, show_default=default)
        kind: Any = field.annotation
        annotation: Any = Annotated[kind | None, option]
        flags.append(inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation))

    def run(**arguments: Any) -> None:
        kept = {p.name: arguments.pop(p.name) for p in own}
        command(**kept, **{name: value for name, value in arguments.items() if value is not None})

    signature = inspect.Signature([p.replace(kind=p.KEYWORD_ONLY) for p in own] + flags)
    run.__signature__ = signature  # type: ignore[attr-defined]
    run.__annotations__ = {p.name: p.annotation for p in signature.parameters.values()}
    run.__name__, run.__doc__ = command.__name__, command.__doc__
    return run


@app.command()
@with_config_options
def train(config: ConfigFile = None, output: Output = Path("runs/train"), **options: Any) -> None:
    """Train a classifier, printing a line of metrics per epoch, and save it as OUTPUT/model.pt."""
    settings = make_config({**(read_config(config) if config else {}), **options})

    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from emr_training import trainer
    from emr_training.checkpoint import save_checkpoint
    from emr_training.data import load_digits
    from emr_training.reporting import environment, metrics_line, write_json

    splits = load_digits(settings.seed)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task(f"{settings.method} on {splits.name}", total=settings.epochs)

        def on_epoch(metrics: trainer.EpochMetrics) -> None:
            progress.console.print(metrics_line(metrics, settings.epochs), highlight=False, soft_wrap=True)
            progress.advance(task)

        result = trainer.train(settings, splits.train, splits.validation, splits.classes, on_epoch=on_epoch)
    last = result.history[-1].as_dict()
    save_checkpoint(
        output / "model.pt",
        result.model,
        settings,
        input_shape=splits.input_shape,
        classes=splits.classes,
        metrics=last,
    )
    record = {
        "config": settings.model_dump(),
        "environment": environment(),
        "engine": result.engine,
        "seconds": round(result.seconds, 3),
        "history": [metrics.as_dict() for metrics in result.history],
    }
    write_json(output / "metrics.json", record)
    console.print(f"{result.seconds:.1f} s; saved {output / 'model.pt'} and metrics.json", highlight=False)


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
    checkpoint: Annotated[Path, typer.Argument(help="A checkpoint of `emr train` or `emr demo`.")],
    epsilon: Annotated[list[float], typer.Option(help="Linf radius, in [0, 1] pixel units; repeatable.")] = (
        0.1,
        0.2,
    ),  # type: ignore[assignment]
    steps: Annotated[int, typer.Option(min=1, help="PGD steps.")] = 50,
    restarts: Annotated[int, typer.Option(min=1, help="PGD restarts.")] = 10,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the attack's random starts.")] = 0,
    output: Annotated[Path | None, typer.Option(help="Also write the results to this JSON file.")] = None,
) -> None:
    """Report a checkpoint's clean and robust accuracy and effective margins on its test split."""
    from emr_training import evaluation
    from emr_training.attacks import PGD
    from emr_training.checkpoint import load_checkpoint
    from emr_training.data import load_digits
    from emr_training.reporting import environment, evaluation_table, write_json

    attack = PGD(0.0, steps, restarts=restarts, seed=seed)
    loaded = load_checkpoint(checkpoint)
    test = load_digits(loaded.config.seed).test
    result = evaluation.evaluate(loaded.model, test, epsilon, attack)
    console.print(evaluation_table({loaded.config.method: result}, f"PGD-{steps}"))
    low, high = result.clean.interval()
    intervals = [f"clean {100 * low:.1f} to {100 * high:.1f}%"]
    for radius, accuracy in result.robust.items():
        low, high = accuracy.interval()
        intervals.append(f"ε = {radius:g} {100 * low:.1f} to {100 * high:.1f}%")
    console.print(
        f"{len(test)} test digits, {restarts} restarts; 95% intervals: {', '.join(intervals)}",
        style="dim",
        highlight=False,
    )
    if output is not None:
        record = {
            "checkpoint": str(checkpoint),
            "config": loaded.config.model_dump(),
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
    try:
        app()
    except (ConfigError, ValueError, FileNotFoundError) as error:
        for line in str(error).splitlines():
            Console(stderr=True).print(f"error: {line}", style="red", highlight=False, soft_wrap=True)
        sys.exit(2)
