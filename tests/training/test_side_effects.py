"""No attack leaves a trace: in the model, its gradients and statistics, or the global random state."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from attack_cases import ATTACKS, exported
from emr_training.attacks import PGD, Attack
from emr_training.data import Data
from side_effects import Awkward, Plain, in_training, trace

every_attack = pytest.mark.parametrize("attack", ATTACKS.values(), ids=ATTACKS)
# Awkward is random, which AutoAttack remarks on.
pytestmark = pytest.mark.filterwarnings("ignore::emr_training.attacks.EvaluationWarning")


def test_every_attack_is_here() -> None:
    # BoundedAttack's own search is abstract; every other class of attack has an entry.
    assert exported() == {name.split(",")[0] for name in ATTACKS}


def head(batch: Data) -> tuple[Tensor, Tensor]:
    return batch.x[:8], batch.y[:8]


@every_attack
@pytest.mark.parametrize("kind", [Awkward, Plain])
def test_leaves_no_trace(batch: Data, attack: Attack, kind: type[Awkward] | type[Plain]) -> None:
    model = kind()
    in_training(model)
    x, y = head(batch)
    given = x.clone()
    before = trace(model)
    x_adv = attack(model, x, y)
    assert trace(model) == before
    assert not x_adv.requires_grad and x_adv.grad_fn is None and not x_adv.is_inference()
    assert torch.equal(x, given) and x_adv.data_ptr() != x.data_ptr()


@every_attack
@pytest.mark.parametrize("fail_at", [1, 2])
@pytest.mark.parametrize("failure", [RuntimeError("out of luck"), KeyboardInterrupt()], ids=["error", "interrupt"])
def test_leaves_no_trace_when_it_ends_early(batch: Data, attack: Attack, failure: BaseException, fail_at: int) -> None:
    if attack is ATTACKS["FGSM"] or attack is ATTACKS["RFGSM"]:
        fail_at = 1  # they call the model once
    model = Awkward(failure, fail_at)
    in_training(model)
    before = trace(model)
    with pytest.raises(type(failure)):
        attack(model, *head(batch))
    assert trace(model) == before


@every_attack
def test_training_mode_moves_statistics_and_nothing_else(batch: Data, attack: Attack) -> None:
    model = Plain()
    in_training(model)
    with torch.no_grad():
        y = copy.deepcopy(model)(batch.x).argmax(1)
    before = trace(model)
    settings = {"bn_mode": "train"}
    if attack is ATTACKS["AutoAttack"]:
        inner = {name: replace(part, bn_mode="train") for name, part in attack.attacks().items()}
        settings["attacks_to_run"] = inner
    replace(attack, **settings)(model, batch.x, y)
    after = trace(model)
    moved = {name for name, value in after.pop("state").items() if value != before["state"][name]}
    assert moved == {"norm.running_mean", "norm.running_var", "norm.num_batches_tracked"}
    before.pop("state")
    assert after == before


def test_pgd_in_training_mode_counts_its_forwards(batch: Data) -> None:
    model = Plain().train()
    PGD(0.1, 7, bn_mode="train", keep="last")(model, *head(batch))
    assert int(model.norm.num_batches_tracked) == 7


@every_attack
def test_a_graph_of_the_caller_stays_valid(batch: Data, attack: Attack) -> None:
    # Writing a buffer or a flag anew would spoil the backward pass of a forward made before the attack.
    model = Plain().train()
    x, y = head(batch)
    loss = nn.functional.cross_entropy(model(x), y)
    attack(model, x, y)
    loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@every_attack
def test_is_reproducible_whatever_the_global_state(net: nn.Module, batch: Data, attack: Attack) -> None:
    x, y = head(batch)
    first = attack(net, x, y)
    torch.rand(7)
    assert torch.equal(attack(net, x, y), first)
