"""`EMRLoss`: a loss on the logits and the effective weight penalty, as one number to differentiate."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from emr_kernels.checks import check_logits
from emr_kernels.options import number
from emr_kernels.penalty import EffectiveWeightPenalty, PenaltyTerms


@dataclass(frozen=True)
class LossTerms(PenaltyTerms):
    """What the last call of `EMRLoss` computed, detached.

    Attributes:
        base_loss: the loss beside the penalty (cross-entropy by default), 0-d.
        total: base_loss + strength · penalty, 0-d.
        logits: `[N, C]`, of the base loss's forward.
        shared_forward: whether that forward served the penalty, too.
    """

    base_loss: torch.Tensor
    total: torch.Tensor
    logits: torch.Tensor
    shared_forward: bool

    @property
    def cross_entropy(self) -> torch.Tensor:
        """The base loss, by the name of the default one."""
        return self.base_loss


BaseLoss = Callable[[torch.Tensor, Any], torch.Tensor]


class EMRLoss(nn.Module):
    """Cross-entropy plus Effective Margin Regularization: base_loss(f(x), y) + strength · R(x).

    The base loss's forward runs first, in the model's own mode (BatchNorm with batch statistics in training mode,
    updating the running ones); then the penalty, with the evaluation statistics as they then are, which is the
    order of the released code (Liu & Chan, BMVC 2022). The defaults are its adversarial-training setting, λ = 3 and
    T = 40; T <= 1 is what enlarges margins without adversarial training.

    Where the model computes the same function in its present mode as in evaluation mode (no BatchNorm and no dropout
    in training mode, no branch on `self.training`, no hooks, no wrapper), one forward serves both, exactly.

    Args:
        model: see `EffectiveWeightPenalty`, which explains every option that is not listed here.
        strength: λ >= 0; may be set between steps.
        base_loss: `(logits [N, C], y) -> 0-d loss`; cross-entropy by default.
        share_forward: False runs the live model for the base loss in any case, as a forward with effects of its own
            (a counter, a stored feature map) needs it.

    Raises:
        TypeError, ValueError: naming the argument, its value and what was expected, before any work.

    Example:
        >>> criterion = EMRLoss(model, strength=3.0, temperature=40.0)
        >>> loss = criterion(x_adv, y)
        >>> loss.backward()
        >>> criterion.last.effective_weight_norms["input"]  # [N]
    """

    def __init__(
        self,
        model: nn.Module,
        strength: float = 3.0,
        temperature: float = 40.0,
        direction: str = "softmax",
        reduction: str = "paper",
        layers: Sequence[str] = ("input",),
        subset: float = 1.0,
        every: int = 1,
        center: bool = False,
        batch_size: int | None = None,
        base_loss: BaseLoss | None = None,
        checks: str = "auto",
        graph: bool = False,
        share_forward: bool = True,
    ) -> None:
        super().__init__()
        self.strength = strength
        if not isinstance(share_forward, bool):
            raise TypeError(f"share_forward is {share_forward!r}; expected True or False")
        self.share_forward = share_forward
        if reduction == "none":
            raise ValueError("reduction is 'none'; expected 'paper', 'mean' or 'sum' (EMRLoss returns one number)")
        if base_loss is not None and not callable(base_loss):
            raise TypeError(f"base_loss is {base_loss!r}; expected a function of logits and y, or None")
        self.penalty = EffectiveWeightPenalty(
            model, temperature, direction, reduction, layers, subset, every, center, batch_size, checks, graph
        )
        self._base_loss = (base_loss,)
        self.last: LossTerms | None = None

    @property
    def strength(self) -> float:
        """λ, the penalty's factor."""
        return self._strength

    @strength.setter
    def strength(self, value: float) -> None:
        number("strength", value)
        if value < 0:
            raise ValueError(f"strength is {value}; expected a number >= 0")
        self._strength = float(value)

    @property
    def model(self) -> nn.Module:
        """The classifier, as it was given."""
        return self.penalty.model

    @property
    def engine(self) -> str:
        """How the penalty is computed: "linearized", "autograd" (double backward), or "unprepared"."""
        return self.penalty.engine

    @property
    def engine_reason(self) -> str | None:
        """Why the engine is "autograd"."""
        return self.penalty.engine_reason

    def extra_repr(self) -> str:
        return f"strength={self.strength}"

    def prepare(self, x: torch.Tensor) -> None:
        """Export the model ahead of the first call, from a batch `[N, ...]` as it will come."""
        self.penalty.prepare(x)

    def refresh(self) -> None:
        """Export the model again at the next call, after a change that its modules and parameters do not show.

        Such as a plain attribute that `forward` branches on, or a forward hook that changes values (hooks run when
        the model is exported, and not again).
        """
        self.penalty.refresh()

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """base_loss + strength · penalty.

        Args:
            x: `[N, ...]`; the adversarial example in adversarial training.
            y: class indices `[N]`; with a base_loss of one's own, whatever that takes.

        Returns:
            0-d; its `backward()` gives every parameter's exact gradient.

        Raises:
            TypeError, ValueError: for bad input, before any work.
        """
        (base_loss,) = self._base_loss
        engine = self.penalty.ready(x, y, base_loss is None or self.penalty.options.needs_labels)
        # Without weight in the loss the penalty is still reported, but needs no gradient.
        differentiated = torch.is_grad_enabled() and self.strength > 0
        shared = self.penalty.with_logits(engine, x, y) if differentiated and self.share_forward else None
        # A copy: the model may write into its input, and the penalty is taken at x.
        logits = self.model(x.clone()) if shared is None else shared[0]
        check_logits(logits, x.shape[0])
        base = F.cross_entropy(logits, y) if base_loss is None else base_loss(logits, y)
        if not isinstance(base, torch.Tensor) or base.dim() != 0:
            found = tuple(base.shape) if isinstance(base, torch.Tensor) else type(base).__name__
            raise ValueError(f"base_loss returns {found}; expected one number (a 0-d tensor)")
        if shared is None:
            with torch.set_grad_enabled(differentiated):
                penalty = self.penalty.compute(engine, x, y)
        else:
            penalty = shared[1]
        total = base + self.strength * penalty
        norms = self.penalty.last.effective_weight_norms if self.penalty.last else {}
        self.last = LossTerms(
            penalty.detach(), norms, base.detach(), total.detach(), logits.detach(), shared is not None
        )
        return total
