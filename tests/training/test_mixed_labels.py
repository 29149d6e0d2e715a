"""CutMix's labels through the training path: losses against class probabilities, attacks on the likeliest class."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from emr_training.attacks import PGD
from emr_training.config import ConfigError, make_config
from emr_training.data import Augmentation, Data, Mixed, Splits
from emr_training.defenses import MAIL, MART, PGDAT, TRADES, Defense, Standard
from emr_training.models import build_model
from emr_training.penalties import EMR
from emr_training.training import train

ATTACK = PGD(0.1, 3, keep="last")


@pytest.fixture
def mixed(batch: Data) -> tuple[Tensor, Tensor, Tensor]:
    """Digits, class probabilities with two classes each, and the likelier one."""
    generator = torch.Generator().manual_seed(0)
    share = 0.05 + 0.9 * torch.rand(32, 1, generator=generator, dtype=torch.float64)
    own, other = (torch.eye(10, dtype=torch.float64)[batch.y[rows]] for rows in (slice(32), slice(32, 64)))
    labels = share * own + (1 - share) * other
    return batch.x[:32].double(), labels, labels.argmax(1)


def soft_cross_entropy(logits: Tensor, labels: Tensor, smoothing: float) -> Tensor:
    smoothed = (1 - smoothing) * labels + smoothing / labels.shape[1]
    return -(smoothed * logits.log_softmax(1)).sum(1).mean()


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("method", ["standard", "at", "trades"])
def test_losses_and_gradients(
    net: nn.Module, mixed: tuple[Tensor, Tensor, Tensor], method: str, smoothing: float
) -> None:
    x, labels, likeliest = mixed
    model, twin = copy.deepcopy(net).double(), copy.deepcopy(net).double()
    penalty = EMR(model, 2.0, 1.0, {"direction": "label"})
    defenses: dict[str, Defense] = {
        "standard": Standard([penalty], smoothing=smoothing),
        "at": PGDAT(ATTACK, [penalty], smoothing),
        "trades": TRADES(ATTACK, 6.0, [penalty], smoothing),
    }
    losses = defenses[method](model, x, labels)
    losses.total.backward()

    x_adv = x if method == "standard" else ATTACK(twin, x, likeliest)
    expected = soft_cross_entropy(twin(x if method == "trades" else x_adv), labels, smoothing)
    if method == "trades":
        p, log_q = twin(x).softmax(1), twin(x_adv).log_softmax(1)
        expected = expected + 6 * (p * (p.log() - log_q)).sum(1).mean()
    leaf = x_adv.clone().requires_grad_()
    own = twin(leaf).gather(1, likeliest[:, None]).sum()
    (weight,) = torch.autograd.grad(own, leaf, create_graph=True)
    expected = expected + 2 * weight.square().sum() / len(x) ** 2
    expected.backward()
    torch.testing.assert_close(losses.total, expected, rtol=1e-10, atol=0)
    for one, other in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-8, atol=1e-12)


def test_probabilities_of_one_class_are_labels(net: nn.Module, batch: Data) -> None:
    certain = torch.eye(10)[batch.y]
    for defense in (Standard(smoothing=0.1), PGDAT(ATTACK), TRADES(ATTACK)):
        found = defense(net, batch.x, certain).total
        torch.testing.assert_close(found, defense(net, batch.x, batch.y).total)


def test_low_precision_logits(net: nn.Module, mixed: tuple[Tensor, Tensor, Tensor]) -> None:
    x, labels, _ = mixed
    model = copy.deepcopy(net).bfloat16()
    loss = Standard()(model, x.bfloat16(), labels.float()).total
    assert loss.dtype == torch.float32
    expected = soft_cross_entropy(model(x.bfloat16()).double(), labels, 0.0)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("defense", [
    Standard(logit_margin=3.0),
    PGDAT(ATTACK, logit_margin=3.0),
    PGDAT(ATTACK, mail=MAIL(10.0, -0.5)),
    TRADES(ATTACK, mail=MAIL(10.0, -0.5, normalize=True)),
    MART(ATTACK),
])  # fmt: skip
def test_what_needs_one_label_refuses(net: nn.Module, mixed: tuple[Tensor, Tensor, Tensor], defense: Defense) -> None:
    with pytest.raises((TypeError, ValueError), match="expected"):
        defense(net, mixed[0].float(), mixed[1].float())


def test_labels_by_area() -> None:
    y, other, share = torch.tensor([0, 1, 2]), torch.tensor([1, 1, 0]), torch.tensor([0.75, 0.25, 0.0])
    x = torch.zeros(3, 1, 2, 2)
    assert Mixed(x, y).labels(3) is y
    expected = torch.tensor([[0.75, 0.25, 0.0], [0.0, 1.0, 0.0], [1.0, 0.0, 0.0]])
    assert torch.equal(Mixed(x, y, other, share).labels(3), expected)


def test_a_run_on_mixed_images(splits: Splits) -> None:
    """Its loss and accuracy, at a learning rate that leaves the weights as they are."""
    data = Data(splits.train.x[:64], splits.train.y[:64])
    options = {"data.augmentation": {"flip": True, "cutmix": True}, "trainer.epochs": 1, "trainer.batch_size": 64}
    config = make_config({**options, "optimizer.learning_rate": 1e-12})
    metrics = train(config, data, None, 10).history[0]

    torch.manual_seed(config.trainer.seed)
    model = build_model("mlp", (1, 8, 8), 10)
    order = torch.randperm(64, generator=torch.Generator().manual_seed(config.trainer.seed))
    changes = torch.Generator().manual_seed(config.trainer.seed + 1)
    x, y, other, share = Augmentation(flip=True, cutmix=True)(data.x[order], data.y[order], changes)
    assert other is not None and share is not None
    logits = model(x)
    log_p = logits.log_softmax(1)
    each = share * log_p.gather(1, y[:, None])[:, 0] + (1 - share) * log_p.gather(1, other[:, None])[:, 0]
    assert metrics.losses["cross_entropy"] == pytest.approx(-each.mean().item(), rel=1e-5)
    right = logits.argmax(1) == torch.where(share >= 0.5, y, other)
    assert metrics.train_accuracy == pytest.approx(right.float().mean().item())


def test_augmentation_of_what_is_no_image() -> None:
    data = Data(torch.rand(64, 20), torch.arange(64) % 4)
    with pytest.raises(ConfigError, match=r"data.augmentation is given with images \[20\]; expected \[C, H, W\]"):
        train(make_config({"data.augmentation.cutmix": True}), data, None, 4)
