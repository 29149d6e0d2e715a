"""The demo: four methods on real digits, compared on clean and robust accuracy and on effective margins."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress

from emr_training.attacks import PGD
from emr_training.checkpoint import save_checkpoint
from emr_training.config import RunConfig, make_config
from emr_training.data import Splits, load_digits
from emr_training.evaluation import Accuracy, Evaluation, Settings, evaluate, robust_curve
from emr_training.reporting import (
    accuracy_curves,
    environment,
    evaluation_table,
    margin_distributions,
    training_curves,
    write_json,
)
from emr_training.selection import ATTACK_STEPS, CRITERION, Selection, select
from emr_training.training import TrainResult, train

METHODS: dict[str, dict[str, Any]] = {
    "Standard": {},
    "EMR": {"penalties": {"emr": {}}},
    "AT": {"defense": "at"},
    "AT-EMR": {"defense": "at", "penalties": {"emr": {}}},
}


@dataclass(frozen=True)
class DemoSettings:
    """What the demo runs. Epsilons and spacing are Linf radii in units of the [0, 1] pixel range."""

    seed: int = 0
    epochs: int = 40
    epsilons: tuple[float, ...] = (0.1, 0.2)
    attack_steps: int = 50
    attack_restarts: int = 10
    curve_spacing: float = 0.025
    temperatures: tuple[float, ...] = (0.1, 1.0)
    strengths: tuple[float, ...] = (3.0, 10.0, 30.0)
    strengths_at: tuple[float, ...] = (0.3, 1.0, 3.0)


@dataclass(frozen=True)
class Outcome:
    """One method's training, its evaluation on the test split, and robust accuracy by epsilon."""

    config: RunConfig
    trained: TrainResult
    evaluation: Evaluation
    curve: list[tuple[float, Accuracy]]


def run_demo(output: Path, console: Console, settings: DemoSettings | None = None) -> dict[str, Outcome]:
    """Run the demo, print its table, and write results.json, three figures and four checkpoints to `output`.

    The four runs share the split, initial weights, order of batches, epochs and optimiser. EMR's strength
    and temperature are chosen on the validation split, separately for EMR and AT-EMR; the test split is
    first used when all choices are made.
    """
    started = time.perf_counter()
    settings = settings or DemoSettings()
    splits = load_digits(settings.seed)
    chosen, selections, selection_seconds = _choose(splits, settings, console)
    outcomes = _run_all(splits, chosen, settings, console)
    _draw(output, outcomes, splits, settings)
    seconds = time.perf_counter() - started
    for outcome in outcomes.values():
        save_checkpoint(
            output / f"{outcome.config.method}.pt",
            outcome.trained.model,
            outcome.config,
            input_shape=splits.input_shape,
            classes=splits.classes,
            metrics=outcome.trained.history[-1].as_dict(),
        )
    report = _report(splits, settings, selections, outcomes)
    report["seconds"] = {"total": round(seconds, 2), "selection": round(selection_seconds, 2)}
    write_json(output / "results.json", report)
    _print(console, output, splits, settings, outcomes, seconds)
    return outcomes


def _choose(
    splits: Splits, settings: DemoSettings, console: Console
) -> tuple[dict[str, RunConfig], dict[str, Selection], float]:
    """Each method's config, with EMR's selections and the seconds they took."""
    started = time.perf_counter()
    configs = {
        name: make_config({**options, "trainer": {"epochs": settings.epochs, "seed": settings.seed}})
        for name, options in METHODS.items()
    }
    strengths = {"EMR": settings.strengths, "AT-EMR": settings.strengths_at}
    total = len(settings.temperatures) * sum(map(len, strengths.values()))
    selections = {}
    with Progress(console=console, transient=True) as progress:
        task = progress.add_task("", total=total)
        for name, sweep in strengths.items():
            progress.update(task, description=f"choosing {name}'s strength and temperature on validation")
            selections[name] = select(
                configs[name],
                splits.train,
                splits.held,
                splits.classes,
                strengths=sweep,
                temperatures=settings.temperatures,
                epsilons=settings.epsilons,
                on_candidate=lambda _: progress.advance(task),
            )
            configs[name] = selections[name].config
    return configs, selections, time.perf_counter() - started


def _run_all(
    splits: Splits, configs: dict[str, RunConfig], settings: DemoSettings, console: Console
) -> dict[str, Outcome]:
    attack_name = f"pgd{settings.attack_steps}x{settings.attack_restarts}"
    measured = Settings((attack_name,), settings.epsilons, seed=settings.seed, batch_size=1024)
    attack = PGD(0.0, settings.attack_steps, restarts=settings.attack_restarts, seed=settings.seed)
    outcomes = {}
    with Progress(console=console, transient=True) as progress:
        task = progress.add_task("", total=len(configs) * (settings.epochs + 2))
        for name, config in configs.items():
            progress.update(task, description=f"training {name}")
            trained = train(
                config,
                splits.train,
                splits.held,
                splits.classes,
                on_epoch=lambda _: progress.advance(task),
            )
            test = splits.test.to(next(trained.model.parameters()).device)
            progress.update(task, description=f"attacking {name}")
            evaluation = evaluate(trained.model, test, measured)
            progress.advance(task)
            curve = robust_curve(trained.model, test, attack, settings.curve_spacing, evaluation.robust(attack_name))
            progress.advance(task)
            outcomes[name] = Outcome(config, trained, evaluation, curve)
    return outcomes


