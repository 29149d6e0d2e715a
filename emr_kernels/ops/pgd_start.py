"""Random starts of PGD: uniform in the ball, a function of seed, offset and element alone."""

from __future__ import annotations

import math

import torch

from emr_kernels.ops import _checks, _dispatch
from emr_kernels.ops._format import compute_dtype, dense_format, flatten_dense, to_format, unflatten_dense
from emr_kernels.ops._philox import words
from emr_kernels.ops.pgd_step import check_ball


def _unit(word: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """(0, 1], in steps of 2**-24, from a word's 24 high bits."""
    return ((word >> 8) + 1).to(dtype) * 2.0**-24


def _gaussian(word: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Box and Muller: each pair of words `[B, 4]` gives a pair of independent standard normal numbers."""
    radius = (-2 * _unit(word[:, 0::2], dtype).log()).sqrt()
    angle = (word[:, 1::2] >> 8).to(dtype) * (2 * math.pi * 2.0**-24)
    return torch.stack((radius * angle.cos(), radius * angle.sin()), -1)


def _laplace(word: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """An exponential number from the 24 high bits, its sign from the lowest."""
    return -_unit(word, dtype).log() * (1 - 2 * (word & 1))


def pgd_start_reference(
    origin: torch.Tensor, epsilon: float, norm: str, seed: int, offset: int, lower: float, upper: float
) -> torch.Tensor:
    """`pgd_start` in plain PyTorch, for a dense origin."""
    if origin.numel() == 0:
        return torch.empty_like(origin)
    dtype = compute_dtype(origin)
    numel, batch = origin.numel(), origin.shape[0]
    word = words(torch.arange((numel + 3) // 4, device=origin.device), seed, offset, 0)
    if norm == "linf":
        noise = epsilon * ((word >> 8).to(dtype) * 2.0**-23 - 1)
        noise = noise.flatten()[:numel]
    else:
        once = words(torch.arange(batch, device=origin.device), seed, offset, 1)
        draw = (_gaussian if norm == "l2" else _laplace)(word, dtype).flatten()[:numel].view(batch, -1)
        tiny = torch.finfo(dtype).tiny
        if norm == "l2":
            radius = epsilon * _unit(once[:, 0], dtype) ** (1 / draw.shape[1])
            scale = radius / torch.linalg.vector_norm(draw, dim=1).clamp(min=tiny)
        else:
            scale = epsilon / (draw.abs().sum(1) - _unit(once[:, 0], dtype).log()).clamp(min=tiny)
        noise = (draw * scale[:, None]).flatten()
    start = flatten_dense(origin).to(dtype) + noise
    return torch.empty_like(origin).copy_(unflatten_dense(start.clamp(lower, upper), origin))


def _pgd_start_fake(origin: torch.Tensor, *_: object) -> torch.Tensor:
    return torch.empty_like(origin)


_pgd_start = _dispatch.define(
    "pgd_start(Tensor origin, float epsilon, str norm, int seed, int offset, float lower, float upper) -> Tensor",
    pgd_start_reference,
    _pgd_start_fake,
)


def pgd_start(
    origin: torch.Tensor,
    epsilon: float,
    norm: str = "linf",
    *,
    seed: int,
    offset: int = 0,
    lower: float = 0.0,
    upper: float = 1.0,
) -> torch.Tensor:
    """A random start of PGD: uniform in the ball of the origin, then clamped to the box; per sample.

        linf  origin + epsilon s, s uniform in [-1, 1)
        l2    origin + epsilon u^(1/d) z / |z|_2, z standard normal (Box and Muller), u uniform in (0, 1]
        l1    origin + epsilon e / (|e|_1 + e'), e of Laplace's distribution, e' exponential (Barthe et al. 2005)

    Random words are those of Philox4x32-10 (Salmon et al. 2011) with the seed as its key: element i, in the memory
    order of origin, takes word i % 4 of the counter (i // 4, offset); u and e' of sample n come from (n, offset) with
    the highest bit set. So the same arguments give the same start on every backend and with any number of threads:
    under linf to the last bit, else to rounding. PyTorch's generators are neither used nor changed.

    Args:
        origin: float32, bfloat16, float16 or float64, `[N, ...]`; in the box, or else the box prevails.
        epsilon: radius of the ball, finite, >= 0.
        norm: "linf", "l2" or "l1".
        seed, offset: in [0, 2**63); each pair gives an independent start. Restarts: the same seed, the next offset.
        lower, upper: the box, numbers that origin's dtype can represent.

    Returns:
        like origin, in the memory format `dense_format(origin)`.

    Raises:
        TypeError, ValueError: for a wrong dtype, shape or number.
        RuntimeError: if origin requires grad in grad mode (the operator has no derivative of its own).
    """
    _checks.check_floating("origin", origin)
    if origin.dim() == 0:
        raise ValueError("origin has shape (); expected [N, ...]")
    check_ball(epsilon, norm, lower, upper)
    if epsilon == math.inf:
        raise ValueError("epsilon is inf; expected a finite number")
    for name, value in (("seed", seed), ("offset", offset)):
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f"{name} is {value!r}; expected a whole number")
        if not 0 <= value < 2**63:
            raise ValueError(f"{name} is {value}; expected a number in [0, 2**63)")
    _checks.check_not_differentiated("pgd_start", origin=origin)
    dense = to_format(origin, dense_format(origin))
    return _pgd_start(dense, dense, epsilon, norm, seed, offset, lower, upper)
