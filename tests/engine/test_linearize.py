"""The linear passes themselves: vjp and jvp against autograd, the adjoint identity, random shapes."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import zoo
from emr_kernels import EffectiveWeightPenalty, linearize
from emr_kernels.linearize.export import UnsupportedModelError, export_graph
from oracle import assert_gradients_match, double_backward, evaluation_mode
from zoo import ENTRIES, Entry

LINEARIZABLE = [e for e in ENTRIES if e.engine == "linearized"]


def autograd_vjp(model: nn.Module, x: Tensor, seed: Tensor) -> tuple[Tensor, Tensor]:
    with evaluation_mode(model), sdpa_kernel(SDPBackend.MATH):
        leaf = x.clone().requires_grad_()
        z = model(leaf)
        return z.detach(), torch.autograd.grad(z, leaf, seed)[0]


def autograd_jvp(model: nn.Module, x: Tensor, tangent: Tensor) -> Tensor:
    """J u as the gradient of <J^T v, u> in v, which needs no forward-mode formula."""
    with evaluation_mode(model), sdpa_kernel(SDPBackend.MATH):
        leaf = x.clone().requires_grad_()
        z = model(leaf)
        v = torch.zeros_like(z, requires_grad=True)
        (g,) = torch.autograd.grad(z, leaf, v, create_graph=True)
        return torch.autograd.grad(g, v, tangent)[0]


@pytest.mark.device
@pytest.mark.parametrize("entry", LINEARIZABLE, ids=lambda entry: entry.id)
def test_passes_equal_autograd_and_are_adjoint(entry: Entry) -> None:
    model, twin = entry.shared(), entry.make(reference=True)
    x, _ = entry.data()
    lin = linearize(model, x)
    point = lin(x)
    seed, tangent = torch.randn_like(point.logits), torch.randn_like(x)
    logits, pullback = autograd_vjp(twin, x, seed)
    vjp, jvp = point.vjp(seed), point.jvp(tangent)
    assert vjp.shape == x.shape and jvp.shape == logits.shape
    torch.testing.assert_close(point.logits, logits, rtol=1e-10, atol=1e-11)
    torch.testing.assert_close(vjp, pullback, rtol=1e-9, atol=1e-11 * float(pullback.abs().max()))
    pushforward = autograd_jvp(twin, x, tangent)
    torch.testing.assert_close(jvp, pushforward, rtol=1e-9, atol=1e-11 * float(pushforward.abs().max()))
    scale = float(seed.norm() * jvp.norm())
    assert abs(float((seed * jvp).sum() - (vjp * tangent).sum())) < 1e-12 * scale
    assert not (point.logits.requires_grad or vjp.requires_grad or jvp.requires_grad)


def test_passes_are_linear_and_repeatable() -> None:
    entry = zoo.get("act_silu")
    model, (x, _) = entry.make(), entry.data()
    point = linearize(model, x)(x)
    a, b = torch.randn_like(point.logits), torch.randn_like(point.logits)
    first = point.vjp(a)
    torch.testing.assert_close(point.vjp(2 * a - b), 2 * first - point.vjp(b), rtol=1e-11, atol=1e-14)
    assert torch.equal(point.vjp(a), first)
    u = torch.randn_like(x)
    torch.testing.assert_close(point.jvp(-3 * u), -3 * point.jvp(u), rtol=1e-11, atol=1e-14)
    assert not point.vjp(torch.zeros_like(a)).any() and not point.jvp(torch.zeros_like(x)).any()


def test_two_points_are_independent() -> None:
    entry = zoo.get("wrn_10_2")
    model, (x, _) = entry.make(), entry.data()
    lin = linearize(model, x)
    first, second = lin(x), lin(1 - x)
    seed = torch.randn_like(first.logits)
    for point, at in ((first, x), (second, 1 - x), (first, x)):
        torch.testing.assert_close(point.vjp(seed), autograd_vjp(model, at, seed)[1])


def test_parameters_are_read_at_every_call() -> None:
    entry = zoo.get("mlp_batchnorm")
    model, (x, _) = entry.make(), entry.data()
    lin = linearize(model, x)
    lin(x)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.3)
    seed = torch.randn(len(x), 4, dtype=x.dtype)
    torch.testing.assert_close(lin(x).vjp(seed), autograd_vjp(model, x, seed)[1])


def test_wrong_seed_and_tangent_shapes_are_named() -> None:
    entry = zoo.get("mlp")
    model, (x, _) = entry.make(), entry.data()
    point = linearize(model, x)(x)
    with pytest.raises(ValueError, match=r"(?s)seed.*3, 5"):
        point.vjp(torch.zeros(3, 5, dtype=x.dtype))
    with pytest.raises(ValueError, match=r"(?s)tangent.*2, 12"):
        point.jvp(x[:2])


def check(model: nn.Module, x: Tensor) -> None:
    reference = double_backward(model, x, temperature=0.7)
    penalty = EffectiveWeightPenalty(model, temperature=0.7)
    value = penalty(x)
    value.backward()
    assert penalty.engine == "linearized", penalty.engine_reason
    torch.testing.assert_close(value.detach(), reference.value, rtol=1e-10, atol=0)
    assert_gradients_match(model, reference.grads)


drawn = settings(max_examples=12, deadline=None, derandomize=True, database=None)


@drawn
@given(
    rank=st.integers(1, 3),
    groups=st.integers(1, 3),
    width=st.integers(1, 3),
    kernel=st.integers(1, 3),
    stride=st.integers(1, 3),
    padding=st.integers(0, 2),
    dilation=st.integers(1, 2),
    size=st.integers(5, 8),
    batch=st.integers(1, 4),
    transposed=st.booleans(),
    bias=st.booleans(),
    smooth=st.booleans(),
)
def test_convolutions_of_any_shape(
    rank: int,
    groups: int,
    width: int,
    kernel: int,
    stride: int,
    padding: int,
    dilation: int,
    size: int,
    batch: int,
    transposed: bool,
    bias: bool,
    smooth: bool,
) -> None:
    torch.manual_seed(0)
    name = f"Conv{'Transpose' if transposed else ''}{rank}d"
    stem = getattr(nn, f"Conv{rank}d")(2, groups * width, 1)
    conv = getattr(nn, name)(
        groups * width,
        groups * 2,
        kernel,
        stride,
        min(padding, dilation * (kernel - 1)),
        groups=groups,
        dilation=dilation,
        bias=bias,
    )
    act = nn.SiLU() if smooth else nn.LeakyReLU(0.2)
    head = [getattr(nn, f"AdaptiveAvgPool{rank}d")(2), nn.Flatten(), nn.Linear(groups * 2 * 2**rank, 3)]
    norm = getattr(nn, f"BatchNorm{rank}d")(groups * width)
    model = nn.Sequential(stem, norm, act, conv, act, *head).double()
    check(model, torch.rand(batch, 2, *(size + i for i in range(rank)), dtype=torch.float64))


@drawn
@given(
    widths=st.lists(st.integers(1, 9), min_size=1, max_size=4),
    extra=st.lists(st.integers(1, 3), max_size=2),
    batch=st.integers(1, 5),
    norm=st.sampled_from([None, "batch", "layer"]),
    smooth=st.booleans(),
)
def test_linear_layers_of_any_shape(
    widths: list[int], extra: list[int], batch: int, norm: str | None, smooth: bool
) -> None:
    """Linear layers, also over extra leading dimensions that are averaged at the end."""
    torch.manual_seed(0)
    parts: list[nn.Module] = []
    previous = 4
    for width in widths:
        parts.append(nn.Linear(previous, width))
        if norm == "layer" and width > 2:
            parts.append(nn.LayerNorm(width))
        if norm == "batch" and not extra:
            parts.append(nn.BatchNorm1d(width))
        parts.append(nn.Tanh() if smooth else nn.PReLU())
        previous = width

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.head = nn.Sequential(*parts), nn.Linear(previous, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.body(x).flatten(1, -2).mean(1) if extra else self.body(x))

    check(Net().double(), torch.rand(batch, *extra, 4, dtype=torch.float64))


@drawn
@given(
    kind=st.sampled_from(["Max", "Avg"]),
    rank=st.integers(1, 3),
    kernel=st.integers(1, 3),
    stride=st.integers(1, 3),
    padded=st.booleans(),
    ceil=st.booleans(),
    size=st.integers(4, 8),
    batch=st.integers(1, 3),
)
def test_pools_of_any_shape(
    kind: str, rank: int, kernel: int, stride: int, padded: bool, ceil: bool, size: int, batch: int
) -> None:
    torch.manual_seed(0)
    pool = getattr(nn, f"{kind}Pool{rank}d")(kernel, stride, kernel // 2 if padded else 0, ceil_mode=ceil)
    conv = getattr(nn, f"Conv{rank}d")
    model = nn.Sequential(
        conv(2, 3, 1),
        nn.Tanh(),
        pool,
        conv(3, 3, 1),
        nn.ReLU(),
        getattr(nn, f"AdaptiveAvgPool{rank}d")(1),
        nn.Flatten(),
    ).double()
    check(model, torch.rand(batch, 2, *[size] * rank, dtype=torch.float64))


def test_a_failed_export_leaves_no_hook_in_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch 2.11 leaves one, and with it every later forward would count as hooked."""

    def export(*arguments: object, **options: object) -> None:
        nn.modules.module.register_module_buffer_registration_hook(lambda module, name, buffer: None)
        raise RuntimeError("no")

    hooks = nn.modules.module._global_buffer_registration_hooks
    before = dict(hooks)
    monkeypatch.setattr(torch.export, "export", export)
    with pytest.raises(UnsupportedModelError, match="RuntimeError: no"):
        export_graph(nn.Linear(3, 2), torch.rand(4, 3))
    assert hooks == before
