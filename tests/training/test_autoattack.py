"""AutoAttack: its ensembles, its verdict, what it says, that it goes on where it was, and that it leaves no trace."""

from __future__ import annotations

import json
import warnings
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from emr_training.attacks import (
    APGD,
    APGDT,
    FAB,
    FABT,
    PGD,
    AutoAttack,
    BoundedAttack,
    EvaluationWarning,
    Square,
)
from emr_training.attacks.balls import NORMS, distance
from emr_training.attacks.problem import Problem
from emr_training.attacks.suite import for_classes, suite
from emr_training.data import Data

SHORT = {
    "apgd-ce": APGD(0.1, steps=5),
    "apgd-t": APGDT(0.1, steps=5, n_targets=3),
    "fab-t": FABT(0.1, steps=5, n_targets=2),
    "square": Square(0.1, queries=30),
}


def short(**options: Any) -> AutoAttack:
    """An ensemble of seconds rather than minutes."""
    return AutoAttack(eps=0.1, version="custom", attacks_to_run=SHORT, **{"verbose": False, **options})


def correct(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    with torch.no_grad():
        return model(x).argmax(1) == y


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


# What it says.


def test_the_lines_that_users_search_for(net: nn.Module, batch: Data, tmp_path: Path, capsys: Any) -> None:
    log = tmp_path / "log.txt"
    attack = replace(short(verbose=True, log_path=log), model=net)
    x_adv, labels = attack.run_standard_evaluation(batch.x, batch.y, bs=32, return_labels=True)
    robust = float(correct(net, x_adv, batch.y).double().mean())
    assert torch.equal(labels, net(x_adv).argmax(1))
    told = capsys.readouterr().out
    for lines in (told, log.read_text()):
        assert "using custom version including apgd-ce, apgd-t, fab-t, square." in lines
        assert f"initial accuracy: {float(correct(net, batch.x, batch.y).double().mean()):.2%}" in lines
        assert "apgd-ce - 1/2 - " in lines and " out of 32 successfully perturbed" in lines
        assert f"robust accuracy after SQUARE: {robust:.2%} (total time " in lines
        assert "max Linf perturbation: 0.10000, nan in tensor: 0, max: 1.00000, min: 0.00000" in lines
        assert f"\nrobust accuracy: {robust:.2%}" in lines or f" robust accuracy: {robust:.2%}" in lines
    assert isinstance(attack.run_standard_evaluation(batch.x, batch.y), Tensor)
    with pytest.raises(ValueError, match="model is None"):
        short().run_standard_evaluation(batch.x, batch.y)


def test_quiet(net: nn.Module, batch: Data, capsys: Any) -> None:
    short().run(net, batch.x, batch.y)
    captured = capsys.readouterr()
    assert captured.out == captured.err == ""


def test_individual(net: nn.Module, batch: Data, capsys: Any) -> None:
    attack = AutoAttack(net, "Linf", 0.1, version="custom", attacks_to_run=["apgd-ce", "apgd-dlr"])
    found = attack.run_standard_evaluation_individual(batch.x[:20], batch.y[:20])
    assert list(found) == ["apgd-ce", "apgd-dlr"]
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 and lines[1].startswith("robust accuracy by APGD-DLR")
    # Each alone on all images, so that both break most of what can be broken.
    assert all(float(correct(net, x_adv, batch.y[:20]).float().mean()) < 0.6 for x_adv in found.values())


class Wrapped(nn.Module):
    """The classifier with something done to its input or output."""

    def __init__(self, inner: nn.Module, how: str) -> None:
        super().__init__()
        self.inner, self.how = inner, how

    def forward(self, x: Tensor) -> Tensor:
        if self.how == "random":
            x = x + 0.05 * torch.randn_like(x)
        if self.how == "rounded":
            x = x + (x.round() - x).detach() - (x - x.detach())
        if self.how == "dynamic":
            with torch.enable_grad():
                leaf = x.detach().requires_grad_()
                x = x - 0.01 * torch.autograd.grad(self.inner(leaf).logsumexp(1).sum(), leaf)[0].sign()
        logits = self.inner(x)
        return logits.softmax(1) if self.how == "softmax" else logits


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("random", r'the model is random.*version="rand"'),
        ("softmax", "outputs are probabilities.*Return the logits"),
        ("rounded", "exactly zero at .* images.*Square"),
        ("dynamic", "takes 1 gradients in one forward pass.*adaptive attack"),
    ],
)
def test_warns_of_what_makes_an_evaluation_unreliable(net: nn.Module, batch: Data, how: str, message: str) -> None:
    attack = AutoAttack(eps=0.1, version="custom", attacks_to_run={"a": APGD(0.1, steps=1)}, verbose=False)
    with pytest.warns(EvaluationWarning, match=message):
        _, result = attack.run(Wrapped(net, how), batch.x, batch.y)
    assert len(result.warnings) == 1


def test_does_not_warn_without_a_reason(net: nn.Module, robust_net: nn.Module, batch: Data) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", EvaluationWarning)
        for model in (net, robust_net):
            assert short().run(model, batch.x, batch.y)[1].warnings == ()
        rand = AutoAttack(eps=0.1, version="custom", attacks_to_run={"a": APGD(0.1, steps=2, eot=2)}, verbose=False)
        rand.run(Wrapped(net, "random"), batch.x, batch.y)


def test_warns_when_square_breaks_what_gradients_did_not(net: nn.Module, batch: Data) -> None:
    weak = {"apgd-ce": APGD(0.0, steps=1), "square": Square(0.2, queries=100)}
    attack = AutoAttack(eps=0.2, version="custom", attacks_to_run=weak, verbose=False)
    with pytest.warns(EvaluationWarning, match="Square lowered the robust accuracy by .* points"):
        attack.run(net, batch.x, batch.y)
    alone = replace(attack, attacks_to_run={"square": weak["square"]})
    with warnings.catch_warnings():
        warnings.simplefilter("error", EvaluationWarning)
        alone.run(net, batch.x, batch.y)


