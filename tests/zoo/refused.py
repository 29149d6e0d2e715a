"""Models whose export is impossible or silently wrong: noticed, and still right gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from zoo.awkward import Dense
from zoo.entry import Entry


class SoftGradientReLU(torch.autograd.Function):
    """ReLU forward, a sigmoid as its derivative backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.clamp_min(0)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return grad * torch.sigmoid(5 * x)


class Ternary(torch.autograd.Function):
    """Rounds weights to {-s, 0, s}; the gradient passes straight through."""

    @staticmethod
    def forward(ctx: Any, w: Tensor) -> Tensor:
        return 0.3 * torch.sign(w) * (w.abs() > 0.1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad.clone()


def custom_activation(m: Dense, x: Tensor) -> Tensor:
    return m.b(SoftGradientReLU.apply(m.a(x)))


def straight_through_weights(m: Dense, x: Tensor) -> Tensor:
    return m.b(F.silu(F.linear(x, Ternary.apply(m.a.weight), m.a.bias)))


def no_grad_gate(m: Dense, x: Tensor) -> Tensor:
    h = m.a(x)
    with torch.no_grad():
        gate = torch.sigmoid(h)
    return m.b(F.silu(h) * gate)


def no_grad_weight_scale(m: Dense, x: Tensor) -> Tensor:
    with torch.no_grad():
        scale = m.a.weight.norm(dim=1, keepdim=True)
    return m.b(F.silu(F.linear(x, m.a.weight / scale, m.a.bias)))


def random_noise(m: Dense, x: Tensor) -> Tensor:
    return m.b(F.silu(m.a(x + 0.1 * torch.randn_like(x))))


def always_dropout(m: Dense, x: Tensor) -> Tensor:
    return m.b(F.dropout(F.silu(m.a(x)), 0.5, training=True))


def control_flow(m: Dense, x: Tensor) -> Tensor:
    h = m.a(x)
    return m.b(F.silu(h) if bool(h.sum() > 0) else F.relu(h))


def through_numpy(m: Dense, x: Tensor) -> Tensor:
    scale = float(x.detach().numpy().max())
    return m.b(F.silu(m.a(x))) * scale


def _entry(entry_id: str, forward: Callable[[Dense, Tensor], Tensor], reason: str) -> Entry:
    return Entry(entry_id, lambda: Dense(forward), (12,), engine="autograd", reason=reason)


# Matched loosely: which check notices first is the library's business, but a reason must be named.
ENTRIES = [
    _entry("custom_function_activation", custom_activation, r"(?i)custom|autograd\.Function|gradient|vjp"),
    _entry("custom_function_weights", straight_through_weights, r"(?i)custom|autograd\.Function|gradient"),
    _entry("no_grad_region", no_grad_gate, r"(?i)no_grad|grad_enabled|gradient|vjp"),
    _entry("no_grad_region_on_weights", no_grad_weight_scale, r"(?i)no_grad|grad_enabled|gradient"),
    _entry("random_noise", random_noise, r"(?i)random"),
    _entry("dropout_always_on", always_dropout, r"(?i)random|dropout"),
    _entry("data_dependent_control_flow", control_flow, r"(?i)export"),
    _entry("through_numpy", through_numpy, r"(?i)export"),
]
