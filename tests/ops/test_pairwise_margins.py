"""pairwise_margins: against float64 differences, on every backend."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from backends import BACKENDS, DTYPES, Backend
from emr_kernels import ops
from emr_kernels.ops.pairwise_margins import ORDERS, pairwise_margins_reference

# Whole vectors, odd sizes, more than a block, single elements and classes, nothing.
SHAPES = [(3, 4, 32), (2, 3, 37), (1, 3, 5000), (4, 2, 1), (2, 1, 8), (0, 3, 4), (2, 3, 0)]


def problem(shape: tuple[int, int, int], dtype: torch.dtype, device: str) -> Any:
    n, k, d = shape
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    tensors = torch.randn(n, k, d).to(dtype), torch.randn(n, k, dtype=wide), torch.randint(k, (n,))
    return tuple(t.to(device) for t in tensors)


def assert_close(actual: torch.Tensor, weights: torch.Tensor, logits: torch.Tensor, y: torch.Tensor, ord: float):
    wide = torch.float64 if weights.dtype == torch.float64 else torch.float32
    assert actual.dtype == wide and actual.shape == logits.shape
    exact = pairwise_margins_reference(weights.double().cpu(), logits.double().cpu(), y.cpu(), ord)
    # Terms of one sign: the sums' errors are relative. The gap's is that of the logits' difference.
    sample = torch.arange(len(y))
    cancelled = logits.double().cpu().abs() + logits.double().cpu()[sample, y.cpu()].abs()[:, None]
    gap = (logits.double().cpu()[sample, y.cpu()][:, None] - logits.double().cpu()).abs()
    bound = exact.abs() * torch.finfo(wide).eps * (64 + cancelled / gap)
    near = (actual.double().cpu() - exact).abs() <= bound
    assert bool((near | (actual.cpu() == exact)).all())


@pytest.mark.parametrize("ord", ORDERS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS, ids=str)
def test_match_float64(backend: Backend, dtype: torch.dtype, ord: float) -> None:
    kernel = backend.kernel("pairwise_margins", dtype)
    for shape in SHAPES:
        args = problem(shape, dtype, backend.device)
        actual = kernel(*args, float(ord))
        assert_close(actual, *args, ord)
        assert torch.equal(actual, kernel(*args, float(ord)))


@pytest.mark.parametrize("ord", ORDERS)
@pytest.mark.parametrize("backend", BACKENDS, ids=str)
def test_match_for_classes_close_to_each_other(backend: Backend, ord: float) -> None:
    """Weights that differ in their last digits alone, where an expansion of the square has none left."""
    kernel = backend.kernel("pairwise_margins", torch.float32)
    weights = torch.randn(2, 1, 200).expand(2, 3, 200).contiguous()
    weights[:, 1] *= 1 + 2**-20
    weights[:, 2, 7] += 2**-12
    args = tuple(t.to(backend.device) for t in (weights, torch.randn(2, 3), torch.tensor([0, 0])))
    assert_close(kernel(*args, float(ord)), *args, ord)


@pytest.mark.parametrize("ord", ORDERS)
@pytest.mark.parametrize("backend", BACKENDS, ids=str)
def test_match_special_values(backend: Backend, ord: float) -> None:
    kernel = backend.kernel("pairwise_margins", torch.float32)
    nan, inf = torch.nan, torch.inf
    # The label's weight is zero: norms are those of the rows.
    rows = torch.zeros(1, 7, 40)
    rows[0, 1, 3], rows[0, 2, 39], rows[0, 3, 0], rows[0, 6, 5] = nan, inf, -inf, 1e-30
    logits = torch.tensor([[1.0, 0.0, 0.0, 2.0, 1.0, 3.0, nan]])
    actual = kernel(*(t.to(backend.device) for t in (rows, logits, torch.tensor([0]))), float(ord)).cpu()
    # NaN norm; infinite norms; nothing over nothing; no way to a greater logit; NaN gap.
    expected = torch.tensor([[inf, nan, 0.0, -0.0, 0.0, -inf, nan]])
    torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("ord", ORDERS)
def test_public_function(ord: float) -> None:
    weights = torch.randn(4, 3, 2, 5, dtype=torch.float64).transpose(2, 3)
    logits, y = torch.randn(4, 3), torch.tensor([0, 2, 1, 1])
    found = ops.pairwise_margins(weights, logits, y, ord)
    for i, label in enumerate(y.tolist()):
        for j in range(3):
            norm = torch.linalg.vector_norm(weights[i, label] - weights[i, j], ord)
            gap = logits[i, label].double() - logits[i, j].double()
            expected = torch.tensor(math.inf, dtype=torch.float64) if j == label else gap / norm
            torch.testing.assert_close(found[i, j], expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(
        ops.pairwise_margins(weights.half(), logits.half(), y, ord).double(), found, rtol=1e-2, atol=1e-3
    )


def test_results_do_not_depend_on_threads() -> None:
    weights, logits, y = problem((9, 5, 7001), torch.float32, "cpu")
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(ops.pairwise_margins(weights, logits, y))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


def test_opcheck_and_compile() -> None:
    args = problem((3, 4, 5), torch.float32, "cpu")
    torch.library.opcheck(torch.ops.emr.pairwise_margins.default, (*args, 2.0))
    compiled = torch.compile(lambda *a: ops.pairwise_margins(*a).amin(1), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*args), ops.pairwise_margins(*args).amin(1))


W, Z, Y = torch.zeros(2, 3, 4), torch.zeros(2, 3), torch.tensor([0, 2])


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: ops.pairwise_margins(W.int(), Z, Y), TypeError, "weights has dtype torch.int32; expected float32"),
        (lambda: ops.pairwise_margins(Z, Z, Y), ValueError, r"weights has shape \(2, 3\); expected \[N, K, ...\]"),
        (lambda: ops.pairwise_margins(W, Z[:, :2], Y), ValueError, r"logits has shape \(2, 2\); expected \(2, 3\)"),
        (lambda: ops.pairwise_margins(W, Z, Y[:1]), ValueError, r"y has shape \(1,\); expected \(2,\)"),
        (lambda: ops.pairwise_margins(W, Z, Y.int()), TypeError, "y has dtype torch.int32"),
        (lambda: ops.pairwise_margins(W, Z, Y + 1), ValueError, r"y holds 3; expected class indices in \[0, 3\)"),
        (lambda: ops.pairwise_margins(W, Z, Y, 3), ValueError, "ord is 3; expected 1, 2 or float"),
        (lambda: ops.pairwise_margins(W, Z, Y, True), ValueError, "ord is True; expected"),
        (
            lambda: ops.pairwise_margins(W.clone().requires_grad_(), Z, Y),
            RuntimeError,
            "pairwise_margins has no derivative, and weights requires grad",
        ),
    ],
)
def test_bad_arguments(call: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()
