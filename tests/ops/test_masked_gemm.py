"""masked_gemm, masked_chain and their norms: against float64, on every backend."""

from __future__ import annotations

import importlib
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from backends import BACKENDS, DTYPES, Backend, run_on_instruction_set
from emr_kernels import ops
from emr_kernels.ops.masked_chain import masked_chain_reference
from emr_kernels.ops.masked_gemm import masked_gemm_reference

# (N, K, H, D): rows of bits that start with a byte or not, more rows than a tile has, columns that fill no panel.
SHAPES = [(3, 2, 5, 7), (5, 10, 96, 70), (2, 25, 104, 33), (7, 1, 13, 40), (1, 3, 8, 1), (4, 13, 31, 17)]
# Several batches of samples, and blocks of units, on the CPU.
LARGE = [(60, 40, 700, 9), (2, 3, 6200, 11)]


def mask_of(n: int, h: int) -> torch.Tensor:
    """Units that are on in all samples, in none, and in between."""
    return torch.rand(n, h) < torch.rand(h) * 1.2 - 0.1


def problem(shape: tuple[int, int, int, int], dtype: torch.dtype, shared: bool, device: str = "cpu") -> Any:
    n, k, h, d = shape
    grad = torch.randn(1 if shared else n, k, h).to(dtype).expand(n, k, h)
    return tuple(t.to(device) for t in (grad, ops.pack_bits(mask_of(n, h)), torch.randn(h, d).to(dtype)))


def exact(
    grad: torch.Tensor, bits: torch.Tensor, weight: torch.Tensor, slope: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """The product in float64, and the sum of its terms' magnitudes, on which rounding errors depend."""
    grad, bits, weight = grad.double().cpu(), bits.cpu(), weight.double().cpu()
    product = masked_gemm_reference(grad, bits, weight, slope, "ieee")
    return product, (grad.abs().reshape(-1, grad.shape[2]) @ weight.abs()).view(product.shape)


def assert_close(actual: torch.Tensor, grad: torch.Tensor, bits: torch.Tensor, weight: torch.Tensor, slope: float):
    product, magnitude = exact(grad, bits, weight, slope)
    assert actual.shape == product.shape and actual.dtype == grad.dtype
    eps, wide = torch.finfo(grad.dtype).eps, torch.float64 if grad.dtype == torch.float64 else torch.float32
    # Partial sums round a few hundred times, some up, some down; and once to the result's dtype.
    bound = 8 * torch.finfo(wide).eps * magnitude + eps * product.abs()
    if grad.is_cuda and grad.dtype != wide and slope != 0:
        bound += eps * magnitude  # tensor cores take the scaled values rounded
    assert bool(((actual.double().cpu() - product).abs() <= bound).all())


def assert_norms_close(actual: torch.Tensor, product: torch.Tensor, magnitude: torch.Tensor, dtype: torch.dtype):
    expected = product.square().sum(2)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    assert actual.dtype == wide and actual.shape == expected.shape
    # Twice the relative error of the rows, which is that of their magnitudes.
    bound = 16 * torch.finfo(wide).eps * (magnitude * product.abs()).sum(2) + 8 * torch.finfo(wide).eps * expected
    assert bool(((actual.double().cpu() - expected).abs() <= bound).all())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS, ids=str)
def test_match_float64(backend: Backend, dtype: torch.dtype) -> None:
    product, out_of = backend.kernel("masked_gemm", dtype), backend.kernel("masked_gemm_out", dtype)
    norms = backend.kernel("masked_gemm_sq_norms", dtype)
    shapes = SHAPES if backend.interpreted else SHAPES + LARGE
    for shape in shapes:
        for shared, slope in ((False, 0.0), (True, 0.0), (False, 0.1), (True, 0.3)):
            grad, bits, weight = problem(shape, dtype, shared, backend.device)
            actual = product(grad, bits, weight, slope, "ieee")
            assert_close(actual, grad, bits, weight, slope)
            out = torch.full_like(actual, torch.nan)
            out_of(grad, bits, weight, slope, "ieee", out)
            assert torch.equal(out, actual)
            if not (grad.is_cuda and dtype in (torch.bfloat16, torch.float16) and slope != 0):
                squares = norms(grad, bits, weight, slope, "ieee")
                assert_norms_close(squares, *exact(grad, bits, weight, slope), dtype)


