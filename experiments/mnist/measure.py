"""The jobs: training a model, and what is measured of it. Each returns a dictionary for JSON."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import partial, wraps
from math import isfinite
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from emr_kernels import effective_weight_norms, effective_weights
from emr_training.attacks import PGD, AutoAttack
from emr_training.attacks.flags import EvaluationWarning
from emr_training.checkpoint import load_checkpoint, save_checkpoint
from emr_training.data import Data
from emr_training.evaluation import Settings as Measured
from emr_training.evaluation import clean_accuracy, robust_accuracy
from emr_training.evaluation.accuracy import parts
from emr_training.evaluation.measure import Measure
from emr_training.evaluation.result import quartiles
from emr_training.training import TrainingDiverged, train
from experiments.jobs import Job, read
from experiments.mnist.settings import Settings
from experiments.mnist.spec import Spec, configuration, first, splits

_BATCH = 500


def training(output: Path, spec: Spec, settings: Settings) -> Job:
    """The job that trains a model."""
    kind = f"train {spec.net} {spec.defense}{'' if spec.emr is None else '+EMR'}"
    return Job(output / "models" / f"{spec.name}.json", kind, trained, (output, spec, settings))


def validation(output: Path, spec: Spec, settings: Settings) -> Job:
    """The job that attacks a model on validation images."""
    return Job(output / "validation" / f"{spec.name}.json", f"validate {spec.net}", validated, (output, spec, settings))


def attack(output: Path, spec: Spec, epsilon: float, settings: Settings) -> Job:
    """The job that runs AutoAttack at one radius."""
    path = output / "autoattack" / f"{spec.name}_eps{epsilon:g}.json"
    kind = f"AutoAttack {spec.net} {'standard' if spec.defense == 'standard' else 'robust'}"
    return Job(path, kind, attacked, (output, spec, epsilon, settings))


def margins(output: Path, spec: Spec, settings: Settings) -> Job:
    """The job that measures clean accuracy, margins and weight norms."""
    return Job(output / "margins" / f"{spec.name}.json", f"margins {spec.net}", measured, (output, spec, settings))


def radius(spec: Spec, settings: Settings) -> float:
    """At which radius a model is validated and diagnosed: its attack's."""
    return spec.epsilon or settings.standard_epsilon


def load(output: Path, spec: Spec) -> nn.Module:
    """A trained model."""
    return load_checkpoint(output / "models" / f"{spec.name}.pt", trust=True).model


def unless_diverged(function: Callable[..., dict[str, Any]]) -> Callable[..., dict[str, Any]]:
    """Of a model whose training diverged, say so instead of measuring it."""

    @wraps(function)
    def guarded(output: Path, spec: Spec, *others: Any) -> dict[str, Any]:
        reason = read(output / "models" / f"{spec.name}.json")["diverged"]
        if reason is not None:
            return {"spec": spec.as_dict(), "diverged": reason}
        return function(output, spec, *others)

    return guarded


def trained(output: Path, spec: Spec, settings: Settings) -> dict[str, Any]:
    """Train on the training images, and keep the last weights; nothing is chosen along the way."""
    data, config = splits(settings), configuration(spec, settings)
    about = {"spec": spec.as_dict(), "config": config.model_dump(mode="json")}
    try:
        images = data.train if spec.images is None else first(data.train, spec.images)
        result = train(config, images, None, data.classes)
    except TrainingDiverged as error:
        return {**about, "diverged": str(error)}
    if result.stopped is not None:
        raise InterruptedError(f"training of {spec.name} was stopped by {result.stopped}")
    last = result.history[-1].as_dict()
    save_checkpoint(
        output / "models" / f"{spec.name}.pt",
        result.model,
        config,
        input_shape=data.input_shape,
        classes=data.classes,
        metrics=last,
    )
    return {**about, "diverged": None, "engine": result.engine, "last": last, "costs": vars(result.costs)}


@unless_diverged
def validated(output: Path, spec: Spec, settings: Settings) -> dict[str, Any]:
    """Clean and strong-PGD accuracy on the validation images."""
    epsilon, held = radius(spec, settings), splits(settings).held
    model = load(output, spec)
    strong = PGD(epsilon, settings.validation_steps, restarts=settings.validation_restarts)
    clean, robust = clean_accuracy(model, held), robust_accuracy(model, held, strong)
    return {"spec": spec.as_dict(), "epsilon": epsilon, "clean": clean.value, "robust": robust.value}


@unless_diverged
def attacked(output: Path, spec: Spec, epsilon: float, settings: Settings) -> dict[str, Any]:
    """AutoAttack's standard version on the first test images."""
    data = first(splits(settings).test, settings.attacked)
    ensemble = AutoAttack(
        norm="Linf",
        eps=epsilon,
        version="custom" if settings.ensemble else "standard",
        order="standard" if settings.ensemble else "yield",
        attacks_to_run=settings.ensemble,
        seed=0,
        verbose=False,
        batch_size=_BATCH,
    )
    with warnings.catch_warnings():
        # They are in the result.
        warnings.simplefilter("ignore", EvaluationWarning)
        _, result = ensemble.run(load(output, spec), data.images(), data.y)
    found = {k: v for k, v in result.as_dict().items() if k in ("attacks", "version", "order", "warnings")}
    return {
        "spec": spec.as_dict(),
        "epsilon": epsilon,
        "images": len(data),
        "clean": result.clean_accuracy,
        "robust": result.robust_accuracy,
        "robust_images": "".join("01"[name is None] for name in result.broken_by),
        **found,
    }


@unless_diverged
def measured(output: Path, spec: Spec, settings: Settings) -> dict[str, Any]:
    """Clean accuracy on all test images; on the attacked ones margins, clean and attacked, and gradient norms.

    Margins in L2 and in Linf; effective weight norms in L2, of the class mix at temperature 1, at the temperature
    trained with, and of the mean logit, for which methods with a high temperature pay.
    """
    model, everything = load(output, spec), splits(settings).test
    data = first(everything, settings.attacked)
    epsilon = radius(spec, settings)
    result: dict[str, Any] = {
        "spec": spec.as_dict(),
        "images": len(data),
        "test_accuracy": clean_accuracy(model, everything).as_dict(),
        "epsilon": epsilon,
    }
    for norm in ("L2", "Linf"):
        measure = Measure(model, data, Measured(("pgd20",), (epsilon,), batch_size=_BATCH, margin_norm=norm))
        for at, where in ((0.0, "clean"), (epsilon, "attacked")):
            found, _ = measure.margins(at)
            result[f"{where}_{norm}"] = found.quartiles()
            if norm == "L2" and where == "clean":
                result["margins"] = [float(f"{m:.4g}") for m in found.margins.tolist() if isfinite(m)]
    for name, of in (("mean_logit_gradient", _mean_logit), ("gradient_T40", partial(_mix, temperature=40.0))):
        result[name] = quartiles(torch.cat([of(model, part) for part in parts(data, _BATCH)]))
    return result


def _mean_logit(model: nn.Module, data: Data) -> Tensor:
    """The norm of the mean logit's gradient, [N]."""
    return effective_weights(model, data.x).mean(1).flatten(1).norm(dim=1)


def _mix(model: nn.Module, data: Data, temperature: float) -> Tensor:
    """The norm of the class mix's gradient at this temperature, [N]."""
    return effective_weight_norms(model, data.x, temperature=temperature)
