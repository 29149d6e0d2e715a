"""Data sets in the formats they are published in: read right, and faults told by file."""

from __future__ import annotations

import gzip
import os
import pickle
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import TensorDataset

from emr_training.data import Data, DataError, held_out, load_data
from emr_training.data import idx as idx_module

RNG = np.random.default_rng(0)


def idx(array: np.ndarray) -> bytes:
    return struct.pack(f">{1 + array.ndim}I", 0x0800 + array.ndim, *array.shape) + array.tobytes()


def images(count: int, *shape: int) -> np.ndarray:
    return RNG.integers(0, 256, (count, *shape), dtype=np.uint8)


def labels(count: int, classes: int = 10) -> np.ndarray:
    return (np.arange(count) % classes).astype(np.uint8)


def write_idx(folder: Path, packed: bool) -> dict[str, np.ndarray]:
    arrays = {
        "train-images-idx3-ubyte": images(40, 28, 28),
        "train-labels-idx1-ubyte": labels(40),
        "t10k-images-idx3-ubyte": images(10, 28, 28),
        "t10k-labels-idx1-ubyte": labels(10),
    }
    for name, array in arrays.items():
        content = idx(array)
        path = folder / (f"{name}.gz" if packed else name)
        path.write_bytes(gzip.compress(content) if packed else content)
    return arrays


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("name", ["mnist", "fashion-mnist"])
def test_idx(tmp_path: Path, name: str, packed: bool) -> None:
    folder = tmp_path / name
    folder.mkdir()
    arrays = write_idx(folder, packed)
    splits = load_data(name, tmp_path, validation=0, checksums=False)
    assert splits.validation is None and splits.classes == 10 and splits.input_shape == (1, 28, 28)
    assert splits.train.x.dtype is torch.uint8
    assert np.array_equal(splits.train.x[:, 0].numpy(), arrays["train-images-idx3-ubyte"])
    assert np.array_equal(splits.test.y.numpy(), arrays["t10k-labels-idx1-ubyte"])
    floats = splits.test.images()
    assert floats.dtype is torch.float32
    assert np.allclose(floats[:, 0].numpy(), arrays["t10k-images-idx3-ubyte"] / 255)


def test_packed_files_have_to_be_the_published_ones(tmp_path: Path) -> None:
    write_idx(tmp_path, True)
    with pytest.raises(DataError, match=r"train-images-idx3-ubyte.gz has .* expected the published file's, f68b3c2d"):
        load_data("mnist", tmp_path)


def broken(change: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        path = folder / "t10k-images-idx3-ubyte"
        path.write_bytes(change(path.read_bytes()))

    return apply


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (broken(lambda b: b[:-5]), "t10k-images-idx3-ubyte has 7835 values; expected 7840"),
        (broken(lambda b: b"\0\0\x08\x01" + b[4:]), "t10k-images-idx3-ubyte is no idx file of 3 dimensions"),
        (broken(lambda b: b[:7]), "is no idx file"),
        (lambda f: (f / "train-labels-idx1-ubyte").unlink(), "expected train-labels-idx1-ubyte.gz or train-labels"),
        (
            lambda f: (f / "t10k-labels-idx1-ubyte").write_bytes(idx(labels(9))),
            "has 10 t10k images and 9 labels",
        ),
        (
            lambda f: (f / "train-images-idx3-ubyte.gz").write_bytes(gzip.compress(b"x" * 4000)[:-20]),
            "train-images-idx3-ubyte.gz is a damaged gzip file",
        ),
    ],
)
def test_damaged_idx(tmp_path: Path, spoil: Callable[[Path], object], message: str) -> None:
    write_idx(tmp_path, False)
    spoil(tmp_path)
    with pytest.raises(DataError, match=message):
        load_data("mnist", tmp_path, checksums=False)


def test_every_published_sum_names_a_file() -> None:
    for sums in (idx_module._PACKED, idx_module._UNPACKED):
        assert {len(one) for one in sums.values()} == {4}


CIFAR = {
    "cifar10": ([f"data_batch_{n}" for n in range(1, 6)], "test_batch", b"labels", 10),
    "cifar100": (["train"], "test", b"fine_labels", 100),
}