@pytest.mark.parametrize("precision", ["tf32", "bf16"])
@pytest.mark.parametrize("backend", BACKENDS, ids=str)
def test_match_in_less_precision(backend: Backend, precision: str) -> None:
    grad, bits, weight = problem((5, 10, 96, 70), torch.float32, False, backend.device)
    actual = backend.kernel("masked_gemm", torch.float32)(grad, bits, weight, 0.0, precision)
    product, magnitude = exact(grad, bits, weight, 0.0)
    # Both operands of each product are rounded to 10 or 7 bits after the first.
    assert bool(((actual.cpu() - product).abs() <= magnitude * (2**-9 if precision == "tf32" else 2**-6)).all())


@pytest.mark.parametrize("backend", BACKENDS, ids=str)
def test_match_unaligned(backend: Backend) -> None:
    kernel = backend.kernel("masked_gemm", torch.float32)
    grad, bits, weight = problem((4, 6, 48, 20), torch.float32, False, backend.device)
    shifted = [torch.empty(t.numel() + 1, dtype=t.dtype, device=t.device)[1:].view(t.shape) for t in (grad, weight)]
    for target, source in zip(shifted, (grad, weight), strict=True):
        target.copy_(source)
    actual = kernel(shifted[0], bits, shifted[1], 0.0, "ieee")
    assert_close(actual, grad, bits, weight, 0.0)
    # Samples from another tensor's slice: dense, but not next to each other.
    wide = torch.randn(4, 8, 48, device=backend.device)
    assert_close(kernel(wide[:, 1:7], bits, weight, 0.0, "ieee"), wide[:, 1:7], bits, weight, 0.0)


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("backend", BACKENDS, ids=str)
def test_match_special_values(backend: Backend, shared: bool) -> None:
    kernel = backend.kernel("masked_gemm", torch.float32)
    n, k, h = 3, 4, 24
    grad = torch.randn(1 if shared else n, k, h)
    grad[0, 0, 3], grad[0, 1, 5], grad[0, 2, 7], grad[0, 3, 9] = torch.inf, torch.nan, -torch.inf, -0.0
    mask = torch.rand(n, h) < 0.5
    mask[0, [3, 5, 7]], mask[1, [3, 5, 7]] = True, False
    grad, weight = grad.expand(n, k, h), torch.rand(h, 5) + 0.5
    bits = ops.pack_bits(mask)
    actual = kernel(*(t.to(backend.device) for t in (grad, bits, weight)), 0.0, "ieee").cpu()
    expected = masked_gemm_reference(grad.double(), bits, weight.double(), 0.0, "ieee")
    # What is off gives nothing, however large it was.
    assert bool(expected[1].isfinite().all()) and not bool(expected[0, :3].isfinite().any())
    torch.testing.assert_close(actual.double(), expected, rtol=1e-5, atol=1e-5, equal_nan=True)


@pytest.mark.parametrize("backend", BACKENDS, ids=str)
def test_match_nothing(backend: Backend) -> None:
    kernel, norms = (backend.kernel(f"masked_gemm{name}", torch.float32) for name in ("", "_sq_norms"))
    for n, k, h, d in ((0, 3, 8, 4), (3, 0, 8, 4), (3, 2, 0, 4), (3, 2, 8, 0)):
        grad, weight = torch.ones(n, k, h, device=backend.device), torch.ones(h, d, device=backend.device)
        bits = torch.zeros((n * h + 7) // 8, dtype=torch.uint8, device=backend.device)
        assert torch.equal(kernel(grad, bits, weight, 0.0, "ieee").cpu(), torch.zeros(n, k, d))
        assert torch.equal(norms(grad, bits, weight, 0.0, "ieee").cpu(), torch.zeros(n, k))


def chain(n: int, k: int, sizes: tuple[int, ...], dtype: torch.dtype, device: str) -> Any:
    grad = torch.randn(k, sizes[0]).to(dtype).expand(n, k, sizes[0])
    bits = [ops.pack_bits(mask_of(n, h)).to(device) for h in sizes[:-1]]
    weights = [(torch.randn(h, d) / h**0.5).to(device, dtype) for h, d in pairwise(sizes)]
    return grad.to(device), bits, weights


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS, ids=str)
def test_chain_matches_float64(backend: Backend, dtype: torch.dtype) -> None:
    product, norms = backend.kernel("masked_chain", dtype), backend.kernel("masked_chain_sq_norms", dtype)
    cases = [(5, 3, (16, 24, 9)), (3, 14, (7, 10, 40, 5)), (4, 2, (11, 6))]
    if not backend.interpreted:
        cases.append((70, 20, (800, 33, 500, 40)))
    for n, k, sizes in cases:
        grad, bits, weights = chain(n, k, sizes, dtype, backend.device)
        for slope in (0.0, 0.2):
            slopes = [slope] + [0.0] * (len(weights) - 1)
            actual = product(grad, bits, weights, slopes, "ieee").double().cpu()
            wide = [grad.double().cpu(), [b.cpu() for b in bits], [w.double().cpu() for w in weights]]
            expected = masked_chain_reference(*wide, slopes, "ieee")
            # A product of a few layers, each within a few roundings of its dtype.
            tolerance = 30 * torch.finfo(dtype).eps
            assert float((actual - expected).norm()) <= tolerance * float(expected.norm())
            squares = norms(grad, bits, weights, slopes, "ieee").double().cpu()
            torch.testing.assert_close(squares, expected.square().sum(2), rtol=20 * tolerance, atol=tolerance)


