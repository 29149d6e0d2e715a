"""Convolutions of 3 by 3 pixels by Winograd's minimal filtering, against the plain sum in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import conv2d

from backends import run_on_instruction_set
from emr_kernels import ops
from emr_kernels.ops._dispatch import operators
from emr_kernels.ops.winograd import (
    winograd_convolution_reference,
    winograd_weight_grad_reference,
    winograd_weight_reference,
)

# Images, height, width, channels, output channels, padding down and across.
GEOMETRIES = [
    (2, 8, 8, 32, 32, 1, 1),
    # Tiles cut off on both sides; a weight that fills half of a panel; more than one panel.
    (3, 9, 6, 16, 48, 1, 0),
    (2, 5, 7, 48, 16, 2, 1),
    (1, 3, 3, 16, 16, 0, 0),
    (2, 1, 2, 16, 32, 1, 2),
    # One tile for each image; more tiles than a task holds, in tasks of unequal size.
    (5, 4, 4, 32, 64, 1, 1),
    (7, 13, 17, 16, 32, 1, 1),
    (1, 33, 31, 64, 32, 1, 1),
]


@pytest.fixture(params=["compiled", "reference"])
def both(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the kernels and without."""
    if request.param == "reference":
        monkeypatch.setattr(operators["winograd_convolution"], "overload", winograd_convolution_reference)
        monkeypatch.setattr(operators["winograd_weight"], "overload", winograd_weight_reference)
        monkeypatch.setattr(operators["winograd_weight_grad"], "overload", winograd_weight_grad_reference)


def problem(geometry: tuple[int, ...]) -> tuple[Tensor, Tensor, Tensor, tuple[int, int]]:
    """Images [N, H, W, C], kernels [K, C, 3, 3], a bias and the padding."""
    n, high, wide, channels, outputs, *padding = geometry
    generator = torch.Generator().manual_seed(sum(geometry))
    x = torch.randn(n, high, wide, channels, generator=generator).relu()
    kernels = torch.randn(outputs, channels, 3, 3, generator=generator) / (3 * channels**0.5)
    return x, kernels, torch.randn(outputs, generator=generator), (padding[0], padding[1])


def close(got: Tensor, expected: Tensor) -> None:
    """Within rounding: the largest error of many, of values around 1."""
    torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("both")
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
def test_it_is_the_convolution(geometry: tuple[int, ...], memory_format: torch.memory_format) -> None:
    x, kernels, bias, padding = problem(geometry)
    expected = conv2d(x.permute(0, 3, 1, 2).double(), kernels.double(), bias.double(), padding=padding)
    expected = expected.permute(0, 2, 3, 1)
    weight = ops.winograd_weight(kernels.contiguous(memory_format=memory_format))
    y = torch.full(expected.shape, torch.nan)
    ops.winograd_convolution(y, x, weight, bias, padding)
    close(y, expected)
    ops.winograd_convolution(y, x, weight, None, padding)
    close(y, expected - bias)


@pytest.mark.usefixtures("both")
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
def test_the_transposed_weight_gives_the_vjp(geometry: tuple[int, ...], memory_format: torch.memory_format) -> None:
    x, kernels, _, padding = problem(geometry)
    leaf = x.permute(0, 3, 1, 2).double().requires_grad_()
    output = conv2d(leaf, kernels.double(), padding=padding)
    cotangent = torch.randn(output.shape)
    (expected,) = torch.autograd.grad(output, leaf, cotangent.double())
    got = torch.full(x.shape, torch.nan)
    rows = cotangent.permute(0, 2, 3, 1).contiguous()
    turned = ops.winograd_weight(kernels.contiguous(memory_format=memory_format), transposed=True)
    ops.winograd_convolution(got, rows, turned, None, (2 - padding[0], 2 - padding[1]))
    close(got, expected.permute(0, 2, 3, 1))


