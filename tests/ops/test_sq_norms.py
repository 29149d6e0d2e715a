"""sq_norms: against float64, on every backend; any layout, many tensors, any number of threads."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from backends import BACKENDS, DTYPES, Backend
from emr_kernels import ops

# Whole vectors, odd sizes, more than one block of the CPU's, a single element, nothing.
SHAPES = [(3, 4, 8, 8), (2, 3, 5, 7), (2, 17011), (5, 1), (4,), (0, 3, 4), (2, 0, 3)]


def exact(tensors: list[torch.Tensor]) -> torch.Tensor:
    return torch.stack(
        [
            t.double().reshape(t.shape[0], -1).square().sum(1)
            if t.numel()
            else t.new_zeros(t.shape[0], dtype=torch.float64)
            for t in tensors
        ]
    )


def close(actual: torch.Tensor, tensors: list[torch.Tensor], interpreted: bool = False) -> None:
    expected = exact(tensors)
    dtype = torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32
    assert actual.dtype == dtype and actual.shape == expected.shape
    # All terms are positive, so every rounding is relative: products, and partial sums of up to a few hundred terms.
    rtol = 64 * torch.finfo(torch.float32 if any(t.dtype != torch.float64 for t in tensors) else dtype).eps
    torch.testing.assert_close(actual.double(), expected, rtol=rtol, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS, ids=str)
def test_match_float64(backend: Backend, dtype: torch.dtype) -> None:
    kernel = backend.kernel("sq_norms", dtype)
    for shape in SHAPES:
        tensors = [torch.randn(shape, device=backend.device).to(dtype)]
        close(kernel(tensors), tensors)


@pytest.mark.parametrize("backend", BACKENDS, ids=str)
def test_match_for_a_list(backend: Backend) -> None:
    kernel = backend.kernel("sq_norms", torch.float32)
    base = torch.randn(4, 6, 9, 7, device=backend.device)
    tensors = [
        base,
        base.half(),
        base[:, 0, 0, 0],
        base.bfloat16().contiguous(memory_format=torch.channels_last),
        base.flatten(1)[:, 1:78].contiguous(),
        base[::2].repeat(2, 1, 1, 1)[1:].reshape(-1)[3 : 3 + 4 * 30].view(4, 30),  # not aligned to a vector
        base[:1].expand(4, 6, 9, 7),
        base.permute(0, 2, 3, 1),
    ]
    close(kernel(tensors), tensors)


@pytest.mark.parametrize("backend", BACKENDS, ids=str)
def test_match_special_values(backend: Backend) -> None:
    kernel = backend.kernel("sq_norms", torch.float32)
    inf, nan = float("inf"), float("nan")
    rows = torch.tensor([[inf, 1, 0], [1, nan, 0], [-inf, 1, 2], [-0.0, 0, 0], [1e-30, 0, 0], [1e20, 0, 0]])
    actual = kernel([rows.to(backend.device)]).cpu()
    # Squares under- and overflow as float32's do.
    expected = torch.tensor([[inf, nan, inf, 0, 0, inf]])
    torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("backend", BACKENDS, ids=str)
def test_repeats_to_the_last_bit(backend: Backend) -> None:
    kernel = backend.kernel("sq_norms", torch.float32)
    tensors = [torch.randn(2, 40_000, device=backend.device), torch.randn(2, 77, device=backend.device)]
    first = kernel(tensors)
    assert torch.equal(first, kernel(tensors))
    if backend.name == "cpu":
        threads = torch.get_num_threads()
        try:
            for count in (2, 3):
                torch.set_num_threads(count)
                assert torch.equal(first, kernel(tensors))
        finally:
            torch.set_num_threads(threads)


def test_any_layout() -> None:
    base = torch.randn(4, 5, 6, 8)
    tensors = [
        base[:, ::2],
        base.transpose(1, 3),
        base[..., 1:7],
        base[::2].repeat(2, 1, 1, 1),
        base.transpose(0, 1)[:4],
    ]
    close(ops.sq_norms(tensors), tensors)
    mixed = [base, base.double()]
    close(ops.sq_norms(mixed), mixed)


def test_opcheck_and_compile() -> None:
    tensors = [torch.randn(3, 4, 5), torch.randn(3, 7).half()]
    torch.library.opcheck(torch.ops.emr.sq_norms.default, (tensors,))
    compiled = torch.compile(lambda a, b: ops.sq_norms([a * 2, b]).sqrt(), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*tensors), ops.sq_norms([tensors[0] * 2, tensors[1]]).sqrt())


A = torch.zeros(2, 3)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: ops.sq_norms([]), ValueError, "tensors is empty; expected at least one"),
        (lambda: ops.sq_norms([A, A.int()]), TypeError, r"tensors\[1\] has dtype torch.int32; expected float32"),
        (lambda: ops.sq_norms([A, 1.0]), TypeError, r"tensors\[1\] is float; expected a tensor"),
        (lambda: ops.sq_norms([A, A[:1]]), ValueError, r"tensors\[1\] has shape \(1, 3\); expected \[2, \.\.\.\]"),
        (lambda: ops.sq_norms([A[0, 0]]), ValueError, r"tensors\[0\] has shape \(\); expected \[N, \.\.\.\]"),
        (lambda: ops.sq_norms([A, A.to("meta")]), ValueError, r"tensors\[1\] is on device meta; expected cpu"),
        (lambda: ops.sq_norms([A.clone().requires_grad_()]), RuntimeError, r"no derivative, and tensors\[0\]"),
    ],
)
def test_bad_arguments(call: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()