@pytest.mark.parametrize("rows", [1, 12, 14])
@pytest.mark.parametrize("share_on", [0.0, 0.05, 0.8, 1.0])
def test_chain_of_any_share_of_units(share_on: float, rows: int) -> None:
    """From no unit to all: none, some or more columns of a panel than a tile holds; and a panel packed in two parts."""
    samples, sizes = 9, (60, 2100, 97, 50)
    grad, _, weights = chain(samples, rows, sizes, torch.float32, "cpu")
    bits = [ops.pack_bits(torch.rand(samples, h) < share_on) for h in sizes[:-1]]
    for given in (grad, torch.randn(samples, rows, sizes[0])):
        actual = ops.masked_chain(given, bits, weights, [0.0] * 3).double()
        expected = masked_chain_reference(given.double(), bits, [w.double() for w in weights], [0.0] * 3, "ieee")
        assert float((actual - expected).norm()) <= 4e-6 * float(expected.norm())


def test_chain_in_parts_of_a_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton", reason="Triton cannot be imported")
    from emr_kernels.triton import launchers

    if not BACKENDS[1].interpreted:
        pytest.skip("on a GPU there is nothing else to test")
    grad, bits, weights = chain(19, 2, (11, 5, 3), torch.float32, "cpu")
    whole = launchers["masked_chain"](grad, bits, weights, [0.0, 0.0], "ieee")
    # The package exports a function of the module's name.
    monkeypatch.setattr(importlib.import_module("emr_kernels.triton.masked_chain"), "_INTERMEDIATE", 1)
    parts = launchers["masked_chain"](grad, bits, weights, [0.0, 0.0], "ieee")
    torch.testing.assert_close(parts, whole)
    squares = launchers["masked_chain_sq_norms"](grad, bits, weights, [0.0, 0.0], "ieee")
    torch.testing.assert_close(squares, whole.square().sum(2))


def test_results_do_not_depend_on_threads() -> None:
    grad, bits, weights = chain(70, 20, (800, 33, 500, 40), torch.float32, "cpu")
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(ops.masked_chain(grad, bits, weights, [0.0] * 3))
            results.append(ops.masked_chain_sq_norms(grad, bits, weights, [0.0] * 3))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(results[i], results[i % 2]) for i in range(6))


@pytest.mark.parametrize("index", range(3))
def test_every_instruction_set(index: int) -> None:
    files = [__file__, str(Path(__file__).with_name("test_pairwise_margins.py"))]
    run_on_instruction_set(index, files, "match and cpu-cpu")


def test_public_functions() -> None:
    grad, bits, weight = problem((5, 4, 12, 6), torch.float64, False)
    expected, _ = exact(grad, bits, weight, 0.1)
    strided = grad.transpose(1, 2).contiguous().transpose(1, 2)
    for given in (grad, strided):
        actual = ops.masked_gemm(given, bits, weight.T.contiguous().T, 0.1)
        torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)
    out = torch.empty(5, 4, 6, dtype=torch.float64)
    assert ops.masked_gemm(grad, bits, weight, 0.1, out=out) is out
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)
    squares = ops.masked_gemm_sq_norms(grad, bits, weight, 0.1)
    torch.testing.assert_close(squares, expected.square().sum(2), rtol=1e-12, atol=1e-12)
    chained = ops.masked_chain(grad, [bits], [weight], [0.1])
    torch.testing.assert_close(chained, expected, rtol=1e-12, atol=1e-12)
    squares = ops.masked_chain_sq_norms(grad, [bits], [weight], [0.1])
    torch.testing.assert_close(squares, expected.square().sum(2), rtol=1e-12, atol=1e-12)