def write_cifar(folder: Path, name: str, binary: bool) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    train, test, key, classes = CIFAR[name]
    written = {}
    for stem in (*train, test):
        x, y = images(120, 3072), labels(120, classes)
        if binary:
            fields = [y[:, None], x] if name == "cifar10" else [y[:, None] // 5, y[:, None], x]
            (folder / f"{stem}.bin").write_bytes(np.concatenate(fields, 1).tobytes())
        else:
            content = {b"data": x, key: y.tolist(), b"batch_label": b"some batch"}
            (folder / stem).write_bytes(pickle.dumps(content, protocol=2))
        written[stem] = x, y
    return written


@pytest.mark.parametrize("binary", [True, False])
@pytest.mark.parametrize("name", CIFAR)
def test_cifar(tmp_path: Path, name: str, binary: bool) -> None:
    written = write_cifar(tmp_path, name, binary)
    splits = load_data(name, tmp_path, validation=0, checksums=False)
    train, test, _, classes = CIFAR[name]
    assert splits.classes == classes and splits.input_shape == (3, 32, 32)
    assert np.array_equal(splits.train.x.flatten(1).numpy(), np.concatenate([written[stem][0] for stem in train]))
    assert np.array_equal(splits.test.y.numpy(), written[test][1])


def test_cifar_binary_files_have_to_be_the_published_ones(tmp_path: Path) -> None:
    write_cifar(tmp_path, "cifar10", True)
    with pytest.raises(DataError, match=r"data_batch_1.bin has .* expected the published file's, 5dd7e06a"):
        load_data("cifar10", tmp_path)


class Evil:
    def __reduce__(self) -> tuple[object, ...]:
        return os.system, ("touch pwned",)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("test_batch.bin", b"\0" * 3072, "test_batch.bin has 3072 bytes; expected a multiple of 3073"),
        ("test_batch.bin", b"", "has 0 bytes"),
        ("test_batch.bin", b"\x0b" + b"\0" * 3072, "test_batch.bin has the label 11; expected labels below 10"),
        (
            "test_batch",
            pickle.dumps({b"data": Evil()}),
            "test_batch is no batch of CIFAR's Python version: it asks for",
        ),
        ("test_batch", b"nonsense", "test_batch is no batch of CIFAR's Python version"),
        ("test_batch", pickle.dumps({b"data": images(2, 3072)}), "test_batch is no batch"),
    ],
)
def test_damaged_cifar(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, content: bytes, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    write_cifar(tmp_path, "cifar10", True)
    (tmp_path / "test_batch.bin").unlink()
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        load_data("cifar10", tmp_path, checksums=False)
    assert not (tmp_path / "pwned").exists()


@pytest.mark.parametrize("shape", [(8, 9), (1, 8, 9), (3, 8, 9), (8, 9, 3)])
@pytest.mark.parametrize("dtype", [np.uint8, np.float64])
def test_npz(tmp_path: Path, shape: tuple[int, ...], dtype: type) -> None:
    x = images(30, *shape)
    path = tmp_path / "some.npz"
    content = x if dtype is np.uint8 else x / 255
    np.savez(path, image=content, label=labels(30, 3), test_image=content[:6], test_label=labels(6, 3))
    splits = load_data("npz", path, validation=0)
    expected = x[:, None] if len(shape) == 2 else x.transpose(0, 3, 1, 2) if shape[-1] == 3 else x
    assert np.allclose(splits.train.images().numpy(), expected / 255)
    assert splits.classes == 3 and len(splits.test) == 6


def test_npz_without_a_test_set_is_split(tmp_path: Path) -> None:
    np.savez(tmp_path / "some.npz", images=images(50, 4, 4), labels=labels(50, 5))
    splits = load_data("npz", tmp_path / "some.npz", validation=10)
    assert [len(part) for part in (splits.train, splits.held, splits.test)] == [30, 10, 10]
    assert torch.bincount(splits.test.y).tolist() == [2] * 5


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"pictures": images(3, 4, 4)}, "has the arrays pictures; expected images or image or x"),
        ({"x": images(3, 4, 4)}, "expected labels or label or y"),
        ({"x": images(3, 4, 4).astype(np.int32), "y": labels(3)}, "has images of int32"),
        ({"x": images(3, 4, 4) * 1.0, "y": labels(3)}, "x has values in"),
        ({"x": images(3, 4, 4), "y": labels(3) * 1.0}, r"has labels \[3\] of float64"),
        ({"x": images(3, 4, 4), "y": labels(2)}, r"y has shape \[2\]"),
        ({"x": np.array([{}], dtype=object), "y": labels(1)}, "is no readable .npz file"),
    ],
)
def test_bad_npz(tmp_path: Path, arrays: dict[str, np.ndarray], message: str) -> None:
    np.savez(tmp_path / "bad.npz", **arrays)
    with pytest.raises(DataError, match=message):
        load_data("npz", tmp_path / "bad.npz")


