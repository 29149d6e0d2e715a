"""Patches of convolutions, folded: the vjp of a convolution is the cotangent's product with the weight, folded."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import conv2d

from backends import DTYPES
from emr_kernels import ops
from emr_kernels.ops._dispatch import operators
from emr_kernels.ops.patches import fold_patches_reference

# Channels, image, kernel, stride, padding.
GEOMETRIES = [
    (1, (9, 12), (4, 4), (2, 2), (1, 1)),
    (3, (8, 7), (3, 3), (1, 1), (1, 1)),
    (3, (11, 11), (7, 7), (2, 2), (3, 3)),
    (2, (10, 9), (3, 2), (2, 3), (0, 1)),
    (4, (8, 8), (4, 4), (4, 4), (0, 0)),
    # What the strides leave over; gaps between patches; padding wider than an image; a channel count of its own.
    (8, (12, 13), (3, 3), (3, 4), (0, 0)),
    (3, (9, 9), (2, 2), (3, 3), (1, 1)),
    (1, (1, 2), (5, 5), (1, 2), (4, 4)),
    (5, (6, 5), (1, 1), (1, 1), (0, 0)),
]


@pytest.fixture(params=["compiled", "reference"])
def both(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the kernel and without."""
    if request.param == "reference":
        monkeypatch.setattr(operators["fold_patches"], "overload", fold_patches_reference)


def vjp_of_convolution(
    samples: int, channels: int, image: Any, kernel: Any, stride: Any, padding: Any, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Patches of a random cotangent, rounded to the dtype, and the cotangent of the input from autograd in float64."""
    patch = channels * kernel[0] * kernel[1]
    # An output channel for every element of a patch: its cotangents are the patches.
    weight = torch.eye(patch, dtype=torch.float64).view(patch, *kernel, channels).permute(0, 3, 1, 2)
    x = torch.zeros(samples, channels, *image, dtype=torch.float64, requires_grad=True)
    output = conv2d(x, weight, stride=stride, padding=padding)
    cotangent = torch.randn(output.shape).to(dtype)
    (expected,) = torch.autograd.grad(output, x, cotangent.double())
    patches = cotangent.permute(0, 2, 3, 1).contiguous().view(samples, *output.shape[2:], *kernel, channels)
    return patches, expected.permute(0, 2, 3, 1)


@pytest.mark.usefixtures("both")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
def test_folding_is_the_vjp_of_cutting_out(geometry: Any, dtype: torch.dtype) -> None:
    patches, expected = vjp_of_convolution(3, *geometry, dtype)
    images = torch.full(expected.shape, torch.nan, dtype=dtype)
    ops.fold_patches(images, patches, *geometry[3:])
    # Sums in float32 or float64, rounded once.
    bound = {torch.float64: 1e-14, torch.float32: 1e-6}.get(dtype, torch.finfo(dtype).eps)
    torch.testing.assert_close(images.double(), expected, rtol=bound, atol=bound)


def test_many_images_in_parallel() -> None:
    geometry = (3, (33, 31), (3, 3), (2, 1), (1, 1))
    patches, expected = vjp_of_convolution(70, *geometry, torch.float64)
    images = torch.empty(expected.shape, dtype=torch.float64)
    ops.fold_patches(images, patches, *geometry[3:])
    torch.testing.assert_close(images, expected, rtol=1e-14, atol=1e-14)


@pytest.mark.usefixtures("both")
def test_infinities_stay_where_they_are() -> None:
    patches = torch.zeros(1, 3, 3, 3, 3, 1)
    patches[0, 0, 0, 2, 2, 0] = torch.inf
    patches[0, 2, 2, 0, 1, 0] = torch.nan
    images = torch.empty(1, 5, 5, 1)
    ops.fold_patches(images, patches, (1, 1), (0, 0))
    expected = torch.zeros(1, 5, 5, 1)
    expected[0, 2, 2], expected[0, 2, 3] = torch.inf, torch.nan
    torch.testing.assert_close(images, expected, equal_nan=True, rtol=0, atol=0)


@pytest.mark.usefixtures("both")
@pytest.mark.parametrize("shape", [(0, 2, 2, 3, 3, 1), (2, 0, 2, 3, 3, 1)], ids=str)
def test_no_patches(shape: tuple[int, ...]) -> None:
    images = torch.ones(shape[0], 4, 4, 1)
    ops.fold_patches(images, torch.ones(shape), (1, 1), (0, 0))
    assert not images.any()


def test_opcheck() -> None:
    patches, expected = vjp_of_convolution(2, *GEOMETRIES[0], torch.float32)
    torch.library.opcheck(torch.ops.emr.fold_patches.default, (torch.zeros(expected.shape), patches, 2, 2, 1, 1))


def test_compile() -> None:
    def function(patches: Tensor) -> Tensor:
        images = torch.empty(2, 9, 12, 1)
        ops.fold_patches(images, patches * 2, (2, 2), (1, 1))
        return images + 1

    patches, _ = vjp_of_convolution(2, *GEOMETRIES[0], torch.float32)
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")(patches)
    torch.testing.assert_close(compiled, function(patches))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"images": [1.0]}, TypeError, "images is list"),
        ({"images": torch.zeros(2, 3, 4)}, ValueError, "images has shape"),
        ({"images": torch.zeros(2, 1, 4, 4).permute(0, 2, 3, 1).transpose(1, 2)}, ValueError, "strides"),
        ({"patches": torch.zeros(2, 2, 2, 3, 3, 1, dtype=torch.int64)}, TypeError, "patches has dtype torch.int64"),
        ({"patches": torch.zeros(2, 2, 2, 3, 3, 1).double()}, ValueError, "torch.float64"),
        ({"patches": torch.zeros(3, 2, 2, 3, 3, 1)}, ValueError, "patches has shape"),
        ({"patches": torch.zeros(2, 2, 2, 3, 3, 2)}, ValueError, "patches has shape"),
        ({"stride": (0, 1)}, ValueError, "stride is"),
        ({"padding": (0, -1)}, ValueError, "padding is"),
        ({"padding": (0,)}, ValueError, "padding is"),
    ],
)
def test_bad_arguments(change: dict[str, Any], error: type[Exception], message: str) -> None:
    given: dict[str, Any] = {"images": torch.zeros(2, 4, 4, 1), "patches": torch.zeros(2, 2, 2, 3, 3, 1)}
    with pytest.raises(error, match=message):
        ops.fold_patches(**{**given, "stride": (1, 1), "padding": (0, 0), **change})


def test_a_lost_gradient_is_refused() -> None:
    patches = torch.zeros(2, 2, 2, 3, 3, 1, requires_grad=True)
    with pytest.raises(RuntimeError, match="patches requires grad"):
        ops.fold_patches(torch.zeros(2, 4, 4, 1), patches, (1, 1), (0, 0))
