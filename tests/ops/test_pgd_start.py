"""pgd_start: the generator's published vectors, the distributions, each backend against the reference, bad input."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from backends import BACKENDS, DTYPES, Backend
from emr_kernels import ops
from emr_kernels.ops._philox import philox
from emr_kernels.ops.pgd_start import pgd_start_reference
from emr_kernels.ops.pgd_step import NORMS

SHAPES = [(3, 2, 4, 8), (2, 3, 5, 7), (5, 1), (4,), (2, 6001), (0, 3, 4), (2, 0, 3)]
EPSILON = {"linf": 0.1, "l2": 0.4, "l1": 1.5}


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ([0] * 4, [0] * 2, "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            [0xA4093822, 0x299F31D0],
            "d16cfe09 94fdcceb 5001e420 24126ea1",
        ),
    ],
)
def test_philox_gives_the_published_vectors(counter: list[int], key: list[int], expected: str) -> None:
    words = philox(tuple(torch.tensor([c]) for c in counter), (key[0], key[1]))
    assert " ".join(f"{int(w):08x}" for w in words) == expected


def test_counter_and_key_are_as_documented() -> None:
    seed, offset = 0x299F31D0A4093822, 0x0370734413198A2E
    start = ops.pgd_start(torch.zeros(1, 8, dtype=torch.float64), 1.0, seed=seed, offset=offset, lower=-1.0)
    low, high = offset & 0xFFFFFFFF, offset >> 32
    words = philox(tuple(torch.tensor(v) for v in (1, 0, low, high)), (seed & 0xFFFFFFFF, seed >> 32))
    assert start[0, 4:].tolist() == [(int(w) >> 8) / 2**23 - 1 for w in words]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("backend", BACKENDS, ids=str)
def test_match_reference(backend: Backend, norm: str, dtype: torch.dtype) -> None:
    kernel = backend.kernel("pgd_start", dtype)
    eps = torch.finfo(dtype).eps
    for shape in SHAPES:
        for memory_format in (torch.contiguous_format, *([torch.channels_last] if len(shape) == 4 else [])):
            origin = torch.rand(shape, device=backend.device).to(dtype).contiguous(memory_format=memory_format)
            args = (origin, EPSILON[norm], norm, 2**62 + 12345, 2**40 + 7, 0.0, 1.0)
            actual, expected = kernel(*args), pgd_start_reference(*args)
            assert actual.stride() == origin.stride()
            # Values are below 1. Under l2 and l1 the draws pass through log, cos and a sum.
            atol = 0.0 if norm == "linf" else 4 * eps if dtype in (torch.float32, torch.float64) else eps / 2
            if backend.interpreted and dtype == torch.bfloat16:
                # The interpreter truncates.
                atol += eps / 2
            torch.testing.assert_close(actual, expected, rtol=0, atol=atol)


@pytest.mark.parametrize("norm", NORMS)
def test_uniform_in_the_ball(norm: str) -> None:
    # In a ball of dimension d the radius to the power of d is uniform, and a direction as likely as its mirror image.
    batch, size = 4000, 3
    shift = 10.0
    origin = torch.full((batch, size), shift, dtype=torch.float64)
    delta = ops.pgd_start(origin, 2.0, norm, seed=11, lower=-100.0, upper=100.0) - shift
    order = {"linf": torch.inf, "l2": 2, "l1": 1}[norm]
    level = (torch.linalg.vector_norm(delta, order, dim=1) / 2) ** size
    assert bool((level <= 1 + 1e-6).all())
    # Kolmogorov's distance of 4000 uniform numbers is above 0.04 with a probability below 1e-5.
    steps = torch.arange(batch, dtype=torch.float64) / batch
    assert float((level.sort().values - steps).abs().max()) < 0.04
    # Means of 4000 numbers of variance below 4/3: six standard errors.
    assert float(delta.mean(0).abs().max()) < 6 * (4 / 3 / batch) ** 0.5
    assert float((delta[:, 0] * delta[:, 1]).mean().abs()) < 6 * 4 / 3 / batch**0.5
    # The share of one coordinate, which tells the three balls apart: second moments d²-scaled.
    second = {"linf": 4 / 3, "l2": 4 / 5, "l1": 4 * 2 / 20}[norm]
    assert delta.square().mean().item() == pytest.approx(second, rel=0.06)


def test_depends_on_seed_and_offset_alone() -> None:
    origin = torch.rand(2, 3, 4, 4)
    before = torch.get_rng_state()
    for norm in NORMS:
        start = ops.pgd_start(origin, 0.1, norm, seed=5)
        assert torch.equal(start, ops.pgd_start(origin, 0.1, norm, seed=5))
        assert not torch.equal(start, ops.pgd_start(origin, 0.1, norm, seed=6))
        assert not torch.equal(start, ops.pgd_start(origin, 0.1, norm, seed=5, offset=1))
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("norm", NORMS)
def test_results_do_not_depend_on_threads(norm: str) -> None:
    origin = torch.rand(3, 50_000)
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(ops.pgd_start(origin, 0.1, norm, seed=1))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


def test_other_layouts() -> None:
    base = torch.rand(4, 6, 5)
    for origin in (base[:, ::2], base.mT, base[:1].expand(4, 6, 5)):
        start = ops.pgd_start(origin, 0.1, seed=0)
        assert torch.equal(start, ops.pgd_start(origin.contiguous(), 0.1, seed=0))


def test_opcheck_and_compile() -> None:
    origin = torch.rand(2, 3, 5, 4).contiguous(memory_format=torch.channels_last)
    for norm in NORMS:
        torch.library.opcheck(torch.ops.emr.pgd_start.default, (origin, 0.1, norm, 1, 2, 0.0, 1.0))
    compiled = torch.compile(lambda t: ops.pgd_start(t * 0.5, 0.1, "l2", seed=3), fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(origin), ops.pgd_start(origin * 0.5, 0.1, "l2", seed=3))


X = torch.zeros(2, 3)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: ops.pgd_start(X.int(), 0.1, seed=0), TypeError, "origin has dtype torch.int32; expected float32"),
        (lambda: ops.pgd_start(X[0, 0], 0.1, seed=0), ValueError, r"origin has shape \(\); expected \[N, \.\.\.\]"),
        (lambda: ops.pgd_start(X, -0.1, seed=0), ValueError, "epsilon is -0.1; expected a number >= 0"),
        (lambda: ops.pgd_start(X, float("inf"), seed=0), ValueError, "epsilon is inf; expected a finite number"),
        (lambda: ops.pgd_start(X, 0.1, "l0", seed=0), ValueError, "norm is 'l0'; expected one of"),
        (lambda: ops.pgd_start(X, 0.1, seed=-1), ValueError, r"seed is -1; expected a number in \[0, 2\*\*63\)"),
        (lambda: ops.pgd_start(X, 0.1, seed=0, offset=2**63), ValueError, "offset is 9223372036854775808; expected"),
        (lambda: ops.pgd_start(X, 0.1, seed=0.5), TypeError, "seed is 0.5; expected a whole number"),
        (
            lambda: ops.pgd_start(X.clone().requires_grad_(), 0.1, seed=0),
            RuntimeError,
            "pgd_start has no derivative, and origin requires grad",
        ),
    ],
)
def test_bad_arguments(call: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()
