"""The training loop, on Lightning Fabric."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from lightning_fabric import Fabric
from torch import Tensor, nn

from emr_training.attacks import PGD
from emr_training.config import ConfigError, TrainConfig
from emr_training.data import Data, batches
from emr_training.defenses import PGDAT, Defense, Standard
from emr_training.evaluation import clean_accuracy, robust_accuracy
from emr_training.models import build_model
from emr_training.penalties import EMR

VALIDATION_STEPS = 10


class TrainingDiverged(RuntimeError):
    """The loss stopped being a number."""


@dataclass(frozen=True)
class EpochMetrics:
    """One epoch: mean loss terms and accuracy over its batches, and accuracies on the validation split.

    `train_accuracy` is on the images trained on, which are adversarial ones in adversarial training.
    Accuracies are fractions; the validation ones are None where there was no validation split.
    """

    epoch: int
    losses: dict[str, float]
    train_accuracy: float
    validation_accuracy: float | None
    validation_robust_accuracy: float | None
    seconds: float

    def as_dict(self) -> dict[str, Any]:
        """The numbers, for JSON."""
        return asdict(self)


@dataclass(frozen=True)
class TrainResult:
    """A trained model in evaluation mode, its history, the penalty's engine (None without), and the time."""

    model: nn.Module
    history: list[EpochMetrics]
    engine: str | None
    seconds: float


def train(
    config: TrainConfig,
    data: Data,
    validation: Data | None,
    classes: int,
    *,
    on_epoch: Callable[[EpochMetrics], None] | None = None,
) -> TrainResult:
    """Train a model from scratch as `config` says; the same config and data give the same weights.

    After each epoch the model is validated on `validation`, clean and under PGD-10 at the config's epsilon,
    if given. The caller's global random state is left as it was. Raises ConfigError for a batch larger than
    `data`, and TrainingDiverged naming the epoch and loss when the loss is no longer finite.
    """
    if config.batch_size > len(data):
        raise ConfigError(f"batch_size is {config.batch_size}; expected at most {len(data)}, the training samples")
    started = time.perf_counter()
    fabric = Fabric(accelerator=config.device, devices=1, precision=config.precision)
    fabric.launch()
    with _seeded(config.seed, fabric.device):
        model = build_model(config.model, data.x.shape[1:], classes)
        optimizer = torch.optim.SGD(
            model.parameters(),
            lr=config.learning_rate,
            momentum=config.momentum,
            weight_decay=config.weight_decay,
        )
        wrapped, optimizer = fabric.setup(model, optimizer)
        data = data.to(fabric.device)
        validation = validation.to(fabric.device) if validation is not None else None
        steps = config.epochs * (len(data) // config.batch_size)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        defense = make_defense(config, model)
        # Two streams: batches come in the same order whether or not the method draws random starts.
        order = torch.Generator().manual_seed(config.seed)
        starts = torch.Generator(fabric.device).manual_seed(config.seed)

        history = []
        for epoch in range(1, config.epochs + 1):
            epoch_started = time.perf_counter()
            wrapped.train()
            sums: dict[str, Tensor] = {}
            correct = torch.zeros((), device=fabric.device)
            count = 0
            for x, y in batches(data, config.batch_size, order):
                with fabric.autocast():
                    losses = defense(wrapped, x, y, generator=starts)
                optimizer.zero_grad()
                fabric.backward(losses.total)
                optimizer.step()
                schedule.step()
                for name, term in losses.terms.items():
                    sums[name] = sums.get(name, 0) + term.detach()
                correct += (losses.logits.detach().argmax(1) == y).sum()
                count += 1
            means = {name: float(total) / count for name, total in sums.items()}
            if not all(map(math.isfinite, means.values())):
                raise TrainingDiverged(
                    f"training diverged in epoch {epoch}: losses {means}; try a smaller learning_rate or strength"
                )
            metrics = EpochMetrics(
                epoch,
                means,
                float(correct) / (count * config.batch_size),
                *_validate(config, model, validation),
                time.perf_counter() - epoch_started,
            )
            history.append(metrics)
            if on_epoch is not None:
                on_epoch(metrics)
    engines = {p.engine for p in defense.penalties if isinstance(p, EMR)}
    return TrainResult(model.eval(), history, engines.pop() if engines else None, time.perf_counter() - started)


def make_defense(config: TrainConfig, model: nn.Module) -> Defense:
    """The defense that `config.method` names, with EMR on `model` where the method has it."""
    penalties = []
    if config.regularized:
        # The nominal batch keeps the paper's reduction the same should a batch ever be split.
        options = {"center": config.center, "batch_size": config.batch_size}
        penalties.append(EMR(model, config.strength, config.temperature, options))
    if not config.adversarial:
        return Standard(penalties)
    attack = PGD(config.epsilon, config.attack_steps, config.attack_step_size, keep="last")
    return PGDAT(attack, penalties)


def _validate(config: TrainConfig, model: nn.Module, data: Data | None) -> tuple[float | None, float | None]:
    if data is None:
        return None, None
    attack = PGD(config.epsilon, VALIDATION_STEPS, seed=config.seed)
    return clean_accuracy(model, data).value, robust_accuracy(model, data, attack).value


@contextmanager
def _seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Torch's global random state set from `seed` inside, and as it was after."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield
