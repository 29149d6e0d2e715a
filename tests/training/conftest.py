"""The digits and two classifiers trained on them, made once."""

from __future__ import annotations

import pytest
from torch import nn

from emr_training.config import make_config
from emr_training.data import Data, Splits, load_digits
from emr_training.training import train


@pytest.fixture(scope="session")
def splits() -> Splits:
    return load_digits(seed=0)


@pytest.fixture(scope="session")
def batch(splits: Splits) -> Data:
    """The first 64 validation digits."""
    return Data(splits.validation.x[:64], splits.validation.y[:64])


@pytest.fixture(scope="session")
def net(splits: Splits) -> nn.Module:
    """An MLP trained on clean digits. Shared: tests must not change it."""
    return train(make_config({"trainer.epochs": 10}), splits.train, None, splits.classes).model


@pytest.fixture(scope="session")
def robust_net(splits: Splits) -> nn.Module:
    """An MLP adversarially trained on digits. Shared: tests must not change it."""
    return train(make_config({"defense": "at", "trainer.epochs": 8}), splits.train, None, splits.classes).model
