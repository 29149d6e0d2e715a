"""Is it masking? What should not happen to a model whose robustness is real, and a verdict by stated criteria."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import nn

from emr_kernels import effective_margins
from emr_training.attacks import FAB, PGD, AutoAttack, DeepFool, Square
from emr_training.attacks.balls import distance
from emr_training.data import Data
from emr_training.evaluation import clean_accuracy, robust_accuracy, robust_curve
from experiments.jobs import Job
from experiments.mnist.measure import load, radius, unless_diverged
from experiments.mnist.settings import Settings
from experiments.mnist.spec import Spec, first, splits
from experiments.statistics import spearman

#: Points of accuracy (fractions) by which an attack that should be weaker may be ahead, from chance alone.
SLACK = 0.01
#: What ten restarts may gain over one.
RESTART_GAIN = 0.02
#: Least rank correlation of the effective margin with the distance that an attack finds.
LEAST_RHO = 0.5
#: Median of margin over distance: first-order distances of a network without masking are of the true ones' size.
RATIO = (0.5, 2.0)
_STEPS = 40
_BATCH = 500

#: What is asked of a model; each may fail.
CRITERIA = {
    "square": f"Square alone is at most {100 * SLACK:g} point stronger than APGD-CE and APGD-T together, same images",
    "transfer": f"other models' adversarial examples are at most {100 * SLACK:g} point stronger than those attacks",
    "monotone": "PGD's accuracy never rises by more than that from one radius to the next",
    "unbounded": "PGD's accuracy is 0 at some radius up to 1",
    "restarts": f"ten random starts lower PGD's accuracy by at most {100 * RESTART_GAIN:g} points",
    "margin": (
        f"effective margins and FAB's distances have a rank correlation of at least {LEAST_RHO:g}, and the median of "
        f"their ratio is between {RATIO[0]:g} and {RATIO[1]:g}"
    ),
    "warnings": "AutoAttack warns of nothing: no zero gradients, no randomness, no success of Square alone",
}


def diagnosis(output: Path, spec: Spec, sources: tuple[Spec, ...], settings: Settings) -> Job:
    """The job that diagnoses a model; `sources` are those whose adversarial examples are tried on it."""
    path = output / "diagnosis" / f"{spec.name}.json"
    return Job(path, f"diagnose {spec.net}", diagnosed, (output, spec, sources, settings))


@unless_diverged
def diagnosed(output: Path, spec: Spec, sources: tuple[Spec, ...], settings: Settings) -> dict[str, Any]:
    """Everything that `verdict` looks at but AutoAttack's warnings, and the loss around one image."""
    model, epsilon = load(output, spec), radius(spec, settings)
    data = first(splits(settings).test, settings.diagnosed)
    gradients = AutoAttack(
        norm="Linf", eps=epsilon, version="custom", attacks_to_run=settings.white_box, seed=0, verbose=False
    )
    single, many = (PGD(epsilon, _STEPS, restarts=count) for count in (1, settings.restarts))
    pgd = robust_accuracy(model, data, single, _BATCH)
    curve = robust_curve(model, data, PGD(epsilon, _STEPS), settings.curve_spacing, {epsilon: pgd})
    others = [other for other in sources if (output / "models" / f"{other.name}.pt").is_file()]
    return {
        "spec": spec.as_dict(),
        "epsilon": epsilon,
        "images": len(data),
        "white_box": robust_accuracy(model, data, gradients, _BATCH).value,
        "square": robust_accuracy(model, data, Square(epsilon, queries=settings.square_queries), _BATCH).value,
        "square_queries": settings.square_queries,
        "pgd": pgd.value,
        "pgd_restarts": robust_accuracy(model, data, many, _BATCH).value,
        "restarts": settings.restarts,
        "transfer": {source.name: _transferred(load(output, source), model, data, single) for source in others},
        "curve": [[at, accuracy.value] for at, accuracy in curve],
        "distances": _distances(model, first(data, settings.distances)),
        "surface": _surface(model, data, epsilon, settings.surface),
    }


