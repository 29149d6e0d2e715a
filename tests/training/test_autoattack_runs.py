"""A run of AutoAttack: what it says, that it goes on where it was, and that it leaves no trace."""

from __future__ import annotations

import cProfile
import pstats
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from attack_cases import correct, short
from emr_training.attacks import (
    APGD,
    AutoAttack,
    EvaluationWarning,
    Square,
)
from emr_training.data import Data


def test_the_lines_that_users_search_for(net: nn.Module, batch: Data, tmp_path: Path, capsys: Any) -> None:
    log = tmp_path / "logs" / "log.txt"
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
    assert len(lines) == 2 and lines[1].startswith("robust accuracy by APGD-DLR \t ")
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


def test_can_be_profiled(net: nn.Module, batch: Data) -> None:
    """The search for gradients in the forward pass takes the place of a profiler, and cannot put back cProfile's."""
    profile = cProfile.Profile()
    profile.runcall(lambda: short().run(net, batch.x, batch.y))
    assert any("square" in str(place) for place in pstats.Stats(profile).stats)  # type: ignore[attr-defined]


def test_does_not_warn_without_a_reason(net: nn.Module, robust_net: nn.Module, batch: Data) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", EvaluationWarning)
        for model in (net, robust_net):
            assert short().run(model, batch.x, batch.y)[1].warnings == ()
        rand = AutoAttack(eps=0.1, version="custom", attacks_to_run={"a": APGD(0.1, steps=2, eot=2)}, verbose=False)
        rand.run(Wrapped(net, "random"), batch.x, batch.y)


def test_warns_of_nan_off_the_images(net: nn.Module, batch: Data) -> None:
    class Fragile(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            off = ((x[:, None] - batch.x[None]).abs().flatten(2).amax(2).amin(1) > 1e-4)[:, None]
            return torch.where(off, torch.nan, net(x))

    attack = AutoAttack(eps=0.1, version="custom", attacks_to_run=["apgd-ce"], verbose=False)
    with pytest.warns(EvaluationWarning, match=r"apgd-ce met NaN in the model's logits \d+ times"):
        _, result = attack.run(Fragile(), batch.x, batch.y)
    assert result.robust_accuracy == result.clean_accuracy
    assert len(result.warnings) == 1


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
    elsewhere = tmp_path / "callable.state"
    attack.run(lambda x: net(x), batch.x, batch.y, state_path=elsewhere)
    attack.run(lambda x: net(x), batch.x, batch.y, state_path=elsewhere)
    with pytest.raises(ValueError, match=r"evaluation with another model.*the logits of the first images differ"):
        attack.run(lambda x: robust_net(x), batch.x, batch.y, state_path=elsewhere)
    path.write_text("{}")
    with pytest.raises(ValueError, match="is not the state of an evaluation"):
        attack.run(net, batch.x, batch.y, state_path=path)


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
