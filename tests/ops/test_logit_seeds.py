"""logit_seeds: against autograd of the plain formulas, and every backend against the float64 reference."""

from __future__ import annotations

import importlib
from itertools import product
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from backends import BACKENDS, DTYPES, Backend, run_on_instruction_set
from emr_kernels import ops

# The package exports a function of the module's name.
reference = importlib.import_module("emr_kernels.ops.logit_seeds")

INF, NAN = float("inf"), float("nan")
# Few and many classes, vectors' widths and one beside them, side-by-side and single rows of the CPU's kernels.
SHAPES = [(5, 2), (17, 3), (33, 10), (3, 16), (2, 65), (5, 128), (3, 131), (2, 1000), (1, 5003), (0, 10)]


def labels(rows: int, classes: int) -> tuple[Tensor, Tensor]:
    y = torch.randint(0, classes, (rows,))
    return y, (y + torch.randint(1, classes, (rows,))) % classes


def kinds(classes: int) -> list[str]:
    return [k for k in reference.KINDS if classes >= {"dlr": 3, "dlr_targeted": 4}.get(k, 2)]


def on(device: str, *tensors: Tensor | None) -> list[Tensor | None]:
    return [None if t is None else t.to(device) for t in tensors]


def exact(z: Tensor, y: Tensor | None, t: Tensor | None, kind: str, temperature: float, center: bool) -> Any:
    return ops.LogitSeeds(*reference.logit_seeds_reference(z.double(), y, t, kind, temperature, center))


def compare(found: Any, expected: Any, z: Tensor, kind: str, truncates: bool = False) -> None:
    """Against float64 on the same logits."""
    found = ops.LogitSeeds(*(t.cpu() for t in found))
    wide = torch.float64 if z.dtype == torch.float64 else torch.float32
    assert [t.dtype for t in found] == [z.dtype, wide, wide, torch.int64, wide]
    assert found.seed.shape == z.shape and found.seed.is_contiguous()
    assert torch.equal(found.runner_up, expected.runner_up)
    unit, stored = torch.finfo(wide).eps, torch.finfo(z.dtype)
    torch.testing.assert_close(found.margin.double(), expected.margin, rtol=unit, atol=0, equal_nan=True)
    # Finite logits beside others differ by at most 50: an exponential's relative error is that of its argument. Sums
    # of shares times logits err by a few units of the largest logit.
    size = z.double().nan_to_num(posinf=0, neginf=0).abs().sum(1) + 1
    assert close(found.loss, expected.loss, 60 * unit, 4 * unit * size)
    assert close(found.probability_margin, expected.probability_margin, 0, 60 * unit)
    # Seeds are sums of a few parts, each as exact, and are rounded once more; the interpreter cuts bfloat16 off.
    # Beyond float16's range is infinity.
    largest = expected.seed.abs().amax(1, keepdim=True)
    if kind.startswith("dlr"):
        # Its parts may cancel.
        ranked = z.double().sort(1, descending=True).values
        largest = (1 + expected.loss.abs()[:, None]) / (ranked[:, :1] - ranked[:, 2:3] + 1e-12)
    rtol, atol = 60 * unit + stored.eps * (1 if truncates else 0.5), 4 * unit * largest + stored.tiny * stored.eps
    seed = expected.seed.where(expected.seed.abs() <= stored.max, expected.seed.sign() * INF)
    assert close(found.seed, seed, rtol, atol)


def close(found: Tensor, expected: Tensor, rtol: float, atol: Any) -> bool:
    """Equal, both NaN, or near."""
    found = found.double()
    near = (found - expected).abs() <= rtol * expected.abs() + atol
    return bool(((found == expected) | near | (found.isnan() & expected.isnan())).all())


