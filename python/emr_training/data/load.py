"""Data sets by name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import Dataset

from emr_training.data.archive import load_npz
from emr_training.data.cifar import load_cifar
from emr_training.data.digits import load_digits
from emr_training.data.files import DataError
from emr_training.data.folder import load_folder
from emr_training.data.idx import load_idx
from emr_training.data.splits import Data, Splits, held_out
from emr_training.errors import nearest
from emr_training.importing import import_callable, is_import_path

Loader = Callable[[str, Path, bool], tuple[Data, "Data | None"]]
_BY_NAME: dict[str, Loader] = {
    "mnist": load_idx,
    "fashion-mnist": load_idx,
    "cifar10": load_cifar,
    "cifar100": load_cifar,
    "npz": lambda name, root, checksums: load_npz(root),
    "folder": lambda name, root, checksums: _load_folders(root),
}
DATA_SETS = ("digits", *_BY_NAME)
#: Of a test set that is split off where a data set has none.
_TEST = 0.2


def load_data(
    name: str,
    root: Path | str | None = None,
    *,
    seed: int = 0,
    validation: float = 0.15,
    checksums: bool = True,
) -> Splits:
    """A data set's training, validation and test images.

    Args:
        name: "digits" (comes with scikit-learn), "mnist", "fashion-mnist", "cifar10", "cifar100", "npz", "folder", or
            "package.module:callable", which returns one Dataset of pairs (image in [0, 1] or uint8, label), or two, for
            training and testing.
        root: the folder of the original files (or one that holds them in mnist/, fashion-mnist/, cifar-10-batches-bin/,
            cifar-10-batches-py/, cifar-100-binary/ or cifar-100-python/); the .npz file; the image folder, which may
            have train/ and test/. Not looked at for digits and callables.
        seed: of every split.
        validation: held out of the training images, a number of them, or below 1 a fraction; 0: none. Digits have
            splits of their own.
        checksums: whether files with published MD5 sums have to have them.

    Raises:
        ValueError: for an unknown name, a missing root, or a size of validation that leaves nothing.
        DataError: naming the file that is missing, damaged or not what its name says.
    """
    if name == "digits":
        return load_digits(seed)
    if is_import_path(name):
        train, test = _from_callable(name)
    elif name not in _BY_NAME:
        raise ValueError(f"data is {name!r}; {nearest(name, list(DATA_SETS))}, or 'package.module:callable'")
    elif root is None:
        raise ValueError(f"root is None with data {name!r}; expected where its files are, such as data.root=DIR")
    else:
        train, test = _BY_NAME[name](name, _folder_of(name, Path(root).expanduser()), checksums)
    if test is None:
        train, test = held_out(train, _TEST, seed)
        assert test is not None
    if train.x.shape[1:] != test.x.shape[1:]:
        shapes = f"{list(train.x.shape[1:])} and {list(test.x.shape[1:])}"
        raise DataError(f"{name} has training and test images of {shapes}; expected one shape")
    train, held = held_out(train, validation, seed)
    classes = _CLASSES.get(name) or 1 + max(int(part.y.max()) for part in (train, test))
    return Splits(name, classes, train, held, test)


_CLASSES = {"mnist": 10, "fashion-mnist": 10, "cifar10": 10, "cifar100": 100}
_FOLDERS = {
    "mnist": ("mnist", "MNIST/raw"),
    "fashion-mnist": ("fashion-mnist", "FashionMNIST/raw"),
    "cifar10": ("cifar-10-batches-bin", "cifar-10-batches-py"),
    "cifar100": ("cifar-100-binary", "cifar-100-python"),
}


def _folder_of(name: str, root: Path) -> Path:
    return next((root / sub for sub in _FOLDERS.get(name, ()) if (root / sub).is_dir()), root)


def _load_folders(root: Path) -> tuple[Data, Data | None]:
    if (root / "train").is_dir() and (root / "test").is_dir():
        return load_folder(root / "train"), load_folder(root / "test")
    return load_folder(root), None


def _from_callable(name: str) -> tuple[Data, Data | None]:
    made = import_callable("data", name)()
    if isinstance(made, tuple):
        if len(made) != 2:
            raise ValueError(f"{name} returns {len(made)} data sets; expected one, or training and test")
        return _collected(made[0], name), _collected(made[1], name)
    return _collected(made, name), None


def _collected(dataset: Dataset[tuple[object, object]], name: str) -> Data:
    """All of a map-style Dataset in memory."""
    count = len(dataset)  # type: ignore[arg-type]
    pairs = [dataset[index] for index in range(count)]
    if not pairs:
        raise DataError(f"{name} is empty; expected images")
    if not all(isinstance(x, Tensor) for x, _ in pairs):
        raise DataError(f"{name} gives images of type {type(pairs[0][0]).__name__}; expected tensors [C, H, W]")
    try:
        images = torch.stack([x for x, _ in pairs])  # type: ignore[misc]
        return Data(images, torch.tensor([int(y) for _, y in pairs]))  # type: ignore[call-overload]
    except (RuntimeError, TypeError, ValueError) as error:
        raise DataError(f"{name}: {error}") from None
