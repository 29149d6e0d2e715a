"""The bodies of the CUDA kernels, run on the CPU thread after thread: indices, tails, bits, sums, in-place results."""

from __future__ import annotations

import ctypes
import importlib
import subprocess
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from emr_kernels import _build, ops

# The package exports a function of the module's name.
reference = importlib.import_module("emr_kernels.ops.affine_relu")

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(scope="module")
def bodies(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    """The compiled bodies; skips without a compiler."""
    try:
        tools = _build.find_toolchain()
    except _build.BuildError as error:
        pytest.skip(str(error))
    source = Path(__file__).with_name("cuda_on_cpu.cpp")
    library = tmp_path_factory.mktemp("bodies") / "bodies.so"
    flags = ["-std=c++20", "-O1", "-fPIC", "-shared", "-ffp-contract=off", "-Wall", "-Wextra", "-Werror"]
    includes = ["-I", str(_build.source_folder()), "-isystem", str(tools.torch / "include")]
    subprocess.run([tools.compiler, *flags, *includes, str(source), "-o", str(library)], check=True)
    return ctypes.CDLL(str(library))


def pointer(tensor: torch.Tensor | None) -> ctypes.c_void_p:
    return ctypes.c_void_p(None if tensor is None else tensor.data_ptr())


def sizes(t: torch.Tensor, per_channel: bool) -> tuple[ctypes.c_int64, ...]:
    """numel, channels and inner as the kernels' host code sees a tensor."""
    channels, inner = 1, t.numel()
    if per_channel and t.shape[1] > 1:
        channels = t.shape[1]
        inner = t.numel() // (t.shape[0] * channels) if t.is_contiguous() else 1
    return tuple(map(ctypes.c_int64, (t.numel(), channels, inner)))


def run_forward(
    bodies: ctypes.CDLL,
    a: torch.Tensor,
    scale: torch.Tensor | None,
    shift: torch.Tensor | None,
    skip: torch.Tensor | None,
    slope: float,
    out: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    y = torch.full_like(a, torch.nan) if out is None else out
    bits = torch.full(((a.numel() + 7) // 8,), 0x55, dtype=torch.uint8)
    measures = sizes(a, scale is not None or shift is not None)
    tensors = map(pointer, (a, skip, y, bits))
    vectors = map(pointer, (scale, shift))
    bodies.affine_relu(DTYPES.index(a.dtype), *tensors, *measures, *vectors, ctypes.c_float(slope))
    return y, bits


def run_backward(
    bodies: ctypes.CDLL,
    u: torch.Tensor,
    bits: torch.Tensor,
    scale: torch.Tensor | None,
    slope: float,
    delta: torch.Tensor | None,
    out: torch.Tensor | None = None,
    skip: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    result = torch.full_like(u, torch.nan) if out is None else out
    dscale = None if delta is None else torch.full((u.shape[1],), torch.nan)
    measures = sizes(u, scale is not None or delta is not None)
    tensors = map(pointer, (u, skip if delta is None else delta, result, bits))
    bodies.backward(DTYPES.index(u.dtype), *tensors, *measures, pointer(scale), ctypes.c_float(slope), pointer(dscale))
    return result, dscale


def agree(bodies: ctypes.CDLL, tensors: list[torch.Tensor], scale: torch.Tensor, shift: torch.Tensor) -> None:
    a, skip, delta, u = tensors
    for s, b, k, slope in (
        (scale, shift, None, 0.0),
        (scale, shift, skip, 0.1),
        (None, shift, None, 0.1),
        (scale, None, skip, 0.0),
        (None, None, skip, 0.0),
        (None, None, None, 0.1),
    ):
        expected, expected_bits = reference.affine_relu_reference(a, s, b, k, slope)
        y, bits = run_forward(bodies, a, s, b, k, slope)
        # Neither contracts a * scale + shift, so they round alike.
        assert torch.equal(y, expected) and torch.equal(bits, expected_bits)
        for target in (a.clone(), *([] if k is None else [k.clone()])):
            first, second = (a, target) if k is not None and torch.equal(target, k) else (target, k)
            y, bits = run_forward(bodies, first, s, b, second, slope, out=target)
            assert torch.equal(y, expected) and torch.equal(bits, expected_bits)
    for s, slope in ((scale, 0.0), (scale, 0.1), (None, 0.1)):
        expected, _ = reference.affine_relu_jvp_reference(u, bits, s, slope, delta)
        assert torch.equal(run_backward(bodies, u, bits, s, slope, None)[0], expected)
        total = reference.affine_relu_vjp_reference(u, bits, s, skip, slope)
        for target in (None, u.clone(), skip.clone()):
            first = target if target is not None and torch.equal(target, u) else u
            second = target if target is not None and torch.equal(target, skip) else skip
            assert torch.equal(run_backward(bodies, first, bits, s, slope, None, target, second)[0], total)
        out, dscale = run_backward(bodies, u, bits, s, slope, delta)
        assert torch.equal(out, expected) and dscale is not None
        exact = reference.affine_relu_jvp_reference(u.double(), bits, None, slope, delta.double())[1]
        # Rounding of the products, and of partial sums of at most a few hundred terms.
        bound = (u.double() * delta.double()).abs().sum((0, *range(2, u.dim())))
        assert bool(((dscale - exact).abs() <= 8 * torch.finfo(torch.float32).eps * bound).all())
        for first, second in ((u.clone(), delta), (u, delta.clone())):
            target = second if first is u else first
            again, sums = run_backward(bodies, first, bits, s, slope, second, out=target)
            assert torch.equal(again, expected) and sums is not None and torch.equal(sums, dscale)


# Long rows of whole and of odd vectors, several pieces to a row, short rows, short periods side by side in a block,
# periods of several blocks, vectors that hold three rows, a single channel, fewer elements than a vector.
SHAPES = [
    (2, 3, 32, 32),
    (4, 3, 33, 31),
    (2, 2, 90, 91),
    (3, 5, 7, 5),
    (5, 6, 2, 2),
    (7, 600, 3, 3),
    (40, 10),
    (5, 1001),
    (9, 2100),
    (2, 7, 130),
    (3, 4, 3, 4, 5),
    (3, 1, 65, 5),
    (17, 48, 1, 1),
    (200, 16, 2, 2),
    (1, 2),
    (1, 1),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_bodies_match_reference(bodies: ctypes.CDLL, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    scale, shift = torch.randn(2, shape[1]).unbind()
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    for memory_format in (torch.contiguous_format, formats.get(len(shape))):
        if memory_format is not None:
            tensors = [torch.randn(shape).to(dtype).contiguous(memory_format=memory_format) for _ in range(4)]
            agree(bodies, tensors, scale.clone(), shift.clone())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_unaligned(bodies: ctypes.CDLL, dtype: torch.dtype) -> None:
    for shape in ((3, 6, 9, 9), (3, 6, 2, 2), (5, 24)):
        size = torch.Size(shape).numel()
        tensors = [torch.randn(size + 1).to(dtype)[1:].view(shape) for _ in range(4)]
        assert all(t.data_ptr() % 16 for t in tensors)
        agree(bodies, tensors, torch.randn(shape[1] + 1)[1:], torch.randn(shape[1] + 1)[1:])


@settings(max_examples=40, deadline=None)
@given(
    shape=st.lists(st.integers(1, 12), min_size=2, max_size=5).map(tuple),
    seed=st.integers(0, 1000),
    dtype=st.sampled_from(DTYPES),
)
def test_any_shape(bodies: ctypes.CDLL, shape: tuple[int, ...], seed: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(seed)
    tensors = [torch.randn(shape, generator=generator).to(dtype) for _ in range(4)]
    scale, shift = (torch.randn(shape[1], generator=generator) for _ in range(2))
    agree(bodies, tensors, scale, shift)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_special_values(bodies: ctypes.CDLL, dtype: torch.dtype) -> None:
    nan, inf = float("nan"), float("inf")
    a = torch.tensor([nan, inf, -inf, -0.0, 0.0, 1e-40, -1e-40, 1.0, -1.0] * 11, dtype=dtype)
    for slope in (0.0, 0.25):
        y, bits = run_forward(bodies, a, None, None, None, slope)
        expected = torch.nn.functional.leaky_relu(a, slope) if slope else torch.relu(a)
        torch.testing.assert_close(y, expected, rtol=0, atol=0, equal_nan=True)
        assert torch.equal(ops.unpack_bits(bits, a.shape), a > 0)
    out, _ = run_backward(bodies, a, torch.zeros_like(bits), None, 0.0, None)
    assert bool((out == 0).all())


@pytest.mark.parametrize("numel", [1, 7, 8, 9, 16, 17, 24, 25, 4099])
def test_pack_bits(bodies: ctypes.CDLL, numel: int) -> None:
    mask = torch.rand(numel + 1) > 0.5
    for part in (mask[:numel], mask[1:]):
        bits = torch.full(((numel + 7) // 8 + 1,), 0x55, dtype=torch.uint8)
        bodies.pack_bits(pointer(part), pointer(bits), ctypes.c_int64(numel))
        assert torch.equal(ops.unpack_bits(bits[:-1], (numel,)), part)
        assert int(bits[-1]) == 0x55 and int(bits[-2]) < 1 << ((numel - 1) % 8 + 1)


@given(n=st.integers(0, 2**31 - 1), d=st.integers(1, 2**31 - 1))
def test_division(bodies: ctypes.CDLL, n: int, d: int) -> None:
    for value in {n, n // d * d, max(0, n // d * d - 1), 2**31 - 1}:
        assert bodies.divide(ctypes.c_uint32(value), ctypes.c_uint32(d)) == value // d


@given(
    start=st.integers(0, 2**40),
    ahead=st.integers(0, 4096),
    channels=st.integers(1, 9),
    inner=st.one_of(st.integers(32, 5000), st.integers(2**30 - 2, 2**34)),
)
def test_channels_beyond_32_bits(bodies: ctypes.CDLL, start: int, ahead: int, channels: int, inner: int) -> None:
    numbers = torch.arange(float(channels))
    first, second, split = (ctypes.c_int() for _ in range(3))
    measures = ctypes.c_int64(start), ahead, ctypes.c_int64(channels), ctypes.c_int64(inner)
    results = map(ctypes.byref, (first, second, split))
    bodies.channels_of(*measures, pointer(numbers), *results)
    expected = [(start + ahead + i) // inner % channels for i in range(8)]
    assert [first.value if i < split.value else second.value for i in range(8)] == expected
