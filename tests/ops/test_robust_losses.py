"""robust_losses and robust_loss: against autograd of the plain formulas, every backend against the reference."""

from __future__ import annotations

import importlib
from itertools import product
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import emr_kernels
from backends import BACKENDS, DTYPES, Backend
from emr_kernels import ops

# The package exports a function of the module's name.
reference = importlib.import_module("emr_kernels.ops.robust_losses")

INF, NAN = float("inf"), float("nan")
SHAPES = [(5, 2), (33, 10), (2, 65), (3, 131), (2, 1000), (1, 5003), (0, 10)]
# kind, beta, smoothing, slope and bias of MAIL (with EMR's values, and MAIL's)
CASES = [
    ("ce", 1.0, 0.0, None),
    ("ce", 1.0, 0.1, (30.0, -0.07)),
    ("kl", 1.0, 0.0, None),
    ("kl", 1.0, 0.0, (2.0, 0.0)),
    ("trades", 6.0, 0.0, None),
    ("trades", 12.0, 0.2, (5.0, 0.05)),
    ("mart", 5.0, 0.0, None),
    ("mart", 6.0, 0.0, (10.0, -0.5)),
]


def plain(a: Tensor, c: Tensor, y: Tensor, w: Tensor, kind: str, beta: float, smoothing: float, mail: Any) -> Tensor:
    """The losses as the papers' code has them, for autograd."""
    q = a.softmax(1)
    q_y = q.gather(1, y[:, None]).squeeze(1)
    q_j = q.scatter(1, y[:, None], -1.0).amax(1)
    if mail is not None:
        w = w * (3 * torch.sigmoid(mail[0] * (q_j - q_y + mail[1]))).detach()
    if kind == "ce":
        return w * F.cross_entropy(a, y, reduction="none", label_smoothing=smoothing)
    p = c.softmax(1)
    kl = F.kl_div(a.log_softmax(1), p, reduction="none").sum(1)
    if kind == "kl":
        return w * kl
    if kind == "trades":
        return F.cross_entropy(c, y, reduction="none", label_smoothing=smoothing) + beta * w * kl
    boosted = F.cross_entropy(a, y, reduction="none") - torch.log(1.0001 - q_j + 1e-12)
    kl = F.kl_div(torch.log(q + 1e-12), p, reduction="none").sum(1)
    return w * boosted + beta * kl * (1.0000001 - p.gather(1, y[:, None]).squeeze(1))


def example(rows: int, classes: int, dtype: torch.dtype = torch.float64, scale: float = 3.0) -> tuple[Tensor, ...]:
    a, c = ((torch.randn(rows, classes) * scale).to(dtype) for _ in range(2))
    return a, c, torch.randint(0, classes, (rows,)), torch.rand(rows).to(reference.compute_dtype(a))


@pytest.mark.parametrize(("kind", "beta", "smoothing", "mail"), CASES)
@pytest.mark.parametrize("classes", [2, 10, 200])
def test_against_autograd(classes: int, kind: str, beta: float, smoothing: float, mail: Any) -> None:
    a, c, y, w = example(9, classes)
    a, c = a.requires_grad_(), c.requires_grad_()
    expected = plain(a, c, y, w, kind, beta, smoothing, mail)
    options: dict[str, Any] = {"kind": kind, "beta": beta, "smoothing": smoothing, "weights": w, "mail": mail}
    clean = None if kind == "ce" else c
    loss = emr_kernels.robust_loss(a, clean, y, **options)
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-12)
    cotangent = torch.randn(9, dtype=torch.float64)
    inputs = [a] if clean is None else [a, c]
    # The losses reach 100: 1e-10 is a few units in the last place of what the formula adds up.
    for found, gradient in zip(
        torch.autograd.grad(loss, inputs, cotangent), torch.autograd.grad(expected, inputs, cotangent), strict=True
    ):
        torch.testing.assert_close(found, gradient, rtol=0, atol=1e-10)


