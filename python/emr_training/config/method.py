"""How it is trained: defense, attack and penalties."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from emr_training.config.section import Number, Section


class AttackConfig(Section):
    """The attack that makes training examples."""

    name: Literal["pgd", "rfgsm", "fgsm"] = Field(
        "pgd", description="pgd; rfgsm: one step from a random start, as in fast adversarial training; or fgsm."
    )
    norm: Literal["Linf", "L2", "L1"] = Field("Linf", description="In which epsilon is measured.")
    epsilon: Number = Field(0.15, ge=0, description="Radius, in units of the [0, 1] pixels; 8/255 may be written so.")
    steps: int = Field(7, ge=1, description="PGD steps.")
    step_size: Number | None = Field(
        None, gt=0, description="In the same units; null: 2.5 * epsilon / steps, for rfgsm 1.25 * epsilon."
    )
    warmup: int = Field(
        0, ge=0, description="Epochs in which radius and step size rise in equal parts; whole in the last of them."
    )
    loss: Literal["ce", "cw", "dlr", "kl"] | None = Field(
        None, description="What the attack increases; null: kl for TRADES, ce for the others."
    )
    random_start: bool = Field(True, description="PGD: start from a random point of the ball.")
    start_std: Number | None = Field(
        None, ge=0, description="PGD: a Gaussian start of this standard deviation instead of a uniform one."
    )
    restarts: int = Field(1, ge=1, description="PGD: independent runs.")
    bn_mode: Literal["eval", "train"] = Field(
        "eval", description="BatchNorm during the attack; train uses batch statistics and moves the running ones."
    )
    precision: Literal["ambient", "float32", "bfloat16", "float16"] = Field(
        "ambient", description="Of the search; ambient: as the training step."
    )
    engine: Literal["auto", "autograd"] = Field("auto", description="auto: the linearized program where exact.")


class MAILConfig(Section):
    """Weights of samples by their probabilistic margins."""

    slope: float = Field(10.0, description="How sharply the weight depends on the margin.")
    bias: float = Field(-0.5, description="Where the weight is half of its largest, in margins.")
    normalize: bool = Field(False, description="Divide by the batch's mean, as the paper; else weights up to 3.")


class BurnInConfig(Section):
    """Another defense in the first epochs."""

    epoch: int = Field(76, ge=1, description="The first epoch (from 1) of the defense proper.")
    name: Literal["standard", "at", "trades", "mart"] = Field("at", description="Defense in the epochs before.")
    attack: AttackConfig | None = Field(None, description="Its attack; null: the run's.")


class DefenseConfig(Section):
    """The training loss."""

    name: Literal["standard", "at", "trades", "mart"] = Field(
        "standard", description="standard: clean images; at: adversarial images; trades; mart."
    )
    beta: float = Field(6.0, ge=0, description="Weight of TRADES's and MART's divergence.")
    smoothing: float = Field(0.0, ge=0, lt=1, description="Label smoothing (standard, at, trades).")
    mail: MAILConfig | None = Field(None, description="MAIL's sample weights, on at, trades or mart.")
    burn_in: BurnInConfig | None = None
    clean_forward: bool = Field(
        False, description="at: clean images also pass, for BatchNorm alone, as the released MAIL code."
    )
    clean_forwards: Literal[1, 2] = Field(1, description="trades: 2 runs the clean images twice, as the released code.")
    nominal_batch: bool = Field(
        False, description="trades: divide the divergences by trainer.batch_size in a short batch, too."
    )
    logit_margin: float = Field(
        0.0, ge=0, description="Taken off the label's logit: Hypersphere Embedding's scale * m (standard, at, trades)."
    )

    @model_validator(mode="before")
    @classmethod
    def _by_name(cls, value: Any) -> Any:
        return {"name": value} if isinstance(value, str) else value

    @model_validator(mode="after")
    def _consistent(self) -> DefenseConfig:
        if self.mail is not None and self.name == "standard":
            raise ValueError("expected at, trades or mart beside mail: its weights need adversarial examples")
        for option in ("smoothing", "logit_margin"):
            if self.name == "mart" and getattr(self, option):
                raise ValueError(f"{option} is {getattr(self, option)} with mart; expected 0, as its loss has none")
        return self


class PenaltyConfig(Section):
    """A penalty's weight, and when it falls."""

    strength: float = Field(1.0, ge=0, description="Weight in the loss.")
    milestones: tuple[int, ...] = Field(
        (), description="Epochs (from 1) at whose start the strength is multiplied by gamma."
    )
    gamma: float = Field(0.1, ge=0, description="What it is multiplied by at each milestone.")

    def at_epoch(self, epoch: int) -> float:
        """The strength in this epoch (the first is 1)."""
        return self.strength * self.gamma ** sum(epoch >= m for m in self.milestones)


