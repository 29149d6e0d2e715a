"""A few images of CIFAR-10, for a run that only shows that everything works."""

from __future__ import annotations

import os

from torch import Tensor
from torch.utils.data import Dataset, TensorDataset

from emr_training.data import load_data

TRAIN, TEST = 160, 32


def few() -> tuple[Dataset[tuple[Tensor, ...]], Dataset[tuple[Tensor, ...]]]:
    """The first training and test images of the files below $EMR_DATA."""
    found = load_data("cifar10", os.environ["EMR_DATA"], validation=0)
    train, test = found.train, found.test
    return TensorDataset(train.x[:TRAIN], train.y[:TRAIN]), TensorDataset(test.x[:TEST], test.y[:TEST])