def on(device: str, *tensors: Tensor | None) -> list[Tensor | None]:
    return [None if t is None else t.to(device) for t in tensors]


def near(found: Tensor, expected: Tensor, tolerance: Any) -> bool:
    """Equal, both NaN, or near."""
    found = found.cpu().double()
    same = (found == expected) | (found.isnan() & expected.isnan())
    return bool((same | ((found - expected).abs() <= tolerance)).all())


def compare(found: Any, arguments: tuple[Any, ...]) -> None:
    """Against float64 on the same logits."""
    a, c, y, w, kind, beta, smoothing, mail, slope, bias = arguments
    clean = None if c is None else c.double()
    weights = None if w is None else w.double()
    expected = reference.robust_losses_reference(
        a.double(), clean, y, weights, kind, beta, smoothing, mail, slope, bias
    )
    wide = reference.compute_dtype(a)
    assert all(t.dtype == wide and t.is_contiguous() for t in found)
    assert [t.shape for t in found] == [t.shape for t in expected]
    unit = torch.finfo(wide).eps
    # Softmaxes err by 60 units (see test_logit_seeds); their logarithms by a few units of the logits; MAIL's sigmoid
    # multiplies that by its slope; MART divides what is left of 1 by as little as 1e-4, and has 6 factors beta.
    logits = max(
        (float(t.double().abs().nan_to_num(0, 0, 0).max()) for t in (a, c) if t is not None and t.numel()), default=0
    )
    factor = 3 * (1 + slope / 4) if mail else 1.0
    error = 8 * unit * factor * (1 + beta) * (logits + 8)
    largest = expected[0].abs().nan_to_num(posinf=0)
    assert near(found[0], expected[0], error + 8 * unit * factor * largest)
    for gradient, exact in zip(found[1:], expected[1:], strict=True):
        bound = error * (1 + exact.abs().amax(1, keepdim=True).nan_to_num()) if exact.dim() == 2 else error
        assert near(gradient, exact, bound)