def test_a_random_model_repeats_by_the_seed_and_leaves_the_global_one(net: nn.Module, batch: Data) -> None:
    attack = AutoAttack(
        eps=0.05, version="custom", attacks_to_run={"a": APGD(0.05, steps=3, eot=2)}, verbose=False, batch_size=30
    )
    model = Wrapped(net, "random")
    state = torch.get_rng_state()
    first = attack.run(model, batch.x, batch.y)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(99)
    second = attack.run(model, batch.x, batch.y)
    assert first[1].attacks[0].broken == second[1].attacks[0].broken > 0


# Going on where it was.


class Interrupted(nn.Module):
    """Raises KeyboardInterrupt once so many images have been classified."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner, self.left = inner, float("inf")

    def forward(self, x: Tensor) -> Tensor:
        self.left -= len(x)
        if self.left < 0:
            raise KeyboardInterrupt
        return self.inner(x)


def test_goes_on_after_an_interruption(robust_net: nn.Module, batch: Data, tmp_path: Path) -> None:
    model, path = Interrupted(robust_net), tmp_path / "states" / "aa.state"
    attack = short(batch_size=20, engine="autograd")
    expected_x, expected = attack.run(model, batch.x, batch.y)
    interruptions = 0
    for _ in range(100):
        model.left = 900
        try:
            x_adv, result = attack.run(model, batch.x, batch.y, state_path=path)
            break
        except KeyboardInterrupt:
            interruptions += 1
            assert [p.name for p in path.parent.iterdir()] == ["aa.state"]
    assert interruptions >= 3
    assert torch.equal(x_adv, expected_x)
    assert result.broken_by == expected.broken_by and torch.equal(result.predicted, expected.predicted)
    for ours, theirs in zip(result.attacks, expected.attacks, strict=True):
        assert replace(ours, seconds=0.0) == replace(theirs, seconds=0.0)
    # A finished evaluation is not run again: 64 images at most for a look at the classes.
    model.left = 64
    again_x, again = attack.run(model, batch.x, batch.y, state_path=path)
    assert torch.equal(again_x, expected_x) and again.broken_by == expected.broken_by


def test_refuses_a_state_of_something_else(net: nn.Module, robust_net: nn.Module, batch: Data, tmp_path: Path) -> None:
    path = tmp_path / "aa.state"
    attack = replace(short(), attacks_to_run={"a": APGD(0.1, steps=1)})
    attack.run(net, batch.x, batch.y, state_path=path)
    before = path.read_bytes()
    with pytest.raises(ValueError, match=r"evaluation with another data.*Delete the file"):
        attack.run(net, batch.x.flip(0), batch.y, state_path=path)
    with pytest.raises(ValueError, match="evaluation with another model"):
        attack.run(robust_net, batch.x, batch.y, state_path=path)
    with pytest.raises(ValueError, match="evaluation with another settings"):
        replace(attack, seed=1).run(net, batch.x, batch.y, state_path=path)
    assert path.read_bytes() == before
    path.write_text("{}")
    with pytest.raises(ValueError, match="is not the state of an evaluation"):
        attack.run(net, batch.x, batch.y, state_path=path)


# No trace.


@pytest.mark.parametrize("fail", [False, True])
@pytest.mark.parametrize("mode", [True, False])
def test_leaves_no_trace(batch: Data, fail: bool, mode: bool) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.norm, self.last = nn.Linear(64, 24), nn.BatchNorm1d(24), nn.Linear(24, 10)
            self.frozen = nn.BatchNorm1d(24)
            self.calls = 0

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            if fail and self.calls > 30:
                raise RuntimeError("out of luck")
            return self.last(self.frozen(self.norm(self.first(x.flatten(1)))).relu())

    model = Net().train(mode)
    model.frozen.eval()
    model.first.bias.requires_grad_(False)
    model.last.weight.grad = torch.ones_like(model.last.weight)

    def trace() -> dict[str, object]:
        return {
            "modes": [m.training for m in model.modules()],
            "requires_grad": [p.requires_grad for p in model.parameters()],
            "grad": [None if p.grad is None else p.grad.tolist() for p in model.parameters()],
            "state": {name: value.tolist() for name, value in model.state_dict().items()},
            "rng": torch.get_rng_state().tolist(),
            "x": batch.x.tolist(),
            "grad_mode": torch.is_grad_enabled(),
        }

    before = trace()
    attack = short(engine="autograd")
    if fail:
        with pytest.raises(RuntimeError, match="out of luck"):
            attack.run(model, batch.x, batch.y)
    else:
        attack.run(model, batch.x, batch.y)
    assert trace() == before


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
        ({"eps": -0.1}, ValueError, "epsilon is -0.1"),
        ({"norm": "L0"}, ValueError, "norm is 'L0'"),
        ({"version": "standart"}, ValueError, "version is 'standart'; did you mean 'standard'"),
        ({"order": "yeild"}, ValueError, "order is 'yeild'; did you mean 'yield'"),
        ({"batch_size": 0}, ValueError, "batch_size is 0"),
        ({"model": 3}, TypeError, "model is of type int"),
        ({"version": "custom"}, ValueError, "attacks_to_run is .* with version 'custom'"),
        ({"attacks_to_run": ["square"]}, ValueError, "with version 'standard'"),
        ({"version": "custom", "attacks_to_run": ["sqare"]}, ValueError, "did you mean 'square'"),
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
