"""Auto-PGD: its schedule, exact cases, bounds, and what it is at least as strong as."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from emr_training.attacks import APGD, APGDT, PGD
from emr_training.attacks.apgd import likeliest_wrong, random_start
from emr_training.attacks.ascent import Momentum, Sparse, State, checkpoints, climb
from emr_training.attacks.balls import NORMS, Ball, distance
from emr_training.attacks.classifier import Classifier
from emr_training.attacks.losses import LOSSES
from emr_training.attacks.noise import Noise
from emr_training.attacks.problem import Problem
from emr_training.data import Data

#: Radii at which about half of the digits break.
RADII = {"Linf": 0.08, "L2": 0.5, "L1": 1.5}


def correct(model: nn.Module, x: Tensor, y: Tensor) -> int:
    with torch.no_grad():
        return int((model(x).argmax(1) == y).sum())


def problem_of(model: nn.Module, x: Tensor, y: Tensor, seed: int = 0, keys: Tensor | None = None) -> Problem:
    return Problem(Classifier(model), x, y, None, torch.Generator().manual_seed(seed), keys)


class Linear(nn.Module):
    """Logits (0, <w, x - 1/2> - gap): class 0 at x = 1/2, class 1 across the hyperplane."""

    def __init__(self, weight: Tensor, gap: float = 0.0) -> None:
        super().__init__()
        self.weight, self.gap = nn.Parameter(weight), gap

    def forward(self, x: Tensor) -> Tensor:
        z = (x - 0.5).flatten(1) @ self.weight - self.gap
        return torch.stack([torch.zeros_like(z), z], 1)


@pytest.mark.parametrize(
    ("steps", "expected"),
    [
        (100, [22, 41, 57, 70, 80, 87, 93, 99]),
        (50, [11, 21, 30, 38, 45]),
        (1, [1]),
        (3, [1, 2, 3]),
    ],
)
def test_checkpoints(steps: int, expected: list[int]) -> None:
    assert checkpoints(steps) == expected


def alone(model: nn.Module, x: Tensor, y: Tensor, start: Tensor, epsilon: float, steps: int) -> tuple[Tensor, float]:
    """Algorithm 1 of Croce and Hein (2020) under Linf for one image: the point of greatest loss, and that loss."""

    def asked(point: Tensor) -> tuple[float, Tensor]:
        leaf = point.clone().requires_grad_()
        value = nn.functional.cross_entropy(model(leaf), y)
        return value.item(), torch.autograd.grad(value, leaf)[0]

    def projected(point: Tensor) -> Tensor:
        return point.clamp(x - epsilon, x + epsilon).clamp(0, 1)

    shares, window = [0.0, 0.22], 0.22
    while shares[-1] + max(window - 0.03, 0.06) <= 1:
        window = max(window - 0.03, 0.06)
        shares.append(shares[-1] + window)
    places = [int(share * steps + 1e-9) for share in shares]

    step, halved = 2 * epsilon, True
    value, slope = asked(start)
    best, best_value, best_slope, then = start, value, slope, value
    previous, point, rises = start, start, 0
    for k in range(steps):
        moved = projected(point + step * slope.sign())
        following = moved if k == 0 else projected(point + 0.75 * (moved - point) + 0.25 * (point - previous))
        previous, point = point, following
        last, (value, slope) = value, asked(point)
        rises += value > last
        if value > best_value:
            best, best_value, best_slope = point, value, slope
        if k + 1 in places[1:]:
            j = places.index(k + 1)
            halve = rises <= 0.75 * (places[j] - places[j - 1]) or (not halved and best_value <= then)
            halved, then, rises = halve, best_value, 0
            if halve:
                step, point, slope = step / 2, best, best_slope
    return best, best_value


def test_climbs_as_the_paper_says(robust_net: nn.Module, batch: Data) -> None:
    model = copy.deepcopy(robust_net).double().eval()
    x, y = batch.x[:6].double(), batch.y[:6]
    start = (x + 0.1 * (2 * torch.rand_like(x) - 1)).clamp(0, 1)
    ball = Ball("Linf", 0.1)
    found = climb(problem_of(model, x, y), start, Momentum(ball, 100, 0.75), LOSSES["ce"], 100, stop=False)
    for i in range(len(x)):
        row = slice(i, i + 1)
        point, value = alone(model, x[row], y[row], start[row], 0.1, 100)
        # The search's loss is the log odds m; cross-entropy is log(1 + exp(m)).
        assert nn.functional.softplus(found.best_value[i]).item() == pytest.approx(value, rel=1e-9)
        torch.testing.assert_close(found.best[row], point, rtol=0, atol=1e-9)


def state_of(n: int, rises: Tensor | None = None, **own: Tensor) -> State:
    x, y = torch.full((n, 4), 0.5), torch.zeros(n, dtype=torch.int64)
    problem = problem_of(Linear(torch.ones(4)), x, y)
    return State(
        rows=torch.arange(n),
        problem=problem,
        goal=None,
        point=x + 0.1,
        previous=x,
        value=torch.zeros(n),
        gradient=torch.ones(n, 4),
        best=x + 0.2,
        best_value=torch.ones(n),
        best_gradient=torch.full((n, 4), 2.0),
        rises=torch.zeros(n, dtype=torch.int64) if rises is None else rises,
        own=own,
    )


def test_a_step_is_halved_when_the_loss_rises_too_rarely_or_the_best_is_stuck() -> None:
    state = state_of(
        5,
        step=torch.ones(5),
        rises=torch.tensor([16, 17, 17, 17, 0]),
        halved=torch.tensor([False, False, True, False, True]),
        best_then=torch.tensor([0.0, 1.0, 1.0, 0.5, 0.0]),
    )
    # 22 iterations before the first checkpoint: at most 0.75 * 22 = 16.5 rises are too few.
    Momentum(Ball("Linf", 0.3), 100, 0.75).adapt(state, 22)
    halved = torch.tensor([True, True, False, False, True])
    assert torch.equal(state.own["halved"], halved)
    assert torch.equal(state.own["step"], torch.where(halved, 0.5, 1.0))
    assert torch.equal(state.own["best_then"], torch.ones(5))
    assert not state.rises.any()
    assert torch.equal(state.point == 0.7, halved[:, None].expand(5, 4))
    assert torch.equal(state.gradient == 2.0, halved[:, None].expand(5, 4))


def test_the_sparse_step_starts_anew_where_the_best_point_became_sparser() -> None:
    state = state_of(3, step=torch.tensor([0.5, 0.5, 0.11]), fraction=torch.ones(3), nonzero=torch.tensor([4.0, 2, 2]))
    state.best = torch.full((3, 4), 0.5)
    state.best[:, :2] = 0.6
    Sparse(Ball("L1", 1.0), 100).adapt(state, 4)
    torch.testing.assert_close(state.own["step"], torch.tensor([1.0, 0.5 / 1.5, 0.1]))
    assert torch.equal(state.own["nonzero"], torch.full((3,), 2.0))
    # Two pixels differ, and 2 / 1.5 is nearest to 1 of the 4.
    assert ((state.own["fraction"] * 4).floor() == 1).all()
    assert torch.equal(state.point[0], state.best[0])
    assert torch.equal(state.point[1:], torch.full((2, 4), 0.6))


@pytest.mark.parametrize("norm", NORMS)
def test_exact_on_a_linear_model(norm: str) -> None:
    # From x = 1/2 with epsilon = 0.2 the box is far away. The farthest point of the ball along w has
    # <w, d> = 0.2 |w|_1, 0.2 |w|_2, 0.2 max |w|.
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(12, generator=generator, dtype=torch.float64)
    x, y = torch.full((8, 12), 0.5, dtype=torch.float64), torch.zeros(8, dtype=torch.int64)
    reach = 0.2 * {"Linf": weight.abs().sum(), "L2": weight.norm(), "L1": weight.abs().max()}[norm]
    x_adv = APGD(0.2, norm=norm, best_loss=True)(Linear(weight), x, y)
    # Linf ends in a corner; the others come as near as the least step allows.
    torch.testing.assert_close((x_adv - 0.5) @ weight, reach.expand(8), rtol=1e-9 if norm == "Linf" else 2e-3, atol=0)
    for gap, wins in ((0.98 * float(reach), True), (1.0001 * float(reach), False)):
        model = Linear(weight, gap)
        assert (correct(model, APGD(0.2, norm=norm)(model, x, y), y) == 0) == wins


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("attack", [APGD, APGDT])
def test_bounds_and_what_is_wrong_already(net: nn.Module, batch: Data, norm: str, attack: type[APGD]) -> None:
    x_adv = attack(RADII[norm], norm=norm, steps=20)(net, batch.x, batch.y)  # checks ball and box itself
    assert float(distance(norm, x_adv, batch.x).max()) <= RADII[norm] * (1 + 1e-5)
    assert not x_adv.requires_grad
    with torch.no_grad():
        before, after = net(batch.x).argmax(1) == batch.y, net(x_adv).argmax(1) == batch.y
    assert torch.equal(x_adv[~before], batch.x[~before])
    # Whoever was not fooled is returned as given.
    assert torch.equal(x_adv[after], batch.x[after])
    assert 0 < int(after.sum()) < int(before.sum())


@pytest.mark.parametrize("norm", NORMS)
def test_no_weaker_than_pgd(net: nn.Module, robust_net: nn.Module, batch: Data, norm: str) -> None:
    # As in AutoAttack; a single run at full radius may leave a few images more than the sparse steps of PGD.
    restarts = 5 if norm == "L1" else 1
    for model in (net, robust_net):
        plain = PGD(RADII[norm], 10, norm=norm)(model, batch.x, batch.y)
        # One image is allowed for the random starts.
        for loss in ("ce", "dlr", "cw"):
            attack = APGD(RADII[norm], norm=norm, loss=loss, restarts=restarts, shrinking=norm == "L1")
            x_adv = attack(model, batch.x, batch.y)
            if loss != "dlr":
                assert correct(model, x_adv, batch.y) <= correct(model, plain, batch.y) + 1
        targeted = APGDT(RADII[norm], norm=norm)(model, batch.x, batch.y)
        assert correct(model, targeted, batch.y) <= correct(model, x_adv, batch.y)


def test_more_restarts_and_targets_are_never_weaker(robust_net: nn.Module, batch: Data) -> None:
    def left(attack: APGD) -> int:
        return correct(robust_net, attack(robust_net, batch.x, batch.y), batch.y)

    # Each restart has a stream of its own, so the first runs are the same runs.
    restarts = [left(APGD(0.12, steps=2, restarts=n)) for n in (1, 3, 9)]
    targets = [left(APGDT(0.12, steps=4, n_targets=n)) for n in (1, 3, 9, 50)]
    assert restarts == sorted(restarts, reverse=True)
    assert targets == sorted(targets, reverse=True)
    assert targets[0] > targets[-1] == targets[-2]


def test_best_loss_returns_the_greatest_loss(net: nn.Module, batch: Data) -> None:
    def losses(x: Tensor) -> Tensor:
        return nn.functional.cross_entropy(net(x), batch.y, reduction="none").detach()

    attack = APGD(0.05, steps=10, best_loss=True)
    once = losses(attack(net, batch.x, batch.y))
    thrice = losses(APGD(0.05, steps=10, best_loss=True, restarts=3)(net, batch.x, batch.y))
    assert (once >= losses(APGD(0.05, steps=10)(net, batch.x, batch.y)) - 1e-5).all()
    assert (thrice >= once - 1e-5).all()


def test_targeted(net: nn.Module, batch: Data) -> None:
    target = (batch.y + 1) % 10
    x_adv = APGD(0.3, loss="ce")(net, batch.x, batch.y, target=target)
    with torch.no_grad():
        hit = net(x_adv).argmax(1) == target
    assert hit.sum() > 50
    assert torch.equal(x_adv[~hit], batch.x[~hit])
    with pytest.raises(ValueError, match="APGDT has no targeted form"):
        APGDT(0.3)(net, batch.x, batch.y, target=target)


def test_the_likeliest_wrong_classes() -> None:
    logits = torch.tensor([[1.0, 4.0, 2.0, 3.0], [9.0, 1.0, 2.0, 3.0]])
    assert likeliest_wrong(logits, torch.tensor([1, 2]), 2).tolist() == [[3, 2], [0, 3]]
    assert likeliest_wrong(logits, torch.tensor([1, 2]), 9).tolist() == [[3, 2, 0], [0, 3, 1]]


@pytest.mark.parametrize("classes", [2, 3])
def test_few_classes(classes: int) -> None:
    generator = torch.Generator().manual_seed(0)
    model = nn.Linear(6, classes)
    x = torch.rand(16, 6, generator=generator)
    y = model(x).argmax(1)
    assert correct(model, APGDT(1.0)(model, x, y), y) == 0
    if classes == 2:
        with pytest.raises(ValueError, match="loss is 'dlr' with a model of 2 classes"):
            APGD(0.1, loss="dlr")(model, x, y)


@pytest.mark.parametrize("norm", NORMS)
def test_starts_are_in_the_ball_and_belong_to_the_image(norm: str) -> None:
    x = torch.full((6, 1, 5, 5), 0.5)
    noise = Noise(torch.arange(6))
    ball = Ball(norm, 0.3)
    start = random_start(ball, x, noise, 0)
    torch.testing.assert_close(ball.distance(start, x), torch.full((6,), 0.3, dtype=torch.float64), atol=1e-5, rtol=0)
    rows = torch.tensor([4, 1])
    assert torch.equal(random_start(ball, x[rows], noise.subset(rows), 0), start[rows])
    assert not torch.equal(random_start(ball, x, noise, 1), start)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("norm", NORMS)
def test_starts_in_half_precision(norm: str, dtype: torch.dtype) -> None:
    x = torch.full((50, 3, 20, 20), 0.5)
    noise, ball = Noise(torch.arange(50)), Ball(norm, 0.3)
    start = random_start(ball, x.to(dtype), noise, 0)
    assert start.dtype == dtype
    torch.testing.assert_close(start.float(), random_start(ball, x, noise, 0), atol=0.02, rtol=0)


def test_keys_decide_whatever_the_batch(robust_net: nn.Module, batch: Data) -> None:
    keys = torch.arange(100, 164)
    attack = APGD(0.12, steps=3, restarts=2)
    whole = attack.search(problem_of(robust_net.eval(), batch.x, batch.y, keys=keys))
    rows = torch.arange(63, 20, -3)
    part = attack.search(problem_of(robust_net, batch.x[rows], batch.y[rows], seed=1, keys=keys[rows]))
    # The same points but for the rounding of differently shaped products.
    torch.testing.assert_close(part, whole[rows], atol=1e-5, rtol=0)
    assert not torch.equal(part, batch.x[rows])


def test_averages_over_a_random_model(net: nn.Module, batch: Data) -> None:
    class Noisy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.calls = 0

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            return net(x) + 0.5 * torch.randn(x.shape[0], 10)

    model = Noisy()
    state = torch.get_rng_state()
    x_adv = APGD(0.2, steps=5, eot=4, engine="autograd")(model, batch.x, batch.y)
    assert torch.equal(torch.get_rng_state(), state)
    assert model.calls == 1 + 4 * 6
    assert correct(net, x_adv, batch.y) < correct(net, batch.x, batch.y) / 2


@pytest.mark.parametrize("make", [APGD, APGDT])
def test_seed_and_generator(robust_net: nn.Module, batch: Data, make: Callable[..., APGD]) -> None:
    def run(seed: int = 0, generator: torch.Generator | None = None) -> Tensor:
        return make(0.15, steps=2, seed=seed)(robust_net, batch.x, batch.y, generator=generator)

    assert torch.equal(run(), run())
    assert not torch.equal(run(), run(seed=1))
    assert torch.equal(run(), run(seed=1, generator=torch.Generator().manual_seed(0)))


def test_epsilon_zero_is_clean(net: nn.Module, batch: Data) -> None:
    assert torch.equal(APGD(0.0, steps=3)(net, batch.x, batch.y), batch.x)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"epsilon": -0.1}, ValueError, "epsilon is -0.1"),
        ({"steps": 0}, ValueError, "steps is 0; expected an integer >= 1"),
        ({"restarts": 0}, ValueError, "restarts is 0"),
        ({"eot": 0}, ValueError, "eot is 0"),
        ({"rho": 1.5}, ValueError, "rho is 1.5"),
        ({"loss": "dlrr"}, ValueError, "loss is 'dlrr'; did you mean 'dlr'"),
        ({"shrinking": True}, ValueError, "shrinking is True under Linf"),
    ],
)
def test_bad_settings(options: dict[str, object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        APGD(**{"epsilon": 0.1, **options})
    with pytest.raises(ValueError, match="n_targets is 0"):
        APGDT(0.1, n_targets=0)
    with pytest.raises(ValueError, match="best_loss is True"):
        APGDT(0.1, best_loss=True)


def test_noise_is_uniform_normal_and_of_its_key() -> None:
    noise = Noise(torch.arange(50))
    u, z = noise.uniform(3, (4, 1000)), noise.normal(-(2**70), (1000,), torch.float64)
    assert u.shape == (50, 4, 1000) and float(u.min()) >= 0 and float(u.max()) < 1
    # Standard errors: 0.2887 / sqrt(200000) = 0.00065 of a uniform mean, 1 / sqrt(50000) = 0.0045 of a Gaussian one.
    assert abs(float(u.mean()) - 0.5) < 0.003
    assert abs(float(z.mean())) < 0.02 and abs(float(z.std()) - 1) < 0.02
    assert abs(float(torch.corrcoef(u[:2].flatten(1))[0, 1])) < 0.08
    counts = noise.integers(0, 2000, 7).flatten().bincount()
    assert counts.shape == (7,) and (counts - 100_000 / 7).abs().max() < 600  # 5 standard deviations of 110
    signs = noise.signs(0, (2000,))
    assert set(signs.unique().tolist()) == {-1.0, 1.0} and abs(float(signs.mean())) < 0.02
    assert torch.equal(noise.uniform(3, (10,)), noise.uniform(3, (20,))[:, :10])