@pytest.mark.parametrize("backend", BACKENDS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_backends(backend: Backend, dtype: torch.dtype, shape: tuple[int, int]) -> None:
    kernel = backend.kernel("robust_losses", dtype)
    a, c, y, w = example(*shape, dtype, 5.0)
    for index, (kind, beta, smoothing, mail) in enumerate(CASES):
        slope, bias = mail or (0.0, 0.0)
        weights = w if index % 3 else None
        tensors = (a, None if kind == "ce" else c, None if kind == "kl" and mail is None else y, weights)
        options = (kind, beta, smoothing, mail is not None, slope, bias)
        found = kernel(*on(backend.device, *tensors), *options)
        compare(found, (*tensors, *options))


ROWS = torch.tensor(
    [
        [1.0, 1.0, 1.0, 1.0, 1.0],
        [3.0, 2.0, 3.0, 2.0, 1.0],
        [-INF, 1.0, -INF, 2.0, 0.0],
        [-INF] * 5,
        [0.0, INF, 1.0, 2.0, -1.0],
        [0.0, NAN, 1.0, 2.0, 3.0],
        [1e4, -1e4, 9.9e3, 0.0, 1.0],
        [1e-40, -1e-40, 0.0, -0.0, 1e-41],
        [40.0, 0.0, -1.0, -2.0, 1.0],
        [0.0, 40.0, -1.0, -2.0, 1.0],
    ]
)


@pytest.mark.parametrize("backend", BACKENDS, ids=str)
@pytest.mark.parametrize("kind", reference.KINDS)
def test_special_values(backend: Backend, kind: str) -> None:
    kernel = backend.kernel("robust_losses", torch.float32)
    # Each row with itself and with two others; side by side, and in rows wide enough to be worked on alone.
    a, c = ROWS.repeat(3, 1), torch.cat([ROWS, ROWS.roll(1, 0), ROWS.roll(4, 0)])
    for fill in (0, 150):
        a, c = (torch.cat([t, torch.full((len(t), fill), -INF)], 1) for t in (a, c))
        for label in (0, 1):
            y = torch.full((len(a),), label)
            tensors = (a, None if kind == "ce" else c, y, None)
            options = (kind, 2.0, 0.0, False, 0.0, 0.0)
            found = kernel(*on(backend.device, *tensors), *options)
            for rows in range(len(a)):
                one = tuple(None if t is None else t[rows : rows + 1] for t in tensors)
                compare([t[rows : rows + 1] for t in found], (*one, *options))


@pytest.mark.parametrize("backend", BACKENDS, ids=str)
def test_confident_rows_keep_their_gradient(backend: Backend) -> None:
    kernel = backend.kernel("robust_losses", torch.float32)
    a, c = torch.tensor([[30.0, 0.01, -2.0]]), torch.tensor([[30.0, 0.0, -2.0]])
    tensors = on(backend.device, a, c, torch.tensor([0]))
    for kind in ("kl", "trades"):
        _, found, _ = kernel(*tensors, None, kind, 6.0, 0.0, False, 0.0, 0.0)
        factor = 6.0 if kind == "trades" else 1.0
        # p' − p of the first class would round to 0; it is what the others lose. Those differ by 1%, known to 60 units.
        expected = -factor * (a.double().softmax(1) - c.double().softmax(1))[:, 1:].sum(1)
        torch.testing.assert_close(found.cpu().double()[:, 0], expected, rtol=100 * 60 * 1.2e-7, atol=0)


def check_labels_out_of_range(kernel: Any) -> None:
    """On a GPU nobody looks at labels before the kernel: such a row is NaN, its neighbours are not."""
    a, c = torch.randn(3, 10), torch.randn(3, 10)
    for wrong, kind in product((-1, 2**32), reference.KINDS):
        y = torch.tensor([4, wrong, 0])
        found = kernel(a, None if kind == "ce" else c, y, None, kind, 2.0, 0.0, False, 0.0, 0.0)
        assert all(t[1].isnan().all() and t[::2].isfinite().all() for t in found if t.numel())


@pytest.mark.parametrize("backend", BACKENDS, ids=str)
def test_labels_out_of_range(backend: Backend) -> None:
    kernel = backend.kernel("robust_losses", torch.float32)
    if backend.name == "cpu":
        with pytest.raises(RuntimeError, match="class index -1 is out of range"):
            kernel(torch.randn(2, 10), None, torch.tensor([1, -1]), None, "ce", 1.0, 0.0, False, 0.0, 0.0)
    else:
        check_labels_out_of_range(lambda *args: kernel(*on(backend.device, *args[:4]), *args[4:]))


def test_divergence_has_a_direction() -> None:
    a, c, *_ = example(4, 5)
    p, q = c.softmax(1), a.softmax(1)
    loss, *_ = ops.robust_losses(a, c, kind="kl")
    torch.testing.assert_close(loss, (p * (p / q).log()).sum(1))
    assert not torch.allclose(loss, ops.robust_losses(c, a, kind="kl")[0], rtol=1e-3)


@pytest.mark.parametrize(
    ("bias", "slope", "weights"),
    [
        (-0.07, 30.0, [0.0, 0.0, 0.0009, 0.0182, 0.3273, 2.1328, 3.0, 3.0]),
        (0.05, 5.0, [0.0422, 0.286, 0.9625, 1.3135, 1.6865, 2.0375, 2.8197, 2.9743]),
        (-0.5, 10.0, [0.0, 0.0001, 0.0027, 0.0074, 0.0201, 0.054, 1.5, 2.946]),
        (0.0, 2.0, [0.4256, 0.8068, 1.2039, 1.3505, 1.5, 1.6495, 2.1932, 2.5744]),
    ],
)
def test_mail_weights(bias: float, slope: float, weights: list[float]) -> None:
    """The weights of the released settings, at probability margins p'_j − p'_y chosen through two logits."""
    margins = torch.tensor([-0.9, -0.5, -0.2, -0.1, 0.0, 0.1, 0.5, 0.9], dtype=torch.float64)
    logits = torch.stack([torch.zeros_like(margins), ((1 + margins) / (1 - margins)).log()], 1)
    y = torch.zeros(8, dtype=torch.int64)
    weighted, *_ = ops.robust_losses(logits, y=y, kind="ce", mail=(slope, bias))
    bare, *_ = ops.robust_losses(logits, y=y, kind="ce")
    torch.testing.assert_close(weighted / bare, torch.tensor(weights, dtype=torch.float64), rtol=0, atol=5e-5)


def test_mail_normalised_over_the_batch() -> None:
    """The paper's weights: two steps, the second one a weighted loss."""
    a, _, y, _ = example(6, 4)
    margin = ops.logit_seeds(a, y, kind="ce").probability_margin
    weights = torch.sigmoid(-5.0 * (margin - 0.1))
    weights = weights / weights.mean()
    loss = emr_kernels.robust_loss(a, y=y, kind="ce", weights=weights).mean()
    torch.testing.assert_close(loss, (weights * F.cross_entropy(a, y, reduction="none")).mean())


def test_gradcheck() -> None:
    a, c, y, w = example(3, 4)
    a, c = a.requires_grad_(), c.requires_grad_()
    for kind, beta, smoothing, mail in CASES:
        if mail is None:
            options: dict[str, Any] = {"kind": kind, "beta": beta, "smoothing": smoothing, "weights": w}
            clean = None if kind == "ce" else c
            assert torch.autograd.gradcheck(lambda a, c, o=options: emr_kernels.robust_loss(a, c, y, **o), (a, clean))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_gradients_have_the_dtype_of_the_logits(dtype: torch.dtype) -> None:
    a, c, y, _ = example(4, 6, dtype)
    a, c = a.requires_grad_(), c.requires_grad_()
    loss = emr_kernels.robust_loss(a, c, y, kind="trades", beta=6.0)
    assert loss.dtype == torch.float32
    # 2^-20 of a gradient is below float16's smallest number only where it is rounded before it is scaled.
    (loss.sum() * 2**-20 * 2**20).backward()
    _, expected, clean = ops.robust_losses(a.detach(), c.detach(), y, kind="trades", beta=6.0)
    assert a.grad is not None and c.grad is not None and a.grad.dtype == dtype
    assert torch.equal(a.grad, expected.to(dtype)) and clean is not None and torch.equal(c.grad, clean.to(dtype))


def test_only_what_is_asked_for() -> None:
    a, c, y, _ = example(4, 6)
    loss = emr_kernels.robust_loss(a.requires_grad_(), c, y, kind="trades")
    loss.sum().backward()
    assert a.grad is not None and c.grad is None


def test_no_second_derivative() -> None:
    a, c, y, w = example(4, 6)
    a = a.requires_grad_()
    (first,) = torch.autograd.grad(emr_kernels.robust_loss(a, c, y, kind="mart").sum(), a, create_graph=True)
    with pytest.raises(RuntimeError, match="gradient of the robust loss was differentiated again"):
        first.square().sum().backward()
    with pytest.raises(RuntimeError, match="weights requires grad; expected constant weights"):
        emr_kernels.robust_loss(a, c, y, kind="mart", weights=w.requires_grad_())
    with pytest.raises(RuntimeError, match="robust_losses has no derivative, and adversarial requires grad"):
        ops.robust_losses(a, c, y, kind="mart")


def test_layouts() -> None:
    wide = torch.randn(12, 40)
    y = torch.randint(0, 10, (12,))
    for a in (wide[:, 1:11], wide[::2, ::4], wide.t()[:10].t()):
        c = a.flip(0)
        found = ops.robust_losses(a, c, y[: len(a)], kind="mart")
        expected = ops.robust_losses(
            a.clone(memory_format=torch.contiguous_format), c, y[: len(a)].clone(), kind="mart"
        )
        assert all(torch.equal(f, e) for f, e in zip(found, expected, strict=True))  # type: ignore[arg-type]


def test_opcheck() -> None:
    a, c, y, w = example(3, 5, torch.float32)
    for args in (
        (a, c, y, w, "mart", 5.0, 0.0, True, 10.0, -0.5),
        (a, None, y, None, "ce", 1.0, 0.1, False, 0.0, 0.0),
        (a, c, None, None, "kl", 1.0, 0.0, False, 0.0, 0.0),
    ):
        torch.library.opcheck(torch.ops.emr.robust_losses.default, args)


def test_compile() -> None:
    a, c, y, _ = example(3, 5, torch.float32)
    a, c = a.requires_grad_(), c.requires_grad_()

    def function(a: Tensor, c: Tensor, y: Tensor) -> Tensor:
        return emr_kernels.robust_loss(a * 2, c, y, kind="trades", beta=6.0).mean()

    expected = torch.autograd.grad(function(a, c, y), (a, c))
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")(a, c, y)
    torch.testing.assert_close(torch.autograd.grad(compiled, (a, c)), expected)


A, Y = torch.zeros(2, 3), torch.zeros(2, dtype=torch.int64)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: ops.robust_losses(A, A, Y, kind="hinge"), ValueError, "kind is 'hinge'; expected one of 'ce', 'kl'"),
        (
            lambda: ops.robust_losses(A[0], A, Y, kind="kl"),
            ValueError,
            r"adversarial has shape \(3,\); expected \[N, C",
        ),
        (lambda: ops.robust_losses(A, None, Y, kind="trades"), ValueError, "clean is None with kind 'trades'"),
        (lambda: ops.robust_losses(A, A, Y, kind="ce"), ValueError, "clean is given with kind 'ce'"),
        (lambda: ops.robust_losses(A, A[:1], Y, kind="kl"), ValueError, r"clean has shape \(1, 3\); expected \(2, 3\)"),
        (lambda: ops.robust_losses(A, A.double(), Y, kind="kl"), TypeError, "clean has dtype torch.float64"),
        (lambda: ops.robust_losses(A, A, kind="mart"), ValueError, "y is None with kind 'mart'; expected class ind"),
        (lambda: ops.robust_losses(A, A, kind="kl", mail=(1, 0)), ValueError, "y is None with kind 'kl' and mail"),
        (lambda: ops.robust_losses(A, A, Y + 3, kind="mart"), ValueError, r"y holds 3; expected class indices in"),
        (lambda: ops.robust_losses(A, A, kind="kl", weights=Y), TypeError, "weights has dtype torch.int64"),
        (
            lambda: ops.robust_losses(A, A, kind="kl", weights=A[0]),
            ValueError,
            r"weights has shape \(3,\); expected \(2,\)",
        ),
        (
            lambda: ops.robust_losses(A, A, Y, kind="mart", smoothing=0.1),
            ValueError,
            "smoothing is 0.1 with kind 'mart'",
        ),
        (lambda: ops.robust_losses(A, y=Y, kind="ce", smoothing=1.0), ValueError, "smoothing is 1.0 with kind 'ce'"),
        (
            lambda: ops.robust_losses(A, A, Y, kind="mart", beta=NAN),
            ValueError,
            "beta is nan; expected a finite number",
        ),
        (
            lambda: ops.robust_losses(A, A, Y, kind="kl", mail=(1.0,)),
            ValueError,
            r"mail is \(1.0,\); expected two finite",
        ),
        (lambda: ops.robust_losses(A, A, Y, kind="kl", mail=(1.0, INF)), ValueError, "expected two finite numbers"),
    ],
)
def test_bad_arguments(call: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()
