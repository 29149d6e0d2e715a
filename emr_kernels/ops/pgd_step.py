"""One step of projected gradient descent: step, projection on the ball, projection on the box, in one operator.

Arithmetic is float32 (float64 for float64 tensors), the result is rounded once to the dtype of x.
"""

from __future__ import annotations

import math

import torch

from emr_kernels.ops import _checks, _dispatch
from emr_kernels.ops._format import compute_dtype, dense_format, to_format

NORMS = ("linf", "l2", "l1")
_Optional = torch.Tensor | None


def _sign(tensor: torch.Tensor) -> torch.Tensor:
    """1, 0 or -1, and NaN for NaN, where `torch.sign` has 0."""
    return torch.where(tensor.isnan(), tensor, tensor.sign())


def _linf(x: torch.Tensor, origin: torch.Tensor, g: torch.Tensor, a: torch.Tensor, epsilon: float) -> torch.Tensor:
    return (x + a * _sign(g)).clamp(origin - epsilon, origin + epsilon)


def _l2(x: torch.Tensor, origin: torch.Tensor, g: torch.Tensor, a: torch.Tensor, epsilon: float) -> torch.Tensor:
    t = x + g * (a / (torch.linalg.vector_norm(g, dim=1, keepdim=True) + 1e-12))
    delta = t - origin
    norm = torch.linalg.vector_norm(delta, dim=1, keepdim=True)
    return torch.where(norm <= epsilon, t, origin + delta * (epsilon / norm))


