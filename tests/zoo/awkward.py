"""Ordinary models with something in them that a tracer, a cache or a hand-written rule could get wrong."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune
from torch.utils.checkpoint import checkpoint

from zoo.entry import CLASSES, Entry


class Dense(nn.Module):
    """Two linear layers (12 -> 8 -> classes) whose forward is given; ``setup`` may add or change members."""

    def __init__(
        self, forward: Callable[[Dense, Tensor], Tensor], setup: Callable[[Dense], object] | None = None
    ) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(12, 8), nn.Linear(8, CLASSES)
        self.body = forward
        if setup is not None:
            setup(self)

    def forward(self, x: Tensor) -> Tensor:
        return self.body(self, x)


def plain(m: Dense, x: Tensor) -> Tensor:
    return m.b(F.relu(m.a(x)))


def weight_norm(m: Dense) -> None:
    parametrizations.weight_norm(m.a)
    parametrizations.weight_norm(m.b, dim=1)


def weight_norm_by_hook(m: Dense) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        nn.utils.weight_norm(m.a)


def pruned(m: Dense) -> None:
    prune.random_unstructured(m.a, "weight", 0.4)


def orthogonal(m: Dense) -> None:
    parametrizations.orthogonal(m.b)


def spectral_norm() -> nn.Module:
    return nn.Sequential(
        parametrizations.spectral_norm(nn.Conv2d(3, 5, 3)),
        nn.ReLU(),
        nn.Flatten(),
        parametrizations.spectral_norm(nn.Linear(5 * 16, CLASSES)),
    )


def tied_parameters(m: Dense) -> None:
    m.c, m.d = nn.Linear(8, 12), nn.Linear(12, 8)
    m.c.weight = nn.Parameter(torch.randn(12, 8) * 0.3)
    m.d.weight = m.a.weight
    m.e = nn.Linear(8, 8)
    m.e.weight = nn.Parameter(torch.randn(8, 8) * 0.3)
    m.f = m.e


def tied_forward(m: Dense, x: Tensor) -> Tensor:
    h = F.relu(m.a(x))
    h = F.relu(m.d(F.relu(m.c(h))))
    return m.b(m.f(F.relu(m.e(h)))) + h @ m.b.weight.t()


def twice(m: Dense) -> None:
    m.c = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.PReLU())


def in_place(m: Dense, x: Tensor) -> Tensor:
    h = m.a(x)
    h[:, :4] = torch.sigmoid(2 * h[:, :4]) * 2
    h[:, 4:].mul_(0.5).add_(x[:, :4], alpha=0.3)
    h[:, 3].zero_()
    h[:, 0] = 2 * h[:, 1]
    h.t()[5].neg_()
    return m.b(F.relu(h * 2)) + m.b(h)


def views(m: Dense, x: Tensor) -> Tensor:
    h = m.a(x.reshape(x.shape[0], 3, 4).permute(0, 2, 1).flatten(1))
    first, second = h.chunk(2, dim=1)
    p, q, _ = h.split([3, 4, 1], dim=1)
    stacked = torch.stack([first, second * 2, q.flip(1)], dim=1).movedim(1, 2).contiguous()
    summed = stacked.view(-1, 12)[:, ::2].unsqueeze(1).squeeze(1)
    gathered = torch.cat([summed, p.narrow(1, 0, 1), h.index_select(1, torch.tensor([7]))], dim=1)
    return m.b(F.relu(gathered.roll(1, dims=1)))[..., [3, 1, 0, 2]]


def products(m: Dense, x: Tensor) -> Tensor:
    h = torch.tanh(m.a(x))
    outer = torch.einsum("ni,nj->nij", h, h * h)
    gram = torch.bmm(outer, outer.transpose(1, 2)) + outer.square()
    return m.b(gram.diagonal(dim1=1, dim2=2) + (outer @ h.unsqueeze(2)).squeeze(2))


def scaled(m: Dense, x: Tensor) -> Tensor:
    h = 2.0 * x / m.scale - x * 0.3 + 1.5
    h = F.relu(m.a(h)) * m.gain / (1.0 + m.gain.square())
    return m.b(h / 0.7).div(m.temperature.exp()) - 0.5 * m.b(-h)


def scales(m: Dense) -> None:
    m.register_buffer("scale", 0.5 + torch.rand(12))
    m.gain = nn.Parameter(torch.randn(8))
    m.temperature = nn.Parameter(torch.tensor(0.3))


def divided(m: Dense, x: Tensor) -> Tensor:
    h = m.a(x)
    return m.b(h / (1 + h.abs().sum(1, keepdim=True))) / (1 + h.square().mean(1, keepdim=True)).sqrt()


def elementary(m: Dense, x: Tensor) -> Tensor:
    h = m.a(x)
    h = torch.where(h > 0, h.exp().log1p(), h.sin()) + torch.logsumexp(h, 1, keepdim=True) - h.cumsum(1) * 0.1
    h = torch.maximum(h, h.roll(1, 1) ** 2) + h.pow(3).clamp(-1, 1) + torch.atan2(h, 1 + h * h)
    top = h.topk(8, dim=1).values * torch.linspace(1, 2, 8, dtype=h.dtype)
    return m.b(top) - m.b(top).log_softmax(1).square()


def normalised_by_attribute(m: Dense) -> None:
    m.mean, m.std = torch.rand(12) * 0.5, 0.5 + torch.rand(12)


def normalised_by_buffer(m: Dense) -> None:
    m.register_buffer("mean", torch.rand(12) * 0.5)
    m.register_buffer("std", 0.5 + torch.rand(12), persistent=False)


def partially_frozen(m: Dense) -> None:
    m.a.weight.requires_grad_(False)
    m.b.bias.requires_grad_(False)


def unused(m: Dense) -> None:
    m.c, m.d = nn.Linear(3, 3), nn.Parameter(torch.randn(2))


def uses_batch_size(m: Dense, x: Tensor) -> Tensor:
    n = x.shape[0]
    h = F.relu(m.a(x.view(n, -1))) + torch.zeros(n, 8, dtype=x.dtype)
    return m.b(h.reshape(n * 2, 4).reshape(n, 8)) * (1 + 1 / n) + torch.arange(n).unsqueeze(1).to(x.dtype)


def batch_branch(m: Dense, x: Tensor) -> Tensor:
    h = m.a(x)
    return m.b(torch.tanh(h) if x.shape[0] > 4 else F.silu(h))


def hypersphere(m: Dense, x: Tensor) -> Tensor:
    h = F.normalize(F.relu(m.a(x)), dim=1)
    return 10.0 * F.linear(h, F.normalize(m.b.weight, dim=1))


def fourier(m: Dense, x: Tensor) -> Tensor:
    spectrum = torch.fft.rfft(m.a(x), dim=1) * torch.view_as_complex(m.filter)
    return m.b(F.relu(torch.fft.irfft(spectrum, n=8, dim=1)) + spectrum.abs().sum(1, keepdim=True))


def fourier_filter(m: Dense) -> None:
    m.filter = nn.Parameter(torch.randn(5, 2))


class CallCounter(nn.Module):
    """Counts its calls in a buffer, in evaluation mode too."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(12, 8), nn.Linear(8, CLASSES)
        self.register_buffer("calls", torch.zeros((), dtype=torch.long))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.b(F.silu(self.a(x)))


