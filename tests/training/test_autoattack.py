"""AutoAttack: its ensembles, its verdict, and what it refuses."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from attack_cases import SHORT, correct, short
from emr_training.attacks import (
    APGD,
    APGDT,
    FAB,
    FABT,
    PGD,
    AutoAttack,
    BoundedAttack,
    Square,
)
from emr_training.attacks.balls import NORMS, distance
from emr_training.attacks.problem import Problem
from emr_training.attacks.suite import for_classes, suite
from emr_training.data import Data


@pytest.mark.parametrize("norm", ["Linf", "L2"])
def test_the_standard_ensemble(norm: str) -> None:
    attacks = AutoAttack(norm=norm, eps=0.3, seed=5).attacks()
    assert list(attacks) == ["apgd-ce", "apgd-t", "fab-t", "square"]
    assert attacks["apgd-ce"] == APGD(0.3, norm=norm, steps=100, restarts=1, loss="ce", seed=5)
    assert attacks["apgd-t"] == APGDT(0.3, norm=norm, steps=100, restarts=1, n_targets=9, loss="dlr", seed=5)
    assert attacks["fab-t"] == FABT(0.3, norm=norm, steps=100, restarts=1, n_targets=9, seed=5)
    assert attacks["square"] == Square(0.3, norm=norm, queries=5000, p=0.8, rescale=False, seed=5)


def test_the_other_ensembles() -> None:
    sparse = AutoAttack(norm="L1", eps=12.0).attacks()
    assert list(sparse) == ["apgd-ce", "apgd-t", "fab-t", "square"]
    assert sparse["apgd-ce"] == APGD(12.0, norm="L1", restarts=5, shrinking=True)
    assert sparse["apgd-t"] == APGDT(12.0, norm="L1", n_targets=5, shrinking=True)
    plus = AutoAttack(eps=0.3, version="plus", precision="bfloat16").attacks()
    assert list(plus) == ["apgd-ce", "apgd-dlr", "fab", "square", "apgd-t", "fab-t"]
    assert plus["apgd-dlr"] == APGD(0.3, loss="dlr", restarts=5, precision="bfloat16")
    assert plus["fab"] == FAB(0.3, restarts=5, precision="bfloat16")
    assert plus["fab-t"] == FABT(0.3, precision="bfloat16")
    rand = AutoAttack(eps=0.3, version="rand").attacks()
    assert list(rand.values()) == [APGD(0.3, eot=20), APGD(0.3, loss="dlr", eot=20)]
    named = AutoAttack(eps=0.3, version="custom", attacks_to_run=["square", "apgd-ce"]).attacks()
    assert list(named) == ["square", "apgd-ce"]


def test_order_by_yield_has_the_same_attacks() -> None:
    for version in ("standard", "plus", "rand"):
        usual, by_yield = (suite("Linf", 0.3, version, order) for order in ("standard", "yield"))
        assert by_yield.pop("apgd-ce-10", APGD(0.3, steps=10)) == APGD(0.3, steps=10)
        assert by_yield == usual
        if version != "rand":
            assert next(iter(by_yield)) == "apgd-t"
            assert {"square", "fab-t"} <= set(list(by_yield)[-3:])


def test_few_classes() -> None:
    attack, change = for_classes(APGDT(0.1), 5)
    assert attack == APGDT(0.1) and change == "4 targets instead of 9: the model has 5 classes"
    assert for_classes(FABT(0.1), 10) == (FABT(0.1), None)
    attack, change = for_classes(APGD(0.1, loss="dlr"), 2)
    assert attack == APGD(0.1, loss="cw") and change is not None
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 2))
    x = torch.rand(20, 1, 4, 4)
    y = model(x).argmax(1)
    tiny = {"apgd-dlr": APGD(1.0, loss="dlr"), "apgd-t": APGDT(1.0), "fab-t": FABT(1.0)}
    x_adv, result = AutoAttack(eps=1.0, version="custom", attacks_to_run=tiny, verbose=False).run(model, x, y)
    assert result.robust_accuracy == 0 and not correct(model, x_adv, y).any()


@pytest.mark.parametrize("order", ["standard", "yield"])
def test_the_result_agrees_with_the_examples(robust_net: nn.Module, batch: Data, order: str) -> None:
    x, y = batch.x[:30], batch.y[:30]
    attack = AutoAttack(eps=0.12, version="custom", attacks_to_run=["apgd-ce", "apgd-t"], order=order, verbose=False)
    x_adv, result = attack.run(robust_net, x, y, batch_size=16)
    clean, robust = correct(robust_net, x, y), correct(robust_net, x_adv, y)
    assert result.clean_accuracy == float(clean.double().mean())
    assert result.robust_accuracy == float(robust.double().mean())
    assert torch.equal(result.robust, robust)
    assert [name == "clean" for name in result.broken_by] == (~clean).tolist()
    assert torch.equal(result.predicted, robust_net(x_adv).argmax(1))
    assert float(distance("Linf", x_adv, x).max()) <= 0.12 + 1e-6
    assert torch.equal(x_adv[robust], x[robust]) and torch.equal(x_adv[~clean], x[~clean])
    assert [a.name for a in result.attacks] == (["apgd-ce", "apgd-t"] if order == "standard" else ["apgd-t", "apgd-ce"])
    left = int(clean.sum())
    for outcome in result.attacks:
        assert outcome.attacked == left
        assert outcome.broken == result.broken_by.count(outcome.name)
        left -= outcome.broken
        assert outcome.robust_accuracy == left / 30
        assert outcome.forwards > outcome.backwards >= 0 < outcome.seconds
    assert 0 < left < int(clean.sum()) - 5
    assert json.loads(json.dumps(result.as_dict()))["robust_accuracy"] == result.robust_accuracy
    assert f"{result.robust_accuracy:.2%}" in str(result)


def test_ordering_of_attacks(net: nn.Module, robust_net: nn.Module, batch: Data) -> None:
    for model in (net, robust_net):
        pgd = PGD(0.1, 20)(model, batch.x, batch.y)
        counts = [int(correct(model, x, batch.y).sum()) for x in (batch.x, pgd, short()(model, batch.x, batch.y))]
        assert counts == sorted(counts, reverse=True)
    nothing = AutoAttack(eps=0.0, version="custom", attacks_to_run=["apgd-ce"], verbose=False)
    assert torch.equal(nothing(net, batch.x, batch.y), batch.x)
    everything = AutoAttack(eps=1.0, version="custom", attacks_to_run=["apgd-ce"], verbose=False)
    assert everything.run(net, batch.x, batch.y)[1].robust_accuracy == 0


def test_the_batch_size_does_not_matter(robust_net: nn.Module, batch: Data) -> None:
    runs = [short(batch_size=n).run(robust_net, batch.x, batch.y) for n in (64, 7)]
    assert runs[0][1].broken_by == runs[1][1].broken_by
    torch.testing.assert_close(runs[0][0], runs[1][0], atol=1e-4, rtol=0)
    assert len(set(runs[0][1].broken_by)) > 2


def test_seeds(robust_net: nn.Module, batch: Data) -> None:
    def run(seed: int | None) -> Tensor:
        return short(seed=seed, attacks_to_run={"a": APGD(0.1, steps=2)}).run(robust_net, batch.x, batch.y)[0]

    def short(**options: Any) -> AutoAttack:
        return AutoAttack(eps=0.1, version="custom", verbose=False, **options)

    assert torch.equal(run(1), run(1))
    assert not torch.equal(run(1), run(2))
    drawn = short(seed=None, attacks_to_run=["square"])
    assert isinstance(drawn.seed, int) and drawn.attacks()["square"].seed == drawn.seed


@dataclass(frozen=True)
class Lying(BoundedAttack):
    """Returns points that are in the ball, or not, and says nothing about success."""

    shift: float = 0.0

    def search(self, problem: Problem) -> Tensor:
        return (problem.x + self.shift).clamp(0, 1)


def test_successes_are_classified_again_and_balls_checked(net: nn.Module, batch: Data) -> None:
    harmless = AutoAttack(eps=0.1, version="custom", attacks_to_run={"l": Lying(0.1)}, verbose=False)
    _, result = harmless.run(net, batch.x, batch.y)
    assert result.robust_accuracy == result.clean_accuracy
    outside = AutoAttack(eps=0.1, version="custom", attacks_to_run={"l": Lying(0.1, shift=0.2)}, verbose=False)
    with pytest.raises(RuntimeError, match="left its ball"):
        outside.run(net, batch.x, batch.y)


def test_low_precision_is_verified_in_float32(net: nn.Module, batch: Data) -> None:
    x_adv, result = AutoAttack(
        eps=0.1, version="custom", attacks_to_run=["apgd-ce"], precision="bfloat16", verbose=False
    ).run(net, batch.x, batch.y)
    assert torch.equal(correct(net, x_adv, batch.y), result.robust)


def test_a_black_box_and_a_plain_callable(net: nn.Module, batch: Data) -> None:
    with torch.no_grad():
        expected = short(engine="autograd").run(net, batch.x, batch.y)[1]
    assert short().run(lambda x: net(x), batch.x, batch.y)[1].broken_by == expected.broken_by
    square = replace(short(), attacks_to_run={"square": SHORT["square"]})

    def scores(x: Tensor) -> Tensor:
        return net(x).detach()

    assert square.run(scores, batch.x, batch.y)[1].attacks[0].broken > 0
    with pytest.raises(ValueError, match="logits have no gradient"):
        short().run(scores, batch.x, batch.y)


@pytest.mark.parametrize("norm", NORMS)
def test_all_norms_and_the_call(net: nn.Module, batch: Data, norm: str) -> None:
    eps = {"Linf": 0.08, "L2": 0.5, "L1": 1.5}[norm]
    few = {
        "apgd-ce": APGD(eps, norm=norm, steps=5, shrinking=norm == "L1"),
        "fab-t": FABT(eps, norm=norm, steps=5, n_targets=1),
        "square": Square(eps, norm=norm, queries=20),
    }
    attack = AutoAttack(norm=norm, eps=eps, version="custom", attacks_to_run=few)
    x_adv = attack(net, batch.x, batch.y)
    assert float(distance(norm, x_adv, batch.x).max()) <= eps * (1 + 1e-5)
    assert torch.equal(x_adv, attack(net, batch.x, batch.y, generator=torch.Generator().manual_seed(0)))
    assert int(correct(net, x_adv, batch.y).sum()) < 0.8 * len(batch)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"eps": -0.1}, ValueError, "^eps is -0.1; expected a finite number >= 0"),
        ({"eps": "8/255"}, TypeError, "^eps is '8/255' of type str; expected a finite number"),
        ({"norm": "L0"}, ValueError, "norm is 'L0'"),
        ({"version": "standart"}, ValueError, "version is 'standart'; did you mean 'standard'"),
        ({"order": "yeild"}, ValueError, "order is 'yeild'; did you mean 'yield'"),
        ({"batch_size": 0}, ValueError, "batch_size is 0"),
        ({"model": 3}, TypeError, "model is of type int"),
        ({"version": "custom"}, ValueError, "attacks_to_run is .* with version 'custom'"),
        ({"attacks_to_run": ["square"]}, ValueError, "with version 'standard'"),
        ({"version": "custom", "attacks_to_run": ["sqare"]}, ValueError, "did you mean 'square'"),
        ({"version": "custom", "attacks_to_run": "square"}, TypeError, "'square'; expected a list of names, or a map"),
        ({"version": "custom", "attacks_to_run": APGD(0.1)}, TypeError, "expected a list of names, or a mapping"),
        ({"version": "custom", "attacks_to_run": [APGD(0.1)]}, TypeError, "expected a list of names, or a mapping"),
        ({"version": "custom", "attacks_to_run": {"a": APGD(0.5)}}, ValueError, "expected Linf with epsilon at most"),
        ({"version": "custom", "attacks_to_run": {"a": APGD(0.1, norm="L2")}}, ValueError, "is in L2"),
        ({"version": "custom", "attacks_to_run": {"a": FAB()}}, ValueError, "epsilon None"),
    ],
)
def test_bad_settings(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        AutoAttack(**{"eps": 0.1, **options})


def test_bad_input(net: nn.Module, batch: Data) -> None:
    cases = [
        (batch.x + 1, batch.y, "x has values in"),
        (batch.x[:0], batch.y[:0], "expected at least one image"),
        (batch.x, batch.y + 9, "expected labels below the model's 10 classes"),
        (batch.x, batch.y[:3], "y has shape"),
    ]
    for x, y, message in cases:
        with pytest.raises(ValueError, match=message):
            short().run(net, x, y)
    broken = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    broken[1].weight.data.fill_(torch.nan)
    with pytest.raises(ValueError, match="output has NaN"):
        short().run(broken, batch.x, batch.y)
    with pytest.raises(TypeError, match="model is of type int"):
        short().run(3, batch.x, batch.y)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_refused(net: nn.Module, batch: Data) -> None:
    attack = AutoAttack(eps=0.1, device="cuda", verbose=False)
    with pytest.raises(ValueError, match="device is 'cuda'; expected cpu"):
        attack.run(net, batch.x, batch.y)


def test_shapes_that_square_does_not_take_are_refused_before_work(batch: Data) -> None:
    def never(x: Tensor) -> Tensor:
        raise AssertionError("the model was called")

    x = batch.x.view(-1, 1, 2, 4, 8)
    for attack in (lambda: AutoAttack(verbose=False).run(never, x, batch.y), lambda: Square(0.1)(never, x, batch.y)):
        with pytest.raises(ValueError, match=r"x has shape \[\d+, 1, 2, 4, 8\]; expected images \[N, C, H, W\]"):
            attack()
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    without = AutoAttack(eps=0.1, version="custom", attacks_to_run=["apgd-ce"], verbose=False)
    assert without(model, x, batch.y).shape == x.shape
