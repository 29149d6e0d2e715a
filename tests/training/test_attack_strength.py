"""Order by strength, targeted forms, and what a search in low precision may count as a success."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from attack_cases import ATTACKS, EPSILON, TARGETED
from emr_training.attacks import (
    APGD,
    BIM,
    FGSM,
    MIFGSM,
    PGD,
    RFGSM,
    Attack,
    AutoAttack,
    BoundedAttack,
    CarliniWagner,
    Square,
)
from emr_training.data import Data


def correct(model: nn.Module, x: Tensor, y: Tensor) -> int:
    with torch.no_grad():
        return int((model(x).argmax(1) == y).sum())


@pytest.mark.parametrize("epsilon", [0.06, 0.12])
def test_more_work_leaves_fewer(net: nn.Module, robust_net: nn.Module, batch: Data, epsilon: float) -> None:
    brief = {"apgd": APGD(epsilon, steps=100), "square": Square(epsilon, queries=200)}
    ladder = [
        FGSM(epsilon),
        PGD(epsilon, 10),
        PGD(epsilon, 100, epsilon / 4),
        AutoAttack(eps=epsilon, version="custom", attacks_to_run=brief, verbose=False),
    ]
    for model in (net, robust_net):
        left = [correct(model, attack(model, batch.x, batch.y), batch.y) for attack in ladder]
        clean = correct(model, batch.x, batch.y)
        assert [clean, *left] == sorted([clean, *left], reverse=True)
        assert clean > left[-1] > 0


BOUNDED = {name: attack for name, attack in ATTACKS.items() if isinstance(attack, BoundedAttack)}


@pytest.mark.parametrize("name", [*BOUNDED, "FABT"])
@pytest.mark.parametrize("norm", ["Linf", "L2", "L1"])
def test_epsilon_zero_is_clean(net: nn.Module, batch: Data, name: str, norm: str) -> None:
    x_adv = replace(ATTACKS[name], epsilon=0.0, norm=norm)(net, batch.x, batch.y)
    assert torch.equal(x_adv, batch.x)


LARGE = [
    BIM(1.0, 40),
    PGD(1.0, 40),
    MIFGSM(1.0, 40, momentum=0.5),
    APGD(1.0),
    PGD(8.0, 40, norm="L2"),
    PGD(64.0, 100, norm="L1", fraction=0.2),
]


@pytest.mark.parametrize("attack", LARGE, ids=[type(a).__name__ + " " + a.norm for a in LARGE])
def test_a_large_epsilon_leaves_nothing(net: nn.Module, robust_net: nn.Module, batch: Data, attack: Attack) -> None:
    for model in (net, robust_net):
        assert correct(model, attack(model, batch.x, batch.y), batch.y) == 0


def test_single_steps_are_what_they_say(net: nn.Module, batch: Data) -> None:
    leaf = batch.x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(nn.functional.cross_entropy(net(leaf), batch.y, reduction="sum"), leaf)
    expected = (batch.x + EPSILON * gradient.sign()).clamp(0, 1)
    # Where a gradient is lost in rounding its sign is anybody's.
    clear = gradient.abs() > 1e-6 * gradient.abs().max()
    torch.testing.assert_close(FGSM(EPSILON)(net, batch.x, batch.y)[clear], expected[clear])
    generator = torch.Generator().manual_seed(3)
    start = RFGSM(EPSILON).ball.start(batch.x, generator)
    leaf = start.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(nn.functional.cross_entropy(net(leaf), batch.y, reduction="sum"), leaf)
    expected = torch.minimum(
        torch.maximum(start + 1.25 * EPSILON * gradient.sign(), batch.x - EPSILON), batch.x + EPSILON
    )
    clear = gradient.abs() > 1e-6 * gradient.abs().max()
    found = RFGSM(EPSILON, seed=3)(net, batch.x, batch.y)
    torch.testing.assert_close(found[clear], expected.clamp(0, 1)[clear])


def test_momentum_accumulates() -> None:
    # The path of MI-FGSM, written down anew for a curved model in float64.
    def model(x: Tensor) -> Tensor:
        z = (3 * x).sin().flatten(1)
        return torch.stack([z[:, 0] * z[:, 1], z[:, 2] + z[:, 0] ** 2, z[:, 3] * z[:, 2]], 1)

    x, y = torch.rand(16, 4, dtype=torch.float64), torch.randint(3, (16,))
    point, velocity = x.clone(), torch.zeros_like(x)
    for _ in range(6):
        leaf = point.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(nn.functional.cross_entropy(model(leaf), y, reduction="sum"), leaf)
        velocity = 0.7 * velocity + gradient / gradient.abs().mean(1, keepdim=True)
        point = torch.minimum(torch.maximum(point + 0.02 * velocity.sign(), x - 0.05), x + 0.05).clamp(0, 1)
    # Every one of cross-entropy's gradients is divided by its size, so any positive factor of it drops out.
    found = MIFGSM(0.05, 6, 0.02, momentum=0.7, keep="last")(model, x, y)
    torch.testing.assert_close(found, point)
    assert not torch.allclose(BIM(0.05, 6, 0.02, keep="last")(model, x, y), point)


@pytest.mark.parametrize("norm", ["L2", "L1"])
def test_exact_on_a_linear_model_in_other_balls(norm: str) -> None:
    weight = torch.randn(2, 40)
    model = nn.Linear(40, 2, bias=False)
    model.weight.data.copy_(weight)
    slope = weight[1] - weight[0]
    x, y = 0.4 + 0.2 * torch.rand(20, 40), torch.zeros(20, dtype=torch.int64)
    x_adv = PGD(0.3, 40, 0.1, norm=norm, keep="last", fraction=0.01)(model, x, y)
    if norm == "L2":
        best = 0.3 * slope / slope.norm()
    else:
        best = torch.zeros_like(slope)
        best[slope.abs().argmax()] = 0.3 * slope[slope.abs().argmax()].sign()
    torch.testing.assert_close(x_adv, (x + best), rtol=0, atol=1e-3)


@pytest.mark.parametrize("attack", [PGD(1.5, 100, 0.1), BIM(1.5, 100, 0.1)])
def test_moves_what_can_move_in_the_box_under_l1(attack: PGD) -> None:
    model = nn.Linear(40, 2, bias=False)
    slope = model.weight[1] - model.weight[0]
    x, y = torch.rand(20, 40).round(decimals=0), torch.zeros(20, dtype=torch.int64)
    x[:, ::3] = 0.5
    # The best there is: pixels in the order of their slopes, each to the edge of the box.
    room = torch.where(slope > 0, 1 - x, x)
    order = slope.abs().argsort(descending=True)
    room, slopes = room[:, order], slope.abs()[order]
    spent = torch.minimum(room, (1.5 - (room.cumsum(1) - room)).clamp_min(0))
    best = (spent * slopes).sum(1)
    x_adv = replace(attack, norm="L1", keep="last")(model, x, y)
    with torch.no_grad():
        gained = ((x_adv - x) * slope).sum(1)
        assert (gained > 0.95 * best).all()
        single = FGSM(0.5, norm="L1")(model, x, y)
        assert (((single - x) * slope).sum(1) > 0.99 * 0.5 * torch.where(room > 0, slopes, 0).amax(1)).all()


@pytest.mark.parametrize("norm", ["L2", "L1"])
@pytest.mark.parametrize("keep", ["best", "last"])
@pytest.mark.parametrize("epsilon", [0.0, 0.05, 0.5, 3.0])
def test_stays_in_other_balls_and_uses_them(net: nn.Module, batch: Data, epsilon: float, keep: str, norm: str) -> None:
    x_adv = PGD(epsilon, 5, norm=norm, keep=keep)(net, batch.x, batch.y)
    assert x_adv.min() >= 0 and x_adv.max() <= 1
    moved = torch.linalg.vector_norm((x_adv - batch.x).double().flatten(1), {"L2": 2, "L1": 1}[norm], dim=1)
    assert moved.max() <= epsilon * (1 + 1e-5) + 1e-6
    if keep == "last" and epsilon == 0.05:
        assert moved.max() > 0.049


@pytest.mark.parametrize("attack", TARGETED.values(), ids=TARGETED)
def test_targeted_attacks_go_where_they_are_told(net: nn.Module, batch: Data, attack: Attack) -> None:
    target = (batch.y + 1) % 10

    def lead(x: Tensor) -> Tensor:
        with torch.no_grad():
            logits = net(x)
        rival = logits.scatter(1, target[:, None], -torch.inf).amax(1)
        return logits.gather(1, target[:, None]).squeeze(1) - rival

    if isinstance(attack, BoundedAttack):
        attack = replace(attack, epsilon=0.3)
    if isinstance(attack, Square):
        attack = replace(attack, queries=100)
    if isinstance(attack, CarliniWagner):
        attack = replace(attack, steps=40, c=1.0)
    before, after = lead(batch.x), lead(attack(net, batch.x, batch.y, target=target))
    assert after.mean() > before.mean() + 1
    assert (after > 0).sum() > (before > 0).sum()


@pytest.mark.parametrize("loss", ["ce", "cw", "dlr"])
@pytest.mark.parametrize("kind", [PGD, BIM, MIFGSM])
def test_targeted_paths_arrive(net: nn.Module, batch: Data, kind: type[PGD], loss: str) -> None:
    target = (batch.y + 3) % 10
    x_adv = kind(0.5, 40, 0.05, loss=loss)(net, batch.x, batch.y, target=target)
    with torch.no_grad():
        predicted = net(x_adv).argmax(1)
    assert (predicted == target).float().mean() > 0.9
    # Other misclassifications are no success, and keep="best" does not stop at them.
    untargeted = PGD(0.5, 40, 0.05, loss=loss)(net, batch.x, batch.y)
    with torch.no_grad():
        assert (net(untargeted).argmax(1) == target).float().mean() < 0.5


class Step(nn.Module):
    """Class 1 where the mean pixel is above 0.503; autocast to bfloat16 makes a mean of 0.502 into 0.50390625."""

    def __init__(self) -> None:
        super().__init__()
        self.mean = nn.Linear(16, 1, bias=False)
        self.mean.weight.data.fill_(1 / 16)

    def forward(self, x: Tensor) -> Tensor:
        z = 1000 * (self.mean(x.flatten(1)).float().squeeze(1) - 0.503)
        return torch.stack([0 * z, z, z - 500], 1)


LOW = {
    name: replace(attack, precision="bfloat16", **({"epsilon": 0.002} if hasattr(attack, "epsilon") else {}))
    for name, attack in ATTACKS.items()
    if name != "AutoAttack"
}
LOW["Square"] = replace(LOW["Square"], queries=50)


@pytest.mark.parametrize("attack", LOW.values(), ids=LOW)
def test_low_precision_alone_makes_no_success(attack: Attack) -> None:
    model, x, y = Step(), torch.full((4, 1, 4, 4), 0.502), torch.zeros(4, dtype=torch.int64)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert (model(x).argmax(1) == 1).all()
    with torch.no_grad():
        assert (model(x).argmax(1) == 0).all()
    # The true boundary is within reach: whoever believed bfloat16 would stop at x.
    x_adv = attack(model, x, y)
    with torch.no_grad():
        assert (model(x_adv).argmax(1) == 1).all()
