"""What every attack shares: its call, and what is checked before and after the search."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import KW_ONLY, dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from emr_training.attacks.balls import Ball, Norm, check_in_box
from emr_training.attacks.classifier import ENGINES, PRECISIONS, Classifier, Engine, Model, Precision
from emr_training.attacks.problem import Problem
from emr_training.attacks.tally import record
from emr_training.errors import check_count, check_images, check_targets, nearest
from emr_training.guard import bare, left_as_found


@dataclass(frozen=True)
class Attack(ABC):
    """Finds, for each image, a misclassified one nearby; called as `attack(model, x, y) -> x_adv`.

    The model, its gradients, modes and BatchNorm statistics, and the global random state are as before afterwards,
    also when the call ends by an exception.

    seed: of the random numbers, where the call is given no generator.
    bn_mode: "eval": every module in evaluation mode during the attack. "train": every module stays in the mode it is
        in, as in codes that attack a model in training mode: there BatchNorm normalises by the statistics of the batch
        that is attacked, each forward of the attack moves its running statistics (they are not put back), and dropout
        is active. The loss is then that of the batch: images depend on each other.
    precision: of the search: "ambient" as the caller's autocast says, else autocast to this dtype ("float32": off).
        A success counts only once the model itself, without autocast, agrees.
    engine: "auto" runs the model as a linearized program where that is exact, "autograd" never does.
    """

    _: KW_ONLY
    seed: int = 0
    bn_mode: Literal["eval", "train"] = "eval"
    precision: Precision = "ambient"
    engine: Engine = "auto"

    #: Whether the attack takes a target class for each image.
    targetable: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_count("seed", self.seed, low=0)
        for name, choices in (("bn_mode", ("eval", "train")), ("precision", PRECISIONS), ("engine", ENGINES)):
            check_choice(name, getattr(self, name), choices)

    def __call__(
        self,
        model: Model,
        x: Tensor,
        y: Tensor,
        *,
        target: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Adversarial examples [N, ...], like x and detached.

        Args:
            model: returns logits [N, C] and holds its input normalisation inside: an nn.Module, or any callable (whose
                modes and statistics are then the caller's business).
            x: images [N, ...] in [0, 1].
            y: labels [N], int64.
            target: classes [N], int64, that the images are to be taken for; None: any but the label.
            generator: source of random numbers, on x's device; None: a fresh one with `seed`.

        Raises:
            TypeError, ValueError: for an x outside [0, 1], labels or targets out of range, a model that returns no
                logits [N, C] or NaN, or that has no gradient.
        """
        check_images(x, y)
        self.check_shape(x)
        if target is not None:
            if not self.targetable:
                raise ValueError(f"target is given; expected None, as {type(self).__name__} has no targeted form")
            check_targets(target, y)
        if generator is None:
            generator = torch.Generator(x.device).manual_seed(self.seed)
        if not callable(model):
            raise TypeError(f"model is of type {type(model).__name__}; expected a callable that returns logits [N, C]")
        if x.numel() == 0:
            return x.detach().clone()
        if isinstance(model, nn.Module):
            model = bare(model)
        evaluation = self.bn_mode == "eval"
        with left_as_found(model, x.device, evaluation=evaluation):
            # Tensors made in inference mode cannot take part in autograd; copies made outside of it can.
            x, y = x.detach().clone(), y.clone()
            target = None if target is None else target.clone()
            classifier = Classifier(model, self.engine, self.precision, evaluation=evaluation)
            x_adv = self.search(Problem(classifier, x, y, target, generator))
        record(classifier.forwards, classifier.backwards)
        return self.verify(x_adv.detach(), x)

    def check_shape(self, x: Tensor) -> None:  # noqa: B027
        """Raise ValueError unless the attack takes images of this shape; most take any."""

    @abstractmethod
    def search(self, problem: Problem) -> Tensor:
        """Adversarial examples for a problem of at least one image."""

    def verify(self, x_adv: Tensor, x: Tensor) -> Tensor:
        """Return x_adv; raise RuntimeError if it is not where the attack promises."""
        return check_in_box(x_adv)


@dataclass(frozen=True)
class BoundedAttack(Attack):
    """An attack within `epsilon` of the image, in units of the [0, 1] pixel range.

    norm: "Linf", "L2" or "L1", in which epsilon is measured.
    """

    epsilon: float
    _: KW_ONLY
    norm: Norm = "Linf"

    def __post_init__(self) -> None:
        super().__post_init__()
        Ball(self.norm, self.epsilon)

    @property
    def ball(self) -> Ball:
        """Where the attack may go."""
        return Ball(self.norm, self.epsilon)

    def verify(self, x_adv: Tensor, x: Tensor) -> Tensor:
        """Return x_adv; raise RuntimeError unless it is in the ball around x and in [0, 1]."""
        return self.ball.check(x_adv, x)


def check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    """Raise ValueError unless `value` is one of `choices`."""
    if value not in choices:
        raise ValueError(f"{name} is {value!r}; {nearest(str(value), list(choices))}")


def per_row(vector: Tensor, like: Tensor) -> Tensor:
    """`vector` [N] shaped to broadcast over the rows of `like` [N, ...]."""
    return vector.view(-1, *[1] * (like.dim() - 1))
