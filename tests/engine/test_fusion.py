"""What the engine fuses, and that nothing is laid out anew between its passes."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch import nn

import zoo
from emr_kernels import linearize
from emr_kernels.linearize.cache import find_program


def rules_of(entry_id: str, layers: tuple[str, ...] = ("input",)) -> Counter[str]:
    entry = zoo.get(entry_id)
    model, (x, _) = entry.shared(), entry.data()
    linearize(model, x)
    return Counter(type(rule).__name__ for rule in find_program(model, x, layers).rules)


@pytest.mark.parametrize(
    ("entry_id", "expected"),
    [
        ("wrn_16_4", {"AffineReluRule": 13}),
        ("resnet_post_activation", {"AffineReluRule": 4, "AffineAddReluRule": 3, "FunctionalBatchNormRule": 1}),
        ("added_norms", {"AffineAddReluRule": 2, "BatchNormRule": 1}),
    ],
)
def test_chains_become_one_rule(entry_id: str, expected: dict[str, int]) -> None:
    found = rules_of(entry_id)
    assert {name: count for name, count in found.items() if "Affine" in name or "BatchNorm" in name} == expected
    assert found["ReluRule"] == (1 if entry_id == "added_norms" else 0)


def test_a_tapped_value_stays_one_of_its_own() -> None:
    assert rules_of("added_norms", ("input", "convs.1"))["AffineAddReluRule"] == 2
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.LazyLinear(2)).double()
    x = torch.rand(2, 3, 5, 5, dtype=torch.float64)
    model(x)
    linearize(model, x)
    names = [type(rule).__name__ for rule in find_program(model, x, ("2",)).rules]
    assert "AffineReluRule" not in names and "ReluRule" in names
