"""What is measured: for each operator its arguments, and the same formula as eager PyTorch has it."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F

from benchmarks.micro.convolutions import CONVOLUTIONS
from benchmarks.micro.entry import Entry, Inputs, Make, shape_name
from benchmarks.micro.products import PRODUCTS
from emr_kernels import ops

__all__ = ["ENTRIES", "Entry", "Inputs", "Make"]

EPSILON = 8 / 255
BN_EPSILON = 1e-5


# Hidden activations of wide residual networks.
_IMAGES = (((32, 64, 8, 8), 0), ((32, 160, 32, 32), 1), ((128, 160, 32, 32), 2), ((512, 160, 32, 32), 3))
_BOTH = ("nchw", "channels_last")


def _batch_norm(a: torch.Tensor, scale: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
    mean, variance = torch.zeros_like(scale), torch.full_like(scale, 1 - BN_EPSILON)
    return F.batch_norm(a, mean, variance, scale, shift, False, 0.0, BN_EPSILON)


def _eager_affine_relu(a: torch.Tensor, scale: torch.Tensor, shift: torch.Tensor, skip: Any) -> torch.Tensor:
    t = _batch_norm(a, scale, shift)
    return F.relu(t if skip is None else t + skip)


def _eager_vjp(delta: torch.Tensor, y: torch.Tensor, scale: torch.Tensor, held: Any) -> torch.Tensor:
    product = torch.ops.aten.threshold_backward(delta, y, 0) * scale.to(delta.dtype)[:, None, None]
    return product if held is None else product + held


def _eager_jvp(
    u: torch.Tensor, y: torch.Tensor, scale: torch.Tensor, delta: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    masked = torch.ops.aten.threshold_backward(u, y, 0)
    return masked * scale.to(u.dtype)[:, None, None], (masked * delta).sum((0, 2, 3), dtype=torch.float32)


def _activation(make: Make, shape: tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A ReLU's output, its bits, and the scale of the BatchNorm before it."""
    scale = make.uniform(shape[1], low=0.5, high=1.5, dtype=torch.float32)
    y, bits = ops.affine_relu(make.normal(*shape))
    return y, bits, scale