def test_opcheck() -> None:
    grad, bits, weight = problem((3, 2, 9, 5), torch.float32, True)
    out = torch.empty(3, 2, 5)
    emr = torch.ops.emr
    for operator, args in (
        (emr.masked_gemm, (grad, bits, weight, 0.1, "ieee")),
        (emr.masked_gemm_out, (grad, bits, weight, 0.1, "ieee", out)),
        (emr.masked_gemm_sq_norms, (grad, bits, weight, 0.1, "ieee")),
        (emr.masked_chain, (grad, [bits], [weight], [0.1], "ieee")),
        (emr.masked_chain_sq_norms, (grad, [bits], [weight], [0.1], "ieee")),
    ):
        torch.library.opcheck(operator.default, args)


def test_compile() -> None:
    grad, bits, weight = problem((3, 2, 9, 5), torch.float32, False)

    def function(grad: torch.Tensor, weight: torch.Tensor) -> tuple[torch.Tensor, ...]:
        out = ops.masked_gemm(grad * 2, bits, weight, out=torch.empty(3, 2, 5))
        chained = ops.masked_chain(grad, [bits], [weight], [0.1])
        return out, chained, ops.masked_gemm_sq_norms(grad, bits, weight)

    with torch.no_grad():
        compiled = torch.compile(function, fullgraph=True, backend="aot_eager")(grad, weight)
    torch.testing.assert_close(compiled, function(grad, weight))


GRAD, BITS, WEIGHT = torch.zeros(2, 3, 8), torch.zeros(2, dtype=torch.uint8), torch.zeros(8, 4)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: ops.masked_gemm([1.0], BITS, WEIGHT), TypeError, "grad is list; expected a tensor"),
        (lambda: ops.masked_gemm(GRAD[0], BITS, WEIGHT), ValueError, r"grad has shape \(3, 8\); expected \[N, K, H\]"),
        (lambda: ops.masked_gemm(GRAD, BITS, WEIGHT[1:]), ValueError, r"weight has shape \(7, 4\); expected \[8, D\]"),
        (lambda: ops.masked_gemm(GRAD, BITS, WEIGHT.double()), TypeError, "weight has dtype torch.float64; expected"),
        (lambda: ops.masked_gemm(GRAD, BITS[1:], WEIGHT), ValueError, r"bits has shape \(1,\) .* expected \(2,\)"),
        (lambda: ops.masked_gemm(GRAD, BITS.int(), WEIGHT), TypeError, "bits has dtype torch.int32"),
        (lambda: ops.masked_gemm(GRAD, BITS, WEIGHT, precision="fp8"), ValueError, "precision is 'fp8'; expected one"),
        (lambda: ops.masked_gemm(GRAD, BITS, WEIGHT, out=GRAD), ValueError, r"out has shape .* \(2, 3, 4\)"),
        (
            lambda: ops.masked_gemm(GRAD, BITS, WEIGHT, out=torch.zeros(2, 3, 4).double()),
            TypeError,
            "out has dtype torch.float64; expected torch.float32",
        ),
        (lambda: ops.masked_gemm_sq_norms(GRAD, BITS, WEIGHT[0]), ValueError, r"weight has shape \(4,\)"),
        (lambda: ops.masked_chain(GRAD, [], [], []), ValueError, "0 bits, 0 weights and 0 negative_slopes; expected"),
        (lambda: ops.masked_chain(GRAD, [BITS], [WEIGHT], []), ValueError, "1 bits, 1 weights and 0 negative_slopes"),
        (
            lambda: ops.masked_chain_sq_norms(GRAD, [BITS] * 2, [WEIGHT] * 2, [0.0] * 2),
            ValueError,
            r"weights\[1\] has shape \(8, 4\); expected \[4, D\]",
        ),
        (
            lambda: ops.masked_chain(GRAD, [BITS] * 2, [WEIGHT, WEIGHT[:4]], [0.0] * 2),
            ValueError,
            r"bits\[1\] has shape \(2,\)",
        ),
        (
            lambda: ops.masked_gemm(GRAD, BITS, WEIGHT.clone().requires_grad_()),
            RuntimeError,
            "masked_gemm has no derivative, and weight requires grad",
        ),
    ],
)
def test_bad_arguments(call: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()
