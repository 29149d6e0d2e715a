"""FAB: its projections against solvers, exact distances, and its two uses."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from scipy.optimize import linprog, minimize
from torch import Tensor, nn

import emr_kernels
from emr_training.attacks import FAB, FABT
from emr_training.attacks.balls import NORMS, distance
from emr_training.attacks.classifier import Classifier
from emr_training.attacks.hyperplanes import to_hyperplane
from emr_training.attacks.problem import Problem
from emr_training.data import Data
from linear_models import images, one_region

RADII = {"Linf": 0.08, "L2": 0.5, "L1": 1.5}
ORDERS = {"Linf": torch.inf, "L2": 2, "L1": 1}
DUALS = {"Linf": 1, "L2": 2, "L1": torch.inf}


def correct(model: nn.Module, x: Tensor, y: Tensor) -> int:
    with torch.no_grad():
        return int((model(x).argmax(1) == y).sum())


def solved(norm: str, x: np.ndarray, w: np.ndarray, gap: float) -> float | None:
    """The least norm of d with <w, d> = -gap and x + d in the box, by a general solver; None: out of reach."""
    n = len(x)
    if norm == "L2":
        bounds = list(zip(-x, 1 - x, strict=True))
        constraint = {"type": "eq", "fun": lambda d: w @ d + gap, "jac": lambda d: w}
        done = minimize(
            lambda d: d @ d, np.zeros(n), jac=lambda d: 2 * d, bounds=bounds, constraints=[constraint],
            options={"ftol": 1e-14, "maxiter": 500},
        )  # fmt: skip
        return float(np.sqrt(done.fun)) if done.success else None
    # d = up - down with both >= 0; under Linf one more variable bounds them all.
    cost = np.ones(2 * n) if norm == "L1" else np.r_[np.zeros(2 * n), 1.0]
    equal = np.r_[w, -w] if norm == "L1" else np.r_[w, -w, 0.0]
    bounds = [(0, v) for v in np.r_[1 - x, x]] + ([] if norm == "L1" else [(0, None)])
    inequality = {}
    if norm == "Linf":
        inequality = {"A_ub": np.c_[np.eye(2 * n), -np.ones(2 * n)], "b_ub": np.zeros(2 * n)}
    done = linprog(cost, A_eq=equal[None], b_eq=[-gap], bounds=bounds, **inequality)
    return float(done.fun) if done.success else None


@pytest.mark.parametrize("norm", NORMS)
def test_projection_against_a_solver(norm: str) -> None:
    generator = torch.Generator().manual_seed(3)
    x = torch.rand(60, 9, generator=generator, dtype=torch.float64)
    x[:20] = (3 * x[:20] - 1).clamp(0, 1)  # many pixels at the edge
    w = torch.randn(60, 9, generator=generator, dtype=torch.float64)
    w[::7, :4] = 0
    gap = 3 * torch.randn(60, generator=generator, dtype=torch.float64)
    d, lengths = to_hyperplane(norm, x, w, gap)
    assert float((x + d).min()) >= -1e-15 and float((x + d).max()) <= 1 + 1e-15
    torch.testing.assert_close(lengths, torch.linalg.vector_norm(d, ORDERS[norm], dim=1))
    reached = 0
    for i in range(60):
        least = solved(norm, x[i].numpy(), w[i].numpy(), float(gap[i]))
        if least is None:
            # Every pixel with a weight at the end of its way.
            toward = -torch.sign(gap[i]) * w[i]
            corner = torch.where(toward > 0, 1.0, torch.where(toward < 0, 0.0, x[i]))
            torch.testing.assert_close(x[i] + d[i], corner)
            continue
        reached += 1
        torch.testing.assert_close(w[i] @ d[i], -gap[i], atol=1e-12, rtol=1e-12)
        # The solver of the quadratic programme stops at about 1e-7.
        torch.testing.assert_close(float(lengths[i]), least, atol=1e-6 if norm == "L2" else 1e-9, rtol=0)
    assert 20 < reached < 60


@pytest.mark.parametrize("norm", NORMS)
def test_projection_of_what_needs_none_or_cannot_move(norm: str) -> None:
    x, w = torch.full((2, 3), 0.5), torch.tensor([[1.0, -2.0, 0.0], [0.0, 0.0, 0.0]])
    d, lengths = to_hyperplane(norm, x, w, torch.tensor([0.0, 1.0]))
    assert not d.any() and not lengths.any()


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("kind", [FAB, FABT])
def test_exact_distance_on_a_linear_model(norm: str, kind: type[FAB]) -> None:
    torch.manual_seed(0)
    model = nn.Linear(20, 5).double()
    # The middle of the box is on all boundaries at once, and the images are near it: no pixel meets the box.
    model.bias.data = -0.5 * model.weight.data.sum(1)
    x = 0.5 + 0.02 * torch.randn(40, 20, dtype=torch.float64)
    with torch.no_grad():
        logits = model(x)
    y = logits.argmax(1)
    gaps = logits.gather(1, y[:, None]) - logits
    slopes = torch.linalg.vector_norm(model.weight[y][:, None] - model.weight, DUALS[norm], dim=2)
    exact = (gaps / slopes).nan_to_num(nan=torch.inf).amin(1).detach()
    x_adv = kind(norm=norm)(model, x, y)
    found = distance(norm, x_adv, x)
    assert correct(model, x_adv, y) == 0
    # Beyond the boundary by the overshoot of the last step at most: 5% of the 10% that the step before went back.
    assert (found >= exact).all() and (found <= 1.01 * exact).all()


@pytest.mark.parametrize(("norm", "dual"), [("Linf", 1), ("L2", 2)])
@pytest.mark.parametrize("kind", [FAB, FABT])
def test_exact_distance_in_one_region(norm: str, dual: int, kind: type[FAB]) -> None:
    model = one_region(4)
    x, y = images(model, least=0.02)
    exact = emr_kernels.effective_margins(model, x, y, ord=dual)
    x_adv = kind(norm=norm)(model, x, y)
    assert correct(model, x_adv, y) == 0
    torch.testing.assert_close(distance(norm, x_adv, x).float(), exact, rtol=0.01, atol=0)


@pytest.mark.parametrize("norm", NORMS)
def test_a_bound_keeps_what_is_within_it(net: nn.Module, robust_net: nn.Module, batch: Data, norm: str) -> None:
    for model in (net, robust_net):
        nearest = FABT(norm=norm, steps=20)(model, batch.x, batch.y)
        far = distance(norm, nearest, batch.x)
        with torch.no_grad():
            wrong = model(nearest).argmax(1) != batch.y
            clean = model(batch.x).argmax(1) == batch.y
        assert float(wrong.float().mean()) > 0.95
        assert torch.equal(nearest[~clean], batch.x[~clean])
        bounded = FABT(RADII[norm], norm=norm, steps=20)(model, batch.x, batch.y)
        with torch.no_grad():
            broken = model(bounded).argmax(1) != batch.y
        assert float(distance(norm, bounded, batch.x).max()) <= RADII[norm]
        # The same runs, but for the rounding of smaller batches.
        assert int((broken != (wrong & (far <= RADII[norm]))).sum()) <= 1
        assert torch.equal(bounded[~broken], batch.x[~broken])
        assert 0 < int(broken.sum()) < len(batch)


@pytest.mark.parametrize(
    "ladder",
    [
        [FABT(norm="L2", steps=8, n_targets=n) for n in (1, 3, 9, 20)],
        [FAB(norm="L2", steps=n) for n in (2, 6, 12)],
        [FAB(steps=3, restarts=n) for n in (1, 6)],
    ],
)
def test_more_work_is_never_weaker(robust_net: nn.Module, batch: Data, ladder: list[FAB]) -> None:
    def lengths(attack: FAB) -> Tensor:
        x_adv = attack(robust_net, batch.x, batch.y)
        with torch.no_grad():
            wrong = robust_net(x_adv).argmax(1) != batch.y
        return torch.where(wrong, distance(attack.norm, x_adv, batch.x), torch.inf)

    found = [lengths(attack) for attack in ladder]
    assert all(bool((more <= fewer + 1e-6).all()) for fewer, more in pairwise(found))
    assert (found[-1] < found[0] - 1e-4).any()


def test_the_nearest_class_is_found_by_ratio_not_by_gap() -> None:
    # Class 1 is nearer in logits (gap 1, slope 1: distance 1), class 2 in space (gap 2, slope 10: distance 0.2).
    model = nn.Linear(2, 3)
    model.weight.data = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 10.0]])
    model.bias.data = torch.tensor([0.0, -1.5, -7.0])
    x, y = torch.full((1, 2), 0.5), torch.zeros(1, dtype=torch.int64)
    x_adv = FAB(norm="L2", steps=5)(model, x, y)
    assert int(model(x_adv).argmax()) == 2
    torch.testing.assert_close(distance("L2", x_adv, x), torch.tensor([0.2], dtype=torch.float64), rtol=0.01, atol=0)


def test_counts_passes_and_stops_early(robust_net: nn.Module, batch: Data) -> None:
    def cost(attack: FAB) -> tuple[int, int]:
        classifier = Classifier(robust_net.eval(), "autograd")
        attack.search(Problem(classifier, batch.x, batch.y, None, torch.Generator()))
        return classifier.forwards, classifier.backwards

    right = correct(robust_net, batch.x, batch.y)
    assert cost(FAB(steps=3)) == (64 + 3 * 2 * right, 3 * 9 * right)
    assert cost(FABT(steps=3, n_targets=2)) == (64 + 2 * 3 * 2 * right, 2 * 3 * right)
    assert cost(FABT(1.0, steps=30))[1] < 0.2 * cost(FABT(steps=30))[1]


def test_a_model_without_slope_is_left_alone() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 3))
    model[1].weight.data.zero_()
    model[1].bias.data = torch.tensor([1.0, 0.0, 0.0])
    x, y = torch.rand(3, 4), torch.zeros(3, dtype=torch.int64)
    assert torch.equal(FAB(steps=3, restarts=2)(model, x, y), x)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"epsilon": -1.0}, "epsilon is -1.0"),
        ({"norm": "L3"}, "norm is 'L3'"),
        ({"steps": 0}, "steps is 0"),
        ({"restarts": 0}, "restarts is 0"),
        ({"alpha_max": 2.0}, "alpha_max is 2.0"),
        ({"eta": 0.5}, "eta is 0.5"),
        ({"beta": 1.5}, "beta is 1.5"),
        ({"n_targets": 0}, "n_targets is 0"),
    ],
)
def test_bad_settings(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FABT(**options)


@pytest.mark.parametrize("kind", [FAB, FABT])
def test_a_gradient_that_is_one_number_in_memory(kind: type[FAB]) -> None:
    class Constant(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.eye(3)[:1] + 0 * x.sum()

    x, y = torch.rand(1, 1, 2, 2), torch.zeros(1, dtype=torch.int64)
    assert torch.equal(kind(0.1, steps=2, engine="autograd")(Constant(), x, y), x)
