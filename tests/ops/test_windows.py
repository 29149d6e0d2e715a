"""Windows of images: read as slices are, written back, and only inside of the images."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from backends import DTYPES
from emr_kernels import ops
from emr_kernels.ops._dispatch import operators
from emr_kernels.ops.windows import read_windows_reference, write_windows_reference

COUNT, HEIGHT, WIDTH = 5, 2, 3


def where(count: int = COUNT) -> tuple[Tensor, Tensor, Tensor]:
    """Each image once, in some order; corners in both extremes."""
    top, left = torch.randint(8 - HEIGHT, (count,)), torch.randint(10 - WIDTH, (count,))
    top[:2], left[:2] = torch.tensor([0, 7 - HEIGHT]), torch.tensor([9 - WIDTH, 0])
    return torch.randperm(count), top, left


@pytest.fixture(params=["compiled", "reference"])
def both(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the kernels and without."""
    if request.param == "reference":
        for name, reference in (("read_windows", read_windows_reference), ("write_windows", write_windows_reference)):
            monkeypatch.setattr(operators[name], "overload", reference)


@pytest.mark.usefixtures("both")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("channels", [1, 3, 16])
def test_windows_are_slices(dtype: torch.dtype, channels: int) -> None:
    images = torch.randn(COUNT, 7, 9, channels).to(dtype)
    rows, top, left = where()
    windows = ops.read_windows(images, rows, top, left, HEIGHT, WIDTH)
    assert windows.shape == (COUNT, HEIGHT, WIDTH, channels) and windows.dtype == dtype
    for i, (row, t, side) in enumerate(zip(rows, top, left, strict=True)):
        assert torch.equal(windows[i], images[row, t : t + HEIGHT, side : side + WIDTH])


@pytest.mark.usefixtures("both")
@pytest.mark.parametrize("some", [False, True])
def test_writing_changes_the_windows_alone(some: bool) -> None:
    images = torch.randn(COUNT, 7, 9, 4)
    rows, top, left = where()
    windows = torch.randn(COUNT, HEIGHT, WIDTH, 4)
    chosen = torch.tensor([True, False, False, True, True]) if some else None
    expected = images.clone()
    for i in range(COUNT):
        if chosen is None or chosen[i]:
            expected[rows[i], top[i] : top[i] + HEIGHT, left[i] : left[i] + WIDTH] = windows[i]
    ops.write_windows(images, rows, top, left, windows, chosen)
    assert torch.equal(images, expected)


def test_many_windows_in_parallel() -> None:
    images = torch.randn(3000, 7, 9, 8)
    rows, top, left = where(3000)
    windows = ops.read_windows(images, rows, top, left, HEIGHT, WIDTH)
    assert torch.equal(windows, read_windows_reference(images, rows, top, left, HEIGHT, WIDTH))
    written, expected = torch.zeros_like(images), torch.zeros_like(images)
    ops.write_windows(written, rows, top, left, windows)
    write_windows_reference(expected, rows, top, left, windows, None)
    assert torch.equal(written, expected)


@pytest.mark.usefixtures("both")
def test_no_windows() -> None:
    images, none = torch.randn(2, 4, 4, 3), torch.zeros(0, dtype=torch.int64)
    assert ops.read_windows(images, none, none, none, 2, 2).shape == (0, 2, 2, 3)
    ops.write_windows(images, none, none, none, torch.zeros(0, 2, 2, 3))


@pytest.mark.parametrize("chosen", [False, True])
def test_opcheck(chosen: bool) -> None:
    images, (rows, top, left) = torch.randn(COUNT, 7, 9, 2), where()
    torch.library.opcheck(torch.ops.emr.read_windows.default, (images, rows, top, left, HEIGHT, WIDTH))
    windows, mask = torch.randn(COUNT, HEIGHT, WIDTH, 2), torch.rand(COUNT) > 0.5
    torch.library.opcheck(
        torch.ops.emr.write_windows.default, (images, rows, top, left, windows, mask if chosen else None)
    )


def test_compile() -> None:
    def function(images: Tensor, rows: Tensor, top: Tensor, left: Tensor, chosen: Tensor) -> Tensor:
        doubled = 2 * images
        windows = ops.read_windows(doubled, rows, top, left, HEIGHT, WIDTH)
        ops.write_windows(doubled, rows, top, left, windows + 1, chosen)
        return doubled

    given = torch.randn(COUNT, 7, 9, 2), *where(), torch.rand(COUNT) > 0.5
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")(*given)
    assert torch.equal(compiled, function(*given))


@pytest.mark.usefixtures("both")
@pytest.mark.parametrize(("name", "value"), [("rows", COUNT), ("rows", -1), ("top", 6), ("left", 7), ("left", -1)])
def test_windows_outside_are_refused(name: str, value: int) -> None:
    images = torch.randn(COUNT, 7, 9, 2)
    at = dict(zip(("rows", "top", "left"), where(), strict=True))
    at[name][3] = value
    with pytest.raises(RuntimeError, match=rf"{name} holds numbers outside \[0, "):
        ops.read_windows(images, **at, height=HEIGHT, width=WIDTH)
    with pytest.raises(RuntimeError, match=rf"{name} holds numbers outside \[0, "):
        ops.write_windows(images, **at, windows=torch.zeros(COUNT, HEIGHT, WIDTH, 2))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"images": [1.0]}, TypeError, "images is list"),
        ({"images": torch.zeros(COUNT, 7, 9)}, ValueError, "images has shape"),
        ({"images": torch.zeros(COUNT, 2, 7, 9).permute(0, 2, 3, 1)}, ValueError, "strides"),
        ({"top": torch.zeros(COUNT)}, TypeError, "top has dtype torch.float32; expected torch.int64"),
        ({"left": torch.zeros(2, dtype=torch.int64)}, ValueError, "left has shape"),
        ({"rows": 3}, TypeError, "rows is int"),
        ({"windows": torch.zeros(COUNT, HEIGHT, WIDTH, 3)}, ValueError, "windows has shape"),
        ({"windows": torch.zeros(COUNT, HEIGHT, WIDTH, 2).double()}, ValueError, "torch.float64"),
        ({"windows": torch.zeros(COUNT, 0, WIDTH, 2)}, ValueError, "the windows are 0 x 3"),
        ({"windows": None}, TypeError, "windows is NoneType"),
        ({"chosen": torch.zeros(COUNT)}, ValueError, "chosen is torch.float32"),
    ],
)
def test_bad_arguments(change: dict[str, Any], error: type[Exception], message: str) -> None:
    rows, top, left = where()
    given: dict[str, Any] = {"images": torch.zeros(COUNT, 7, 9, 2), "rows": rows, "top": top, "left": left}
    given["windows"] = torch.zeros(COUNT, HEIGHT, WIDTH, 2)
    with pytest.raises(error, match=message):
        ops.write_windows(**{**given, **change})


def test_a_lost_gradient_is_refused() -> None:
    images = torch.zeros(COUNT, 7, 9, 2, requires_grad=True)
    with pytest.raises(RuntimeError, match="images requires grad"):
        ops.read_windows(images, *where(), HEIGHT, WIDTH)
