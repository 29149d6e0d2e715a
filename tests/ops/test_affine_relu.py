"""affine_relu, its vjp and its jvp: against PyTorch's own operators, and compiled kernels against the reference."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from itertools import product
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from emr_kernels import _extension, ops

# The package exports a function of the module's name.
reference = importlib.import_module("emr_kernels.ops.affine_relu")

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
# Long rows, rows that are no multiple of a vector, rows too short for one, single channels, odd channel counts.
SHAPES = [
    (2, 64, 8, 8),
    (4, 3, 33, 31),
    (3, 5, 7, 3),
    (2, 16, 9, 9),
    (2, 6, 2, 2),
    (1, 2, 150, 150),
    (64, 10),
    (5, 1001),
    (2, 7, 130),
    (2, 3, 4, 5, 6),
    (3, 1, 5, 5),
    (17, 48, 1, 1),
    (1, 1),
    (0, 3, 4, 4),
    (2, 3, 0, 4),
]
FORMATS = {4: torch.channels_last, 5: torch.channels_last_3d}


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def tensors(count: int, shape: tuple[int, ...], dtype: torch.dtype, memory_format: torch.memory_format) -> Any:
    return [torch.randn(shape).to(dtype).contiguous(memory_format=memory_format) for _ in range(count)]


def vectors(channels: int, dtype: torch.dtype) -> Any:
    return torch.randn(channels, dtype=compute_dtype(dtype)), torch.randn(channels, dtype=compute_dtype(dtype))


@pytest.fixture
def compiled() -> None:
    """The compiled operators; skips where they cannot be had."""
    ops.pack_bits(torch.zeros(1, dtype=torch.bool))
    if _extension.library is None:
        pytest.skip(f"no compiled operators: {_extension.reason}")


def layouts(shape: tuple[int, ...]) -> list[torch.memory_format]:
    return [torch.contiguous_format, *([FORMATS[len(shape)]] if len(shape) in FORMATS else [])]


@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_kernels_match_reference(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    for memory_format in layouts(shape):
        a, skip, delta, u = tensors(4, shape, dtype, memory_format)
        scale, shift = vectors(shape[1], dtype)
        for s, b, k, slope in product((None, scale), (None, shift), (None, skip), (0.0, 0.1)):
            y, bits = ops.affine_relu(a, s, b, k, slope)
            expected, expected_bits = reference.affine_relu_reference(a, s, b, k, slope)
            # Neither contracts a * scale + shift, so they round alike.
            assert torch.equal(y, expected)
            assert torch.equal(bits, expected_bits)
            assert y.stride() == a.stride()
        for s, slope in product((None, scale), (0.0, 0.1)):
            out = ops.affine_relu_vjp(delta, bits, s, slope, memory_format=memory_format)
            assert torch.equal(out, reference.affine_relu_vjp_reference(delta, bits, s, slope))
            out, dscale = ops.affine_relu_jvp(u, bits, s, slope, delta, memory_format=memory_format)
            assert torch.equal(out, reference.affine_relu_jvp_reference(u, bits, s, slope, delta)[0])
            exact = reference.affine_relu_jvp_reference(u.double(), bits, None, slope, delta.double())[1]
            # Rounding of the products, and of partial sums of at most a few hundred terms.
            bound = (u.double() * delta.double()).abs().sum((0, *range(2, u.dim())))
            unit = torch.finfo(dscale.dtype).eps
            assert dscale.dtype == compute_dtype(dtype)
            assert bool(((dscale - exact).abs() <= 8 * unit * bound).all())


@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize("index", range(3))
def test_every_instruction_set(index: int) -> None:
    module = _extension.facts_module()
    assert module is not None
    facts = module.facts()
    names = facts["instruction_sets"]
    if index >= len(names) or names.index(facts["instruction_set"]) <= index:
        pytest.skip("not compiled in, not supported here, or what the other tests run")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "match or special", __file__]
    environment = {**os.environ, "EMR_CPU_ISA": names[index], "PYTHONPATH": os.pathsep.join(sys.path)}
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout
    assert "skipped" not in result.stdout


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_special_values(dtype: torch.dtype) -> None:
    nan, inf = float("nan"), float("inf")
    a = torch.tensor([nan, inf, -inf, -0.0, 0.0, 1.0, -1.0] * 11, dtype=dtype)
    y, bits = ops.affine_relu(a)
    torch.testing.assert_close(y, F.relu(a), rtol=0, atol=0, equal_nan=True)
    assert torch.equal(ops.unpack_bits(bits, a.shape), a > 0)
    y, _ = ops.affine_relu(a, negative_slope=0.25)
    torch.testing.assert_close(y, F.leaky_relu(a, 0.25), rtol=0, atol=0, equal_nan=True)
    dead = torch.zeros_like(bits)
    assert bool((ops.affine_relu_vjp(a, dead) == 0).all())


@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_special_rounding(dtype: torch.dtype) -> None:
    magnitudes = torch.logspace(-9, 6, 4000).view(1, 16, 250)
    a = (magnitudes * torch.randn(magnitudes.shape)).to(dtype)
    scale = torch.linspace(0.3, 2.7, 16)
    y, _ = ops.affine_relu(a, scale, negative_slope=0.3)
    assert torch.equal(y, reference.affine_relu_reference(a, scale, None, None, 0.3)[0])


@pytest.mark.parametrize("slope", [0.0, 0.2])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
def test_against_autograd(slope: float, memory_format: torch.memory_format) -> None:
    a, skip, delta, u = tensors(4, (3, 6, 5, 7), torch.float64, memory_format)
    scale, shift = vectors(6, torch.float64)

    def function(a: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        t = a * scale.view(1, -1, 1, 1) + shift.view(1, -1, 1, 1) + skip
        return F.leaky_relu(t, slope)

    y, bits = ops.affine_relu(a, scale, shift, skip, slope)
    torch.testing.assert_close(y, function(a, scale))
    _, transpose = torch.func.vjp(lambda t: function(t, scale), a)
    d_in = ops.affine_relu_vjp(delta, bits, scale, slope, memory_format=memory_format)
    torch.testing.assert_close(d_in, transpose(delta)[0])
    u_out, dscale = ops.affine_relu_jvp(u, bits, scale, slope, delta, memory_format=memory_format)
    torch.testing.assert_close(u_out, torch.func.jvp(lambda t: function(t, scale), (a,), (u,))[1])

    def pairing(scale: torch.Tensor) -> torch.Tensor:
        return (delta * torch.func.jvp(lambda t: function(t, scale), (a,), (u,))[1]).sum()

    torch.testing.assert_close(dscale, torch.func.grad(pairing)(scale))


@settings(max_examples=60, deadline=None)
@given(
    shape=st.lists(st.integers(1, 12), min_size=2, max_size=5).map(tuple),
    seed=st.integers(0, 1000),
    leaky=st.booleans(),
)
def test_any_shape(shape: tuple[int, ...], seed: int, leaky: bool) -> None:
    generator = torch.Generator().manual_seed(seed)
    a, delta = (torch.randn(shape, generator=generator) for _ in range(2))
    scale, shift = (torch.randn(shape[1], generator=generator) for _ in range(2))
    view = (1, -1, *[1] * (len(shape) - 2))
    slope = 0.1 if leaky else 0.0
    for memory_format in layouts(shape):
        dense = a.contiguous(memory_format=memory_format)
        y, bits = ops.affine_relu(dense, scale, shift, negative_slope=slope)
        t = a * scale.view(view) + shift.view(view)
        assert torch.equal(y, F.leaky_relu(t, slope))
        d_in = ops.affine_relu_vjp(delta, bits, scale, slope, memory_format=ops.dense_format(y))
        assert torch.equal(d_in, torch.where(t > 0, delta, delta * slope) * scale.view(view))


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


@pytest.mark.parametrize("shape", [(2, 5, 9, 11), (3, 37), (2, 4, 2, 2)], ids=str)
def test_results_in_place(shape: tuple[int, ...]) -> None:
    a, skip, delta, u = tensors(4, shape, torch.float32, torch.contiguous_format)
    scale, shift = vectors(shape[1], torch.float32)
    y, bits = ops.affine_relu(a, scale, shift, skip)
    buffer = torch.full_like(bits, 255)
    for target in (a.clone(), skip.clone()):
        first, second = (target, skip) if torch.equal(target, a) else (a, target)
        out, packed = ops.affine_relu(first, scale, shift, second, out=target, bits_out=buffer)
        assert out is target and packed is buffer
        assert torch.equal(out, y) and torch.equal(packed, bits)
    d_in = ops.affine_relu_vjp(delta, bits, scale)
    u_out, dscale = ops.affine_relu_jvp(u, bits, scale, delta=delta)
    target = delta.clone()
    assert ops.affine_relu_vjp(target, bits, scale, out=target) is target
    assert torch.equal(target, d_in)
    for first, second in ((u.clone(), delta), (u, delta.clone())):
        target = second if first is u else first
        out, total = ops.affine_relu_jvp(first, bits, scale, delta=second, out=target)
        assert out is target and torch.equal(out, u_out) and torch.equal(total, dscale)


@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize("shape", [(8, 16, 40, 40), (4000, 33)], ids=str)
def test_sums_do_not_depend_on_threads(shape: tuple[int, ...]) -> None:
    u, delta = tensors(2, shape, torch.float32, torch.contiguous_format)
    _, bits = ops.affine_relu(u)
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(ops.affine_relu_jvp(u, bits, delta=delta)[1])
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


def test_opcheck() -> None:
    for memory_format in (torch.contiguous_format, torch.channels_last):
        a, skip, delta = tensors(3, (2, 3, 5, 4), torch.float32, memory_format)
        scale, shift = vectors(3, torch.float32)
        y, bits = ops.affine_relu(a, scale, shift, skip)
        emr = torch.ops.emr
        for operator, args in (
            (emr.affine_relu, (a, scale, shift, skip, 0.0)),
            (emr.affine_relu, (a, None, None, None, 0.1)),
            (emr.affine_relu_out, (a, scale, shift, skip, 0.0, torch.empty_like(a), bits.clone())),
            (emr.affine_relu_vjp, (delta, bits, scale, 0.0)),
            (emr.affine_relu_vjp_out, (delta, bits, scale, 0.0, torch.empty_like(a))),
            (emr.affine_relu_jvp, (delta, bits, scale, 0.0, y)),
            (emr.affine_relu_jvp_out, (delta, bits, scale, 0.0, y, torch.empty_like(a))),
            (emr.pack_bits, (a > 0,)),
        ):
            torch.library.opcheck(operator.default, args)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
def test_compile(memory_format: torch.memory_format) -> None:
    a, delta, u = tensors(3, (2, 3, 5, 4), torch.float32, memory_format)
    scale, shift = vectors(3, torch.float32)

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
        (lambda: ops.affine_relu_vjp(A, BITS[1:]), ValueError, r"bits has shape \(11,\) .* expected \(12,\)"),
        (lambda: ops.affine_relu_jvp(A, BITS, delta=A[:1]), ValueError, "delta has shape"),
        (lambda: ops.affine_relu_jvp(A.view(-1), BITS, delta=A.view(-1)), ValueError, r"u has shape \(96,\)"),
    ],
)
def test_bad_arguments(call: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()