@pytest.mark.usefixtures("both")
@pytest.mark.parametrize("geometry", [*GEOMETRIES, (40, 32, 32, 16, 16, 1, 1)], ids=str)
def test_the_gradient_of_the_kernels_of_a_convolution(geometry: tuple[int, ...]) -> None:
    # The last: tiles in two parts.
    x, kernels, _, padding = problem(geometry)
    leaf = kernels.double().requires_grad_()
    output = conv2d(x.permute(0, 3, 1, 2).double(), leaf, padding=padding)
    cotangent = torch.randn(output.shape) / output[:, 0].numel() ** 0.5
    (expected,) = torch.autograd.grad(output, leaf, cotangent.double())
    found = ops.winograd_weight_grad(x, cotangent.permute(0, 2, 3, 1).contiguous(), padding)
    close(found, expected)
    assert found.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.usefixtures("both")
@pytest.mark.parametrize("padding", [(1, 1), (0, 2)])
def test_a_convolution_of_zeros_is_the_bias(padding: tuple[int, int]) -> None:
    """To the bit, wherever all nine pixels are zero in all channels, and nowhere else; -0 is one, NaN is none."""
    x, kernels, bias, _ = problem((3, 15, 14, 48, 32, 1, 1))
    lines = torch.arange(15)[:, None, None]
    x[0] = x[0].where(lines < 6, 0.0)
    # One channel, at the end, is not zero.
    x[1] = -x[1].where((lines < 2) & (torch.arange(48) == 47), 0.0)
    x[2] = 0.0
    x[2, 7, 6, 40] = torch.nan
    images = x.permute(0, 3, 1, 2)
    read = conv2d((images != 0).double(), torch.ones(1, 48, 3, 3).double(), padding=padding)[:, 0] > 0
    y = torch.empty(*read.shape, 32)
    ops.winograd_convolution(y, x, ops.winograd_weight(kernels), bias, padding)
    assert torch.equal((y == bias).all(3), ~read)
    assert torch.equal(y[2].isnan().any(2), read[2] | y[2].isnan().any(2))
    ops.winograd_convolution(y, x, ops.winograd_weight(kernels), None, padding)
    assert torch.equal((y == 0).all(3), ~read)


@pytest.mark.usefixtures("both")
def test_rounding_is_near_that_of_the_plain_sum() -> None:
    x, kernels, _, padding = problem((4, 16, 16, 64, 64, 1, 1))
    images = x.permute(0, 3, 1, 2)
    expected = conv2d(images.double(), kernels.double(), padding=padding).permute(0, 2, 3, 1)
    y = torch.empty(expected.shape)
    ops.winograd_convolution(y, x, ops.winograd_weight(kernels), None, padding)
    # Unit roundoff, times the root of 64 * 9 terms, times the spread of the result.
    scale = 6e-8 * 24 * expected.std()
    assert (y - expected).square().mean().sqrt() < scale
    assert (y - expected).abs().max() < 10 * scale


def test_threads_do_not_change_it() -> None:
    x, kernels, bias, padding = problem((7, 13, 17, 16, 32, 1, 1))
    weight, threads = ops.winograd_weight(kernels), torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            y = torch.empty(7, 13, 17, 32)
            ops.winograd_convolution(y, x, weight, bias, padding)
            results.append((y, ops.winograd_weight_grad(x, bias.expand(7, 13, 17, 32).contiguous())))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(*pair) for pair in zip(results[0], other, strict=True))


@pytest.mark.usefixtures("both")
def test_nothing_to_do() -> None:
    _, kernels, _, _ = problem((1, 4, 4, 16, 16, 1, 1))
    weight = ops.winograd_weight(kernels)
    ops.winograd_convolution(torch.empty(0, 4, 4, 16), torch.empty(0, 4, 4, 16), weight)
    ops.winograd_convolution(torch.empty(1, 0, 4, 16), torch.empty(1, 2, 6, 16), weight, None, (0, 0))
    assert not ops.winograd_weight_grad(torch.empty(0, 4, 4, 16), torch.empty(0, 4, 4, 16)).any()
    assert not ops.winograd_weight_grad(torch.empty(1, 2, 6, 16), torch.empty(1, 0, 4, 32), (0, 0)).any()


@pytest.mark.parametrize("index", range(2))
def test_every_instruction_set(index: int) -> None:
    run_on_instruction_set(index, [__file__], "convolution or vjp or plain_sum or zeros")


