"""smooth_vjp and smooth_jvp: derivatives by autograd in float64, dtypes, layouts, tails, extremes, in place."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from emr_kernels import ops
from emr_kernels.ops._dispatch import operators
from emr_kernels.ops.smooth import KINDS

FUNCTIONS = {"gelu": F.gelu, "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"), "silu": F.silu}
#: Of results of order one.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 4e-6, torch.bfloat16: 2e-2, torch.float16: 3e-3}
by_kind = pytest.mark.parametrize("kind", KINDS)
by_dtype = pytest.mark.parametrize("dtype", TOLERANCE, ids=str)


@pytest.fixture(autouse=True, params=["serving", "reference"])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "reference":
        for name in ("smooth_vjp", "smooth_vjp_out", "smooth_jvp", "smooth_jvp_out"):
            monkeypatch.setattr(operators[name], "overload", operators[name].reference)
    return str(request.param)


def derivatives(x: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    """f' and f'' by autograd, in float64."""
    leaf = x.to(torch.float64, copy=True).requires_grad_()
    (first,) = torch.autograd.grad(FUNCTIONS[kind](leaf).sum(), leaf, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), leaf)
    return first.detach(), second


def case(shape: tuple[int, ...], dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(len(shape))
    x, u, v = (torch.randn(shape, generator=generator) for _ in range(3))
    return (3 * x).to(dtype), u.to(dtype), v.to(dtype)


@by_kind
@by_dtype
@pytest.mark.parametrize("shape", [(), (1,), (15,), (2, 3, 7), (5, 17000)], ids=str)
def test_derivatives(shape: tuple[int, ...], dtype: torch.dtype, kind: str) -> None:
    x, u, v = case(shape, dtype)
    first, second = derivatives(x, kind)
    pulled, (pushed, bend) = ops.smooth_vjp(v, x, kind), ops.smooth_jvp(u, x, v, kind)
    for found, expected in ((pulled, v * first), (pushed, u * first), (bend, u.double() * v * second)):
        assert found.dtype == dtype and found.shape == torch.Size(shape)
        torch.testing.assert_close(found.double(), expected, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])


@by_kind
def test_derivatives_everywhere(kind: str) -> None:
    """Within 2e-6, where the slope is 1 as in the tails."""
    x = torch.linspace(-30, 30, 200_001)
    one = torch.ones_like(x)
    first, second = derivatives(x, kind)
    slope, (_, bend) = ops.smooth_vjp(one, x, kind), ops.smooth_jvp(one, x, one, kind)
    assert (slope - first).abs().max() < 2e-6 and (bend - second).abs().max() < 2e-6


@by_kind
def test_extremes(kind: str, backend: str) -> None:
    if backend == "reference":
        pytest.skip("PyTorch's own operators say NaN where x² or x³ is infinite")
    x = torch.tensor([-torch.inf, -1e30, -1e4, 1e4, 1e30, torch.inf, torch.nan])
    one = torch.ones_like(x)
    expected = torch.tensor([0.0, 0, 0, 1, 1, 1, torch.nan])
    slope, bend = ops.smooth_jvp(one, x, one, kind)
    torch.testing.assert_close(slope, expected, equal_nan=True, atol=1e-30, rtol=0)
    torch.testing.assert_close(ops.smooth_vjp(one, x, kind), expected, equal_nan=True, atol=1e-30, rtol=0)
    assert bend[:6].abs().max() < 1e-30 and bend[6].isnan()


@by_kind
def test_in_place_and_channels_last(kind: str) -> None:
    x, u, v = (t.to(memory_format=torch.channels_last) for t in case((2, 3, 5, 7), torch.float32))
    pulled, (pushed, bend) = ops.smooth_vjp(v.contiguous(), x, kind), ops.smooth_jvp(u, x, v.contiguous(), kind)
    assert all(t.is_contiguous(memory_format=torch.channels_last) for t in (pulled, pushed, bend))
    assert ops.smooth_jvp(u, x, v, kind, out=u)[0] is u and ops.smooth_vjp(v, x, kind, out=v) is v
    torch.testing.assert_close(u, pushed, rtol=0, atol=0)
    torch.testing.assert_close(v, pulled, rtol=0, atol=0)
    row_major = ops.smooth_jvp(*(t.contiguous() for t in case((2, 3, 5, 7), torch.float32)[1::-1]), v, kind)[0]
    torch.testing.assert_close(row_major, pushed)


def test_the_operators_follow_their_schemas() -> None:
    x, u, v = case((3, 4), torch.float32)
    out = torch.empty_like(x)
    torch.library.opcheck(torch.ops.emr.smooth_vjp.default, (v, x, "gelu"))
    torch.library.opcheck(torch.ops.emr.smooth_vjp_out.default, (v, x, "silu", out))
    torch.library.opcheck(torch.ops.emr.smooth_jvp.default, (u, x, v, "gelu_tanh"))
    torch.library.opcheck(torch.ops.emr.smooth_jvp_out.default, (u, x, v, "gelu", out))


def test_compile() -> None:
    def function(x: Tensor, u: Tensor, v: Tensor) -> tuple[Tensor, ...]:
        pulled = ops.smooth_vjp(v * 2, x, "gelu", out=torch.empty_like(v))
        return pulled, *ops.smooth_jvp(u, x, pulled, "silu"), *ops.smooth_jvp(u, x, v, "gelu", out=torch.empty_like(u))

    given = case((2, 3, 5, 4), torch.float32)
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")(*given)
    torch.testing.assert_close(compiled, function(*given))


def test_bad_arguments() -> None:
    x = torch.zeros(2, 3)
    with pytest.raises(ValueError, match="kind is 'relu'; expected one of 'gelu', 'gelu_tanh', 'silu'"):
        ops.smooth_vjp(x, x, "relu")
    with pytest.raises(ValueError, match=r"vector has shape \(3,\)"):
        ops.smooth_vjp(x[0], x, "gelu")
    with pytest.raises(TypeError, match="cotangent has dtype"):
        ops.smooth_jvp(x, x, x.double(), "gelu")
    with pytest.raises(TypeError, match="input has dtype"):
        ops.smooth_vjp(x.long(), x.long(), "gelu")
    with pytest.raises(ValueError, match="out has strides"):
        ops.smooth_vjp(x, x, "gelu", out=torch.zeros(3, 2).T)
    with pytest.raises(RuntimeError, match="tangent requires grad"):
        ops.smooth_jvp(x.clone().requires_grad_(), x, x, "gelu")