class EMRConfig(PenaltyConfig):
    """Effective Margin Regularization."""

    strength: float = Field(3.0, ge=0, description="Weight in the loss: lambda.")
    temperature: float = Field(1.0, gt=0, description="Of the softmax that mixes effective weights.")
    direction: Literal["softmax", "label", "margin", "all", "random"] = Field(
        "softmax", description="Whose effective weight."
    )
    reduction: Literal["paper", "mean", "sum"] = Field("paper", description="paper: the mean divided by the batch.")
    center: bool = Field(False, description="Leave the mean logit's part out of the mix.")
    layers: tuple[str, ...] = Field(("input",), description="Where weights are taken: input, or names of modules.")
    subset: float = Field(1.0, gt=0, le=1, description="Fraction of the batch, drawn anew each time; unbiased.")
    every: int = Field(1, ge=1, description="Only at every n-th step, times n.")
    graph: bool = Field(False, description="Replay the passes as a CUDA graph.")


class InputGradientConfig(PenaltyConfig):
    """The squared input gradient of cross-entropy."""

    reduction: Literal["paper", "mean"] = Field("paper", description="paper: the mean divided by the batch.")


class JacobianConfig(PenaltyConfig):
    """The squared Jacobian of the logits."""

    strength: float = Field(0.01, ge=0, description="Weight in the loss.")
    projections: int | None = Field(1, ge=1, description="Random projections; null: exact.")


class FiniteDifferenceConfig(PenaltyConfig):
    """The squared slope of the loss along its gradient, by a finite difference."""

    strength: float = Field(0.1, ge=0, description="Weight in the loss.")
    norm: Literal["L2", "L1", "Linf"] = Field("L2", description="Of the gradient: L1 for Linf threats.")
    h: float = Field(0.01, gt=0, description="Step of the difference.")
    central: bool = Field(False, description="Central instead of forward difference.")


class LLRConfig(PenaltyConfig):
    """Local linearity regularisation."""

    strength: float = Field(4.0, ge=0, description="Weight in the loss: lambda.")
    epsilon: Number | None = Field(None, ge=0, description="Radius of the Linf ball; null: attack.epsilon.")
    ratio: float = Field(0.75, ge=0, description="Mu divided by lambda.")
    steps: int = Field(2, ge=1, description="Of the inner search.")


class WEISSIConfig(PenaltyConfig):
    """The penalty of weights that rescaling layers does not change."""

    strength: float = Field(1e-3, ge=0, description="Weight in the loss.")
    sparsity: float = Field(0.0, ge=0, description="Weight of the sparsity term.")
    norm: Literal["frobenius", "spectral"] = Field("frobenius", description="Of a layer's weights.")


class PenaltiesConfig(Section):
    """Terms added to the defense's loss; null: none."""

    emr: EMRConfig | None = None
    input_gradient: InputGradientConfig | None = None
    jacobian: JacobianConfig | None = None
    finite_difference: FiniteDifferenceConfig | None = None
    llr: LLRConfig | None = None
    weissi: WEISSIConfig | None = None

    def given(self) -> dict[str, PenaltyConfig]:
        """The penalties that are there, by name."""
        return {name: value for name in type(self).model_fields if (value := getattr(self, name)) is not None}
