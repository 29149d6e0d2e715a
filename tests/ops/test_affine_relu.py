"""affine_relu, its vjp and its jvp: against PyTorch's own operators, and every backend against the reference."""

from __future__ import annotations

import importlib
import sys
from itertools import product
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from backends import BACKENDS, DTYPES, Backend, run_on_instruction_set
from emr_kernels import _extension, ops

# The package exports a function of the module's name.
reference = importlib.import_module("emr_kernels.ops.affine_relu")

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
# The same in little: a long row, rows of whole bytes and others, columns, more than a block, nothing.
FEW_SHAPES = [(2, 5, 33, 15), (2, 6, 8, 7), (3, 16, 5, 3), (64, 10), (3, 1001), (2, 3, 4, 5, 6), (1, 1), (2, 3, 0, 4)]
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


def ways(backend: Backend) -> list[tuple[bool, ...]]:
    """With and without scale, shift, skip and a negative slope: all ways, or few where each takes long."""
    if not backend.interpreted:
        return list(product((True, False), repeat=4))
    return [(True, True, True, False), (True, True, False, True), (False, False, True, False), (False,) * 4]


def in_memory(tensor: torch.Tensor, backend: Backend, unaligned: bool) -> torch.Tensor:
    """A copy on the backend's device, in the same memory format; at an address that is a multiple of its size only."""
    if not unaligned or tensor.numel() == 0:
        return tensor.to(backend.device)
    storage = torch.empty(tensor.numel() + 1, dtype=tensor.dtype, device=backend.device)
    return storage[1:].as_strided(tensor.shape, tensor.stride(), 1).copy_(tensor)