def test_opcheck() -> None:
    x, kernels, bias, padding = problem(GEOMETRIES[0])
    weight = ops.winograd_weight(kernels)
    torch.library.opcheck(torch.ops.emr.winograd_weight.default, (torch.empty_like(weight), kernels, True))
    y = torch.empty(2, 8, 8, 32)
    torch.library.opcheck(torch.ops.emr.winograd_convolution.default, (y, x, weight, bias, *padding))
    torch.library.opcheck(torch.ops.emr.winograd_weight_grad.default, (torch.empty_like(kernels), x, y, *padding))


def test_compile() -> None:
    x, kernels, bias, padding = problem(GEOMETRIES[1])

    def function(x: Tensor, kernels: Tensor) -> Tensor:
        y = torch.empty(3, 9, 4, 48)
        ops.winograd_convolution(y, x * 2, ops.winograd_weight(kernels), bias, padding)
        return y + ops.winograd_weight_grad(x, y, padding).sum()

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")(x, kernels)
    torch.testing.assert_close(compiled, function(x, kernels))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": [1.0]}, TypeError, "x is list"),
        ({"x": torch.zeros(2, 8, 8, 16).double()}, TypeError, "x has dtype torch.float64"),
        ({"x": torch.zeros(2, 8, 16)}, ValueError, "x has shape"),
        ({"x": torch.zeros(2, 16, 8, 8).permute(0, 2, 3, 1)}, ValueError, "strides"),
        ({"x": torch.zeros(2, 8, 8, 24)}, ValueError, "x has 24 channels"),
        ({"y": torch.zeros(2, 8, 8, 17)}, ValueError, "y has 17 channels"),
        ({"y": torch.zeros(2, 7, 8, 32)}, ValueError, "y has shape"),
        ({"padding": (1, 0)}, ValueError, "y has shape"),
        ({"padding": (1, -1)}, ValueError, "padding is"),
        ({"padding": (1,)}, ValueError, "padding is"),
        ({"weight": torch.zeros(36, 1, 32, 32)}, ValueError, "weight has shape"),
        ({"bias": torch.zeros(16)}, ValueError, "bias has shape"),
        ({"bias": torch.zeros(32).half()}, TypeError, "bias has dtype torch.float16"),
    ],
)
def test_bad_arguments(change: dict[str, Any], error: type[Exception], message: str) -> None:
    given: dict[str, Any] = {"y": torch.zeros(2, 8, 8, 32), "x": torch.zeros(2, 8, 8, 16)}
    given["weight"] = torch.zeros(36, 1, 16, 32)
    with pytest.raises(error, match=message):
        ops.winograd_convolution(**{**given, **change})


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": torch.zeros(2, 8, 8, 16).half()}, TypeError, "x has dtype torch.float16"),
        ({"cotangent": torch.zeros(2, 8, 32)}, ValueError, "cotangent has shape"),
        ({"cotangent": torch.zeros(2, 8, 8, 8)}, ValueError, "cotangent has 8 channels"),
        ({"cotangent": torch.zeros(3, 8, 8, 32)}, ValueError, "cotangent has shape"),
        ({"padding": (0, 1)}, ValueError, "cotangent has shape"),
    ],
)
def test_bad_arguments_of_the_gradient(change: dict[str, Any], error: type[Exception], message: str) -> None:
    given: dict[str, Any] = {"x": torch.zeros(2, 8, 8, 16), "cotangent": torch.zeros(2, 8, 8, 32)}
    with pytest.raises(error, match=message):
        ops.winograd_weight_grad(**{**given, **change})


@pytest.mark.parametrize(
    ("weight", "error", "message"),
    [
        (None, TypeError, "weight is NoneType"),
        (torch.zeros(16, 16, 3, 3).half(), TypeError, "weight has dtype torch.float16"),
        (torch.zeros(16, 16, 3, 1), ValueError, "weight has shape"),
        (torch.zeros(16, 3, 3), ValueError, "weight has shape"),
    ],
)
def test_bad_weights(weight: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        ops.winograd_weight(weight)


def test_a_lost_gradient_is_refused() -> None:
    x, kernels, _, padding = problem(GEOMETRIES[0])
    with pytest.raises(RuntimeError, match="weight requires grad"):
        ops.winograd_weight(kernels.requires_grad_())
    weight = ops.winograd_weight(kernels.detach())
    with pytest.raises(RuntimeError, match="x requires grad"):
        ops.winograd_convolution(torch.empty(2, 8, 8, 32), x.requires_grad_(), weight, None, padding)
