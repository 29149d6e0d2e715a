"""Models that mask classes: their logits are -inf."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from attack_cases import ATTACKS, EPSILON
from emr_kernels.directions import rivals
from emr_training.attacks import FAB, FABT, Attack, DeepFool
from emr_training.data import Data


class Masked(nn.Module):
    """A network of which only the first classes count; the others are masked, or left out."""

    def __init__(self, net: nn.Module, classes: int, *, leave_out: bool) -> None:
        super().__init__()
        self.net, self.classes, self.leave_out = net, classes, leave_out
        mask = torch.zeros(10)
        mask[classes:] = -torch.inf
        self.register_buffer("mask", mask)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.net(x)
        return logits[:, : self.classes] if self.leave_out else logits + self.mask


def test_the_label_is_no_rival_of_itself() -> None:
    logits, y = torch.tensor([[3.0, 1.0, -torch.inf, 2.0, -torch.inf]]), torch.tensor([0])
    assert rivals(logits, y, 4).tolist() in ([[3, 1, 2, 4]], [[3, 1, 4, 2]])


CASES = {
    **{name: attack for name, attack in ATTACKS.items() if name not in ("AutoAttack", "DeepFool", "FAB", "FABT")},
    "DeepFool": DeepFool(),
    "FAB": FAB(EPSILON, steps=20),
    "FABT": FABT(EPSILON, steps=20),
}


@pytest.mark.parametrize("attack", CASES.values(), ids=CASES)
@pytest.mark.parametrize("engine", ["auto", "autograd"])
def test_attacks_are_as_strong_as_without_the_masked_classes(
    net: nn.Module, batch: Data, attack: Attack, engine: str
) -> None:
    rows = batch.y < 7
    x, y = batch.x[rows], batch.y[rows]
    left = []
    for leave_out in (False, True):
        model = Masked(net, 7, leave_out=leave_out).eval()
        x_adv = replace(attack, engine=engine)(model, x, y)
        with torch.no_grad():
            left.append(int((model(x_adv).argmax(1) == y).sum()))
            clean = int((model(x).argmax(1) == y).sum())
    assert left[0] <= left[1] + 1
    assert left[1] < clean
