"""Everything that is measured of one model: accuracies, margins, costs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from torch import nn

from emr_training.data import Data
from emr_training.evaluation.measure import Measure
from emr_training.evaluation.result import Evaluation
from emr_training.evaluation.settings import Settings


def evaluate(model: nn.Module, data: Data, settings: Settings) -> Evaluation:
    """Measure `model` (images in [0, 1] -> logits [N, C]) on `data`, on the device that both are on."""
    return complete(Measure(model, data, settings), settings, None)


def complete(
    measure: Measure,
    settings: Settings,
    before: Evaluation | None,
    on_result: Callable[[Evaluation], object] | None = None,
) -> Evaluation:
    """The evaluation with all that `settings` asks for. What `before` has is not measured again, and stays.

    on_result: called with the evaluation so far after each part.
    """
    if before is None:
        correct, costs = measure.correct()
        before = Evaluation(settings.norm, correct, costs=costs)
    found = before
    for epsilon in (0.0, *settings.epsilons) if settings.margins else ():
        if found.margins_at(epsilon) is None:
            margins, costs = measure.margins(epsilon)
            every = sorted((*found.margins, margins), key=lambda m: m.epsilon)
            found = replace(found, margins=tuple(every), costs=found.costs.plus(costs))
    if on_result is not None:
        on_result(found)
    for name, epsilon in settings.runs():
        if found.find(name, epsilon) is None:
            result = measure.attacked(name, epsilon, found.correct)
            found = replace(found, attacks=(*found.attacks, result))
            if on_result is not None:
                on_result(found)
    return found
