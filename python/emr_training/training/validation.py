"""Validation between epochs: accuracy on clean and on attacked images."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from emr_training.attacks import PGD
from emr_training.config import RunConfig
from emr_training.data import Data
from emr_training.evaluation import clean_accuracy, robust_accuracy


def make_validation_attack(config: RunConfig) -> PGD:
    """The PGD that `config.evaluation` describes."""
    given = config.evaluation
    return PGD(
        config.attack.epsilon if given.epsilon is None else given.epsilon,
        steps=given.steps,
        step_size=given.step_size,
        restarts=given.restarts,
        random_start=given.random_start,
        norm=config.attack.norm,
        keep=given.keep,
        bn_mode=given.bn_mode,
        seed=config.trainer.seed,
    )


class Validation:
    """Accuracies of a model on `data`, of which each of `world` processes measures its share.

    add: the sum of an integer tensor over all processes.
    """

    def __init__(self, config: RunConfig, data: Data, rank: int, world: int, add: Callable[[Tensor], Tensor]) -> None:
        self._attack = make_validation_attack(config)
        self._batch_size = config.evaluation.batch_size
        self._data = data if world == 1 else Data(data.x[rank::world], data.y[rank::world])
        self._total, self._add = len(data), add

    def __len__(self) -> int:
        return self._total

    def measure(self, model: nn.Module) -> tuple[float, float]:
        """Clean and robust accuracy, fractions. The model is left in the mode it is in."""
        robust = robust_accuracy(model, self._data, self._attack, self._batch_size).correct
        clean = clean_accuracy(model, self._data, self._batch_size).correct
        both = self._add(torch.tensor([clean, robust], device=self._data.x.device)).tolist()
        return both[0] / self._total, both[1] / self._total
