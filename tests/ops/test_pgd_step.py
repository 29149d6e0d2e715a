"""pgd_step: the reference against closed forms, each backend against the reference, the ball, bad input."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from backends import BACKENDS, DTYPES, Backend, run_on_instruction_set
from emr_kernels import ops
from emr_kernels.ops.pgd_step import NORMS, pgd_step_reference

# Whole vectors and none, odd sizes, single elements, nothing.
SHAPES = [(3, 2, 4, 8), (2, 3, 5, 7), (4, 1), (5,), (0, 3, 4), (2, 0, 3)]
EPSILON = {"linf": 0.1, "l2": 0.4, "l1": 1.5}
STEP = {"linf": 0.07, "l2": 0.3, "l1": 1.0}


def problem(shape: tuple[int, ...], dtype: torch.dtype, device: str = "cpu", spread: float = 0.3) -> Any:
    """x, origin in the box, and a gradient with ties and zeros."""
    origin = torch.rand(shape).to(dtype)
    x = (origin + spread * (torch.rand(shape) - 0.5)).clamp(0, 1).to(dtype)
    gradient = torch.randn(shape).mul(8).round().div(8).to(dtype)
    return tuple(t.to(device) for t in (x, origin, gradient))


def arguments(x: Any, origin: Any, gradient: Any, norm: str, **changes: Any) -> tuple[Any, ...]:
    """A step's raw arguments."""
    values = {
        "step_size": STEP[norm],
        "step_sizes": None,
        "epsilon": EPSILON[norm],
        "norm": norm,
        "lower": 0.0,
        "upper": 1.0,
        "count": max(1, x[:1].numel() // 10),
        "counts": None,
        **changes,
    }
    return (x, origin, gradient, *values.values())


def close(actual: torch.Tensor, expected: torch.Tensor, norm: str, interpreted: bool) -> None:
    """Equal under linf, where every rounding is prescribed; else equal up to the rounding of two sums."""
    assert actual.dtype == expected.dtype and actual.stride() == expected.stride()
    eps = torch.finfo(actual.dtype).eps
    # Values are below 1: float32 sums differ by a few units, a 16-bit result then by one unit where it is rounded.
    atol = {torch.float32: 4 * eps, torch.float64: 4 * eps}.get(actual.dtype, eps / 2)
    if norm == "linf":
        # Triton's interpreter truncates to bfloat16.
        atol = eps / 2 if interpreted and actual.dtype == torch.bfloat16 else 0.0
    elif interpreted and actual.dtype == torch.bfloat16:
        atol = eps
    torch.testing.assert_close(actual, expected, rtol=0, atol=atol, equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("backend", BACKENDS, ids=str)
def test_match_reference(backend: Backend, norm: str, dtype: torch.dtype) -> None:
    kernel = backend.kernel("pgd_step", dtype)
    # More than one block of the CPU's, more than one tile of Triton's.
    large = (1, 2500 if backend.interpreted else 17011)
    for shape in (*SHAPES, large):
        tensors = problem(shape, dtype, backend.device)
        for memory_format in (torch.contiguous_format, *([torch.channels_last] if len(shape) == 4 else [])):
            args = arguments(*(t.contiguous(memory_format=memory_format) for t in tensors), norm)
            close(kernel(*args), pgd_step_reference(*args), norm, backend.interpreted)


@pytest.mark.parametrize("gradient_dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("backend", BACKENDS, ids=str)
def test_match_with_a_narrow_gradient_and_numbers_for_each_sample(
    backend: Backend, norm: str, gradient_dtype: torch.dtype
) -> None:
    kernel = backend.kernel("pgd_step", torch.float32)
    x, origin, gradient = problem((3, 5, 7), torch.float32, backend.device)
    args = arguments(
        x,
        origin,
        gradient.to(gradient_dtype),
        norm,
        step_sizes=torch.tensor([0.0, 0.03, 2.0], device=backend.device),
        counts=torch.tensor([1, 35, 7], device=backend.device),
        lower=0.25,
        upper=0.75,
    )
    close(kernel(*args), pgd_step_reference(*args), norm, backend.interpreted)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("backend", BACKENDS, ids=str)
def test_match_unaligned_and_in_place(backend: Backend, norm: str) -> None:
    kernel, into = backend.kernel("pgd_step", torch.float32), backend.kernel("pgd_step_out", torch.float32)
    x, origin, gradient = (t.view(-1)[1:-2].view(3, 71) for t in problem((216,), torch.float32, backend.device))
    args = arguments(x, origin, gradient, norm)
    expected = pgd_step_reference(*args)
    close(kernel(*args), expected, norm, backend.interpreted)
    into(*args, x)
    close(x, expected, norm, backend.interpreted)


def inside(result: torch.Tensor, origin: torch.Tensor, norm: str, epsilon: float) -> None:
    """As near as the docstring says: the distance evaluated in the dtype, and one unit for each pixel."""
    distance = (result - origin).abs().flatten(1).double()
    largest = torch.maximum(result.abs(), origin.abs()).flatten(1)
    unit = (torch.nextafter(largest, torch.full_like(largest, torch.inf)) - largest).double()
    assert bool((result >= 0).all()) and bool((result <= 1).all())
    if norm == "linf":
        bound = torch.tensor(epsilon, dtype=torch.promote_types(result.dtype, torch.float32)).double()
        assert bool((distance <= bound.item() + unit).all())
    else:
        least = torch.linalg.vector_norm((distance - unit).clamp(min=0), 2 if norm == "l2" else 1, dim=1)
        assert bool((least <= epsilon * (1 + 1e-5)).all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("backend", BACKENDS, ids=str)
def test_stays_in_ball_and_box(backend: Backend, norm: str, dtype: torch.dtype) -> None:
    kernel = backend.kernel("pgd_step", dtype)
    batch = 1 if backend.interpreted else 8
    origin = torch.rand(batch, 1000, device=backend.device).to(dtype)
    origin[:, :50], origin[:, 50:100] = 0, 1
    for epsilon in (0.0, 8 / 255, 1 / 3, 20.0):
        x = origin
        for _ in range(2):
            gradient = torch.randn(batch, 1000, device=backend.device).to(dtype)
            x = kernel(*arguments(x, origin, gradient, norm, epsilon=epsilon, step_size=epsilon, count=700))
            inside(x, origin, norm, epsilon)
        if epsilon == 0:
            assert torch.equal(x, origin)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("backend", BACKENDS, ids=str)
def test_match_special_values(backend: Backend, norm: str) -> None:
    kernel = backend.kernel("pgd_step", torch.float32)
    inf, nan, tiny = float("inf"), float("nan"), 1e-42
    rows = [
        [0.0, -0.0, 0.0, -0.0],
        [tiny, -tiny, 0.0, tiny],
        [nan, 1.0, -1.0, 0.0],
        [inf, 1.0, -1.0, 0.0],
        [1e30, -1e30, 1.0, 0.0],
        [1e-30, -1e-30, 0.0, 1e-35],
    ]
    gradient = torch.tensor(rows, device=backend.device)
    x = torch.tensor([0.0, 0.25, 0.5, 1.0], device=backend.device).expand(6, 4).contiguous()
    args = arguments(x, x, gradient, norm, count=2)
    actual = kernel(*args)
    expected = pgd_step_reference(*args)
    close(actual, expected, norm, backend.interpreted)
    assert torch.equal(actual[0], x[0])
    assert bool(actual[2, 0].isnan())
    for place in range(2):
        moved = [x.clone(), x.clone()]
        moved[place][1, 2] = nan
        args = arguments(*moved, torch.ones_like(x), norm, count=2)
        actual, expected = kernel(*args), pgd_step_reference(*args)
        close(actual, expected, norm, backend.interpreted)
        assert int(actual.isnan().sum()) == (1 if norm == "linf" else 4)


def test_linf_against_plain_pytorch() -> None:
    x, origin, gradient = problem((4, 3, 9, 9), torch.float64)
    t = x + 0.07 * gradient.sign()
    expected = t.clamp(origin - 0.1, origin + 0.1).clamp(0, 1)
    torch.testing.assert_close(ops.pgd_step(x, origin, gradient, 0.07, 0.1), expected)


def test_l2_against_plain_pytorch() -> None:
    x, origin, gradient = problem((4, 3, 9, 9), torch.float64)
    norms = gradient.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
    delta = x + 0.3 * gradient / norms - origin
    delta = delta * (0.9 / delta.flatten(1).norm(dim=1).view(-1, 1, 1, 1)).clamp(max=1)
    torch.testing.assert_close(ops.pgd_step(x, origin, gradient, 0.3, 0.9, "l2"), (origin + delta).clamp(0, 1))


@pytest.mark.parametrize("epsilon", [0.5, 3.0, 20.0, 1000.0])
@pytest.mark.parametrize("bounded", [True, False])
def test_l1_projection_is_the_nearest_point(epsilon: float, bounded: bool) -> None:
    lower, upper = (0.0, 1.0) if bounded else (-torch.inf, torch.inf)
    t, origin, _ = problem((6, 80), torch.float64, spread=1.5)
    if not bounded:
        t = torch.randn_like(t)
    still = torch.zeros_like(t)
    p = ops.pgd_step(t, origin, still, 0.0, epsilon, "l1", lower=lower, upper=upper)
    t = t.clamp(lower, upper)
    assert bool(((p - origin).abs().sum(1) <= epsilon * (1 + 1e-12)).all())
    # p is nearest to t in a convex set if no point z of it has <t - p, z - p> > 0. The z where that product is largest
    # spends epsilon on the coordinates of largest |t - p|, each up to its side of the box.
    w = t - p
    room = torch.where(w > 0, upper - origin, origin - lower)
    order = w.abs().argsort(1, descending=True)
    spent = room.clamp(max=epsilon).gather(1, order).cumsum(1).clamp(max=epsilon)
    share = torch.zeros_like(w).scatter(1, order, spent.diff(dim=1, prepend=torch.zeros_like(spent[:, :1])))
    gain = (w * (origin + w.sign() * share - p)).sum(1)
    assert bool((gain <= 1e-10).all())


def test_l1_step_moves_the_largest_coordinates() -> None:
    gradient = torch.tensor([[3.0, -5.0, 1.0, 3.0, 0.0], [0.0, 0.0, -1.0, 0.0, 0.0]], dtype=torch.float64)
    x = torch.full_like(gradient, 0.5)
    moved = ops.pgd_step(x, x, gradient, 0.3, 10.0, "l1", fraction=0.4) - x
    # The second largest magnitude is shared by two; zeros never move.
    expected = torch.tensor([[0.1, -0.1, 0, 0.1, 0], [0, 0, -0.3, 0, 0]], dtype=torch.float64)
    torch.testing.assert_close(moved, expected)
    each = ops.pgd_step(x, x, gradient, 0.3, 10.0, "l1", fraction=torch.tensor([0.2, 1.0])) - x
    torch.testing.assert_close(each[0], torch.tensor([0, -0.3, 0, 0, 0], dtype=torch.float64))


@pytest.mark.parametrize("norm", NORMS)
def test_results_do_not_depend_on_threads(norm: str) -> None:
    args = arguments(*problem((2, 3, 80, 151), torch.float32), norm)
    kernel = BACKENDS[0].kernel("pgd_step", torch.float32)
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(kernel(*args))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


@pytest.mark.parametrize("index", range(3))
def test_every_instruction_set(index: int) -> None:
    run_on_instruction_set(index, [__file__, str(Path(__file__).with_name("test_sq_norms.py"))], "match and cpu-cpu")


def test_other_layouts() -> None:
    base, origin, gradient = problem((2, 6, 10, 12), torch.float32)
    for x in (base[:, ::2], base[:, :3].mT, base[:, :3].contiguous(memory_format=torch.channels_last)):
        o = origin.view(-1)[: x.numel()].view(x.shape)
        g = gradient[:, 3:].reshape(x.shape).to(memory_format=torch.channels_last)
        for norm in NORMS:
            result = ops.pgd_step(x, o, g, STEP[norm], EPSILON[norm], norm)
            plain = ops.pgd_step(x.contiguous(), o, g.contiguous(), STEP[norm], EPSILON[norm], norm)
            assert result.is_contiguous(memory_format=ops.dense_format(x))
            # Sums in another order.
            torch.testing.assert_close(result, plain, rtol=0, atol=4e-7)


def test_descends_with_a_negative_step() -> None:
    x, origin, gradient = problem((4, 30), torch.float32)
    for norm in NORMS:
        down = ops.pgd_step(x, origin, gradient, -STEP[norm], EPSILON[norm], norm)
        assert torch.equal(down, ops.pgd_step(x, origin, -gradient, STEP[norm], EPSILON[norm], norm))


def test_opcheck_and_compile() -> None:
    tensors = problem((2, 3, 5, 4), torch.float32)
    for norm in NORMS:
        args = arguments(*tensors, norm)
        torch.library.opcheck(torch.ops.emr.pgd_step.default, args)
        torch.library.opcheck(torch.ops.emr.pgd_step_out.default, (*args, torch.empty_like(tensors[0])))

    def function(x: torch.Tensor, origin: torch.Tensor, gradient: torch.Tensor) -> list[torch.Tensor]:
        steps = [ops.pgd_step(x, origin, gradient * 2, STEP[n], EPSILON[n], n) for n in NORMS]
        return [*steps, ops.pgd_step(x, origin, gradient, 0.1, 0.1, out=torch.empty_like(x))]

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")(*tensors)
    torch.testing.assert_close(compiled, function(*tensors))


X = torch.zeros(2, 3)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: ops.pgd_step(X.int(), X, X, 0.1, 0.1), TypeError, "x has dtype torch.int32; expected float32"),
        (lambda: ops.pgd_step(X[0, 0], X, X, 0.1, 0.1), ValueError, r"x has shape \(\); expected \[N, \.\.\.\]"),
        (lambda: ops.pgd_step(X, X.half(), X, 0.1, 0.1), TypeError, "origin has dtype torch.float16; expected torch.f"),
        (lambda: ops.pgd_step(X, X[:1], X, 0.1, 0.1), ValueError, r"origin has shape \(1, 3\); expected \(2, 3\)"),
        (lambda: ops.pgd_step(X, X, X[:, :1], 0.1, 0.1), ValueError, r"gradient has shape \(2, 1\); expected \(2, 3"),
        (lambda: ops.pgd_step(X, X, X.double(), 0.1, 0.1), TypeError, "gradient has dtype torch.float64; expected"),
        (lambda: ops.pgd_step(X, X, X, 0.1, -1.0), ValueError, "epsilon is -1.0; expected a number >= 0"),
        (lambda: ops.pgd_step(X, X, X, 0.1, float("nan")), ValueError, "epsilon is nan"),
        (lambda: ops.pgd_step(X, X, X, float("inf"), 0.1), ValueError, "step_size is inf; expected a finite"),
        (lambda: ops.pgd_step(X, X, X, X[0], 0.1), ValueError, r"step_size has shape \(3,\); expected \(2,\)"),
        (lambda: ops.pgd_step(X, X, X, 0.1, 0.1, "l3"), ValueError, "norm is 'l3'; expected one of 'linf', 'l2', 'l1'"),
        (lambda: ops.pgd_step(X, X, X, 0.1, 0.1, lower=2), ValueError, "lower is 2 and upper 1.0; expected lower <="),
        (lambda: ops.pgd_step(X, X, X, 0.1, 0.1, "l1", fraction=0), ValueError, r"fraction is 0; .* in \(0, 1\]"),
        (lambda: ops.pgd_step(X, X, X, 0.1, 0.1, "l1", fraction=X), ValueError, r"fraction has shape \(2, 3\)"),
        (lambda: ops.pgd_step(X, X, X, 0.1, 0.1, out=X.double()), TypeError, "out has dtype torch.float64"),
        (
            lambda: ops.pgd_step(X.clone().requires_grad_(), X, X, 0.1, 0.1),
            RuntimeError,
            "pgd_step has no derivative, and x requires grad",
        ),
    ],
)
def test_bad_arguments(call: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()