def verdict(found: dict[str, Any], warnings: list[str]) -> dict[str, Any]:
    """Which of the CRITERIA hold, and whether all do. found: of `diagnosed`; warnings: AutoAttack's."""
    curve = [accuracy for _, accuracy in found["curve"]]
    fab = found["distances"]["fab"]
    reference = found["white_box"] - SLACK - 1e-9
    holds = {
        "square": found["square"] >= reference,
        "transfer": all(accuracy >= reference for accuracy in found["transfer"].values()),
        "monotone": all(after <= before + SLACK + 1e-9 for before, after in pairwise(curve)),
        "unbounded": curve[-1] == 0,
        "restarts": found["pgd"] - found["pgd_restarts"] <= RESTART_GAIN + 1e-9,
        "margin": fab["rho"] is not None and fab["rho"] >= LEAST_RHO and RATIO[0] <= fab["median_ratio"] <= RATIO[1],
        "warnings": not warnings,
    }
    failed = [name for name, held in holds.items() if not held]
    return {"criteria": holds, "failed": failed, "verdict": "suspect" if failed else "no sign of masking"}


def _transferred(source: nn.Module, model: nn.Module, data: Data, attack: PGD) -> float:
    """Accuracy of `model` on adversarial examples of `source`."""
    x_adv = attack(source, data.images(), data.y)
    return clean_accuracy(model, Data(x_adv, data.y)).value


def _distances(model: nn.Module, data: Data) -> dict[str, Any]:
    """L2 distances that FAB and DeepFool find against effective margins, of images that are right as they are."""
    x, y = data.images(), data.y
    with torch.no_grad():
        right = model(x).argmax(1) == y
    x, y = x[right], y[right]
    result: dict[str, Any] = {"images": len(y)}
    for name, attack in (("fab", FAB(norm="L2", steps=50)), ("deepfool", DeepFool())):
        if not len(y):
            result[name] = {"successes": 0, "median_distance": None, "median_ratio": None, "rho": None}
            continue
        x_adv = attack(model, x, y)
        with torch.no_grad():
            found = model(x_adv).argmax(1) != y
        away, margins = distance("L2", x_adv, x)[found], effective_margins(model, x, y)[found]
        result[name] = {
            "successes": len(away),
            "median_distance": float(away.median()) if len(away) else None,
            "median_ratio": float((margins / away).median()) if len(away) else None,
            "rho": spearman(margins.tolist(), away.tolist()),
        }
    return result


def _surface(model: nn.Module, data: Data, epsilon: float, points: int) -> dict[str, Any]:
    """The logit margin of the first image that is right, on a plane around it.

    Horizontally along the sign of the gradient, which attacks follow, vertically along random signs; both to 2 epsilon
    on either side. A masked model shows a plateau or noise at the centre and falls only away from the gradient.
    """
    x, y = data.images(), data.y
    with torch.no_grad():
        index = int((model(x).argmax(1) == y).int().argmax())
    image, label = x[index : index + 1].clone().requires_grad_(), y[index : index + 1]
    (gradient,) = torch.autograd.grad(nn.functional.cross_entropy(model(image), label), image)
    random = torch.randint(2, image.shape, generator=torch.Generator().manual_seed(0)) * 2.0 - 1
    offsets = torch.linspace(-2 * epsilon, 2 * epsilon, points)
    steps = torch.cartesian_prod(offsets, offsets).view(-1, 2, *[1] * (image.dim() - 1))
    with torch.no_grad():
        logits = model((image + steps[:, 1] * gradient.sign() + steps[:, 0] * random).clamp(0, 1))
    own = logits[:, int(label)]
    rivals = logits.index_fill(1, label, -torch.inf).amax(1)
    rows = (own - rivals).view(points, points).tolist()
    return {"image": index, "offsets": offsets.tolist(), "margin": [[round(v, 4) for v in row] for row in rows]}
