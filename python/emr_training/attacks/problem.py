"""What the search of an attack sees: images, labels, targets, and the classifier."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from emr_training.attacks.classifier import At, Classifier
from emr_training.attacks.losses import Loss
from emr_training.attacks.noise import Noise
from emr_training.errors import check_logits


@dataclass(frozen=True)
class Problem:
    """Images x [N, ...] in [0, 1] with labels y [N] (int64), to be misclassified, or classified as `target` [N].

    `generator` (on x's device) is the only source of random numbers, but for `keys` [N] (int64): where they are given,
    the numbers of `noise` are a function of each image's key. The classifier is in the mode that the attack
    asked for, its parameters frozen; whoever calls the search restores it.
    """

    classifier: Classifier
    x: Tensor
    y: Tensor
    target: Tensor | None
    generator: torch.Generator
    keys: Tensor | None = None

    def __len__(self) -> int:
        return self.x.shape[0]

    def subset(self, rows: Tensor) -> Problem:
        """These rows (indices, or a mask [N]) alone."""
        target = None if self.target is None else self.target[rows]
        keys = None if self.keys is None else self.keys[rows]
        return replace(self, x=self.x[rows], y=self.y[rows], target=target, keys=keys)

    def with_target(self, target: Tensor) -> Problem:
        """The same images with target [N]."""
        return replace(self, target=target)

    def noise(self) -> Noise:
        """Random numbers for each image: by its key, or else by one drawn from the generator."""
        if self.keys is not None:
            return Noise(self.keys)
        device = self.generator.device
        return Noise(torch.randint(2**62, (len(self),), generator=self.generator, device=device))

    def _checked(self, logits: Tensor) -> None:
        if not self.classifier.checked:
            check_logits(logits, self.y, self.target)
            self.classifier.checked = True

    def logits(self, x_adv: Tensor) -> Tensor:
        """Logits [N, C] without a gradient, in the search's precision."""
        logits = self.classifier.logits(x_adv)
        self._checked(logits)
        return logits

    def linearized(self, x_adv: Tensor) -> At:
        """Logits [N, C] as `.logits`, and `.vjp(seed [N, C])`, as often as wanted."""
        at = self.classifier.linearized(x_adv)
        self._checked(at.logits)
        return at

    def ascend(self, x_adv: Tensor, loss: Loss) -> tuple[Tensor, Tensor, Tensor]:
        """Logits [N, C], the loss's value [N] and its gradient in x_adv, detached. NaN in the gradient becomes 0."""
        at = self.linearized(x_adv)
        value, seed = loss(at.logits, self.y, self.target)
        self.classifier.backwards += len(x_adv)
        # A NaN moves nothing, rather than spoil the point.
        return at.logits, value, at.vjp(seed).nan_to_num(nan=0.0)

    def judged(self, logits: Tensor, rows: Tensor | None = None) -> Tensor:
        """Which of these logits [m, C], of the images `rows` [m] or of all, are a success, [m]: none with a NaN."""
        predicted = logits.argmax(1)
        y, target = (t if rows is None or t is None else t[rows] for t in (self.y, self.target))
        success = predicted != y if target is None else predicted == target
        nan = logits.isnan().any(1)
        self.classifier.nans = self.classifier.nans + nan.sum()
        return success & ~nan

    def fooled(self, x_adv: Tensor, logits: Tensor) -> Tensor:
        """Which rows of x_adv succeed, [N], given the search's logits there.

        The search may run in low precision or on other kernels than the model's own. What it takes for a success is
        classified again by the model itself, without autocast, and counts only if that agrees.
        """
        success = self.judged(logits)
        if self.classifier.is_plain(x_adv.device):
            return success
        rows = success.nonzero().squeeze(1)
        if rows.numel():
            success[rows] = self.subset(rows).judged(self.classifier.plain_logits(x_adv[rows]))
        return success
