"""Per-channel affine map and (leaky) ReLU as one operator, its transpose and its derivative along a tangent.

The kink's branch is kept as one bit for each element (see `bits`), which is all that vjp and jvp need.
Arithmetic is float32 (float64 for float64 tensors), results are rounded once to the tensors' dtype.
"""

from __future__ import annotations

import torch

from emr_kernels.ops import _checks, _dispatch
from emr_kernels.ops._format import compute_dtype, dense_format, to_format
from emr_kernels.ops.bits import pack_bits_reference, unpack_bits_reference

_Optional = torch.Tensor | None


def _channelwise(vector: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    return vector.view(1, -1, *[1] * (like.dim() - 2))


def _masked(vector: torch.Tensor, bits: torch.Tensor, negative_slope: float) -> torch.Tensor:
    """vector * slope(bits) in the computation's dtype; exactly 0 where the slope is."""
    wide = vector.to(compute_dtype(vector))
    other = wide * negative_slope if negative_slope != 0 else torch.zeros((), dtype=wide.dtype, device=wide.device)
    return torch.where(unpack_bits_reference(bits, vector), wide, other)


def affine_relu_reference(
    a: torch.Tensor, scale: _Optional, shift: _Optional, skip: _Optional, negative_slope: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """`affine_relu` in plain PyTorch, for a dense `a` and a scale and shift in the computation's dtype."""
    t = a.to(compute_dtype(a))
    if scale is not None:
        t = t * _channelwise(scale, a)
    if shift is not None:
        t = t + _channelwise(shift, a)
    if skip is not None:
        t = t + skip
    y = torch.relu(t) if negative_slope == 0 else torch.where(t > 0, t, t * negative_slope)
    out = torch.empty_like(a).copy_(y)
    return out, pack_bits_reference(t > 0)


def affine_relu_vjp_reference(
    delta: torch.Tensor, bits: torch.Tensor, scale: _Optional, skip: _Optional, negative_slope: float
) -> torch.Tensor:
    """`affine_relu_vjp` in plain PyTorch, for a dense `delta` in the order of the bits."""
    product = _masked(delta, bits, negative_slope)
    if scale is not None:
        product = product * _channelwise(scale, delta)
    if skip is not None:
        product = product + skip
    return torch.empty_like(delta).copy_(product)


def affine_relu_jvp_reference(
    u: torch.Tensor, bits: torch.Tensor, scale: _Optional, negative_slope: float, delta: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """`affine_relu_jvp` with `delta` in plain PyTorch, for dense tensors in the order of the bits."""
    product = _masked(u, bits, negative_slope)
    dscale = (product * delta).sum((0, *range(2, u.dim())))
    if scale is not None:
        product = product * _channelwise(scale, u)
    return torch.empty_like(u).copy_(product), dscale


def _affine_relu_out_reference(
    a: torch.Tensor,
    scale: _Optional,
    shift: _Optional,
    skip: _Optional,
    negative_slope: float,
    out: torch.Tensor,
    bits: torch.Tensor,
) -> None:
    y, packed = affine_relu_reference(a, scale, shift, skip, negative_slope)
    out.copy_(y)
    bits.copy_(packed)


def _affine_relu_vjp_out_reference(
    delta: torch.Tensor,
    bits: torch.Tensor,
    scale: _Optional,
    skip: _Optional,
    negative_slope: float,
    out: torch.Tensor,
) -> None:
    out.copy_(affine_relu_vjp_reference(delta, bits, scale, skip, negative_slope))


def _affine_relu_jvp_out_reference(
    u: torch.Tensor,
    bits: torch.Tensor,
    scale: _Optional,
    negative_slope: float,
    delta: torch.Tensor,
    out: torch.Tensor,
) -> torch.Tensor:
    product, dscale = affine_relu_jvp_reference(u, bits, scale, negative_slope, delta)
    out.copy_(product)
    return dscale


def _affine_relu_fake(
    a: torch.Tensor, scale: _Optional, shift: _Optional, skip: _Optional, negative_slope: float
) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.empty_like(a), a.new_empty(((a.numel() + 7) // 8,), dtype=torch.uint8)


def _affine_relu_vjp_fake(
    delta: torch.Tensor, bits: torch.Tensor, scale: _Optional, skip: _Optional, negative_slope: float
) -> torch.Tensor:
    return torch.empty_like(delta)


def _affine_relu_jvp_fake(
    u: torch.Tensor, bits: torch.Tensor, scale: _Optional, negative_slope: float, delta: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.empty_like(u), u.new_empty((u.shape[1],), dtype=compute_dtype(u))


def _affine_relu_out_fake(
    a: torch.Tensor,
    scale: _Optional,
    shift: _Optional,
    skip: _Optional,
    negative_slope: float,
    out: torch.Tensor,
    bits: torch.Tensor,
) -> None:
    return None


def _affine_relu_vjp_out_fake(
    delta: torch.Tensor,
    bits: torch.Tensor,
    scale: _Optional,
    skip: _Optional,
    negative_slope: float,
    out: torch.Tensor,
) -> None:
    return None


def _affine_relu_jvp_out_fake(
    u: torch.Tensor,
    bits: torch.Tensor,
    scale: _Optional,
    negative_slope: float,
    delta: torch.Tensor,
    out: torch.Tensor,
) -> torch.Tensor:
    return u.new_empty((u.shape[1],), dtype=compute_dtype(u))


_affine_relu = _dispatch.define(
    "affine_relu(Tensor a, Tensor? scale, Tensor? shift, Tensor? skip, float negative_slope) -> (Tensor, Tensor)",
    affine_relu_reference,
    _affine_relu_fake,
)
_affine_relu_out = _dispatch.define(
    "affine_relu_out(Tensor a, Tensor? scale, Tensor? shift, Tensor? skip, float negative_slope, "
    "Tensor(a!) out, Tensor(b!) bits) -> ()",
    _affine_relu_out_reference,
    _affine_relu_out_fake,
)
_affine_relu_vjp = _dispatch.define(
    "affine_relu_vjp(Tensor delta, Tensor bits, Tensor? scale, Tensor? skip, float negative_slope) -> Tensor",
    affine_relu_vjp_reference,
    _affine_relu_vjp_fake,
)
_affine_relu_vjp_out = _dispatch.define(
    "affine_relu_vjp_out(Tensor delta, Tensor bits, Tensor? scale, Tensor? skip, float negative_slope, "
    "Tensor(a!) out) -> ()",
    _affine_relu_vjp_out_reference,
    _affine_relu_vjp_out_fake,
)
_affine_relu_jvp = _dispatch.define(
    "affine_relu_jvp(Tensor u, Tensor bits, Tensor? scale, float negative_slope, Tensor delta) -> (Tensor, Tensor)",
    affine_relu_jvp_reference,
    _affine_relu_jvp_fake,
)
_affine_relu_jvp_out = _dispatch.define(
    "affine_relu_jvp_out(Tensor u, Tensor bits, Tensor? scale, float negative_slope, Tensor delta, "
    "Tensor(a!) out) -> Tensor",
    _affine_relu_jvp_out_reference,
    _affine_relu_jvp_out_fake,
)


def _coefficients(name: str, vector: _Optional, like_name: str, like: torch.Tensor) -> _Optional:
    """A checked per-channel vector, contiguous and in the computation's dtype."""
    if vector is None:
        return None
    _checks.check_channels(name, vector, like_name, like)
    dtype = compute_dtype(like)
    return (vector if vector.dtype == dtype else vector.to(dtype)).contiguous()


def affine_relu(
    a: torch.Tensor,
    scale: torch.Tensor | None = None,
    shift: torch.Tensor | None = None,
    skip: torch.Tensor | None = None,
    negative_slope: float = 0.0,
    *,
    out: torch.Tensor | None = None,
    bits_out: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """y = t if t > 0 else negative_slope * t, with t = a * scale[c] + shift[c] + skip; and the bits of t > 0.

    NaN propagates. Without scale, shift and skip it is plain (leaky) ReLU.

    Args:
        a: float32, bfloat16, float16 or float64; `[N, C, ...]`, or any shape without scale and shift.
        scale, shift: `[C]`, any floating dtype; None: 1 and 0.
        skip: like `a`; None: 0.
        negative_slope: slope where t <= 0.
        out: where to write y: dense in the memory format of `a`; may be `a` or `skip` itself.
        bits_out: where to write the bits.

    Returns:
        y: like `a`, in the memory format `dense_format(a)`.
        bits: uint8 `[ceil(numel / 8)]`, packed in the memory order of y; pass `dense_format(y)` on with them.

    Raises:
        TypeError, ValueError: for a wrong dtype, shape, device or layout.
        RuntimeError: if an argument requires grad in grad mode (the operator has no derivative of its own).
    """
    _checks.check_floating("a", a)
    _checks.check_not_differentiated("affine_relu", a=a, scale=scale, shift=shift, skip=skip)
    memory_format = dense_format(a)
    scale = _coefficients("scale", scale, "a", a)
    shift = _coefficients("shift", shift, "a", a)
    if skip is not None:
        _checks.check_like("skip", skip, "a", a)
        skip = to_format(skip, memory_format)
    dense = to_format(a, memory_format)
    if out is None and bits_out is None:
        return _affine_relu(dense, dense, scale, shift, skip, negative_slope)
    if out is None:
        out = torch.empty_like(dense)
    else:
        _checks.check_out(out, "a", a, memory_format)
    if bits_out is None:
        bits_out = torch.empty((a.numel() + 7) // 8, dtype=torch.uint8, device=a.device)
    else:
        _checks.check_bits("bits_out", bits_out, "a", a)
    _affine_relu_out(dense, dense, scale, shift, skip, negative_slope, out, bits_out)
    return out, bits_out


def affine_relu_vjp(
    delta: torch.Tensor,
    bits: torch.Tensor,
    scale: torch.Tensor | None = None,
    negative_slope: float = 0.0,
    *,
    skip: torch.Tensor | None = None,
    memory_format: torch.memory_format | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """delta * slope(bits) * scale[c] + skip: the cotangent of `a` (without scale, of `affine_relu`'s skip, too).

    slope is 1 where the bit is 1, else negative_slope; a slope of 0 gives 0, also for an infinite delta.

    Args:
        delta: the cotangent of y; float32, bfloat16, float16 or float64.
        bits: as `affine_relu` returned them.
        scale: `[C]`, any floating dtype; None: 1.
        negative_slope: slope where the bit is 0.
        skip: what another path has brought to the same value already, like delta; None: nothing.
        memory_format: the order of the bits; delta and skip are brought to it. None: `dense_format(delta)`.
        out: where to write the result: dense in that memory format; may be delta or skip itself.

    Returns:
        like `delta`, in that memory format.

    Raises:
        TypeError, ValueError: for a wrong dtype, shape, device or layout.
        RuntimeError: if an argument requires grad in grad mode (the operator has no derivative of its own).
    """
    _checks.check_floating("delta", delta)
    _checks.check_not_differentiated("affine_relu_vjp", delta=delta, scale=scale, skip=skip)
    _checks.check_bits("bits", bits, "delta", delta)
    scale = _coefficients("scale", scale, "delta", delta)
    if memory_format is None:
        memory_format = dense_format(delta)
    dense = to_format(delta, memory_format)
    if skip is not None:
        _checks.check_like("skip", skip, "delta", delta)
        skip = to_format(skip, memory_format)
    if out is None:
        return _affine_relu_vjp(dense, dense, bits, scale, skip, negative_slope)
    _checks.check_out(out, "delta", delta, memory_format)
    _affine_relu_vjp_out(dense, dense, bits, scale, skip, negative_slope, out)
    return out


def affine_relu_jvp(
    u: torch.Tensor,
    bits: torch.Tensor,
    scale: torch.Tensor | None = None,
    negative_slope: float = 0.0,
    delta: torch.Tensor | None = None,
    *,
    memory_format: torch.memory_format | None = None,
    out: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """u_out = u * slope(bits) * scale[c], and dscale[c] = sum over n and space of delta * slope(bits) * u.

    The tangent of y along u, and in the same pass the scale's second-order gradient.

    Args:
        u: the tangent of `a`; float32, bfloat16, float16 or float64; `[N, C, ...]` where delta is given.
        bits: as `affine_relu` returned them.
        scale: `[C]`, any floating dtype; None: 1.
        negative_slope: slope where the bit is 0.
        delta: the cotangent of y, like u; None: no dscale.
        memory_format: the order of the bits; u and delta are brought to it. None: `dense_format(u)`.
        out: where to write u_out: dense in that memory format; may be `u` or `delta` itself.

    Returns:
        u_out: like u, in that memory format.
        dscale: `[C]`, float32 (float64 for float64), whatever the number of threads; None without delta.

    Raises:
        TypeError, ValueError: for a wrong dtype, shape, device or layout.
        RuntimeError: if an argument requires grad in grad mode (the operator has no derivative of its own).
    """
    if delta is None:
        return affine_relu_vjp(u, bits, scale, negative_slope, memory_format=memory_format, out=out), None
    _checks.check_floating("u", u)
    _checks.check_not_differentiated("affine_relu_jvp", u=u, scale=scale, delta=delta)
    if u.dim() < 2:
        raise ValueError(f"u has shape {tuple(u.shape)}; expected [N, C, ...] where delta is given")
    _checks.check_bits("bits", bits, "u", u)
    _checks.check_like("delta", delta, "u", u)
    scale = _coefficients("scale", scale, "u", u)
    if memory_format is None:
        memory_format = dense_format(u)
    dense, delta = to_format(u, memory_format), to_format(delta, memory_format)
    if out is None:
        return _affine_relu_jvp(dense, dense, bits, scale, negative_slope, delta)
    _checks.check_out(out, "u", u, memory_format)
    return out, _affine_relu_jvp_out(dense, dense, bits, scale, negative_slope, delta, out)