def _draw(output: Path, outcomes: dict[str, Outcome], splits: Splits, settings: DemoSettings) -> None:
    test = f"{len(splits.test)} test digits, MLP, seed {settings.seed}"
    margins = {name: outcome.evaluation.margins[0].margins for name, outcome in outcomes.items()}
    margin_distributions(
        output / "effective_margins.png", margins, f"{test}. Solid vertical line: median. Right is safer."
    )
    curves = {name: outcome.curve for name, outcome in outcomes.items()}
    accuracy_curves(
        output / "robust_accuracy.png",
        curves,
        settings.epsilons,
        f"{_attack_name(settings)}, {test}. Bands: one binomial standard error. Dotted: the table's ε.",
    )
    histories = {name: outcome.trained.history for name, outcome in outcomes.items()}
    epsilon = outcomes["AT"].config.attack.epsilon
    training_curves(
        output / "training_curves.png",
        histories,
        f"{len(splits.train)} training and {len(splits.held)} validation digits, MLP, "
        f"seed {settings.seed}; AT and PGD-10 at ε = {epsilon:g}. "
        "The cross-entropy is that trained on: adversarial for AT and AT-EMR.",
    )


def _report(
    splits: Splits, settings: DemoSettings, selections: dict[str, Selection], outcomes: dict[str, Outcome]
) -> dict[str, Any]:
    return {
        "settings": vars(settings),
        "environment": environment(),
        "data": {
            "name": splits.name,
            "train": len(splits.train),
            "validation": len(splits.held),
            "test": len(splits.test),
        },
        "selection": {
            "criterion": CRITERION,
            "attack": f"PGD-{ATTACK_STEPS}",
            "epsilons": list(settings.epsilons),
            "methods": {
                name: {
                    "strength": selection.chosen.strength,
                    "temperature": selection.chosen.temperature,
                    "without_emr": selection.reference.as_dict(),
                    "candidates": [candidate.as_dict() for candidate in selection.candidates],
                }
                for name, selection in selections.items()
            },
        },
        "methods": {
            name: {
                "config": outcome.config.model_dump(mode="json"),
                "engine": outcome.trained.engine,
                "training_seconds": round(outcome.trained.seconds, 3),
                "costs": vars(outcome.trained.costs),
                "test": outcome.evaluation.as_dict(),
                "robust_accuracy_curve": [
                    {"epsilon": epsilon, **accuracy.as_dict()} for epsilon, accuracy in outcome.curve
                ],
                "history": [metrics.as_dict() for metrics in outcome.trained.history],
            }
            for name, outcome in outcomes.items()
        },
    }


def _print(
    console: Console,
    output: Path,
    splits: Splits,
    settings: DemoSettings,
    outcomes: dict[str, Outcome],
    seconds: float,
) -> None:
    chosen = [
        "-" if emr is None else f"λ={emr.strength:g} T={emr.temperature:g}"
        for emr in (outcome.config.penalties.emr for outcome in outcomes.values())
    ]
    rows = {name: outcome.evaluation for name, outcome in outcomes.items()}
    title = (
        f"scikit-learn digits, MLP, {settings.epochs} epochs, seed {settings.seed}; "
        f"adversarial training at ε={outcomes['AT'].config.attack.epsilon:g}"
    )
    worst = 50 / len(splits.test) ** 0.5
    notes = [
        f"Test split: {len(splits.test)} digits. ± is one binomial standard error, at most {worst:.1f} "
        "points: do not rank methods by less.",
        f"Attack: PGD, {settings.attack_steps} steps, {settings.attack_restarts} restarts; "
        "ε is an L∞ radius in units of the [0, 1] pixels.",
        "Effective margin and weight norm (L2) are medians at the clean test images; the norm is that of the "
        "class mix softmax(logits).",
        f"λ (strength) and T (temperature) were chosen on {len(splits.held)} validation digits: {CRITERION}.",
        f"{seconds:.0f} s in all; EMR's engine: {outcomes['EMR'].trained.engine}. "
        f"Figures, checkpoints and results.json are in {output}.",
    ]
    console.print()
    console.print(evaluation_table(rows, chosen=chosen, title=title))
    for note in notes:
        console.print(note, style="dim", highlight=False)


def _attack_name(settings: DemoSettings) -> str:
    return f"PGD-{settings.attack_steps}, {settings.attack_restarts} restarts"
