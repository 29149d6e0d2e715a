"""Labelled images in memory, stratified splits of them, and shuffled batches."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from emr_training.errors import check_images


@dataclass(frozen=True)
class Data:
    """Images x [N, ...] (floating point, in [0, 1]) and their labels y [N] (int64)."""

    x: Tensor
    y: Tensor

    def __post_init__(self) -> None:
        check_images(self.x, self.y)

    def __len__(self) -> int:
        return len(self.y)

    def to(self, device: torch.device) -> Data:
        """The same data on `device`."""
        return Data(self.x.to(device), self.y.to(device))


@dataclass(frozen=True)
class Splits:
    """A data set's three disjoint parts, and the name and number of its classes."""

    name: str
    classes: int
    train: Data
    validation: Data
    test: Data

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Shape of one image."""
        return tuple(self.train.x.shape[1:])


def stratified_split(labels: np.ndarray, fractions: Sequence[float], seed: int) -> list[np.ndarray]:
    """Disjoint, shuffled index arrays, one for each fraction, that cover all of `labels` [N].

    Every part gets its fraction of each class, to within one sample of that class. Raises ValueError unless
    the fractions are positive and sum to 1.
    """
    if min(fractions) <= 0 or abs(sum(fractions) - 1) > 1e-9:
        raise ValueError(f"fractions is {list(fractions)}; expected positive numbers that sum to 1")
    rng = np.random.default_rng(seed)
    parts: list[list[np.ndarray]] = [[] for _ in fractions]
    for label in np.unique(labels):
        members = rng.permutation(np.flatnonzero(labels == label))
        cuts = np.rint(np.cumsum(fractions)[:-1] * len(members)).astype(int)
        for part, chunk in zip(parts, np.split(members, cuts), strict=True):
            part.append(chunk)
    return [rng.permutation(np.concatenate(part)) for part in parts]


def batches(data: Data, batch_size: int, generator: torch.Generator) -> Iterator[tuple[Tensor, Tensor]]:
    """One epoch of shuffled batches x [batch_size, ...], y [batch_size].

    The incomplete batch at the end is left out: another few samples each epoch, and every batch weighs the
    same in penalties that depend on its size.
    """
    order = torch.randperm(len(data), generator=generator)
    for start in range(0, len(data) - batch_size + 1, batch_size):
        index = order[start : start + batch_size].to(data.x.device)
        yield data.x[index], data.y[index]