def test_truncated_npz(tmp_path: Path) -> None:
    path = tmp_path / "cut.npz"
    np.savez(path, x=images(30, 8, 8), y=labels(30))
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(DataError, match=r"cut.npz is no readable .npz file"):
        load_data("npz", path)


def test_image_folder(tmp_path: Path) -> None:
    image = pytest.importorskip("PIL.Image")
    x = images(12, 5, 6, 3)
    for place, array in enumerate(x):
        folder = tmp_path / f"class_{place % 3}"
        folder.mkdir(exist_ok=True)
        image.fromarray(array).save(folder / f"{place:02}.png")
    splits = load_data("folder", tmp_path, validation=0)
    assert splits.classes == 3 and splits.input_shape == (3, 5, 6)
    found = {
        bytes(part.x[i].permute(1, 2, 0).contiguous().numpy())
        for part in (splits.train, splits.test)
        for i in range(len(part))
    }
    assert found == {bytes(array) for array in x}
    (tmp_path / "class_1" / "bad.png").write_bytes(b"no image")
    with pytest.raises(DataError, match=r"cannot read .*bad.png"):
        load_data("folder", tmp_path)
    image.fromarray(x[0][:3]).save(tmp_path / "class_1" / "bad.png")
    with pytest.raises(DataError, match=r"bad.png has 6x3 pixels; expected 6x5"):
        load_data("folder", tmp_path)


def make_dataset() -> TensorDataset:
    return TensorDataset(torch.rand(20, 1, 4, 4), torch.arange(20) % 2)


def make_pair() -> tuple[TensorDataset, TensorDataset]:
    return make_dataset(), make_dataset()


def test_datasets_of_the_user() -> None:
    splits = load_data("test_formats:make_pair", validation=0.5)
    assert [len(part) for part in (splits.train, splits.held, splits.test)] == [10, 10, 20]
    assert len(load_data("test_formats:make_dataset", validation=0).test) == 4
    with pytest.raises(ValueError, match=r"expected a callable as 'package.module:callable'"):
        load_data("test_formats:nothing")


def test_held_out_is_stratified_and_fixed_by_the_seed() -> None:
    data = Data(torch.arange(200, dtype=torch.uint8).view(200, 1, 1, 1), torch.arange(200) % 4)
    train, taken = held_out(data, 40, 0)
    assert taken is not None and torch.bincount(taken.y).tolist() == [10] * 4
    assert sorted([*train.x.flatten().tolist(), *taken.x.flatten().tolist()]) == list(range(200))
    again, other = held_out(data, 0.2, 0)[1], held_out(data, 40, 1)[1]
    assert again is not None and other is not None
    assert torch.equal(taken.x, again.x) and not torch.equal(taken.x, other.x)


def test_held_out_has_the_size_asked_for() -> None:
    y = torch.tensor([0] * 7 + [1] * 11 + [2] * 13)
    for count in (1, 5, 10, 30):
        _, taken = held_out(Data(torch.zeros(31, 1, 1, 1, dtype=torch.uint8), y), count, 0)
        assert taken is not None and len(taken) == count
        expected = count * torch.tensor([7, 11, 13]) / 31
        assert ((torch.bincount(taken.y, minlength=3) - expected).abs() < 1).all()


@pytest.mark.parametrize("validation", [-1, 200, 10.5])
def test_bad_validation_sizes(validation: float) -> None:
    data = Data(torch.zeros(200, 1, 1, 1, dtype=torch.uint8), torch.arange(200) % 4)
    with pytest.raises(ValueError, match=r"validation is"):
        held_out(data, validation, 0)


def test_bad_names() -> None:
    with pytest.raises(ValueError, match=r"did you mean 'mnist'"):
        load_data("mnits", "somewhere")
    with pytest.raises(ValueError, match=r"root is None with data 'cifar10'"):
        load_data("cifar10")
    with pytest.raises(DataError, match=r"no folder .*nowhere"):
        load_data("mnist", "nowhere")


@pytest.mark.parametrize(
    ("name", "train", "test"), [("mnist", 60000, 10000), ("fashion-mnist", 60000, 10000), ("cifar10", 50000, 10000)]
)
def test_the_published_files(name: str, train: int, test: int) -> None:
    root = os.environ.get("EMR_DATA")
    if root is None:
        pytest.skip("EMR_DATA names no folder with the published files")
    splits = load_data(name, root, validation=5000)
    assert (len(splits.train), len(splits.held), len(splits.test)) == (train - 5000, 5000, test)
    assert torch.bincount(splits.held.y).min() > 400
