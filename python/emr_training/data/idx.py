"""MNIST and Fashion-MNIST in their original idx files."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from emr_training.data.files import DataError, find, read
from emr_training.data.splits import Data

#: The published MD5 sums of the gzip files, and those of what is in them.
_PACKED = {
    "mnist": {
        "train-images-idx3-ubyte": "f68b3c2dcbeaaa9fbdd348bbdeb94873",
        "train-labels-idx1-ubyte": "d53e105ee54ea40749a09fcbcd1e9432",
        "t10k-images-idx3-ubyte": "9fb629c4189551a2d022fa330f9573f3",
        "t10k-labels-idx1-ubyte": "ec29112dd5afa0611ce80d1b7f02629c",
    },
    "fashion-mnist": {
        "train-images-idx3-ubyte": "8d4fb7e6c68d591d4c3dfef9ec88bf0d",
        "train-labels-idx1-ubyte": "25c81989df183df01b3e8a0aad5dffbe",
        "t10k-images-idx3-ubyte": "bef4ecab320f06d8554ea6380940ec79",
        "t10k-labels-idx1-ubyte": "bb300cfdad3c16e7a12a480ee83cd310",
    },
}
_UNPACKED = {
    "mnist": {
        "train-images-idx3-ubyte": "6bbc9ace898e44ae57da46a324031adb",
        "train-labels-idx1-ubyte": "a25bea736e30d166cdddb491f175f624",
        "t10k-images-idx3-ubyte": "2646ac647ad5339dbf082846283269ea",
        "t10k-labels-idx1-ubyte": "27ae3e4e09519cfbb04c329615203637",
    },
    "fashion-mnist": {
        "train-images-idx3-ubyte": "f4a8712d7a061bf5bd6d2ca38dc4d50a",
        "train-labels-idx1-ubyte": "9018921c3c673c538a1fc5bad174d6f9",
        "t10k-images-idx3-ubyte": "8181f5470baa50b63fa0f6fddb340f0a",
        "t10k-labels-idx1-ubyte": "15d484375f8d13e6eb1aabb0c3f46965",
    },
}


def _array(path: Path, md5: str | None, dimensions: int) -> np.ndarray:
    """The uint8 array of an idx file: a magic number, the extents, then the values, big-endian."""
    content = read(path, md5)
    header = 4 * (1 + dimensions)
    magic = 0x0800 + dimensions
    if len(content) < header or struct.unpack(">I", content[:4])[0] != magic:
        raise DataError(f"{path} is no idx file of {dimensions} dimensions; expected it to begin with {magic:#06x}")
    shape = struct.unpack(f">{dimensions}I", content[4:header])
    size = int(np.prod(shape))
    if len(content) != header + size:
        raise DataError(f"{path} has {len(content) - header} values; expected {size}, as its header says")
    return np.frombuffer(content, np.uint8, offset=header).reshape(shape)


def load_idx(name: str, folder: Path, checksums: bool = True) -> tuple[Data, Data]:
    """Training and test images [N, 1, 28, 28] uint8 of "mnist" or "fashion-mnist", from their four files in `folder`.

    The files have their original names, with .gz or unpacked. Raises DataError naming a file that is missing, damaged,
    or (with `checksums`) not the published one.
    """
    parts: list[Data] = []
    for part in ("train", "t10k"):
        arrays: list[Tensor] = []
        for kind, dimensions in (("images-idx3-ubyte", 3), ("labels-idx1-ubyte", 1)):
            stem = f"{part}-{kind}"
            path = find(folder, f"{stem}.gz", stem)
            sums = _PACKED if path.suffix == ".gz" else _UNPACKED
            expected = sums[name][stem] if checksums else None
            arrays.append(torch.from_numpy(_array(path, expected, dimensions).copy()))
        images, labels = arrays
        if len(images) != len(labels):
            raise DataError(f"{folder} has {len(images)} {part} images and {len(labels)} labels; expected as many")
        parts.append(Data(images[:, None], labels.long()))
    return parts[0], parts[1]
