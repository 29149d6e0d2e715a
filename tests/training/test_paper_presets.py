"""The `paper` presets train as the released scripts do: derived anew here, in plain PyTorch with double backward.

The released code is taken from its description alone: network, attack, losses, penalty, optimizer, schedules and
validation below share nothing with the package but its random streams. Those are the initial weights, the order of
images, the crops and mirrors, and the starts of the attack.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from emr_kernels.ops import pgd_start
from emr_training.config import RunConfig, make_config, merge
from emr_training.config.presets import preset
from emr_training.data import Data
from emr_training.models import build_model
from emr_training.training import train

BATCH, SIDE, CLASSES = 6, 16, 10
BN_MOMENTUM, BN_EPSILON, SLOPE = 0.1, 1e-5, 0.1
#: What epochs of the scripts become in a run of four.
CUT = {60: 2, 75: 2, 90: 3, 120: 3, 100: 4, 130: 4}


@dataclass(frozen=True)
class Script:
    """What distinguishes the four scripts. `drops` are the epochs at whose start the strength falls; the learning rate
    falls at their end. `mail_from` is the first epoch of MAIL; before it, and without, AT or TRADES."""

    strength: float
    temperature: float
    weight_decay: float
    drops: tuple[int, int]
    epochs: int
    loss: str
    beta: float = 0.0
    slope: float = 0.0
    bias: float = 0.0
    mail_from: int | None = None

    def cut(self) -> Script:
        first, second = self.drops
        mail_from = None if self.mail_from is None else CUT[self.mail_from]
        return replace(self, drops=(CUT[first], CUT[second]), epochs=CUT[self.epochs], mail_from=mail_from)


SCRIPTS = {
    "at-emr": Script(3.0, 40.0, 5e-4, (60, 90), 100, "at"),
    "trades-emr": Script(1.0, 1.0, 1e-3, (60, 120), 130, "trades", beta=12.0),
    "mail-at-emr": Script(1.0, 0.1, 2e-4, (75, 90), 100, "at", slope=30.0, bias=-0.07, mail_from=75),
    "mail-trades-emr": Script(1.0, 0.1, 2e-4, (75, 90), 100, "trades", 5.0, slope=5.0, bias=0.05, mail_from=75),
}


class Net:
    """WRN-10-1 as the scripts build it, from the tensors of a state dict: LeakyReLU, padded shortcuts, no 1x1."""

    def __init__(self, state: dict[str, Tensor]) -> None:
        self.state = {name: value.clone() for name, value in state.items()}
        statistics = ("running_mean", "running_var", "num_batches_tracked")
        self.parameters = [v.requires_grad_() for n, v in self.state.items() if not n.endswith(statistics)]

    def _norm(self, x: Tensor, name: str, training: bool) -> Tensor:
        weight, bias, mean, variance = (
            self.state[f"{name}.{part}"] for part in ("weight", "bias", "running_mean", "running_var")
        )
        if training:
            values = x.transpose(0, 1).flatten(1)
            used_mean, used_variance = values.mean(1), values.var(1, unbiased=False)
            mean.lerp_(used_mean.detach(), BN_MOMENTUM)
            variance.lerp_(values.detach().var(1, unbiased=True), BN_MOMENTUM)
            self.state[f"{name}.num_batches_tracked"] += 1
        else:
            used_mean, used_variance = mean.clone(), variance.clone()
        place = (1, -1, 1, 1)
        unit = (x - used_mean.view(place)) / (used_variance.view(place) + BN_EPSILON).sqrt()
        return unit * weight.view(place) + bias.view(place)

    def _activated(self, x: Tensor, name: str, training: bool) -> Tensor:
        x = self._norm(x, name, training)
        return torch.where(x > 0, x, SLOPE * x)

    def __call__(self, x: Tensor, training: bool) -> Tensor:
        x = F.conv2d(x, self.state["conv1.weight"], padding=1)
        for stage in (1, 2, 3):
            name = f"block{stage}.layer.0"
            first, second = self.state[f"{name}.conv1.weight"], self.state[f"{name}.conv2.weight"]
            stride = 1 if stage == 1 else 2
            h = self._activated(x, f"{name}.bn1", training)
            added = first.shape[0] - first.shape[1]
            skip = x
            if added:
                skip = h if stride == 1 else F.avg_pool2d(h, 2)
                zeros = skip.new_zeros(len(skip), added // 2, *skip.shape[2:])
                skip = torch.cat([zeros, skip, zeros], 1)
            h = self._activated(F.conv2d(h, first, stride=stride, padding=1), f"{name}.bn2", training)
            x = skip + F.conv2d(h, second, padding=1)
        x = self._activated(x, "bn1", training).mean((2, 3))
        return x @ self.state["fc.weight"].T + self.state["fc.bias"]


def cross_entropy(logits: Tensor, y: Tensor) -> Tensor:
    return -logits.log_softmax(1).gather(1, y[:, None]).squeeze(1)


def divergence(clean: Tensor, adversarial: Tensor) -> Tensor:
    """KL(p(x) || p(x')), both with their gradient."""
    p, log_q = clean.softmax(1), adversarial.log_softmax(1)
    return (p * (p.log() - log_q)).sum(1)


def climb(x: Tensor, point: Tensor, loss: Callable[[Tensor], Tensor], epsilon: float, step: float) -> Tensor:
    for _ in range(10):
        point = point.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(loss(point), point)
        point = point.detach() + step * gradient.sign()
        point = torch.minimum(torch.maximum(point, x - epsilon), x + epsilon).clamp(0, 1)
    return point


class Released:
    """One script's training, from a package-made beginning: `net` after `run`."""

    def __init__(self, script: Script, net: Net, data: Data, validation: Data, seed: int) -> None:
        self.script, self.net, self.data, self.validation = script, net, data, validation
        self.order, self.starts, self.changes = (torch.Generator().manual_seed(seed + plus) for plus in (0, 0, 1))
        self.velocities = [torch.zeros_like(p) for p in net.parameters]
        self.strength, self.rate = script.strength, 0.1

    def run(self, epochs: int) -> None:
        for epoch in range(1, epochs + 1):
            if epoch in self.script.drops:
                self.strength *= 0.1
            for index in torch.randperm(len(self.data), generator=self.order).split(BATCH):
                self.step(epoch, self.augmented(index), self.data.y[index])
            if epoch in self.script.drops:
                self.rate *= 0.1
            self.validate()

    def augmented(self, index: Tensor) -> Tensor:
        """Crops of zero-padded images, half of them mirrored; the draws are made as the package makes them."""
        top, left = (torch.randint(9, (len(index), 1), generator=self.changes) for _ in range(2))
        mirrored = torch.rand(len(index), generator=self.changes) < 0.5
        images = []
        for i, image in enumerate(self.data.x[index]):
            large = torch.zeros(3, SIDE + 8, SIDE + 8, dtype=torch.uint8)
            large[:, 4:-4, 4:-4] = image
            image = large[:, int(top[i]) : int(top[i]) + SIDE, int(left[i]) : int(left[i]) + SIDE]
            images.append(image.flip(2) if mirrored[i] else image)
        return (torch.stack(images).float() / 255).double()

    def released_attack(self, x: Tensor, y: Tensor, *, random: bool) -> Tensor:
        """Cross-entropy in training mode: each of the ten forwards moves the running statistics."""
        point = x
        if random:
            # The package's noise, taken where nothing clips it.
            seed = int(torch.randint(2**62, (1,), generator=self.starts))
            noise = pgd_start(torch.full_like(x, 0.5), 0.0314, "linf", seed=seed) - 0.5
            assert 0.03 < noise.max() <= 0.0314 and abs(noise.mean()) < 2e-3
            point = (x + noise).clamp(0, 1)
        return climb(x, point, lambda p: cross_entropy(self.net(p, True), y).mean(), 0.0314, 0.00784)

    def mail_attack(self, x: Tensor, y: Tensor) -> Tensor:
        """In evaluation mode, from Gaussian noise that nothing clips; the divergence for TRADES."""
        noise = torch.empty_like(x).normal_(0.0, 0.001, generator=self.starts)
        with torch.no_grad():
            clean = self.net(x, False)

        def loss(point: Tensor) -> Tensor:
            logits = self.net(point, False)
            return cross_entropy(logits, y).mean() if self.script.loss == "at" else divergence(clean, logits).sum()

        return climb(x, x + noise, loss, 0.031, 0.007)

    def loss(self, epoch: int, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """The loss without the penalty, and x'."""
        script = self.script
        if script.mail_from is not None and epoch >= script.mail_from:
            x_adv = self.mail_attack(x, y)
            clean, adversarial = self.net(x, True), self.net(x_adv, True)
            p = adversarial.detach().softmax(1)
            own = p.gather(1, y[:, None]).squeeze(1)
            rival = p.scatter(1, y[:, None], -1.0).amax(1)
            weights = 3 * torch.sigmoid(script.slope * (rival - own + script.bias))
            if script.loss == "at":
                return (weights * cross_entropy(adversarial, y)).mean(), x_adv
            robust = (weights * divergence(clean, adversarial)).sum() / len(x)
            return cross_entropy(clean, y).mean() + script.beta * robust, x_adv
        x_adv = self.released_attack(x, y, random=True)
        if script.mail_from is not None or script.loss == "at":
            return cross_entropy(self.net(x_adv, True), y).mean(), x_adv
        natural = cross_entropy(self.net(x, True), y).mean()
        adversarial = self.net(x_adv, True)
        return natural + script.beta * divergence(self.net(x, True), adversarial).sum() / BATCH, x_adv

    def penalty(self, x_adv: Tensor) -> Tensor:
        leaf = x_adv.detach().requires_grad_()
        logits = self.net(leaf, False)
        p = (logits / self.script.temperature).softmax(1).detach()
        (gradient,) = torch.autograd.grad((p * logits).sum(1).mean(), leaf, create_graph=True)
        return gradient.square().sum()

    def step(self, epoch: int, x: Tensor, y: Tensor) -> None:
        loss, x_adv = self.loss(epoch, x, y)
        total = loss + self.strength * self.penalty(x_adv)
        gradients = torch.autograd.grad(total, self.net.parameters)
        with torch.no_grad():
            for p, velocity, gradient in zip(self.net.parameters, self.velocities, gradients, strict=True):
                velocity.mul_(0.9).add_(gradient + self.script.weight_decay * p)
                p.sub_(self.rate * velocity)

    def validate(self) -> None:
        """Also this attack moves the running statistics; what it finds is of no consequence for them."""
        x = (self.validation.x.float() / 255).double()
        self.released_attack(x, self.validation.y, random=False)


def random_images(count: int, seed: int) -> Data:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randint(256, (count, 3, SIDE, SIDE), generator=generator, dtype=torch.uint8)
    return Data(x, torch.randint(CLASSES, (count,), generator=generator))


#: All that a test on the CPU replaces.
SMALL = {
    "model": {"name": "wrn-10-1-pad"},
    "trainer.batch_size": BATCH,
    "trainer.precision": "64",
    "trainer.device": "cpu",
}


def assert_same_training(config: RunConfig, script: Script, images: int) -> None:
    """Parameters, running statistics and their counts."""
    data, validation = random_images(images, 1), random_images(5, 2)
    torch.manual_seed(config.trainer.seed)
    net = Net(build_model(config.model.name, (3, SIDE, SIDE), CLASSES).double().state_dict())
    before = {name: value.detach().clone() for name, value in net.state.items()}
    found = train(config, data, validation, CLASSES).model.state_dict()
    Released(script, net, data, validation, config.trainer.seed).run(config.trainer.epochs)
    assert list(found) == list(net.state)
    for name, expected in net.state.items():
        assert not torch.equal(expected, before[name]), name
        error = (found[name] - expected).abs().max() / expected.abs().max()
        assert error < 1e-9, f"{name}: {error}"


@pytest.mark.parametrize("name", SCRIPTS)
def test_three_steps(name: str) -> None:
    """The first epoch of three batches, the last one short, and the validation after it."""
    config = make_config(merge(preset(f"paper/{name}"), {**SMALL, "trainer.epochs": 1}))
    assert_same_training(config, SCRIPTS[name], 16)


@pytest.mark.parametrize("name", ["mail-at-emr", "mail-trades-emr"])
def test_three_steps_of_mail(name: str) -> None:
    changes = {**SMALL, "trainer.epochs": 1, "defense.burn_in.epoch": 1}
    config = make_config(merge(preset(f"paper/{name}"), changes))
    assert_same_training(config, replace(SCRIPTS[name], mail_from=1), 16)


@pytest.mark.parametrize("name", SCRIPTS)
def test_the_whole_course_cut_to_four_epochs(name: str) -> None:
    """Every switch of the loss, the strength and the learning rate, in epochs of two batches."""
    config = make_config(preset(f"paper/{name}"))
    assert config.penalties.emr is not None
    changes = {
        **SMALL,
        "trainer.epochs": CUT[config.trainer.epochs],
        "schedule.milestones": [CUT[int(m)] for m in config.schedule.milestones],
        "penalties.emr.milestones": [CUT[m] for m in config.penalties.emr.milestones],
    }
    if config.defense.burn_in is not None:
        changes["defense.burn_in.epoch"] = CUT[config.defense.burn_in.epoch]
    config = make_config(merge(preset(f"paper/{name}"), changes))
    assert_same_training(config, SCRIPTS[name].cut(), 10)


@pytest.mark.parametrize("name", SCRIPTS)
def test_what_the_small_runs_replace(name: str) -> None:
    config, script = make_config(preset(f"paper/{name}")), SCRIPTS[name]
    assert config.model.name == "wrn-34-10-pad" and config.data.name == "cifar10"
    assert (config.trainer.epochs, config.trainer.batch_size, config.trainer.drop_last) == (script.epochs, 128, False)
    assert config.trainer.precision == "32" and config.evaluation.batch_size == 128
    mail = script.mail_from is not None
    assert (config.data.validation, config.evaluation.split) == ((0, "test") if mail else (2000, "validation"))
