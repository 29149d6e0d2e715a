"""The options of the penalty, checked before any work."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from emr_kernels.directions import DIRECTIONS, NEEDS_LABELS

REDUCTIONS = ("paper", "mean", "sum", "none")
CHECKS = ("auto", "always", "never")


@dataclass(frozen=True)
class PenaltyOptions:
    """See `emr_kernels.EffectiveWeightPenalty` for their meaning.

    Raises:
        TypeError, ValueError: naming the option, its value and what was expected.
    """

    temperature: float = 40.0
    direction: str = "softmax"
    reduction: str = "paper"
    layers: tuple[str, ...] = ("input",)
    subset: float = 1.0
    every: int = 1
    center: bool = False
    batch_size: int | None = None
    checks: str = "auto"
    graph: bool = False

    def __post_init__(self) -> None:
        _one_of("direction", self.direction, DIRECTIONS)
        _one_of("reduction", self.reduction, REDUCTIONS)
        _one_of("checks", self.checks, CHECKS)
        number("temperature", self.temperature)
        if not self.temperature > 0:
            raise ValueError(f"temperature is {self.temperature}; expected a number > 0")
        number("subset", self.subset)
        if not 0 < self.subset <= 1:
            raise ValueError(f"subset is {self.subset}; expected a fraction of the batch in (0, 1]")
        whole("every", self.every)
        if self.batch_size is not None:
            whole("batch_size", self.batch_size)
        for name in ("center", "graph"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"{name} is {getattr(self, name)!r}; expected True or False")
        if isinstance(self.layers, str) or not isinstance(self.layers, Sequence):
            raise TypeError(f"layers is {self.layers!r}; expected a sequence of names, 'input' or modules")
        if not self.layers:
            raise ValueError("layers is empty; expected 'input' and/or names of modules")
        for layer in self.layers:
            if not isinstance(layer, str):
                raise TypeError(f"layers holds {layer!r}; expected names, 'input' or modules")
        if len(set(self.layers)) != len(self.layers):
            raise ValueError(f"layers is {tuple(self.layers)}; expected each name once")
        object.__setattr__(self, "layers", tuple(self.layers))

    @property
    def moves(self) -> bool:
        """Whether the class mix is differentiated, too, rather than held constant."""
        return self.direction == "cross_entropy"

    @property
    def needs_labels(self) -> bool:
        """Whether the direction is defined by the labels."""
        return self.direction in NEEDS_LABELS

    def factor(self, computed: int, batch: int) -> float:
        """What multiplies the sum of squared norms r_i over the `computed` samples out of a batch.

        paper: (1/B) · mean_i r_i with B the nominal batch size (the batch's own if none is given), which is the
        released code's ‖∇_x (1/N) Σ_i p_i · f(x_i)‖², summed over the batch. With a subset the mean over it
        stands for the mean over the batch.
        """
        if self.reduction == "paper":
            return 1 / (computed * (self.batch_size or batch))
        return 1 / computed if self.reduction == "mean" else batch / computed


def number(name: str, value: object) -> None:
    """`value` is a real number, not a NaN."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} is {value!r}; expected a number")
    if math.isnan(value) or math.isinf(value):
        raise ValueError(f"{name} is {value}; expected a finite number")


def whole(name: str, value: object) -> None:
    """`value` is a whole number of at least one."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} is {value!r}; expected a whole number")
    if value < 1:
        raise ValueError(f"{name} is {value}; expected at least 1")


def _one_of(name: str, value: object, known: tuple[str, ...]) -> None:
    if not isinstance(value, str) or value not in known:
        raise ValueError(f"{name} is {value!r}; expected one of {', '.join(map(repr, known))}")
