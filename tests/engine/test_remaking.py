"""What is computed again rather than kept: inputs and cotangents of layers beside activations and LayerNorm."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from emr_kernels import EffectiveWeightPenalty
from emr_kernels.linearize.cache import find_program
from emr_kernels.linearize.program import Program
from oracle import assert_gradients_match, double_backward

pytestmark = pytest.mark.device


class Net(nn.Module):
    """Linear layers by name: what each of them reads, and who reads it, differs."""

    def __init__(self) -> None:
        super().__init__()
        names = ("first", "after_norm", "beside", "after_gelu", "shared", "last")
        self.layers = nn.ModuleDict({name: nn.Linear(6, 6) for name in names})
        self.norm = nn.LayerNorm(6)

    def forward(self, x: Tensor) -> Tensor:
        layers = self.layers
        h = self.norm(layers["first"](x))  # read by two layers alone
        h = nn.functional.gelu(layers["after_norm"](h)) + nn.functional.silu(layers["beside"](h))
        h = layers["after_gelu"](nn.functional.gelu(h))
        s = torch.tanh(h)  # read by a layer and by a product
        return layers["last"](torch.sigmoid(layers["shared"](s) * s))


def names(program: Program, places: Any) -> set[str]:
    """The layers at these places."""
    return {program.rules[place].node.modules[-1].removeprefix("layers.") for place in places}


def made(layers: tuple[str, ...] = ("input",)) -> tuple[nn.Module, Tensor, Program]:
    torch.manual_seed(3)
    model, x = Net().double(), torch.randn(5, 6, dtype=torch.float64)
    return model, x, find_program(model, x, layers)


def test_what_is_made_again() -> None:
    _, _, program = made()
    plan = program.plan((True,) * len(program.graph.leaves))
    # Nothing bends behind the last layer: its weight's gradient is that of the jvp alone.
    assert names(program, plan.remade) == {"after_norm", "beside", "after_gelu"}
    ordinary = program.plan((True,) * len(program.graph.leaves), first_order=True)
    assert names(program, ordinary.remade) == {"after_norm", "beside", "after_gelu", "last"}
    assert names(program, plan.pulled_again) == {"first", "after_norm", "beside", "after_gelu"}
    assert not any(plan.needs_primal[place] for place in plan.remade)
    assert not any(plan.keeps_cotangent[place] for place in plan.pulled_again)


def test_a_tapped_value_is_kept() -> None:
    _, _, program = made(("input", "layers.after_gelu", "norm"))
    plan = program.plan((True,) * len(program.graph.leaves))
    assert "after_gelu" not in names(program, plan.remade)
    assert "first" not in names(program, plan.pulled_again)


def test_frozen_layers_need_neither() -> None:
    _, _, program = made()
    plan = program.plan((False,) * len(program.graph.leaves))
    assert not plan.remade and not plan.pulled_again


@pytest.mark.parametrize("direction", ["softmax", "all", "cross_entropy"])
def test_gradients(direction: str) -> None:
    """Of one mix, of several over the same residuals, and of a seed that moves."""
    model, x, _ = made()
    y = torch.arange(5)
    reference = double_backward(model, x, y, direction=direction)
    model.zero_grad()
    EffectiveWeightPenalty(model, direction=direction)(x, y).backward()
    assert_gradients_match(model, reference.grads)
