"""Image folders: a folder for each class."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from emr_training.data.files import DataError
from emr_training.data.splits import Data

_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".ppm", ".pgm", ".webp")


def load_folder(folder: Path) -> Data:
    """Images [N, C, H, W] uint8 in FOLDER/CLASS/*.png (or .jpg, ...), classes in the order of their names.

    All images have one size; they are grey (C = 1) where all are, else RGB. Raises DataError naming a folder without
    classes, or the file that cannot be read or differs in size, and ImportError without Pillow.
    """
    try:
        from PIL import Image
    except ImportError:
        raise ImportError("image folders are read with Pillow: pip install pillow") from None
    classes = sorted(entry for entry in folder.iterdir() if entry.is_dir()) if folder.is_dir() else []
    if not classes:
        raise DataError(f"{folder} has no folders; expected one for each class")
    arrays, labels = [], []
    for label, entry in enumerate(classes):
        paths = sorted(path for path in entry.iterdir() if path.suffix.lower() in _SUFFIXES)
        if not paths:
            raise DataError(f"{entry} has no images; expected files ending in {', '.join(_SUFFIXES)}")
        for path in paths:
            try:
                with Image.open(path) as image:
                    arrays.append(np.asarray(image if image.mode == "L" else image.convert("RGB")))
            except OSError as error:
                raise DataError(f"cannot read {path}: {error}") from None
            labels.append(label)
            if arrays[-1].shape[:2] != arrays[0].shape[:2]:
                found, expected = ("x".join(map(str, a.shape[1::-1])) for a in (arrays[-1], arrays[0]))
                raise DataError(f"{path} has {found} pixels; expected {expected}, as the first image has")
    colour = any(array.ndim == 3 for array in arrays)
    images = [np.repeat(a[:, :, None], 3, 2) if colour and a.ndim == 2 else a for a in arrays]
    x = torch.from_numpy(np.stack(images))
    return Data((x.permute(0, 3, 1, 2) if colour else x[:, None]).contiguous(), torch.tensor(labels))
