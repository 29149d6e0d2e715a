"""What the engine fuses, and that nothing is laid out anew between its passes."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import zoo
from emr_kernels import EffectiveWeightPenalty, linearize
from emr_kernels.linearize.cache import find_program

pytestmark = pytest.mark.device
COPIES = (torch.ops.aten.clone.default, torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default)


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


@pytest.mark.parametrize(
    ("entry_id", "attentions", "softmaxes"),
    [("vit", 2, 0), ("attention_written_out", 6, 5), ("multihead_attention_weights", 0, 1)],
)
def test_attention_written_out_becomes_one_rule(entry_id: str, attentions: int, softmaxes: int) -> None:
    found = rules_of(entry_id)
    assert found["AttentionRule"] == attentions and found["SoftmaxRule"] == softmaxes


def test_a_tapped_value_stays_one_of_its_own() -> None:
    assert rules_of("added_norms", ("input", "convs.1"))["AffineAddReluRule"] == 2
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.LazyLinear(2)).double()
    x = torch.rand(2, 3, 5, 5, dtype=torch.float64)
    model(x)
    linearize(model, x)
    names = [type(rule).__name__ for rule in find_program(model, x, ("2",)).rules]
    assert "AffineReluRule" not in names and "ReluRule" in names


@pytest.mark.parametrize("entry_id", ["wrn_10_2", "resnet_post_activation", "added_norms_leaky", "densenet"])
def test_no_layout_is_converted_in_the_passes(entry_id: str) -> None:
    """In channels_last every activation, cotangent and tangent is made in that layout and stays in it."""
    converted: list[str] = []

    class Copies(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            result = func(*args, **(kwargs or {}))
            given = args[1] if func is torch.ops.aten.copy_.default else args[0] if args else None
            if func in COPIES and isinstance(given, torch.Tensor) and isinstance(result, torch.Tensor):
                # Where an extent is 1 the two layouts are one.
                plain = given.dim() == 4 and min(given.shape[1:]) > 1
                if plain and given.stride() != result.stride() and 0 not in given.stride():
                    converted.append(f"{func} {tuple(given.shape)} {given.stride()} -> {result.stride()}")
            return result

    entry = zoo.get(entry_id)
    model = entry.make(torch.float32).to(memory_format=torch.channels_last)
    x = entry.data(4, torch.float32)[0].to(memory_format=torch.channels_last)
    penalty = EffectiveWeightPenalty(model, checks="never")
    penalty(x).backward()
    with Copies():
        penalty(x)
    assert not converted, converted[:5]
