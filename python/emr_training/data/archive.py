"""Images and labels in one .npz file."""

from __future__ import annotations

import zipfile
import zlib
from pathlib import Path

import numpy as np
import torch

from emr_training.data.files import DataError
from emr_training.data.splits import Data

#: What reading a damaged file may raise.
_DAMAGED = (
    OSError, ValueError, EOFError, AttributeError, KeyError, TypeError, NotImplementedError,
    zipfile.BadZipFile, zlib.error,
)  # fmt: skip
_IMAGES = ("images", "image", "x")
_LABELS = ("labels", "label", "y")


def _named(arrays: np.lib.npyio.NpzFile, path: Path, prefix: str, names: tuple[str, ...]) -> np.ndarray:
    for name in names:
        if prefix + name in arrays.files:
            return np.asarray(arrays[prefix + name])
    wanted = " or ".join(prefix + name for name in names)
    raise DataError(f"{path} has the arrays {', '.join(arrays.files) or 'none'}; expected {wanted}")


def _data(images: np.ndarray, labels: np.ndarray, path: Path) -> Data:
    if images.ndim == 3:
        images = images[:, None]
    # Channels last, as generated data sets are stored.
    if images.ndim == 4 and images.shape[1] not in (1, 3) and images.shape[-1] in (1, 3):
        images = images.transpose(0, 3, 1, 2)
    if images.dtype != np.uint8 and not np.issubdtype(images.dtype, np.floating):
        raise DataError(f"{path} has images of {images.dtype}; expected uint8, or floating point in [0, 1]")
    if images.dtype != np.uint8:
        images = images.astype(np.float32)
    if labels.ndim != 1 or not np.issubdtype(labels.dtype, np.integer):
        raise DataError(f"{path} has labels {list(labels.shape)} of {labels.dtype}; expected whole numbers [N]")
    try:
        return Data(torch.from_numpy(np.ascontiguousarray(images)), torch.from_numpy(labels.astype(np.int64)))
    except ValueError as error:
        raise DataError(f"{path}: {error}") from None


def load_npz(path: Path | str) -> tuple[Data, Data | None]:
    """The images of a .npz file, and its test images (None: it has none).

    Arrays: images (or image, x) [N, H, W], [N, C, H, W] or [N, H, W, C], uint8 or floating point in [0, 1]; labels (or
    label, y) [N]; and the test set under the same names after "test_". Nothing pickled is read. Raises DataError naming
    the file and what is wrong.
    """
    path = Path(path)
    if not path.is_file():
        raise DataError(f"no file {path}; expected a .npz file of images and labels")
    try:
        with np.load(path, allow_pickle=False) as arrays:
            train = _data(_named(arrays, path, "", _IMAGES), _named(arrays, path, "", _LABELS), path)
            if not any(name.startswith("test_") for name in arrays.files):
                return train, None
            images, labels = _named(arrays, path, "test_", _IMAGES), _named(arrays, path, "test_", _LABELS)
            return train, _data(images, labels, path)
    except DataError:
        raise
    except _DAMAGED as error:
        raise DataError(f"{path} is no readable .npz file: {error}") from None
