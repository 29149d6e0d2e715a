"""The handwritten digits that come with scikit-learn."""

from __future__ import annotations

import torch
from sklearn import datasets

from emr_training.data.splits import Data, Splits, stratified_split

FRACTIONS = (0.55, 0.15, 0.30)


def load_digits(seed: int = 0) -> Splits:
    """The 1797 digits of 8x8 pixels (UCI, E. Alpaydin and C. Kaynak), scaled from 0..16 to [0, 1].

    x is [N, 1, 8, 8] float32. 55% train, 15% validation, 30% test, stratified by class and fixed by `seed`.
    """
    images, labels = datasets.load_digits(return_X_y=True)
    x = torch.as_tensor(images / 16.0, dtype=torch.float32).view(-1, 1, 8, 8)
    y = torch.as_tensor(labels, dtype=torch.int64)
    parts = (Data(x[i], y[i]) for i in map(torch.as_tensor, stratified_split(labels, FRACTIONS, seed)))
    train, validation, test = parts
    return Splits("digits", 10, train, validation, test)