@pytest.mark.parametrize("backend", BACKENDS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_backends(backend: Backend, dtype: torch.dtype, shape: tuple[int, int]) -> None:
    kernel = backend.kernel("logit_seeds", dtype)
    z = (torch.randn(shape) * 8).to(dtype)
    y, t = labels(*shape)
    for kind in kinds(shape[1]):
        target = t if kind in reference.TARGETED else None
        for label, center in ((y, False), (None, True)):
            found = kernel(*on(backend.device, z, label, target), kind, 3.0, center)
            expected = exact(z, label, target, kind, 3.0, center)
            compare(found, expected, z, kind, backend.interpreted and dtype == torch.bfloat16)


SPECIAL = torch.tensor(
    [
        [1.0, 1.0, 1.0, 1.0, 1.0, 1.0],
        [0.0, -0.0, 0.0, -0.0, -1.0, -1.0],
        [3.0, 2.0, 3.0, 2.0, 3.0, 1.0],
        [-INF, 1.0, -INF, 2.0, -INF, -INF],
        [-INF, -INF, 4.0, -INF, -INF, -INF],
        [-INF] * 6,
        [0.0, INF, 1.0, 2.0, -1.0, 3.0],
        [INF, 1.0, INF, 0.0, -INF, 2.0],
        [0.0, NAN, 1.0, 2.0, 3.0, 4.0],
        [NAN, 5.0, NAN, INF, -INF, 0.0],
        [NAN] * 6,
        [1e4, -1e4, 9.9e3, 0.0, 1.0, -1.0],
        [1e-40, 2e-40, -1e-40, 0.0, -0.0, 1e-41],
        [40.0, 0.0, -1.0, -2.0, -3.0, 1.0],
    ]
)


@pytest.mark.parametrize("backend", BACKENDS, ids=str)
@pytest.mark.parametrize("kind", reference.KINDS)
def test_special_values(backend: Backend, kind: str) -> None:
    kernel = backend.kernel("logit_seeds", torch.float32)
    # Once side by side, once in rows wide enough to be worked on alone.
    for z in (SPECIAL, torch.cat([SPECIAL[:, :3], torch.full((len(SPECIAL), 200), -INF), SPECIAL[:, 3:]], 1)):
        for label in (None, torch.full((len(z),), 1), torch.full((len(z),), z.shape[1] - 1)):
            target = torch.full((len(z),), 2) if kind in reference.TARGETED else None
            found = kernel(*on(backend.device, z, label, target), kind, 1.0, False)
            compare(found, exact(z, label, target, kind, 1.0, False), z, kind)


def test_first_among_equals() -> None:
    for classes in (4, 300):
        z = torch.zeros(2, classes)
        z[1, 2] = NAN
        out = ops.logit_seeds(z, kind="margin")
        assert out.runner_up.tolist() == [1, 0]
        assert out.seed[0].nonzero().flatten().tolist() == [0, 1]
        assert out.seed[1].nonzero().flatten().tolist() == [0, 2]
        assert ops.logit_seeds(z[:1], torch.tensor([1]), kind="margin").runner_up.tolist() == [0]


@pytest.mark.parametrize("backend", BACKENDS, ids=str)
def test_confident_rows_keep_their_gradient(backend: Backend) -> None:
    kernel = backend.kernel("logit_seeds", torch.float32)
    z, y = torch.tensor([[30.0, 0.0, -2.0], [0.0, 60.0, -2.0]]), torch.tensor([0, 1])
    seed, loss, *_ = kernel(*on(backend.device, z, y, None), "ce", 1.0, False)
    expected = exact(z, y, None, "ce", 1.0, False)
    # p − 1 and log p round to 0 in float32; 60 units in the last place are an exponential's error at this argument.
    torch.testing.assert_close(seed.cpu().double(), expected.seed, rtol=60 * 1.2e-7, atol=0)
    torch.testing.assert_close(loss.cpu().double(), expected.loss, rtol=60 * 1.2e-7, atol=0)


def check_labels_out_of_range(kernel: Any) -> None:
    """On a GPU nobody looks at labels before the kernel: such a row is NaN, its neighbours are right."""
    z, rows = torch.randn(3, 10), [0, 2]
    for wrong, kind in product((-1, 2**32), reference.KINDS):
        y = torch.tensor([4, wrong, 0])
        right = y.where(y != wrong, 0)
        targeted = kind in reference.TARGETED
        found = kernel(z, *((right, y) if targeted else (y, None)), kind, 1.0, False)
        assert found[0][1].isnan().all() and found[1][1].isnan()
        expected = exact(z, right, right if targeted else None, kind, 1.0, False)
        compare([t[rows] for t in found], ops.LogitSeeds(*(t[rows] for t in expected)), z[rows], kind)


@pytest.mark.parametrize("backend", BACKENDS, ids=str)
def test_labels_out_of_range(backend: Backend) -> None:
    kernel = backend.kernel("logit_seeds", torch.float32)
    if backend.name == "cpu":
        with pytest.raises(RuntimeError, match="class index 10 is out of range"):
            kernel(torch.randn(2, 10), torch.tensor([1, 10]), None, "ce", 1.0, False)
    else:
        check_labels_out_of_range(lambda *args: kernel(*on(backend.device, *args[:3]), *args[3:]))


def plain(kind: str, z: Tensor, y: Tensor, t: Tensor, temperature: float) -> Tensor:
    """The losses as the docstring's table has them, for autograd."""
    at_y, at_t = (z.gather(1, c[:, None]).squeeze(1) for c in (y, t))
    at_r = z.scatter(1, y[:, None], -INF).amax(1)
    ranked = z.sort(1, descending=True).values
    if kind == "softmax":
        return (F.softmax(z.detach() / temperature, 1) * z).sum(1)
    if kind in ("ce", "ce_targeted"):
        return F.cross_entropy(z, y, reduction="none") if kind == "ce" else -F.cross_entropy(z, t, reduction="none")
    if kind == "dlr":
        return -(at_y - at_r) / (ranked[:, 0] - ranked[:, 2] + 1e-12)
    if kind == "dlr_targeted":
        return -(at_y - at_t) / (ranked[:, 0] - (ranked[:, 2] + ranked[:, 3]) / 2 + 1e-12)
    return {"label": at_y, "margin": at_y - at_r, "cw": at_r - at_y}[kind]


@pytest.mark.parametrize("kind", reference.KINDS)
@pytest.mark.parametrize("classes", [4, 10, 200])
def test_against_autograd(kind: str, classes: int) -> None:
    z = (torch.randn(9, classes, dtype=torch.float64) * 3).requires_grad_()
    y, t = labels(9, classes)
    loss = plain(kind, z, y, t, 2.5)
    (seed,) = torch.autograd.grad(loss.sum(), z)
    target = t if kind in reference.TARGETED else None
    for center in (False, True):
        out = ops.logit_seeds(z.detach(), y, target, kind=kind, temperature=2.5, center=center)
        mean = seed.mean(1, keepdim=True) if center else torch.zeros(())
        torch.testing.assert_close(out.seed, seed - mean, rtol=0, atol=1e-12)
        torch.testing.assert_close(out.loss, (loss - (mean * z).sum(1)).detach(), rtol=1e-12, atol=1e-12)
    p = F.softmax(z.detach(), 1)
    rival = z.detach().scatter(1, y[:, None], -INF).argmax(1)
    assert torch.equal(out.runner_up, rival)
    torch.testing.assert_close(out.margin, (z.gather(1, y[:, None]) - z.gather(1, rival[:, None])).squeeze(1).detach())
    margin = (p.gather(1, y[:, None]) - p.gather(1, rival[:, None])).squeeze(1)
    torch.testing.assert_close(out.probability_margin, margin, rtol=0, atol=1e-12)


def test_dlr_ignores_shift_and_scale() -> None:
    z = torch.randn(8, 6, dtype=torch.float64)
    y, t = labels(8, 6)
    for kind, target in (("dlr", None), ("dlr_targeted", t)):
        loss = ops.logit_seeds(z, y, target, kind=kind).loss
        # Up to the 1e-12 in the denominator.
        torch.testing.assert_close(ops.logit_seeds(7 * z - 3, y, target, kind=kind).loss, loss, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("backend", BACKENDS, ids=str)
def test_small_temperatures(backend: Backend) -> None:
    kernel = backend.kernel("logit_seeds", torch.float32)
    z = torch.tensor([[1e4, -1e4, 9e3], [2.0, 2.0, 1.0]])
    seed, loss, *_ = kernel(*on(backend.device, z, None, None), "softmax", 1e-37, False)
    assert seed.tolist() == [[1, 0, 0], [0.5, 0.5, 0]] and loss.tolist() == [1e4, 2]


def test_layouts() -> None:
    z = torch.randn(12, 40)
    y = torch.randint(0, 10, (24,))
    for view in (z[:, 1:11], z[1::2, ::4], z.t()[:10].t()):
        rows = y[: 2 * len(view) : 2]
        found = ops.logit_seeds(view, rows, kind="ce")
        expected = ops.logit_seeds(view.clone(memory_format=torch.contiguous_format), rows.clone(), kind="ce")
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_same_for_any_number_of_threads() -> None:
    z, y = torch.randn(3000, 10), torch.randint(0, 10, (3000,))
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 3):
            torch.set_num_threads(count)
            results.append(ops.logit_seeds(z, y, kind="dlr"))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("index", range(3))
def test_every_instruction_set(index: int) -> None:
    run_on_instruction_set(index, [__file__, __file__.replace("logit_seeds", "robust_losses")], "cpu-cpu")


def test_opcheck() -> None:
    z = torch.randn(3, 5)
    y, t = labels(3, 5)
    for args in (
        (z, y, None, "softmax", 2.0, True),
        (z, None, None, "margin", 1.0, False),
        (z, y, t, "dlr_targeted", 1.0, False),
    ):
        torch.library.opcheck(torch.ops.emr.logit_seeds.default, args)


def test_compile() -> None:
    z, (y, _) = torch.randn(3, 5), labels(3, 5)

    def function(z: Tensor, y: Tensor) -> Tensor:
        out = ops.logit_seeds(z * 2, y, kind="ce")
        return out.seed * out.loss[:, None]

    with torch.no_grad():
        compiled = torch.compile(function, fullgraph=True, backend="aot_eager")(z, y)
    torch.testing.assert_close(compiled, function(z, y))


def test_refuses_to_lose_a_derivative() -> None:
    z = torch.randn(2, 3, requires_grad=True)
    with pytest.raises(RuntimeError, match="logit_seeds has no derivative, and logits requires grad"):
        ops.logit_seeds(z, kind="ce")


Z, Y = torch.zeros(2, 3), torch.zeros(2, dtype=torch.int64)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: ops.logit_seeds(Z, kind="hinge"), ValueError, "kind is 'hinge'; expected one of 'softmax', 'label'"),
        (lambda: ops.logit_seeds(Z.int(), kind="ce"), TypeError, "logits has dtype torch.int32; expected float32"),
        (
            lambda: ops.logit_seeds(Z[0], kind="ce"),
            ValueError,
            r"logits has shape \(3,\); expected \[N, C\] with C >= 2",
        ),
        (lambda: ops.logit_seeds(Z[:, :1], kind="ce"), ValueError, r"shape \(2, 1\); expected \[N, C\] with C >= 2"),
        (lambda: ops.logit_seeds(Z[:, :2], kind="dlr"), ValueError, r"shape \(2, 2\); expected \[N, C\] with C >= 3"),
        (lambda: ops.logit_seeds(Z, Y, Y, kind="dlr_targeted"), ValueError, "with C >= 4"),
        (lambda: ops.logit_seeds(Z, Y.int(), kind="ce"), TypeError, "y has dtype torch.int32; expected torch.int64"),
        (lambda: ops.logit_seeds(Z, Y[:1], kind="ce"), ValueError, r"y has shape \(1,\); expected \(2,\)"),
        (lambda: ops.logit_seeds(Z, Y + 3, kind="ce"), ValueError, r"y holds 3; expected class indices in \[0, 3\)"),
        (lambda: ops.logit_seeds(Z, Y - 1, kind="ce"), ValueError, "y holds -1"),
        (lambda: ops.logit_seeds(Z, Y, kind="ce_targeted"), ValueError, "target is None with kind 'ce_targeted'"),
        (lambda: ops.logit_seeds(Z, Y, Y, kind="ce"), ValueError, "target is given with kind 'ce'"),
        (lambda: ops.logit_seeds(Z, Y, Y + 3, kind="ce_targeted"), ValueError, "target holds 3"),
        (lambda: ops.logit_seeds(Z, kind="softmax", temperature=0.0), ValueError, "temperature is 0.0; expected a"),
        (lambda: ops.logit_seeds(Z, kind="softmax", temperature=INF), ValueError, "temperature is inf"),
    ],
)
def test_bad_arguments(call: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()