def _sparse_step(x: torch.Tensor, g: torch.Tensor, a: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    """x + a * s / |s|_1, s the sign of g on its largest coordinates, ties included. A NaN in g goes to all of x."""
    magnitude = g.abs()
    threshold = magnitude.sort(1, descending=True).values.gather(1, counts[:, None] - 1)
    s = torch.where(magnitude >= threshold, g.sign(), 0.0)
    step = s * (a / s.count_nonzero(1).clamp(min=1)[:, None])
    return torch.where(g.isnan().any(1, keepdim=True), torch.nan, x + step)


def _excess(distance: torch.Tensor, room: torch.Tensor, threshold: torch.Tensor) -> torch.Tensor:
    """How far each coordinate still moves when its distance is cut by the threshold and bounded by its room."""
    return (distance - threshold).clamp(min=0).minimum(room)


def _l1_threshold(distance: torch.Tensor, room: torch.Tensor, epsilon: float) -> torch.Tensor:
    """The least threshold [N, 1] for which the excesses sum to at most epsilon, in float64.

    The sum is piecewise linear and falling: bisect over its sorted breakpoints, then solve the linear piece.
    """
    breaks = torch.cat([distance - room, distance, torch.zeros_like(distance[:, :1])], 1).clamp(min=0).sort(1).values

    def total(place: torch.Tensor) -> torch.Tensor:
        return _excess(distance, room, breaks.gather(1, place)).sum(1, keepdim=True)

    low = torch.zeros_like(breaks[:, :1], dtype=torch.int64)
    high = torch.full_like(low, breaks.shape[1] - 1)
    for _ in range(breaks.shape[1].bit_length()):
        middle = (low + high) // 2
        above = total(middle) > epsilon
        low, high = torch.where(above, middle, low), torch.where(above, high, middle)
    before, after = total(low), total(high)
    start, end = breaks.gather(1, low), breaks.gather(1, high)
    fraction = ((before - epsilon) / (before - after)).clamp(0, 1)
    return torch.where(before <= epsilon, 0.0, start + (end - start) * fraction)


def _l1(t: torch.Tensor, origin: torch.Tensor, epsilon: float, lower: float, upper: float) -> torch.Tensor:
    """The point nearest to t in the L1 ball around the origin and in the box."""
    delta = (t - origin).double()
    room = torch.where(delta > 0, upper - origin.double(), origin.double() - lower).clamp(min=0)
    threshold = _l1_threshold(delta.abs(), room, epsilon)
    threshold = torch.where(delta.isnan().any(1, keepdim=True), torch.nan, threshold)
    moved = origin + (delta.sign() * _excess(delta.abs(), room, threshold)).to(t.dtype)
    return torch.where(threshold == 0, t, moved)


def pgd_step_reference(
    x: torch.Tensor,
    origin: torch.Tensor,
    gradient: torch.Tensor,
    step_size: float,
    step_sizes: _Optional,
    epsilon: float,
    norm: str,
    lower: float,
    upper: float,
    count: int,
    counts: _Optional,
) -> torch.Tensor:
    """`pgd_step` in plain PyTorch, for dense tensors in one order; `count` coordinates are moved under "l1"."""
    out = torch.empty_like(x)
    if x.numel() == 0:
        return out
    dtype = compute_dtype(x)
    wide, centre, g = (t.to(dtype).reshape(x.shape[0], -1) for t in (x, origin, gradient))
    a = torch.full_like(wide[:, :1], step_size) if step_sizes is None else step_sizes[:, None]
    if norm == "linf":
        moved = _linf(wide, centre, g, a, epsilon)
    elif norm == "l2":
        moved = _l2(wide, centre, g, a, epsilon)
    else:
        if counts is None:
            counts = torch.full_like(wide[:, 0], count, dtype=torch.int64)
        moved = _l1(_sparse_step(wide, g, a, counts), centre, epsilon, lower, upper)
    return out.copy_(moved.clamp(lower, upper).view(x.shape))


def _pgd_step_out_reference(
    x: torch.Tensor,
    origin: torch.Tensor,
    gradient: torch.Tensor,
    step_size: float,
    step_sizes: _Optional,
    epsilon: float,
    norm: str,
    lower: float,
    upper: float,
    count: int,
    counts: _Optional,
    out: torch.Tensor,
) -> None:
    out.copy_(
        pgd_step_reference(x, origin, gradient, step_size, step_sizes, epsilon, norm, lower, upper, count, counts)
    )


def _pgd_step_fake(x: torch.Tensor, *_: object) -> torch.Tensor:
    return torch.empty_like(x)


def _pgd_step_out_fake(*_: object) -> None:
    return None


_ARGUMENTS = (
    "Tensor x, Tensor origin, Tensor gradient, float step_size, Tensor? step_sizes, float epsilon, str norm, "
    "float lower, float upper, int count, Tensor? counts"
)
_pgd_step = _dispatch.define(f"pgd_step({_ARGUMENTS}) -> Tensor", pgd_step_reference, _pgd_step_fake)
_pgd_step_out = _dispatch.define(
    f"pgd_step_out({_ARGUMENTS}, Tensor(a!) out) -> ()", _pgd_step_out_reference, _pgd_step_out_fake
)


def check_ball(epsilon: float, norm: str, lower: float, upper: float) -> None:
    """A ball and a box: epsilon >= 0, a known norm, lower <= upper."""
    if norm not in NORMS:
        raise ValueError(f"norm is {norm!r}; expected one of {', '.join(map(repr, NORMS))}")
    if not epsilon >= 0:
        raise ValueError(f"epsilon is {epsilon}; expected a number >= 0")
    if not lower <= upper:
        raise ValueError(f"lower is {lower} and upper {upper}; expected lower <= upper")


def _per_sample(name: str, vector: torch.Tensor, x: torch.Tensor) -> None:
    """A floating vector with one value for each sample of x."""
    _checks.check_floating(name, vector)
    if vector.shape != x.shape[:1]:
        raise ValueError(f"{name} has shape {tuple(vector.shape)}; expected ({x.shape[0]},), one for each sample")
    if vector.device != x.device:
        raise ValueError(f"{name} is on device {vector.device}; expected {x.device}, that of x")


def _gradient_like(gradient: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """The checked gradient, in a dtype that the kernels read beside that of x."""
    _checks.check_floating("gradient", gradient)
    narrow = gradient.dtype in (torch.bfloat16, torch.float16)
    if gradient.dtype != x.dtype and not (x.dtype == torch.float64 or (x.dtype == torch.float32 and narrow)):
        raise TypeError(f"gradient has dtype {gradient.dtype}; expected {x.dtype}, that of x, or a narrower one")
    if gradient.shape != x.shape:
        raise ValueError(f"gradient has shape {tuple(gradient.shape)}; expected {tuple(x.shape)}, that of x")
    if gradient.device != x.device:
        raise ValueError(f"gradient is on device {gradient.device}; expected {x.device}, that of x")
    return gradient.double() if x.dtype == torch.float64 else gradient


def _moved(fraction: float | torch.Tensor, x: torch.Tensor) -> tuple[int, _Optional]:
    """How many coordinates move under "l1": one number, or int64 `[N]`."""
    size = x.numel() // x.shape[0] if x.numel() else 1
    if isinstance(fraction, torch.Tensor):
        _per_sample("fraction", fraction, x)
        counts = (fraction.double() * size).clamp(1, size).to(torch.int64)
        return 1, counts
    if not 0 < fraction <= 1:
        raise ValueError(f"fraction is {fraction}; expected a number in (0, 1]")
    return max(1, int(fraction * size)), None


def pgd_step(
    x: torch.Tensor,
    origin: torch.Tensor,
    gradient: torch.Tensor,
    step_size: float | torch.Tensor,
    epsilon: float,
    norm: str = "linf",
    *,
    lower: float = 0.0,
    upper: float = 1.0,
    fraction: float | torch.Tensor = 0.01,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """One ascent step of PGD from x, projected on the ball around origin and on the box, per sample.

        linf  t = x + a sign(g);                  clamp(t, origin - epsilon, origin + epsilon), then to the box
        l2    t = x + a g / (|g|_2 + 1e-12);      origin + d min(1, epsilon / |d|_2) with d = t - origin, then the box
        l1    t = x + a s / |s|_1, s = sign(g) where |g| is among the largest (ties included), else 0; then the point
              nearest to t in ball and box together: origin + sign(d) clamp(|d| - m, 0, room), room the way to the
              box, m >= 0 the least number for which it lies in the ball

    Sources: Madry et al. 2018; sparse L1 descent, Tramèr and Boneh 2019; the joint projection, Croce and Hein 2021.

    The result is in the box, and as near to origin as rounding allows: under linf every |x - origin|, evaluated in the
    dtype of x, is at most epsilon plus one unit in the last place of the pixel (of the larger one of x and origin);
    under l2 and l1 every pixel is within one such unit of a point whose norm is at most epsilon (1 + 1e-5). That takes
    an origin in the box; otherwise the box prevails. A gradient of zeros leaves an x in ball and box where it is. NaN
    propagates: a NaN in x, origin or gradient, or under l2 an infinite gradient, gives NaN at that pixel (linf) or in
    that sample (l2, l1).

    Args:
        x: float32, bfloat16, float16 or float64, `[N, ...]`.
        origin: like x; the clean images.
        gradient: of x's shape; x's dtype, or a narrower one beside a float32 or float64 x.
        step_size: a; a number, or one for each sample, `[N]`. Negative to descend.
        epsilon: radius of the ball, >= 0.
        norm: "linf", "l2" or "l1".
        lower, upper: the box, numbers that x's dtype can represent.
        fraction: under "l1", which part of a sample's coordinates moves, in (0, 1]: a number, or `[N]`. At least one.
        out: where to write the result: dense in the memory format `dense_format(x)`; may be x itself.

    Returns:
        like x, in the memory format `dense_format(x)`.

    Raises:
        TypeError, ValueError: for a wrong dtype, shape, device, layout or number.
        RuntimeError: if an argument requires grad in grad mode (the operator has no derivative of its own).
    """
    _checks.check_floating("x", x)
    if x.dim() == 0:
        raise ValueError("x has shape (); expected [N, ...]")
    _checks.check_like("origin", origin, "x", x)
    gradient = _gradient_like(gradient, x)
    check_ball(epsilon, norm, lower, upper)
    step_sizes = None
    if isinstance(step_size, torch.Tensor):
        _per_sample("step_size", step_size, x)
        step_sizes, step_size = step_size.to(compute_dtype(x)).contiguous(), 0.0
    elif not math.isfinite(step_size):
        raise ValueError(f"step_size is {step_size}; expected a finite number")
    _checks.check_not_differentiated("pgd_step", x=x, origin=origin, gradient=gradient, step_size=step_sizes)
    count, counts = _moved(fraction, x) if norm == "l1" else (1, None)
    memory_format = dense_format(x)
    x_, origin, gradient = (to_format(t, memory_format) for t in (x, origin, gradient))
    arguments = (x_, origin, gradient, step_size, step_sizes, epsilon, norm, lower, upper, count, counts)
    if out is None:
        return _pgd_step(x_, *arguments)
    _checks.check_out(out, "x", x, memory_format)
    _pgd_step_out(x_, *arguments, out)
    return out
