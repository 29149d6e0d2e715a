"""What the search takes for a success counts only if the model itself says so."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from emr_kernels.linearize import LinearizedPoint
from emr_training.attacks import APGD, FAB, FABT, CarliniWagner, DeepFool
from emr_training.attacks import classifier as classifiers
from emr_training.attacks.classifier import Classifier
from emr_training.attacks.problem import Problem
from emr_training.data import Data


class Lying:
    """A linearized model that takes every image for one of the next class."""

    def __init__(self, true: LinearizedPoint) -> None:
        self.logits = true.logits.roll(1, 1)
        self._true = true

    def vjp(self, seed: Tensor) -> Tensor:
        return self._true.vjp(seed.roll(-1, 1))


@pytest.fixture
def engine_lies(monkeypatch: pytest.MonkeyPatch) -> None:
    at = LinearizedPoint.at

    class Engine:
        at = staticmethod(lambda *arguments: Lying(at(*arguments)))

    monkeypatch.setattr(classifiers, "LinearizedPoint", Engine)


def problem(model: nn.Module, data: Data, **options: Any) -> Problem:
    return Problem(Classifier(model.eval(), **options), data.x, data.y, None, torch.Generator())


def test_forwards_run_as_the_linearized_program(net: nn.Module, batch: Data) -> None:
    calls = []
    handle = net.register_forward_pre_hook(lambda *_: calls.append(1))
    try:
        asked = problem(net, batch)
        asked.classifier.reason = None  # despite the hook
        expected = asked.logits(batch.x)
        assert len(calls) == 1
        asked.linearized(batch.x)
        calls.clear()
        torch.testing.assert_close(asked.logits(batch.x), expected, rtol=1e-4, atol=1e-4)
        assert not calls
        asked.subset(torch.tensor([0])).logits(batch.x[:1])
        assert calls
    finally:
        handle.remove()


@pytest.mark.usefixtures("engine_lies")
def test_the_model_has_the_last_word(net: nn.Module, batch: Data) -> None:
    asked = problem(net, batch)
    at = asked.linearized(batch.x)
    with torch.no_grad():
        wrong = net(batch.x).argmax(1) != batch.y
    taken = asked.judged(at.logits)
    assert taken.float().mean() > 0.9 and wrong.float().mean() < 0.1
    assert torch.equal(asked.fooled(batch.x, at.logits), wrong & taken)
    rows = torch.tensor([5, 2])
    assert torch.equal(asked.judged(at.logits[rows], rows), taken[rows])
    # By autograd the search sees the model's own logits: nothing to ask again.
    plain = problem(net, batch, engine="autograd")
    before = plain.classifier.forwards
    plain.fooled(batch.x, net(batch.x).detach())
    assert plain.classifier.forwards == before


@pytest.mark.usefixtures("engine_lies")
@pytest.mark.parametrize(
    "attack",
    [
        FAB(steps=5),
        FABT(steps=5, n_targets=2),
        FABT(0.1, steps=5, n_targets=2),
        DeepFool(steps=5),
        CarliniWagner(steps=10, runs=2),
    ],
    ids=["fab", "fab-t", "fab-t within", "deepfool", "cw"],
)
def test_what_only_the_engine_takes_for_a_success_is_none(attack: Any, net: nn.Module, batch: Data) -> None:
    found = attack(net, batch.x[:16], batch.y[:16])
    with torch.no_grad():
        succeeded = net(found).argmax(1) != batch.y[:16]
    unmoved = (found == batch.x[:16]).flatten(1).all(1)
    assert (succeeded | unmoved).all()


def test_the_share_of_steps_that_have_to_pay() -> None:
    assert APGD(0.1).rho == 0.75
