"""The command line: `emr` with its commands, which `emr --help` lists."""

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
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Start anew, whatever run OUTPUT holds.")] = False,
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

    from emr_kernels import keep_memory
    from emr_training.training.command import run

    keep_memory()
    stopped = run(settings, output, console, resume=resume, overwrite=overwrite)
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


@app.command(name="options")
def list_options(
    containing: Annotated[list[str] | None, typer.Argument(help="Only those with all of these in their keys.")] = None,
) -> None:
    """List every option of `emr train` as KEY=DEFAULT with what it is."""
    from emr_training.config.listing import options

    shown = [option for option in options() if all(part in option.key for part in containing or ())]
    if not shown:
        raise ConfigError(f"no option has {' and '.join(containing or ())} in its key")
    for option in shown:
        console.print(f"{option.key}={option.default}", style="bold", highlight=False, soft_wrap=True, markup=False)
        console.print(f"    {option.description}", highlight=False, soft_wrap=True, markup=False)


@app.command()
def demo(
    output: Annotated[Path, typer.Option(help="Folder for figures, checkpoints and results.json.")] = Path("runs/demo"),
    seed: Annotated[int, typer.Option(min=0, help="Seed of everything random.")] = 0,
    epochs: Annotated[int, typer.Option(min=1, help="Epochs of every run, also while choosing settings.")] = 40,
) -> None:
    """Compare standard, EMR, AT and AT-EMR training on real digits: one table, three figures."""
    from emr_kernels import keep_memory
    from emr_training.demo import DemoSettings, run_demo

    keep_memory()
    run_demo(output, console, DemoSettings(seed=seed, epochs=epochs))


@app.command()
def evaluate(
    subject: Annotated[Path, typer.Argument(help="A run's folder, a checkpoint, or published weights with --model.")],
    changes: Annotated[
        list[str] | None,
        typer.Argument(metavar="KEY.SUB=VALUE...", help="Options of the data, such as data.root=DIR, or of a --model."),
    ] = None,
    attacks: Annotated[
        str,
        typer.Option(
            help="Of: clean, fgsm, pgdN, pgdNxR (R restarts), cw (the margin loss, 100 steps), cwN, apgd-ce, apgd-dlr, "
            "apgd-t, fab, fab-t, square, autoattack, autoattack-plus, autoattack-rand, deepfool, cw-l2."
        ),
    ] = "clean,pgd20",
    eps: Annotated[
        list[str] | None, typer.Option(help="Radius, such as 8/255; repeatable. The run's own by default.")
    ] = None,
    norm: Annotated[str | None, typer.Option(help="Linf, L2 or L1. The run's own by default.")] = None,
    images: Annotated[int | None, typer.Option(min=1, help="Only the first so many test images.")] = None,
    model: Annotated[str | None, typer.Option(help="Short for model.name: the architecture of the weights.")] = None,
    data: Annotated[str | None, typer.Option(help="Short for data.name.")] = None,
    checkpoint: Annotated[str | None, typer.Option(help="best or last, of a run's folder; the best if any.")] = None,
    margins: Annotated[bool, typer.Option(help="Measure effective margins and weight norms.")] = True,
    margin_norm: Annotated[str, typer.Option(help="In which effective margins are distances.")] = "L2",
    batch_size: Annotated[int, typer.Option(min=1, help="Images at a time.")] = 500,
    precision: Annotated[str, typer.Option(help="Of the attacks' search: float32, bfloat16, float16.")] = "float32",
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    seed: Annotated[int, typer.Option(min=0, help="Of the attacks.")] = 0,
    output: Annotated[Path | None, typer.Option(help="JSON file; by default beside the weights.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Start anew, whatever that file holds.")] = False,
    trust: Annotated[bool, typer.Option("--trust", help="Import the model or data that a checkpoint names.")] = False,
) -> None:
    """Measure accuracy under attacks, margins, weight norms and costs on the test images.

    Results are kept as attacks end: what the output holds is not repeated, and a killed AutoAttack goes on.
    """
    from emr_kernels import keep_memory
    from emr_training.evaluation import Settings
    from emr_training.evaluation.command import Job, parse_epsilons, pick_device, run
    from emr_training.evaluation.names import parse_attacks
    from emr_training.evaluation.subject import load_subject

    options: dict[str, Any] = {}
    for change in changes or ():
        key, value = parse_override(change)
        options = merge(options, {key: value})
    for key, given in (("model.name", model), ("data.name", data)):
        if given is not None:
            options = merge(options, {key: given})
    names = parse_attacks(attacks)
    keep_memory()
    loaded = load_subject(subject, options, which=checkpoint, trust=trust)
    settings = Settings(
        names,
        parse_epsilons(eps or (), loaded),
        norm or loaded.config.attack.norm,  # type: ignore[arg-type]
        seed,
        batch_size,
        precision,  # type: ignore[arg-type]
        margins,
        margin_norm,  # type: ignore[arg-type]
    )
    run(loaded, Job(settings, pick_device(device), images, output, overwrite), console)


@app.command()
def compare(
    runs: Annotated[list[Path], typer.Argument(help="Runs' folders, weights, or the JSON files of `emr evaluate`.")],
    output: Annotated[Path, typer.Option(help="Folder for comparison.json and figures.")] = Path("runs/comparison"),
) -> None:
    """Put the evaluations of several runs into one table and two figures."""
    from emr_training.evaluation.compare import compare as compare_runs

    compare_runs(runs, output, console)


@app.command(name="export-robustbench")
def export_robustbench(
    run: Annotated[Path, typer.Argument(help="A run's folder, weights, or the JSON file of `emr evaluate`.")],
    name: Annotated[str, typer.Option(help="The model's name in the zoo, such as Carmon2019Unlabeled.")] = "",
    title: Annotated[str, typer.Option(help="Of the paper.")] = "",
    authors: Annotated[str, typer.Option(help="Of the paper, separated by commas.")] = "",
    link: Annotated[str, typer.Option(help="Of the paper.")] = "",
    venue: Annotated[str, typer.Option(help="Such as 'BMVC 2022'.")] = "",
    checkpoint: Annotated[str, typer.Option(help="Address of the weights and the code.")] = "",
    additional_data: Annotated[
        bool | None, typer.Option(help="Whether other data was used in training; by default as the run says.")
    ] = None,
    reported: Annotated[float | None, typer.Option(help="Robust accuracy of the paper, percent.")] = None,
    eps: Annotated[str | None, typer.Option(help="Which radius, where AutoAttack ran at several.")] = None,
    partial: Annotated[bool, typer.Option("--partial", help="Though not all test images were evaluated.")] = False,
    output: Annotated[Path | None, typer.Option(help="Folder; by default robustbench/ beside the run.")] = None,
) -> None:
    """Write RobustBench's model-zoo JSON and the text of a submission, from a run's AutoAttack evaluation."""
    from emr_training.evaluation.names import parse_epsilon
    from emr_training.evaluation.robustbench import Paper, export

    paper = Paper(title, authors, link, venue, name, checkpoint, additional_data, reported)
    export(run, paper, output, console, epsilon=None if eps is None else parse_epsilon(eps), partial=partial)


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
