"""The face of affine_relu, its vjp and its jvp: layouts, buffers, tracing, and what they refuse."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from emr_kernels import ops


def tensors(count: int, shape: tuple[int, ...], memory_format: torch.memory_format) -> Any:
    return [torch.randn(shape).contiguous(memory_format=memory_format) for _ in range(count)]


def test_tensors_in_other_layouts() -> None:
    base = torch.randn(4, 9, 10, 12)
    scale = torch.randn(5)
    for a in (base[:, ::2, 1:8, ::3], base[:, :5].transpose(2, 3), base[:1, :5].expand(3, 5, 10, 12)):
        y, bits = ops.affine_relu(a, scale)
        t = a * scale.view(1, -1, 1, 1)
        assert torch.equal(y, F.relu(t))
        assert torch.equal(ops.unpack_bits(bits, a.shape, ops.dense_format(y)), t > 0)
    a = torch.randn(2, 5, 4, 3).contiguous(memory_format=torch.channels_last)
    delta = torch.randn(2, 5, 4, 3)
    _, bits = ops.affine_relu(a)
    out = ops.affine_relu_vjp(delta, bits, memory_format=torch.channels_last)
    assert torch.equal(out, delta * (a > 0))
    assert out.is_contiguous(memory_format=torch.channels_last)


def test_results_in_given_buffers() -> None:
    a, skip, delta, u = tensors(4, (2, 5, 9, 11), torch.contiguous_format)
    scale = torch.randn(5)
    y, bits = ops.affine_relu(a, scale, skip=skip)
    out, packed = torch.empty_like(a), torch.full_like(bits, 255)
    results = ops.affine_relu(a, scale, skip=skip, out=out, bits_out=packed)
    assert results[0] is out and results[1] is packed
    assert torch.equal(out, y) and torch.equal(packed, bits)
    assert torch.equal(ops.affine_relu(a, scale, skip=skip, bits_out=packed)[0], y)
    d_in = ops.affine_relu_vjp(delta, bits, scale)
    assert ops.affine_relu_vjp(delta, bits, scale, out=out) is out
    assert torch.equal(out, d_in)
    assert torch.equal(ops.affine_relu_vjp(delta, bits, scale, skip=skip), d_in + skip)
    assert ops.affine_relu_vjp(delta, bits, scale, skip=skip, out=out) is out
    assert torch.equal(out, d_in + skip)
    u_out, dscale = ops.affine_relu_jvp(u, bits, scale, delta=delta)
    results = ops.affine_relu_jvp(u, bits, scale, delta=delta, out=out)
    assert results[0] is out and torch.equal(out, u_out) and torch.equal(results[1], dscale)


def test_opcheck() -> None:
    for memory_format in (torch.contiguous_format, torch.channels_last):
        a, skip, delta = tensors(3, (2, 3, 5, 4), memory_format)
        scale, shift = torch.randn(3), torch.randn(3)
        y, bits = ops.affine_relu(a, scale, shift, skip)
        emr = torch.ops.emr
        for operator, args in (
            (emr.affine_relu, (a, scale, shift, skip, 0.0)),
            (emr.affine_relu, (a, None, None, None, 0.1)),
            (emr.affine_relu_out, (a, scale, shift, skip, 0.0, torch.empty_like(a), bits.clone())),
            (emr.affine_relu_vjp, (delta, bits, scale, None, 0.0)),
            (emr.affine_relu_vjp, (delta, bits, scale, skip, 0.0)),
            (emr.affine_relu_vjp_out, (delta, bits, scale, skip, 0.0, torch.empty_like(a))),
            (emr.affine_relu_jvp, (delta, bits, scale, 0.0, y)),
            (emr.affine_relu_jvp_out, (delta, bits, scale, 0.0, y, torch.empty_like(a))),
            (emr.pack_bits, (a > 0,)),
        ):
            torch.library.opcheck(operator.default, args)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
def test_compile(memory_format: torch.memory_format) -> None:
    a, delta, u = tensors(3, (2, 3, 5, 4), memory_format)
    scale, shift = torch.randn(3), torch.randn(3)

    def function(a: torch.Tensor, delta: torch.Tensor, u: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        y, bits = ops.affine_relu(a, scale, shift)
        d_in = ops.affine_relu_vjp(delta * 2, bits, scale, memory_format=memory_format, out=torch.empty_like(y))
        return y, bits, d_in, *ops.affine_relu_jvp(u, bits, scale, 0.0, d_in, memory_format=memory_format)

    with torch.no_grad():
        compiled = torch.compile(function, fullgraph=True, backend="aot_eager")(a, delta, u)
    torch.testing.assert_close(compiled, function(a, delta, u))


def test_refuses_to_lose_a_derivative() -> None:
    a = torch.randn(2, 3, requires_grad=True)
    bits = torch.zeros(1, dtype=torch.uint8)
    with pytest.raises(RuntimeError, match="affine_relu has no derivative, and a requires grad"):
        ops.affine_relu(a)
    with pytest.raises(RuntimeError, match="scale requires grad"):
        ops.affine_relu_vjp(a.detach(), bits, torch.ones(3, requires_grad=True))
    with torch.no_grad():
        assert torch.equal(ops.affine_relu(a)[0], F.relu(a))
    with (
        torch.autograd.forward_ad.dual_level(),
        pytest.raises(RuntimeError, match="u carries a forward-mode tangent"),
    ):
        dual = torch.autograd.forward_ad.make_dual(a.detach(), torch.ones(2, 3))
        ops.affine_relu_jvp(dual, bits, delta=a.detach())


A = torch.zeros(2, 3, 4, 4)
BITS = torch.zeros(12, dtype=torch.uint8)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: ops.affine_relu(A.int()), TypeError, "a has dtype torch.int32; expected float32"),
        (lambda: ops.affine_relu([1.0]), TypeError, "a is list; expected a tensor"),
        (lambda: ops.affine_relu(A, torch.ones(4)), ValueError, r"scale has shape \(4,\); expected \(3,\)"),
        (lambda: ops.affine_relu(A[0, 0, 0], torch.ones(4)), ValueError, r"a has shape \(4,\); expected \[N, C"),
        (lambda: ops.affine_relu(A, skip=A.double()), TypeError, "skip has dtype torch.float64; expected torch.f"),
        (lambda: ops.affine_relu(A, skip=A[:1]), ValueError, r"skip has shape \(1, 3, 4, 4\); expected \(2, 3, 4"),
        (lambda: ops.affine_relu(A, out=A.transpose(0, 1)), ValueError, "out has shape"),
        (lambda: ops.affine_relu(A, out=A.mT), ValueError, "out has strides"),
        (lambda: ops.affine_relu(A, bits_out=BITS[1:]), ValueError, r"bits_out has shape \(11,\)"),
        (lambda: ops.affine_relu_vjp(A, BITS.int()), TypeError, "bits has dtype torch.int32; expected torch.uint8"),
        (lambda: ops.affine_relu_vjp(A, BITS, skip=A[:1]), ValueError, r"skip has shape \(1, 3, 4, 4\); expected"),
        (lambda: ops.affine_relu_vjp(A, BITS[1:]), ValueError, r"bits has shape \(11,\) .* expected \(12,\)"),
        (lambda: ops.affine_relu_jvp(A, BITS, delta=A[:1]), ValueError, "delta has shape"),
        (lambda: ops.affine_relu_jvp(A.view(-1), BITS, delta=A.view(-1)), ValueError, r"u has shape \(96,\)"),
    ],
)
def test_bad_arguments(call: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()
