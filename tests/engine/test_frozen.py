"""Programs for parameters that stay as they are: the same passes, with what follows from parameters computed once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import zoo
from emr_kernels.linearize import LinearizedPoint
from emr_kernels.linearize.cache import find_program
from emr_kernels.linearize.program import Program
from emr_kernels.linearize.rules.flattened import FlattenedLinearRule
from emr_kernels.linearize.rules.packed import PackedConvolution, linear
from zoo import Entry

MODELS = ["wrn_10_2", "densenet", "small_cnn", "preact_resnet18_narrow", "mlp_batchnorm", "vit"]


def passes(program: Program, model: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    point = LinearizedPoint.at(program, model, x)
    seed = torch.linspace(-1, 1, point.logits.numel(), dtype=point.logits.dtype).view_as(point.logits)
    return point.logits, point.vjp(seed)


@pytest.mark.parametrize("entry", [zoo.get(name) for name in MODELS], ids=lambda entry: entry.id)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_frozen_passes_equal_live_ones(entry: Entry, dtype: torch.dtype) -> None:
    model = entry.make(dtype).eval()
    x, _ = entry.data(4, dtype)
    program = find_program(model, x)
    frozen = program.frozen()
    # The same bits in float64. In float32 small convolutions may run elsewhere than in oneDNN.
    tolerance: dict[str, Any] = {"rtol": 0, "atol": 0} if dtype is torch.float64 else {"rtol": 1e-4, "atol": 1e-5}
    for given in (x, x[:3].flip(0), x.repeat(3, *[1] * (x.dim() - 1))):
        for mine, live in zip(passes(frozen, model, given), passes(program, model, given), strict=True):
            torch.testing.assert_close(mine, live, **tolerance)


def test_a_frozen_copy_keeps_its_numbers_and_the_program_does_not() -> None:
    entry = zoo.get("wrn_10_2")
    model = entry.make(torch.float32).eval()
    x, _ = entry.data(4, torch.float32)
    program = find_program(model, x)
    frozen = program.frozen()
    before, _ = passes(frozen, model, x)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.add_(1.0)
    torch.testing.assert_close(passes(frozen, model, x)[0], before, rtol=0, atol=0)
    torch.testing.assert_close(passes(program, model, x)[0], model(x).detach(), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(passes(program, model, x)[0], before, atol=1e-2)


class Flattening(nn.Module):
    """A convolution, and a linear layer on what it makes, flattened in one of the usual ways."""

    def __init__(self, flatten: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.convolution, self.layer, self.flatten = nn.Conv2d(3, 5, 3), nn.Linear(5 * 4 * 3, 7), flatten

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.layer(self.flatten(self.convolution(x).relu()))
        return logits


WAYS: dict[str, Callable[[Tensor], Tensor]] = {
    "flatten": lambda x: x.flatten(1),
    "view": lambda x: x.contiguous().view(x.shape[0], -1),
    "reshape": lambda x: x.reshape(-1, 60),
    "read twice": lambda x: x.flatten(1) * x.flatten(1).sigmoid(),
    "other rows": lambda x: x.reshape(x.shape[0], 5, 12).flatten(1),
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("way", WAYS)
def test_flattened_images_meet_a_linear_layer_in_their_own_order(way: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    exact = dtype if dtype is torch.float64 else torch.float32
    model = Flattening(WAYS[way]).to(exact).eval()
    x = torch.rand(6, 3, 6, 5, dtype=exact)
    program = find_program(model, x).frozen()
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype is torch.bfloat16):
        logits, gradient = passes(program, model, x)
        found, _ = passes(program, model, x[:4])
    leaf = x.clone().requires_grad_()
    expected = model(leaf)
    (expected_gradient,) = torch.autograd.grad(expected, leaf, torch.linspace(-1, 1, 42, dtype=exact).view(6, 7))
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 0.03}[dtype]
    torch.testing.assert_close(logits.to(exact), expected.detach(), rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(found.to(exact), expected[:4].detach(), rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(gradient.to(exact), expected_gradient, rtol=tolerance, atol=tolerance)
    fused = [rule for rule in program.rules if isinstance(rule, FlattenedLinearRule)]
    assert len(fused) == (way in ("flatten", "view", "reshape"))
    # float64 images stay as they come; the others are channels_last, and so is what comes back.
    for rule in fused:
        assert (rule._ordered is None) == (dtype is torch.float64)
        point = LinearizedPoint.at(program, model, x)
        direction = torch.rand_like(x)
        tangent = program.jvp(point._point, (direction,))
        assert tangent is not None
        seed = torch.rand_like(point.logits)
        torch.testing.assert_close((tangent * seed).sum(), (direction * point.vjp(seed)).sum())


@pytest.mark.parametrize(
    ("kernel", "stride", "padding", "dilation", "size"),
    [
        ((3, 3), 1, 1, 1, (9, 8)),
        ((3, 3), 2, 1, 1, (8, 8)),
        ((3, 3), 2, 1, 1, (9, 7)),
        ((1, 1), 2, 0, 1, (8, 7)),
        ((5, 3), (2, 1), (2, 0), 1, (11, 9)),
        ((3, 3), 1, 2, 2, (8, 9)),
        ((4, 4), 3, 0, 1, (12, 13)),
    ],
)
def test_packed_convolution(kernel: Any, stride: Any, padding: Any, dilation: Any, size: tuple[int, int]) -> None:
    layer = nn.Conv2d(16, 24, kernel, stride, padding, dilation)
    options = (list(layer.stride), list(layer.padding), list(layer.dilation), False, [0, 0], 1)
    x = torch.randn(5, 16, *size).contiguous(memory_format=torch.channels_last)
    packed = PackedConvolution.of(x, layer.weight.detach(), layer.bias.detach(), options)
    if packed is None:
        pytest.skip("this build of torch has no oneDNN")
    for batch in (x, x[:2], torch.cat([x, x])):
        batch = batch.contiguous(memory_format=torch.channels_last)
        leaf = batch.clone().requires_grad_()
        output = layer(leaf)
        seed = torch.randn_like(output)
        (expected,) = torch.autograd.grad(output, leaf, seed)
        assert packed.takes(batch) and packed.takes(seed)
        found = packed.forward(batch), packed.vjp(seed, batch.shape)
        for mine, live in zip(found, (output.detach(), expected), strict=True):
            torch.testing.assert_close(mine, live, rtol=1e-5, atol=1e-5)
            assert mine.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize(
    ("layer", "dtype"),
    [
        (nn.Conv2d(8, 8, 3, groups=8), torch.float32),
        (nn.ConvTranspose2d(8, 8, 3), torch.float32),
        (nn.Conv2d(8, 8, 3), torch.float64),
        (nn.Conv1d(8, 8, 3), torch.float32),
    ],
    ids=["depthwise", "transposed", "float64", "1d"],
)
def test_other_convolutions_are_not_packed(layer: Any, dtype: torch.dtype) -> None:
    options = (layer.stride, layer.padding, layer.dilation, layer.transposed, layer.output_padding, layer.groups)
    x = torch.randn(2, 8, *[8] * len(layer.stride), dtype=dtype)
    assert PackedConvolution.of(x, layer.weight.detach().to(dtype), None, options) is None


@pytest.mark.parametrize("rows", [200, 3, 0])
@pytest.mark.parametrize("bias", [False, True])
def test_linear(rows: int, bias: bool) -> None:
    layer = nn.Linear(700, 12, bias=bias)
    x = torch.randn(2, rows, 700)
    packed = linear(x, layer.weight.detach(), layer.bias.detach() if bias else None)
    torch.testing.assert_close(packed, layer(x).detach(), rtol=1e-5, atol=1e-5)
    seed = torch.randn(rows, 12)
    torch.testing.assert_close(
        linear(seed, layer.weight.detach().T, None), seed @ layer.weight.detach(), rtol=1e-5, atol=1e-5
    )
