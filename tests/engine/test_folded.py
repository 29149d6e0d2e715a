"""Convolutions that read few channels: their vjp by folded patches is that of the transposed convolution."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from emr_kernels import effective_weight_norms
from emr_kernels.linearize.rules import folded
from emr_kernels.ops._dispatch import operators

CONVOLUTIONS: dict[str, dict[str, Any]] = {
    "image": {"in_channels": 3, "kernel_size": 3, "padding": 1},
    "stride": {"in_channels": 1, "kernel_size": 4, "stride": 2, "padding": 1, "bias": False},
    "left over": {"in_channels": 8, "kernel_size": (3, 2), "stride": (3, 2)},
    "one side": {"in_channels": 2, "kernel_size": (1, 5), "padding": (0, 2)},
}


def counted(monkeypatch: pytest.MonkeyPatch, chunk: int | None = None) -> list[Tensor]:
    """The results of each use from here on."""
    results: list[Tensor] = []
    vjp = folded.vjp

    def counting(*args: Any) -> Tensor:
        results.append(vjp(*args))
        return results[-1]

    monkeypatch.setattr(folded, "vjp", counting)
    if chunk is not None:
        monkeypatch.setattr(folded, "_CHUNK", chunk)
    return results


def network(options: dict[str, Any]) -> nn.Module:
    return nn.Sequential(nn.Conv2d(out_channels=6, **options), nn.ReLU(), nn.Flatten(), nn.LazyLinear(4))


def effective_weight(model: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """Of the class mix, from autograd; and its norms."""
    leaf = x.clone().requires_grad_()
    logits = model(leaf)
    (weight,) = torch.autograd.grad((logits.softmax(1).detach() * logits).sum(), leaf)
    return weight, weight.flatten(1).norm(dim=1)


@pytest.mark.skipif(not operators["fold_patches"].compiled(), reason="the compiled operators are not here")
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("chunk", [None, 1, 3000])
@pytest.mark.parametrize("options", CONVOLUTIONS.values(), ids=CONVOLUTIONS)
def test_vjp_of_the_first_layer(
    options: dict[str, Any], chunk: int | None, channels_last: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    model = network(options)
    x = torch.randn(5, options["in_channels"], 11, 10)
    model(x)
    if channels_last:
        model, x = model.to(memory_format=torch.channels_last), x.contiguous(memory_format=torch.channels_last)
    results = counted(monkeypatch, chunk)
    norms = effective_weight_norms(model, x)
    assert results
    expected, mixed = effective_weight(model, x)
    torch.testing.assert_close(results[-1], expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(norms, mixed, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "options",
    [
        {"in_channels": 16, "kernel_size": 3},
        {"in_channels": 2, "kernel_size": 3, "groups": 2},
        {"in_channels": 2, "kernel_size": 3, "dilation": 2},
    ],
)
def test_others_are_left_alone(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    model, results = network(options), counted(monkeypatch)
    x = torch.randn(2, options["in_channels"], 9, 9)
    model(x)
    norms = effective_weight_norms(model, x)
    torch.testing.assert_close(norms, effective_weight(model, x)[1], rtol=1e-5, atol=1e-6)
    assert not results