@pytest.mark.parametrize("backend", BACKENDS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("unaligned", [False, True], ids=["aligned", "unaligned"])
def test_backends_match_reference(unaligned: bool, dtype: torch.dtype, backend: Backend) -> None:
    affine_relu, vjp, jvp = (backend.kernel(f"affine_relu{name}", dtype) for name in ("", "_vjp", "_jvp"))

    def here(tensor: torch.Tensor | None) -> torch.Tensor | None:
        return None if tensor is None else in_memory(tensor, backend, unaligned)

    for shape in FEW_SHAPES if backend.interpreted else SHAPES:
        for memory_format in layouts(shape):
            a, skip, delta, u = tensors(4, shape, dtype, memory_format)
            scale, shift = vectors(shape[1], dtype)
            for has_scale, has_shift, has_skip, leaky in ways(backend):
                s, b, k = scale if has_scale else None, shift if has_shift else None, skip if has_skip else None
                slope = 0.1 if leaky else 0.0
                y, bits = affine_relu(here(a), here(s), here(b), here(k), slope)
                expected, expected_bits = reference.affine_relu_reference(a, s, b, k, slope)
                # Neither contracts a * scale + shift, so they round alike.
                assert backend.rounds_like(y, expected)
                assert torch.equal(bits.cpu(), expected_bits)
                assert y.stride() == a.stride()
                if has_shift or has_skip:
                    continue
                packed = here(expected_bits)
                for added in (None, skip):
                    out = vjp(here(delta), packed, here(s), here(added), slope)
                    expected = reference.affine_relu_vjp_reference(delta, expected_bits, s, added, slope)
                    assert backend.rounds_like(out, expected)
                out, dscale = jvp(here(u), packed, here(s), slope, here(delta))
                expected, _ = reference.affine_relu_jvp_reference(u, expected_bits, s, slope, delta)
                assert backend.rounds_like(out, expected)
                wide = u.double(), expected_bits, None, slope, delta.double()
                exact = reference.affine_relu_jvp_reference(*wide)[1]
                # Rounding of the products, and of partial sums of at most a few hundred terms.
                bound = (u.double() * delta.double()).abs().sum((0, *range(2, u.dim())))
                unit = torch.finfo(dscale.dtype).eps
                assert dscale.dtype == compute_dtype(dtype)
                assert bool(((dscale.cpu() - exact).abs() <= 8 * unit * bound).all())


@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize("index", range(3))
def test_every_instruction_set(index: int) -> None:
    run_on_instruction_set(index, [__file__], "(match or special) and cpu-cpu")


@pytest.mark.parametrize("backend", BACKENDS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_special_values(dtype: torch.dtype, backend: Backend) -> None:
    affine_relu, vjp, jvp = (backend.kernel(f"affine_relu{name}", dtype) for name in ("", "_vjp", "_jvp"))
    nan, inf = float("nan"), float("inf")
    # The interpreter loses bfloat16's subnormal numbers.
    small = torch.finfo(dtype).smallest_normal * (8 if backend.interpreted and dtype == torch.bfloat16 else 0.25)
    a = torch.tensor([nan, inf, -inf, -0.0, 0.0, 1.0, -1.0, small, -small] * 11, dtype=dtype).view(9, 11)
    here = a.to(backend.device)
    for slope in (0.0, 0.25):
        y, bits = affine_relu(here, None, None, None, slope)
        assert backend.rounds_like(y, F.leaky_relu(a, slope) if slope else F.relu(a))
        assert torch.equal(ops.unpack_bits(bits.cpu(), a.shape), a > 0)
    for dead in (
        vjp(here, torch.zeros_like(bits), None, None, 0.0),
        jvp(here, torch.zeros_like(bits), None, 0.0, here)[0],
    ):
        assert bool((dead == 0).all())


@pytest.mark.parametrize("backend", BACKENDS, ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_special_rounding(dtype: torch.dtype, backend: Backend) -> None:
    magnitudes = torch.logspace(-9, 6, 4000).view(1, 16, 250)
    a = (magnitudes * torch.randn(magnitudes.shape)).to(dtype)
    scale = torch.linspace(0.3, 2.7, 16)
    y, _ = backend.kernel("affine_relu", dtype)(a.to(backend.device), scale.to(backend.device), None, None, 0.3)
    assert backend.rounds_like(y, reference.affine_relu_reference(a, scale, None, None, 0.3)[0])


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


@pytest.mark.parametrize("backend", BACKENDS, ids=str)
def test_any_shape(backend: Backend) -> None:
    affine_relu, vjp = (backend.kernel(f"affine_relu{name}", torch.float32) for name in ("", "_vjp"))
    examples, largest = (15, 6) if backend.interpreted else (60, 12)

    @settings(max_examples=examples, deadline=None)
    @given(
        shape=st.lists(st.integers(1, largest), min_size=2, max_size=5).map(tuple),
        seed=st.integers(0, 1000),
        leaky=st.booleans(),
    )
    def check(shape: tuple[int, ...], seed: int, leaky: bool) -> None:
        generator = torch.Generator().manual_seed(seed)
        a, delta = (torch.randn(shape, generator=generator) for _ in range(2))
        scale, shift = (torch.randn(shape[1], generator=generator) for _ in range(2))
        view = (1, -1, *[1] * (len(shape) - 2))
        slope = 0.1 if leaky else 0.0
        t = a * scale.view(view) + shift.view(view)
        for memory_format in layouts(shape):
            on = {"device": backend.device, "memory_format": memory_format}
            s = scale.to(backend.device)
            y, bits = affine_relu(a.to(**on), s, shift.to(backend.device), None, slope)
            assert torch.equal(y.cpu(), F.leaky_relu(t, slope))
            d_in = vjp(delta.to(**on), bits, s, None, slope)
            assert torch.equal(d_in.cpu(), torch.where(t > 0, delta, delta * slope) * scale.view(view))

    check()


@pytest.mark.parametrize("backend", BACKENDS, ids=str)
@pytest.mark.parametrize("shape", [(2, 5, 9, 11), (3, 16, 6, 4), (3, 37), (2, 4, 2, 2)], ids=str)
def test_results_in_place(shape: tuple[int, ...], backend: Backend) -> None:
    dtype = torch.float32
    for memory_format in layouts(shape):
        a, skip, delta, u = (t.to(backend.device) for t in tensors(4, shape, dtype, memory_format))
        scale, shift = (t.to(backend.device) for t in vectors(shape[1], dtype))
        y, bits = backend.kernel("affine_relu", dtype)(a, scale, shift, skip, 0.0)
        vjp_of = backend.kernel("affine_relu_vjp", dtype)
        d_in, d_sum = vjp_of(delta, bits, scale, None, 0.0), vjp_of(delta, bits, scale, skip, 0.0)
        u_out, dscale = backend.kernel("affine_relu_jvp", dtype)(u, bits, scale, 0.0, delta)
        affine_relu, vjp, jvp = (backend.kernel(f"affine_relu{name}_out", dtype) for name in ("", "_vjp", "_jvp"))
        for place in (0, 1):
            given, packed = [a.clone(), skip.clone()], torch.full_like(bits, 255)
            affine_relu(given[0], scale, shift, given[1], 0.0, given[place], packed)
            assert torch.equal(given[place], y) and torch.equal(packed, bits)
            given = [u.clone(), delta.clone()]
            total = jvp(given[0], bits, scale, 0.0, given[1], given[place])
            assert torch.equal(given[place], u_out) and torch.equal(total, dscale)
            given = [delta.clone(), skip.clone()]
            vjp(given[0], bits, scale, given[1], 0.0, given[place])
            assert torch.equal(given[place], d_sum)
        vjp(delta, bits, scale, None, 0.0, delta)
        assert torch.equal(delta, d_in)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
def test_programs_that_sum_several_tiles(memory_format: torch.memory_format, monkeypatch: pytest.MonkeyPatch) -> None:
    launcher = pytest.importorskip("emr_kernels.triton", reason="Triton cannot be imported").launchers[
        "affine_relu_jvp"
    ]
    # As a tensor of millions of elements has them; the last program of each channel has fewer.
    monkeypatch.setattr(sys.modules[launcher.__module__], "_PROGRAMS", 3)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    for channels in (2, 8):
        u, delta = tensors(2, (3, channels, 40, 66), torch.float32, memory_format)
        _, bits = reference.affine_relu_reference(u, None, None, None, 0.0)
        out, dscale = launcher(u.to(device), bits.to(device), None, 0.0, delta.to(device))
        expected, _ = reference.affine_relu_jvp_reference(u, bits, None, 0.0, delta)
        assert torch.equal(out.cpu(), expected)
        exact = (expected.double() * delta).sum((0, 2, 3))
        # Rounding of the products, and of partial sums of at most a few hundred terms.
        bound = (u.double() * delta.double()).abs().sum((0, 2, 3))
        assert bool(((dscale.cpu() - exact).abs() <= 8 * torch.finfo(torch.float32).eps * bound).all())


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
