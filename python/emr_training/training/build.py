"""From a configuration to the objects that it names."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from emr_training.attacks import FGSM, PGD, RFGSM, Attack
from emr_training.config import RunConfig
from emr_training.config.method import AttackConfig, EMRConfig
from emr_training.config.optimization import OptimizerConfig
from emr_training.defenses import MAIL, MART, PGDAT, TRADES, BurnIn, Defense, Rising, Standard
from emr_training.models import Normalized, build_model
from emr_training.models.hypersphere import with_hypersphere_head
from emr_training.penalties import EMR, LLR, WEISSI, FiniteDifference, InputGradient, Jacobian, Penalty


def make_model(config: RunConfig, input_shape: Sequence[int], classes: int) -> nn.Module:
    """The classifier, its weights drawn from torch's global random state."""
    model = build_model(config.model.name, input_shape, classes, config.model.options)
    if config.model.hypersphere_scale is not None:
        model = with_hypersphere_head(model, config.model.hypersphere_scale)
    if config.model.mean is not None and config.model.std is not None:
        model = Normalized(model, config.model.mean, config.model.std, input_shape[0])
    return model


def make_attack(config: AttackConfig, defense: str) -> Attack:
    """The attack that makes training examples for the defense of this name."""
    common: dict[str, Any] = {name: getattr(config, name) for name in ("norm", "bn_mode", "precision", "engine")}
    loss: Any = config.loss or ("kl" if defense == "trades" else "ce")
    if config.name == "fgsm":
        return FGSM(config.epsilon, loss=loss, **common)
    if config.name == "rfgsm":
        return RFGSM(config.epsilon, loss=loss, step_size=config.step_size, **common)
    return PGD(
        config.epsilon,
        steps=config.steps,
        step_size=config.step_size,
        loss=loss,
        random_start=config.random_start,
        start_std=config.start_std,
        restarts=config.restarts,
        keep="last",
        **common,
    )


def make_penalties(config: RunConfig, model: nn.Module, parts: int = 1) -> dict[str, Penalty]:
    """The penalties on `model`, by their names in the configuration.

    parts: into how many a batch is split, over devices and accumulation. A "paper" reduction then divides by the
    nominal batch, trainer.batch_size, so that the mean over the parts is the penalty of the whole batch.
    """
    batch = config.trainer.batch_size if parts > 1 else None
    result: dict[str, Penalty] = {}
    given = config.penalties
    if given.emr is not None:
        options = given.emr.model_dump(include=set(EMRConfig.model_fields) - {"strength", "temperature", *_SCHEDULE})
        result["emr"] = EMR(model, given.emr.strength, given.emr.temperature, {**options, "batch_size": batch})
    if given.input_gradient is not None:
        options = {"reduction": given.input_gradient.reduction, "batch_size": batch}
        result["input_gradient"] = InputGradient(model, given.input_gradient.strength, options)
    if given.jacobian is not None:
        result["jacobian"] = Jacobian(model, given.jacobian.strength, given.jacobian.projections)
    if given.finite_difference is not None:
        result["finite_difference"] = FiniteDifference(model, **_options(given.finite_difference))
    if given.llr is not None:
        options = {**_options(given.llr), "seed": config.trainer.seed}
        if given.llr.epsilon is None:
            options["epsilon"] = config.attack.epsilon
        result["llr"] = LLR(model, **options)
    if given.weissi is not None:
        result["weissi"] = WEISSI(model, **_options(given.weissi))
    return result


_SCHEDULE = ("milestones", "gamma")


def _options(section: Any) -> dict[str, Any]:
    return dict(section.model_dump(exclude=set(_SCHEDULE)))


def make_defense(config: RunConfig, penalties: Sequence[Penalty], parts: int = 1) -> Defense:
    """The defense with these penalties; `parts` as in `make_penalties`."""
    defense = _one_defense(config, config.defense.name, config.attack, penalties, parts, proper=True)
    burn_in = config.defense.burn_in
    if burn_in is None:
        return defense
    first = _one_defense(config, burn_in.name, burn_in.attack or config.attack, penalties, parts, proper=False)
    return BurnIn(first, defense, burn_in.epoch)


def _one_defense(
    config: RunConfig, name: str, attack: AttackConfig, penalties: Sequence[Penalty], parts: int, *, proper: bool
) -> Defense:
    """The defense of this name, its attack rising; what only the defense `proper` has (MAIL and the released code's
    ways) is left out of a burn-in."""
    made = _whole_defense(config, name, attack, penalties, parts, proper=proper)
    return Rising(made, attack.warmup) if attack.warmup and name != "standard" else made


def _whole_defense(
    config: RunConfig, name: str, attack: AttackConfig, penalties: Sequence[Penalty], parts: int, *, proper: bool
) -> Defense:
    given = config.defense
    plain = {"penalties": tuple(penalties), "smoothing": given.smoothing, "logit_margin": given.logit_margin}
    if name == "standard":
        return Standard(**plain)  # type: ignore[arg-type]
    made = make_attack(attack, name)
    mail = MAIL(given.mail.slope, given.mail.bias, given.mail.normalize) if proper and given.mail is not None else None
    if name == "at":
        return PGDAT(made, mail=mail, clean_forward=proper and given.clean_forward, **plain)  # type: ignore[arg-type]
    if name == "trades":
        nominal = config.trainer.batch_size // parts if given.nominal_batch else None
        return TRADES(
            made,
            given.beta,
            mail=mail,
            clean_forwards=given.clean_forwards if proper else 1,
            batch_size=nominal,
            **plain,  # type: ignore[arg-type]
        )
    return MART(made, given.beta, tuple(penalties), mail)


def make_optimizer(config: OptimizerConfig, model: nn.Module) -> torch.optim.Optimizer:
    """The optimizer of the parameters that require a gradient."""
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [{"params": trained, "weight_decay": config.weight_decay}]
    if config.decay == "matrices":
        groups = [
            {"params": [p for p in trained if p.dim() > 1], "weight_decay": config.weight_decay},
            {"params": [p for p in trained if p.dim() <= 1], "weight_decay": 0.0},
        ]
    groups = [group for group in groups if group["params"]]
    if config.name == "adamw":
        return torch.optim.AdamW(groups, lr=config.learning_rate, betas=config.betas)
    return torch.optim.SGD(groups, lr=config.learning_rate, momentum=config.momentum, nesterov=config.nesterov)
