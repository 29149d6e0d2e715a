"""Convolutions of 3 by 3 pixels with a quarter of the multiplications (Winograd's minimal filtering, F(4x4, 3x3)).

Lavin and Gray, "Fast Algorithms for Convolutional Neural Networks", CVPR 2016: a tile of 4 by 4 outputs comes from 6
by 6 inputs by Aᵀ [(G g Gᵀ) ⊙ (Bᵀ d B)] A, 36 multiplications a channel instead of 144, and for many tiles and channels
at once 36 products of matrices. The points are 0, ±√½, ±√2 and infinity: in float32 the error is then 2 to 3 times that
of the plain sum (root mean square), and some 1e-6 of the result; with Lavin and Gray's 0, ±1, ±2 it is another three
times as large. That of the kernels' gradient is up to 5 times the plain sum's.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from emr_kernels.ops import _checks, _dispatch

#: Outputs and inputs of a tile, down and across.
TILE, READ = 4, 6
#: Output channels that lie side by side in the transformed weight.
_PANEL = 32
#: What channels come in.
UNIT = 16

_A, _B = 0.5**0.5, 2**0.5
_TO_INPUT = [
    [1, 0, -2.5, 0, 1, 0],
    [0, -_B, -2, _A, 1, 0],
    [0, _B, -2, -_A, 1, 0],
    [0, -_A, -0.5, _B, 1, 0],
    [0, _A, -0.5, -_B, 1, 0],
    [0, 1, 0, -2.5, 0, 1],
]
TO_WEIGHT = [
    [1, 0, 0],
    [-2 / 3, -2 / 3 * _A, -1 / 3],
    [-2 / 3, 2 / 3 * _A, -1 / 3],
    [1 / 6, _B / 6, 1 / 3],
    [1 / 6, -_B / 6, 1 / 3],
    [0, 0, 1],
]
_TO_OUTPUT = [
    [1, 1, 1, 1, 1, 0],
    [0, _A, -_A, _B, -_B, 0],
    [0, 0.5, 0.5, 2, 2, 0],
    [0, _A / 2, -_A / 2, 2 * _B, -2 * _B, 1],
]


def _writes_only(*_: object) -> None:
    """What these operators do to tensors without memory: each only writes into its first."""


def winograd_weight_reference(packed: torch.Tensor, weight: torch.Tensor, transposed: bool) -> None:
    """`winograd_weight` in plain PyTorch, into its result."""
    turned = weight.flip(2, 3).permute(2, 3, 0, 1) if transposed else weight.permute(2, 3, 1, 0)
    channels, columns = turned.shape[2:]
    matrix = weight.new_tensor(TO_WEIGHT)
    products = torch.einsum("ai,bj,ijck->abck", matrix, matrix, turned)
    panels = packed.shape[1]
    spread = F.pad(products, (0, panels * _PANEL - columns)).view(READ * READ, channels, panels, _PANEL)
    packed.copy_(spread.transpose(1, 2))


_winograd_weight = _dispatch.define(
    "winograd_weight(Tensor(a!) packed, Tensor weight, bool transposed) -> ()",
    winograd_weight_reference,
    _writes_only,
)


def winograd_weight(weight: torch.Tensor, transposed: bool = False) -> torch.Tensor:
    """What `winograd_convolution` takes for a weight: G g Gᵀ of every kernel.

    Args:
        weight: `[K, C, 3, 3]`, float32, in any order of memory.
        transposed: for the vjp, which makes C channels of K: the kernels are turned around.

    Returns:
        `[36, ceil(K / 32), C, 32]`, row-major, float32; missing output channels are 0. With transposed K and C change
        places.

    Raises:
        TypeError, ValueError: for a wrong dtype or shape.
        RuntimeError: if the weight requires grad in grad mode (the operator has no derivative of its own).
    """
    _check_float32("weight", weight)
    if weight.dim() != 4 or weight.shape[2:] != (3, 3):
        raise ValueError(f"weight has shape {tuple(weight.shape)}; expected [K, C, 3, 3]")
    _checks.check_not_differentiated("winograd_weight", weight=weight)
    rows, columns = weight.shape[:2] if transposed else weight.shape[1::-1]
    packed = weight.new_empty((READ * READ, -(-columns // _PANEL), rows, _PANEL))
    _winograd_weight(weight, packed, weight, transposed)
    return packed


def _check_float32(name: str, tensor: object) -> None:
    if not isinstance(tensor, torch.Tensor) or tensor.dtype != torch.float32:
        found = f"has dtype {tensor.dtype}" if isinstance(tensor, torch.Tensor) else f"is {type(tensor).__name__}"
        raise TypeError(f"{name} {found}; expected a float32 tensor")


def _tiles_of(x: torch.Tensor, extents: Sequence[int], pad_height: int, pad_width: int) -> torch.Tensor:
    """Bᵀ d B of the tiles that outputs of these extents read, `[6, 6, N, down, across, C]`."""
    # The last tiles read beyond the padding.
    beyond = [
        (-(-out // TILE) - 1) * TILE + READ - extent - pad
        for out, extent, pad in zip(extents, x.shape[1:3], (pad_height, pad_width), strict=True)
    ]
    padded = F.pad(x, (0, 0, pad_width, beyond[1], pad_height, beyond[0]))
    tiles = padded.unfold(1, READ, TILE).unfold(2, READ, TILE)
    to_input = x.new_tensor(_TO_INPUT)
    return torch.einsum("ai,bj,nyxcij->abnyxc", to_input, to_input, tiles)


def winograd_convolution_reference(
    y: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    pad_height: int,
    pad_width: int,
) -> None:
    """`winograd_convolution` in plain PyTorch."""
    if y.numel() == 0:
        return
    values = _tiles_of(x, y.shape[1:3], pad_height, pad_width)
    down, across = values.shape[3:5]
    whole = weight.transpose(1, 2).flatten(2)[..., : y.shape[3]]
    products = (values.flatten(2, 4).flatten(0, 1) @ whole).view(READ, READ, len(x), down, across, -1)
    to_output = x.new_tensor(_TO_OUTPUT)
    outputs = torch.einsum("ia,jb,abnyxk->nyixjk", to_output, to_output, products)
    outputs = outputs.reshape(len(x), down * TILE, across * TILE, -1)[:, : y.shape[1], : y.shape[2]]
    # As in the plain sum: rounding would leave what reads nothing but zeros a sign.
    unread = F.max_pool2d(F.pad(x.abs().amax(3), (pad_width, pad_width, pad_height, pad_height)), 3, stride=1) == 0
    outputs = outputs.masked_fill(unread[..., None], 0)
    y.copy_(outputs if bias is None else outputs + bias)


_winograd_convolution = _dispatch.define(
    "winograd_convolution(Tensor(a!) y, Tensor x, Tensor weight, Tensor? bias, SymInt pad_height, "
    "SymInt pad_width) -> ()",
    winograd_convolution_reference,
    _writes_only,
)


def winograd_weight_grad_reference(
    grad: torch.Tensor, x: torch.Tensor, cotangent: torch.Tensor, pad_height: int, pad_width: int
) -> None:
    """`winograd_weight_grad` in plain PyTorch."""
    if cotangent.numel() == 0:
        grad.zero_()
        return
    values = _tiles_of(x, cotangent.shape[1:3], pad_height, pad_width)
    down, across = values.shape[3:5]
    beyond = [tiles * TILE - extent for tiles, extent in ((down, cotangent.shape[1]), (across, cotangent.shape[2]))]
    outputs = (
        F.pad(cotangent, (0, 0, 0, beyond[1], 0, beyond[0])).unflatten(1, (down, TILE)).unflatten(3, (across, TILE))
    )
    to_output, to_weight = (x.new_tensor(matrix) for matrix in (_TO_OUTPUT, TO_WEIGHT))
    spread = torch.einsum("ia,jb,nyixjk->abnyxk", to_output, to_output, outputs)
    products = torch.einsum("abnyxc,abnyxk->abck", values, spread)
    grad.copy_(torch.einsum("ai,bj,abck->kcij", to_weight, to_weight, products))


_winograd_weight_grad = _dispatch.define(
    "winograd_weight_grad(Tensor(a!) grad, Tensor x, Tensor cotangent, SymInt pad_height, SymInt pad_width) -> ()",
    winograd_weight_grad_reference,
    _writes_only,
)


def winograd_convolution(
    y: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    padding: Sequence[int] = (1, 1),
) -> None:
    """Overwrite y with the convolution of x by kernels of 3 by 3 pixels, with stride 1.

    What reads nothing but zeros is its bias to the bit, as in the plain sum; but equal neighbourhoods elsewhere come
    out equal to rounding only, which matters where values are compared, as in max pooling. An infinity makes NaN of the
    4 by 4 tiles that read it, as a NaN does.

    Args:
        y: `[N, H + 2 padding - 2, W + 2 padding - 2, K]`, row-major, float32. Overwritten.
        x: `[N, H, W, C]`, row-major, float32. C and K are multiples of 16.
        weight: `winograd_weight` of the kernels.
        bias: `[K]`, float32.
        padding: zeros down and across, at least 0.

    Raises:
        TypeError, ValueError: for a wrong dtype, shape, device or layout.
        RuntimeError: if a tensor requires grad in grad mode (the operator has no derivative of its own).
    """
    given = {"x": x, "y": y, "weight": weight, **({} if bias is None else {"bias": bias})}
    _check("winograd_convolution", given, padding)
    expected = (READ * READ, -(-y.shape[3] // _PANEL), x.shape[3], _PANEL)
    if weight.shape != expected:
        raise ValueError(f"weight has shape {tuple(weight.shape)}; expected {expected}, from winograd_weight")
    if bias is not None and bias.shape != y.shape[3:]:
        raise ValueError(f"bias has shape {tuple(bias.shape)}; expected ({y.shape[3]},)")
    _winograd_convolution(x, y, x, weight, bias, *padding)


def winograd_weight_grad(x: torch.Tensor, cotangent: torch.Tensor, padding: Sequence[int] = (1, 1)) -> torch.Tensor:
    """The gradient of those kernels: of the sum of the cotangent times the convolution of x.

    Args:
        x: `[N, H, W, C]`, row-major, float32. C and K are multiples of 16.
        cotangent: of the output, `[N, H + 2 padding - 2, W + 2 padding - 2, K]`, row-major, float32.
        padding: of the convolution, down and across.

    Returns:
        `[K, C, 3, 3]`, in channels_last order.

    Raises:
        TypeError, ValueError: for a wrong dtype, shape, device or layout.
        RuntimeError: if a tensor requires grad in grad mode (the operator has no derivative of its own).
    """
    _check("winograd_weight_grad", {"x": x, "cotangent": cotangent}, padding)
    grad = x.new_empty((cotangent.shape[3], 3, 3, x.shape[3])).permute(0, 3, 1, 2)
    _winograd_weight_grad(x, grad, x, cotangent, *padding)
    return grad


def _check(operator: str, tensors: dict[str, torch.Tensor], padding: Sequence[int]) -> None:
    """Of images (the first), the output or its cotangent (the second), and what else is given."""
    (first, x), (second, y) = list(tensors.items())[:2]
    for name, tensor in tensors.items():
        _check_float32(name, tensor)
        dims = 1 if name == "bias" else 4
        if tensor.dim() != dims or not tensor.is_contiguous():
            raise ValueError(
                f"{name} has shape {tuple(tensor.shape)} and strides {tensor.stride()}; expected {dims} extents, "
                "row-major"
            )
        if tensor.device != x.device:
            raise ValueError(f"{name} is on device {tensor.device}; expected {x.device}, that of {first}")
    _checks.check_not_differentiated(operator, **tensors)
    if len(padding) != 2 or min(padding) < 0:
        raise ValueError(f"padding is {tuple(padding)}; expected two numbers, at least 0")
    for name, tensor in ((first, x), (second, y)):
        if tensor.shape[3] % UNIT:
            raise ValueError(f"{name} has {tensor.shape[3]} channels; expected a multiple of {UNIT}")
    extents = [len(x), *(extent + 2 * pad - 2 for extent, pad in zip(x.shape[1:3], padding, strict=True)), y.shape[3]]
    if min(extents) < 0 or list(y.shape) != extents:
        raise ValueError(f"{second} has shape {tuple(y.shape)}; expected {extents}, for {first} of {tuple(x.shape)}")