class KeepsTraining(nn.Module):
    """Overrides ``train`` and ``eval``: frozen BatchNorm for good, and ``eval`` that refuses."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.bn, self.drop, self.b = (
            nn.Linear(12, 8),
            nn.BatchNorm1d(8),
            nn.Dropout(0.5),
            nn.Linear(8, CLASSES),
        )

    def train(self, mode: bool = True) -> KeepsTraining:
        super().train(mode)
        self.bn.training = False
        return self

    def eval(self) -> KeepsTraining:
        raise RuntimeError("this model is always in training mode")

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.drop(F.relu(self.bn(self.a(x)))))


class SpatialTransformer(nn.Module):
    """Resamples its input on a grid that it computes itself."""

    def __init__(self) -> None:
        super().__init__()
        self.locate, self.head = nn.Linear(2 * 36, 6), nn.Linear(2 * 36, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        theta = 0.3 * torch.tanh(self.locate(x.flatten(1))).view(-1, 2, 3) + torch.eye(2, 3, dtype=x.dtype)
        grid = F.affine_grid(theta, [x.shape[0], 2, 6, 6], align_corners=False)
        return self.head(F.grid_sample(x, grid, align_corners=False).flatten(1))


def grid_sample_is_twice_differentiable() -> bool:
    """Not in torch 2.11, where double backward can be no reference."""
    x = torch.rand(1, 1, 2, 2, requires_grad=True)
    sampled = F.grid_sample(x, torch.zeros(1, 2, 2, 2), align_corners=False)
    (grad,) = torch.autograd.grad(sampled.square().sum(), x, create_graph=True)
    try:
        torch.autograd.grad(grad.sum(), x)
    except RuntimeError:
        return False
    return True


def resampled() -> nn.Module:
    return nn.Sequential(
        nn.Upsample(scale_factor=2, mode="nearest"),
        nn.Conv2d(3, 8, 3, padding=1),
        nn.ChannelShuffle(2),
        nn.PixelShuffle(2),
        nn.ReLU(),
        nn.Upsample(size=(5, 7), mode="bicubic", align_corners=True),
        nn.ReflectionPad2d(1),
        nn.Unfold(3, stride=2),
        nn.Flatten(),
        nn.LazyLinear(CLASSES),
    )


def resampled_ready() -> nn.Module:
    model = resampled()
    model(torch.zeros(1, 3, 4, 4))
    return model


def small() -> nn.Module:
    return nn.Sequential(nn.Linear(12, 8), nn.Tanh(), nn.Linear(8, CLASSES))


def scripted() -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        return torch.jit.script(small())


def traced() -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        return torch.jit.trace(small(), torch.zeros(2, 12))


def vmapped(m: Dense, x: Tensor) -> Tensor:
    return torch.func.vmap(lambda row: m.b(m.a(row).tanh()))(x)


def solves(m: Dense, x: Tensor) -> Tensor:
    h = m.a(x)
    matrix = torch.eye(8, dtype=x.dtype) + 0.1 * torch.tanh(h).unsqueeze(2) * h.unsqueeze(1)
    return m.b(torch.linalg.solve(matrix, h))


def autocast_region(m: Dense, x: Tensor) -> Tensor:
    with torch.autocast("cpu", enabled=False):
        return m.b(m.a(x).tanh())


def hooked() -> nn.Module:
    """A hook changes an output, and a pre-hook an input."""
    model = Dense(plain)
    model.a.register_forward_hook(lambda module, args, out: out.sin())
    model.b.register_forward_pre_hook(lambda module, args: (args[0] * 2 - 0.1,))
    return model


def _dense(
    entry_id: str,
    forward: Callable[[Dense, Tensor], Tensor] = plain,
    setup: Callable[[Dense], object] | None = None,
    engine: str = "linearized",
    piecewise_linear: bool = False,
) -> Entry:
    return Entry(entry_id, lambda: Dense(forward, setup), (12,), engine=engine, piecewise_linear=piecewise_linear)


def _normalised(m: Dense, x: Tensor) -> Tensor:
    return plain(m, (x - m.mean) / m.std)


ENTRIES = [
    _dense("weight_norm", setup=weight_norm, piecewise_linear=True),
    _dense("weight_norm_by_hook", setup=weight_norm_by_hook, engine="any", piecewise_linear=True),
    _dense("pruned", setup=pruned, engine="any", piecewise_linear=True),
    _dense("orthogonal_parametrization", setup=orthogonal, engine="any", piecewise_linear=True),
    Entry("spectral_norm", spectral_norm, (3, 6, 6), piecewise_linear=True),
    _dense("tied_parameters", tied_forward, tied_parameters, piecewise_linear=True),
    _dense("module_called_twice", lambda m, x: m.b(m.c(m.c(m.a(x)))), twice, piecewise_linear=True),
    _dense(
        "weight_as_activation",
        lambda m, x: m.b(F.relu(m.a(x)) @ (m.a.weight @ m.a.weight.t())),
        piecewise_linear=True,
    ),
    _dense("in_place_views", in_place),
    _dense("views", views, piecewise_linear=True),
    _dense("products", products),
    _dense("scaled", scaled, scales, piecewise_linear=True),
    _dense("divided", divided),
    _dense("elementary_functions", elementary),
    _dense("normalised_by_attribute", _normalised, normalised_by_attribute, piecewise_linear=True),
    _dense("normalised_by_buffer", _normalised, normalised_by_buffer, piecewise_linear=True),
    _dense("dropout", lambda m, x: m.b(F.dropout(F.silu(m.a(x)), 0.5, m.training))),
    _dense("partially_frozen", setup=partially_frozen, piecewise_linear=True),
    _dense("unused_parameters", setup=unused, piecewise_linear=True),
    _dense("uses_batch_size", uses_batch_size, piecewise_linear=True),
    _dense("branches_on_batch_size", batch_branch),
    _dense("hypersphere_head", hypersphere),
    _dense("fourier", fourier, fourier_filter),
    _dense(
        "checkpointed",
        lambda m, x: m.b(checkpoint(lambda t: m.a(t).tanh(), x, use_reentrant=False)),
        engine="any",
    ),
    _dense("stop_gradient", lambda m, x: m.b(F.silu(m.a(x)) * m.a(x).detach()), engine="any"),
    _dense("stop_gradient_weight", lambda m, x: m.b(F.silu(F.linear(x, m.a.weight.detach()))), engine="any"),
    Entry("call_counter", CallCounter, (12,)),
    Entry("overrides_train_and_eval", KeepsTraining, (12,), piecewise_linear=True),
    *(
        [Entry("spatial_transformer", SpatialTransformer, (2, 6, 6), engine="any")]
        if grid_sample_is_twice_differentiable()
        else []
    ),
    Entry("resampled", resampled_ready, (3, 4, 4), piecewise_linear=True),
    Entry("torchscript", scripted, (12,), engine="any", reference_build=small),
    Entry("torchscript_traced", traced, (12,), engine="any", reference_build=small),
    _dense("vmap_inside", vmapped, engine="any"),
    _dense("autocast_region", autocast_region, engine="any"),
    _dense("weight_data", lambda m, x: m.b(F.silu(F.linear(x, m.a.weight.data))), engine="any"),
    _dense(
        "straight_through_by_detach",
        lambda m, x: m.b(F.linear(x, m.a.weight + (m.a.weight.sign() - m.a.weight).detach()).tanh()),
        engine="any",
    ),
    _dense("solves_a_system", solves),
    Entry("hooked", hooked, (12,), engine="any"),
]
