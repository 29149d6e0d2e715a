"""CIFAR-10 and CIFAR-100 in their original binary and Python files."""

from __future__ import annotations

import io
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import torch

from emr_training.data.files import DataError, find, read
from emr_training.data.splits import Data

_PIXELS = 3 * 32 * 32
_BATCHES = [f"data_batch_{number}" for number in range(1, 6)]
#: The published MD5 sums of CIFAR-10's binary files, and of the Python files of both sets.
_SUMS = {
    "data_batch_1.bin": "5dd7e06a14cb22eb9f671a540d1b7c25",
    "data_batch_2.bin": "5ea93a67294ea407fff1d09f752e9692",
    "data_batch_3.bin": "942cd6a4bcdd0dd3c604fbe906cb4421",
    "data_batch_4.bin": "ae636b3ba5c66a11e91e8cb52e771fcb",
    "data_batch_5.bin": "53f37980c15c3d472c316c40844f3f0d",
    "test_batch.bin": "803d5f7f4d78ea53de84dbe85f74fb6d",
    "data_batch_1": "c99cafc152244af753f735de768cd75f",
    "data_batch_2": "d4bba439e000b95fd0a9bffe97cbabec",
    "data_batch_3": "54ebc095f3ab1f0389bbae665268c751",
    "data_batch_4": "634d18415352ddfa80567beed471001a",
    "data_batch_5": "482c414d41f54cd18b22e5b47cb7c3cb",
    "test_batch": "40351d587109b95175f43aff81a1287e",
    "train": "16019d7e3df5f24257cddd939b257f8d",
    "test": "f0ef6b0ae62326f3e7ffdfab6717acfc",
}
_COUNTS = (50_000, 10_000)
_SETS = {
    "cifar10": (_BATCHES, "test_batch", b"labels", 1, 10),
    "cifar100": (["train"], "test", b"fine_labels", 2, 100),
}


class _Arrays(pickle.Unpickler):
    """Reads pickles of dictionaries and NumPy arrays, and refuses whatever else could be run."""

    _ALLOWED = frozenset(
        {
            ("numpy", "ndarray"),
            ("numpy", "dtype"),
            ("numpy.core.multiarray", "_reconstruct"),
            ("numpy._core.multiarray", "_reconstruct"),
            ("_codecs", "encode"),
        }
    )

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self._ALLOWED:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}")
        return super().find_class(module, name)


def _binary(path: Path, md5: str | None, label_bytes: int) -> tuple[np.ndarray, np.ndarray]:
    """Images and labels: for each image its label bytes (CIFAR-100: coarse, fine), then its pixels."""
    content = np.frombuffer(read(path, md5), np.uint8)
    record = label_bytes + _PIXELS
    if not len(content) or len(content) % record:
        raise DataError(f"{path} has {len(content)} bytes; expected a multiple of {record}, an image and its labels")
    rows = content.reshape(-1, record)
    return rows[:, label_bytes:], rows[:, label_bytes - 1]


def _pickled(path: Path, md5: str | None, key: bytes) -> tuple[np.ndarray, np.ndarray]:
    raw = read(path, md5)
    try:
        content = _Arrays(io.BytesIO(raw), encoding="bytes").load()
        images, labels = np.asarray(content[b"data"], np.uint8), np.asarray(content[key], np.uint8)
    except Exception as error:  # a damaged pickle may raise anything
        raise DataError(f"{path} is no batch of CIFAR's Python version: {error}") from None
    if images.ndim != 2 or images.shape[1] != _PIXELS or len(images) != len(labels):
        raise DataError(f"{path} has data {list(images.shape)} and {len(labels)} labels; expected [N, {_PIXELS}] and N")
    return images, labels


def load_cifar(name: str, folder: Path, checksums: bool = True) -> tuple[Data, Data]:
    """Training and test images [N, 3, 32, 32] uint8 of "cifar10" or "cifar100" (its fine classes), from `folder`.

    The files have their original names: those of the binary version (data_batch_1.bin, ...; train.bin), or those of the
    Python version (data_batch_1, ...; train), of which nothing but arrays is read. Raises DataError naming a file that
    is missing, damaged, or (with `checksums`) not the published one (of CIFAR-100's binary files only the size is
    known).
    """
    train, test, key, label_bytes, classes = _SETS[name]
    parts = []
    for stems in (train, [test]):
        images, labels = [], []
        for stem in stems:
            path = find(folder, f"{stem}.bin", stem)
            expected = _SUMS.get(path.name) if checksums else None
            found = _binary(path, expected, label_bytes) if path.suffix == ".bin" else _pickled(path, expected, key)
            if int(found[1].max()) >= classes:
                raise DataError(f"{path} has the label {int(found[1].max())}; expected labels below {classes}")
            images.append(torch.from_numpy(found[0].copy()).view(-1, 3, 32, 32))
            labels.append(torch.from_numpy(found[1].astype(np.int64)))
        parts.append(Data(torch.cat(images), torch.cat(labels)))
    if checksums and (len(parts[0]), len(parts[1])) != _COUNTS:
        found_counts = f"{len(parts[0])} training and {len(parts[1])} test images"
        raise DataError(f"{folder} holds {found_counts}; expected {_COUNTS[0]} and {_COUNTS[1]}, as published")
    return parts[0], parts[1]
