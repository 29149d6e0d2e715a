"""Ways to hyperplanes inside the box: the kernel's are the reference's, which tests of FAB hold against a solver."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from backends import DTYPES, run_on_instruction_set
from emr_kernels import ops
from emr_kernels.ops.to_hyperplane import to_hyperplane_reference

NORMS = ("linf", "l2")


def problems(count: int, size: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Points, many of them at the edge of the box, normals with zeros, and gaps within reach and beyond."""
    generator = torch.Generator().manual_seed(count + size)
    x = (1.5 * torch.rand(count, size, generator=generator) - 0.25).clamp(0, 1)
    w = torch.randn(count, size, generator=generator)
    w[:, ::5] = 0
    w[1::6] *= 1e-6
    reach = (w.abs() / 2).sum(1)
    gap = reach * torch.linspace(-1.5, 1.5, count)
    return x.to(dtype), w.to(dtype), gap.to(dtype)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("size", [1, 7, 16, 785])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_against_the_reference(dtype: torch.dtype, size: int, norm: str) -> None:
    x, w, gap = problems(31, size, dtype)
    d, length = ops.to_hyperplane(x, w, gap, norm)
    assert d.dtype == length.dtype == dtype and d.shape == x.shape and length.shape == gap.shape
    exact, expected = to_hyperplane_reference(x.double(), w.double(), gap.double(), norm)
    bound = {torch.float64: 1e-12, torch.float32: 2e-5}.get(dtype, 2 * torch.finfo(dtype).eps)
    torch.testing.assert_close(d.double(), exact, rtol=bound, atol=bound)
    torch.testing.assert_close(length.double(), expected, rtol=bound, atol=bound)
    inside = (x + d).double()
    assert inside.min() >= -bound and inside.max() <= 1 + bound
    assert not d[w == 0].any()


@pytest.mark.parametrize("norm", NORMS)
def test_each_row_is_by_itself(norm: str) -> None:
    x, w, gap = problems(400, 33, torch.float32)
    d, length = ops.to_hyperplane(x, w, gap, norm)
    for row in (0, 199, 200, 399):
        alone, far = ops.to_hyperplane(x[row : row + 1], w[row : row + 1], gap[row : row + 1], norm)
        assert torch.equal(alone[0], d[row]) and torch.equal(far[0], length[row])


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("shape", [(0, 4), (3, 0)])
def test_empty(shape: tuple[int, int], norm: str) -> None:
    for function in (ops.to_hyperplane, to_hyperplane_reference):
        d, length = function(torch.ones(shape), torch.ones(shape), torch.ones(shape[0]), norm)
        assert d.shape == shape and length.shape == shape[:1] and not length.any()


@pytest.mark.parametrize("norm", NORMS)
def test_what_is_no_number_ends(norm: str) -> None:
    w = torch.tensor([[torch.inf, 1.0, 0.0], [torch.nan, 1.0, 0.0], [1.0, 1.0, 1.0]])
    d, _ = ops.to_hyperplane(torch.full((3, 3), 0.5), w, torch.tensor([1.0, 1.0, torch.nan]), norm)
    assert d.shape == (3, 3)


@pytest.mark.parametrize("function", [ops.to_hyperplane, to_hyperplane_reference])
def test_an_infinite_weight_takes_no_way_at_all(function: Any) -> None:
    """Beside a row that takes several steps."""
    w = torch.tensor([[torch.inf, 1.0, 0.0], [1.0, 3.0, 2.0]])
    d, length = function(torch.full((2, 3), 0.5), w, torch.tensor([1.0, 2.5]), "l2")
    assert not d[0].any() and length[0] == 0
    torch.testing.assert_close((w[1] * d[1]).sum(), torch.tensor(-2.5))


@pytest.mark.parametrize("index", range(2))
def test_every_instruction_set(index: int) -> None:
    run_on_instruction_set(index, [__file__], "reference or infinite")


def test_opcheck() -> None:
    torch.library.opcheck(torch.ops.emr.to_hyperplane.default, (*problems(4, 5, torch.float32), "l2"))


def test_compile() -> None:
    def function(x: Tensor, w: Tensor, gap: Tensor) -> Tensor:
        d, length = ops.to_hyperplane(x / 2, w, gap, "l2")
        return d * length[:, None]

    given = problems(4, 5, torch.float32)
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")(*given)
    torch.testing.assert_close(compiled, function(*given))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": [1.0]}, TypeError, "x is list"),
        ({"x": torch.zeros(2, 3, 1)}, ValueError, "x has shape"),
        ({"w": torch.zeros(2, 4)}, ValueError, "w has shape"),
        ({"w": torch.zeros(2, 3).double()}, TypeError, "w has dtype torch.float64"),
        ({"gap": torch.zeros(3)}, ValueError, "gap has shape"),
        ({"gap": torch.zeros(2).half()}, ValueError, "gap has shape"),
        ({"norm": "L1"}, ValueError, "norm is 'L1'; expected one of linf, l2"),
    ],
)
def test_bad_arguments(change: dict[str, Any], error: type[Exception], message: str) -> None:
    given: dict[str, Any] = {"x": torch.zeros(2, 3), "w": torch.zeros(2, 3), "gap": torch.zeros(2)}
    with pytest.raises(error, match=message):
        ops.to_hyperplane(**{**given, **change})


def test_a_lost_gradient_is_refused() -> None:
    x = torch.zeros(2, 3, requires_grad=True)
    with pytest.raises(RuntimeError, match="x requires grad"):
        ops.to_hyperplane(x, torch.zeros(2, 3), torch.zeros(2))