def _affine_relu(shape: tuple[int, ...], size: int, with_skip: bool) -> Entry:
    def make(make: Make) -> Inputs:
        a, skip = make.normal(*shape), make.normal(*shape) if with_skip else None
        scale = make.uniform(shape[1], low=0.5, high=1.5, dtype=torch.float32)
        shift = make.normal(shape[1], dtype=torch.float32)
        bits = torch.empty((a.numel() + 7) // 8, dtype=torch.uint8, device=a.device)
        out = torch.full_like(a, math.nan)
        return Inputs((a, scale, shift, skip, 0.0, out, bits), (a, scale, shift, skip), a)

    def outputs(_: Any, arguments: tuple[Any, ...]) -> tuple[torch.Tensor, ...]:
        *_, out, bits = arguments
        return out, ops.unpack_bits(bits, out.shape, ops.dense_format(out))

    case = "skip" if with_skip else ""
    return Entry("affine_relu_out", case, shape_name(*shape), make, _eager_affine_relu, outputs, _BOTH, size)


def _affine_relu_vjp(shape: tuple[int, ...], size: int, with_skip: bool) -> Entry:
    def make(make: Make) -> Inputs:
        y, bits, scale = _activation(make, shape)
        delta, held = make.normal(*shape), make.normal(*shape) if with_skip else None
        out = torch.full_like(delta, math.nan)
        return Inputs((delta, bits, scale, held, 0.0, out), (delta, y, scale, held), delta)

    def outputs(_: Any, arguments: tuple[Any, ...]) -> tuple[torch.Tensor, ...]:
        return (arguments[-1],)

    case = "skip" if with_skip else ""
    return Entry("affine_relu_vjp_out", case, shape_name(*shape), make, _eager_vjp, outputs, _BOTH, size)


def _affine_relu_jvp(shape: tuple[int, ...], size: int) -> Entry:
    def make(make: Make) -> Inputs:
        y, bits, scale = _activation(make, shape)
        u, delta = make.normal(*shape), make.normal(*shape)
        return Inputs((u, bits, scale, 0.0, delta, torch.full_like(u, math.nan)), (u, y, scale, delta), u)

    def outputs(result: Any, arguments: tuple[Any, ...]) -> tuple[torch.Tensor, ...]:
        return arguments[-1], result

    return Entry("affine_relu_jvp_out", "", shape_name(*shape), make, _eager_jvp, outputs, _BOTH, size)


def _pack_bits(numel: int, size: int) -> Entry:
    def make(make: Make) -> Inputs:
        mask = make.normal(numel, dtype=torch.float32) > 0
        return Inputs((mask,), (mask,), mask)

    def eager(mask: torch.Tensor) -> torch.Tensor:
        weights = 1 << torch.arange(8, dtype=torch.uint8, device=mask.device)
        return (mask.view(-1, 8) * weights).sum(1, dtype=torch.uint8)

    return Entry("pack_bits", "", str(numel), make, eager, size=size, dtypes=(torch.float32,))


def _sq_norms(batch: int, size: int) -> Entry:
    # The cotangents of a WRN-16-10's three stages.
    shapes = [(batch, 160, 32, 32), (batch, 320, 16, 16), (batch, 640, 8, 8)] * 2

    def make(make: Make) -> Inputs:
        tensors = [make.normal(*shape) for shape in shapes]
        return Inputs((tensors,), (tensors,), tensors[0])

    def eager(tensors: list[torch.Tensor]) -> torch.Tensor:
        norms = [torch.linalg.vector_norm(t, dim=(1, 2, 3), dtype=torch.float32) for t in tensors]
        return torch.stack(norms).square()

    return Entry("sq_norms", "", f"{len(shapes)} of {batch}xCxHxW", make, eager, layouts=_BOTH, size=size)


def _eager_linf(x: torch.Tensor, origin: torch.Tensor, gradient: torch.Tensor, step_size: float) -> torch.Tensor:
    moved = x + step_size * gradient.sign()
    return torch.min(torch.max(moved, origin - EPSILON), origin + EPSILON).clamp(0, 1)


def _eager_l2(x: torch.Tensor, origin: torch.Tensor, gradient: torch.Tensor, step_size: float) -> torch.Tensor:
    norms = torch.linalg.vector_norm(gradient, dim=(1, 2, 3), keepdim=True)
    delta = x + step_size * gradient / (norms + 1e-12) - origin
    norms = torch.linalg.vector_norm(delta, dim=(1, 2, 3), keepdim=True)
    return (origin + delta * (EPSILON / norms).clamp(max=1)).clamp(0, 1)


def _pgd_step(shape: tuple[int, ...], size: int, norm: str) -> Entry:
    def make(make: Make) -> Inputs:
        origin = make.uniform(*shape)
        x = (origin + EPSILON * make.uniform(*shape, low=-1)).clamp(0, 1)
        gradient = make.normal(*shape)
        arguments = (
            x,
            origin,
            gradient,
            EPSILON / 4,
            None,
            EPSILON,
            norm,
            0.0,
            1.0,
            1,
            None,
            torch.full_like(x, math.nan),
        )
        return Inputs(arguments, (x, origin, gradient, EPSILON / 4), x)

    def outputs(_: Any, arguments: tuple[Any, ...]) -> tuple[torch.Tensor, ...]:
        return (arguments[-1],)

    eager = {"linf": _eager_linf, "l2": _eager_l2}[norm]
    return Entry("pgd_step_out", norm, shape_name(*shape), make, eager, outputs, size=size)


def _pgd_start(shape: tuple[int, ...], size: int) -> Entry:
    def make(make: Make) -> Inputs:
        origin = make.uniform(*shape)
        return Inputs((origin, EPSILON, "linf", 7, 0, 0.0, 1.0), (origin,), origin)

    def eager(origin: torch.Tensor) -> torch.Tensor:
        return (origin + EPSILON * (2 * torch.rand_like(origin) - 1)).clamp(0, 1)

    def deviation(results: tuple[torch.Tensor, ...], inputs: Inputs) -> float:
        """Of the noise's moments from the uniform distribution's, where no clamp cuts it; inf outside the ball."""
        (origin,) = inputs.eager
        noise = (results[0].double() - origin.double()) / EPSILON
        # Rounding of origin + noise to the dtype moves it by up to half a unit in the last place.
        rounding = torch.finfo(origin.dtype).eps / EPSILON
        if not bool(noise.abs().max() <= 1 + rounding):
            return math.inf
        inside = noise[(origin > EPSILON) & (origin < 1 - EPSILON)]
        allowed = 5 / math.sqrt(inside.numel()) + rounding
        return max(abs(float(inside.mean())), abs(float(inside.square().mean()) - 1 / 3)) / allowed

    return Entry("pgd_start", "linf", shape_name(*shape), make, eager, size=size, deviation=deviation)


def _eager_seeds(logits: torch.Tensor, y: torch.Tensor, kind: str, temperature: float) -> tuple[torch.Tensor, ...]:
    z = logits.float()
    p = torch.softmax(z, 1)
    label = y[:, None]
    others, runner_up = z.scatter(1, label, -math.inf).max(1, keepdim=True)
    if kind == "softmax":
        seed = torch.softmax(z / temperature, 1)
        loss = (seed * z).sum(1)
    else:
        seed = p.scatter_add(1, label, torch.full_like(others, -1))
        loss = -torch.log_softmax(z, 1).gather(1, label).squeeze(1)
    margin = (z.gather(1, label) - others).squeeze(1)
    probability_margin = (p.gather(1, label) - p.gather(1, runner_up)).squeeze(1)
    return seed.to(logits.dtype), loss, margin, runner_up.squeeze(1), probability_margin


def _logit_seeds(shape: tuple[int, int], size: int, kind: str) -> Entry:
    def make(make: Make) -> Inputs:
        logits, y = make.normal(*shape), make.integers(shape[1], shape[0])
        return Inputs((logits, y, None, kind, 4.0, False), (logits, y, kind, 4.0), logits)

    return Entry("logit_seeds", kind, shape_name(*shape), make, _eager_seeds, size=size)


def _eager_trades(
    adversarial: torch.Tensor, clean: torch.Tensor, y: torch.Tensor, beta: float
) -> tuple[torch.Tensor, ...]:
    log_q, log_p = (torch.log_softmax(z.float(), 1) for z in (adversarial, clean))
    q, p = log_q.exp(), log_p.exp()
    ratio = log_p - log_q
    divergence = (p * ratio).sum(1, keepdim=True)
    loss = beta * divergence - log_p.gather(1, y[:, None])
    onehot = F.one_hot(y, p.shape[1])
    return loss.squeeze(1), beta * (q - p), p - onehot + beta * p * (ratio - divergence)


def _robust_losses(shape: tuple[int, int], size: int) -> Entry:
    def make(make: Make) -> Inputs:
        adversarial, clean, y = make.normal(*shape), make.normal(*shape), make.integers(shape[1], shape[0])
        arguments = (adversarial, clean, y, None, "trades", 6.0, 0.0, False, 0.0, 0.0)
        return Inputs(arguments, (adversarial, clean, y, 6.0), adversarial)

    return Entry("robust_losses", "trades", shape_name(*shape), make, _eager_trades, size=size)


# CIFAR and ImageNet batches, and their logits.
_PICTURES = (((128, 3, 32, 32), 0), ((512, 3, 32, 32), 1), ((64, 3, 224, 224), 2), ((512, 3, 224, 224), 3))
_LOGITS = (((128, 10), 0), ((1024, 100), 1), ((4096, 1000), 2), ((65536, 1000), 3))

ENTRIES: tuple[Entry, ...] = (
    *(_affine_relu(*image, with_skip) for with_skip in (False, True) for image in _IMAGES),
    *(_affine_relu_vjp(*image, with_skip) for with_skip in (False, True) for image in _IMAGES),
    *(_affine_relu_jvp(*image) for image in _IMAGES),
    *(_pack_bits(math.prod(shape), size) for shape, size in _IMAGES),
    *(_sq_norms(batch, size) for batch, size in ((8, 0), (32, 1), (128, 3))),
    *(_pgd_step(*picture, norm) for norm in ("linf", "l2") for picture in _PICTURES),
    *(_pgd_start(*picture) for picture in _PICTURES),
    *(_logit_seeds(*rows, kind) for kind in ("softmax", "ce") for rows in _LOGITS),
    *(_robust_losses(*rows) for rows in _LOGITS),
    *PRODUCTS,
    *CONVOLUTIONS,
)
