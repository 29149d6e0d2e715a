"""Windows of images held pixel by pixel, one window of an image at a time: copied out, and written back."""

from __future__ import annotations

import torch

from emr_kernels.ops import _checks, _dispatch


def _places(
    images: torch.Tensor, rows: torch.Tensor, top: torch.Tensor, left: torch.Tensor, height: int, width: int
) -> torch.Tensor:
    """Which of all pixels are in the windows: `[m * height * width]`."""
    extents = (images.shape[0], images.shape[1] - height + 1, images.shape[2] - width + 1)
    for name, vector, extent in zip(("rows", "top", "left"), (rows, top, left), extents, strict=True):
        if vector.is_cpu and bool(((vector < 0) | (vector >= extent)).any()):
            raise RuntimeError(f"{name} holds numbers outside [0, {extent}); expected windows inside of the images")
    down = torch.arange(height, device=rows.device)[:, None] * images.shape[2]
    inside = (down + torch.arange(width, device=rows.device)).flatten()
    corner = (rows * images.shape[1] + top) * images.shape[2] + left
    return (corner[:, None] + inside).flatten()


def read_windows_reference(
    images: torch.Tensor, rows: torch.Tensor, top: torch.Tensor, left: torch.Tensor, height: int, width: int
) -> torch.Tensor:
    """`read_windows` in plain PyTorch."""
    places = _places(images, rows, top, left, height, width)
    return images.flatten(0, 2).index_select(0, places).view(rows.shape[0], height, width, images.shape[3])


def _read_windows_fake(
    images: torch.Tensor, rows: torch.Tensor, top: torch.Tensor, left: torch.Tensor, height: int, width: int
) -> torch.Tensor:
    return images.new_empty((rows.shape[0], height, width, images.shape[3]))


def write_windows_reference(
    images: torch.Tensor,
    rows: torch.Tensor,
    top: torch.Tensor,
    left: torch.Tensor,
    windows: torch.Tensor,
    chosen: torch.Tensor | None,
) -> None:
    """`write_windows` in plain PyTorch."""
    if chosen is not None:
        rows, top, left, windows = rows[chosen], top[chosen], left[chosen], windows[chosen]
    places = _places(images, rows, top, left, *windows.shape[1:3])
    images.flatten(0, 2).index_copy_(0, places, windows.flatten(0, 2))


def _write_windows_fake(
    images: torch.Tensor,
    rows: torch.Tensor,
    top: torch.Tensor,
    left: torch.Tensor,
    windows: torch.Tensor,
    chosen: torch.Tensor | None,
) -> None:
    return None


_read_windows = _dispatch.define(
    "read_windows(Tensor images, Tensor rows, Tensor top, Tensor left, SymInt height, SymInt width) -> Tensor",
    read_windows_reference,
    _read_windows_fake,
)
_write_windows = _dispatch.define(
    "write_windows(Tensor(a!) images, Tensor rows, Tensor top, Tensor left, Tensor windows, Tensor? chosen) -> ()",
    write_windows_reference,
    _write_windows_fake,
)


def _check(
    images: torch.Tensor, rows: torch.Tensor, top: torch.Tensor, left: torch.Tensor, height: int, width: int
) -> None:
    _checks.check_floating("images", images)
    if images.dim() != 4 or not images.is_contiguous():
        raise ValueError(
            f"images has shape {tuple(images.shape)} and strides {images.stride()}; expected a row-major [N, H, W, C]"
        )
    if height < 1 or width < 1:
        raise ValueError(f"the windows are {height} x {width}; expected at least 1 x 1")
    for name, vector in (("rows", rows), ("top", top), ("left", left)):
        if not isinstance(vector, torch.Tensor):
            raise TypeError(f"{name} is {type(vector).__name__}; expected a tensor")
        if vector.dtype != torch.int64:
            raise TypeError(f"{name} has dtype {vector.dtype}; expected torch.int64")
        if vector.dim() != 1 or vector.shape != rows.shape:
            raise ValueError(f"{name} has shape {tuple(vector.shape)}; expected one number for each window")
        if vector.device != images.device:
            raise ValueError(f"{name} is on device {vector.device}; expected {images.device}, that of images")


def read_windows(
    images: torch.Tensor, rows: torch.Tensor, top: torch.Tensor, left: torch.Tensor, height: int, width: int
) -> torch.Tensor:
    """Copies of windows of images: `images[rows[i], top[i] : top[i] + height, left[i] : left[i] + width]`.

    Args:
        images: `[N, H, W, C]`, row-major; float32, bfloat16, float16 or float64.
        rows, top, left: int64 `[m]`: an image, and the window's first pixel.
        height, width: of every window.

    Returns:
        `[m, height, width, C]`.

    Raises:
        TypeError, ValueError: for a wrong dtype, shape, device or layout.
        RuntimeError: on the CPU, for a window that is not wholly inside its image; or if images requires grad in grad
            mode (the operator has no derivative of its own).
    """
    _check(images, rows, top, left, height, width)
    _checks.check_not_differentiated("read_windows", images=images)
    return _read_windows(images, images, rows.contiguous(), top.contiguous(), left.contiguous(), height, width)


def write_windows(
    images: torch.Tensor,
    rows: torch.Tensor,
    top: torch.Tensor,
    left: torch.Tensor,
    windows: torch.Tensor,
    chosen: torch.Tensor | None = None,
) -> None:
    """Write windows into images, in place; the inverse of `read_windows`.

    Args:
        images, rows, top, left: see `read_windows`. No two windows share a pixel.
        windows: `[m, height, width, C]`, like images.
        chosen: bool `[m]`: write only these; None for all.

    Raises:
        TypeError, ValueError, RuntimeError: as for `read_windows`.
    """
    if not isinstance(windows, torch.Tensor):
        raise TypeError(f"windows is {type(windows).__name__}; expected a tensor")
    if windows.dim() != 4:
        raise ValueError(f"windows has shape {tuple(windows.shape)}; expected [m, height, width, C]")
    _check(images, rows, top, left, windows.shape[1], windows.shape[2])
    _checks.check_not_differentiated("write_windows", images=images, windows=windows)
    expected = (rows.shape[0], *windows.shape[1:3], images.shape[3])
    if windows.shape != expected or windows.dtype != images.dtype or windows.device != images.device:
        raise ValueError(
            f"windows has shape {tuple(windows.shape)}, {windows.dtype} on {windows.device}; expected {expected}, "
            f"{images.dtype} on {images.device}, like images"
        )
    if chosen is not None and (chosen.dtype != torch.bool or chosen.shape != rows.shape):
        raise ValueError(f"chosen is {chosen.dtype} of shape {tuple(chosen.shape)}; expected bool, one for each window")
    _write_windows(images, images, rows.contiguous(), top.contiguous(), left.contiguous(), windows.contiguous(), chosen)
