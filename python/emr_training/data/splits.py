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
    """Images x [N, ...] (floating point in [0, 1], or uint8 in 0..255) and their labels y [N] (int64)."""

    x: Tensor
    y: Tensor

    def __post_init__(self) -> None:
        # Bytes need no look at their values, and a few of them as floats no copy of them all.
        whole = not isinstance(self.x, Tensor) or self.x.dtype is not torch.uint8
        check_images(self.x if whole else as_floats(self.x[:1]).expand(self.x.shape), self.y)

    def __len__(self) -> int:
        return len(self.y)

    def followed_by(self, other: Data) -> Data:
        """These images and then the others, in this one's type. Raises ValueError for images of another shape."""
        if other.x.shape[1:] != self.x.shape[1:]:
            shapes = f"{list(other.x.shape[1:])}; expected {list(self.x.shape[1:])}"
            raise ValueError(f"the further images have the shape {shapes}, that of the training images")
        x = other.x
        if x.dtype != self.x.dtype:
            floats = as_floats(x)
            x = (floats * 255).round().to(torch.uint8) if self.x.dtype is torch.uint8 else floats.to(self.x.dtype)
        return Data(torch.cat([self.x, x.to(self.x.device)]), torch.cat([self.y, other.y.to(self.y.device)]))

    def images(self, rows: Tensor | slice = slice(None)) -> Tensor:
        """These images (all by default) as floating point in [0, 1]."""
        return as_floats(self.x[rows])

    def to(self, device: torch.device) -> Data:
        """The same data on `device`."""
        return Data(self.x.to(device), self.y.to(device))


def as_floats(x: Tensor) -> Tensor:
    """uint8 images as float32 in [0, 1]; others as they are."""
    return x.float().div_(255) if x.dtype is torch.uint8 else x


@dataclass(frozen=True)
class Splits:
    """A data set's disjoint parts (validation None: there is none), its name, and the number of its classes."""

    name: str
    classes: int
    train: Data
    validation: Data | None
    test: Data

    @property
    def held(self) -> Data:
        """The validation part. Raises ValueError where there is none."""
        if self.validation is None:
            raise ValueError(f"{self.name} has no validation split; expected one (validation > 0)")
        return self.validation

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


def held_out(data: Data, validation: float, seed: int) -> tuple[Data, Data | None]:
    """`data` without a stratified part, fixed by `seed`, and that part; None for none.

    validation: its size, a number of images, or below 1 a fraction of them. Raises ValueError unless it is a
    non-negative number that leaves images to train on.
    """
    count = round(validation * len(data)) if 0 <= validation < 1 else validation
    if count != int(count) or not 0 <= count < len(data):
        expected = f"a fraction below 1, or a whole number of images below {len(data)}"
        raise ValueError(f"validation is {validation}; expected {expected}")
    if not count:
        return data, None
    labels = data.y.cpu().numpy()
    rng = np.random.default_rng(seed)
    classes, sizes = np.unique(labels, return_counts=True)
    quotas = count * sizes / len(labels)
    shares = np.floor(quotas).astype(int)
    # What rounding leaves goes to the classes that it took most from.
    shares[np.argsort(shares - quotas, kind="stable")[: int(count) - shares.sum()]] += 1
    taken = np.zeros(len(labels), dtype=bool)
    for label, share in zip(classes, shares, strict=True):
        taken[rng.permutation(np.flatnonzero(labels == label))[:share]] = True
    # In the order of the files.
    first, second = (torch.as_tensor(np.flatnonzero(part), device=data.x.device) for part in (~taken, taken))
    return Data(data.x[first], data.y[first]), Data(data.x[second], data.y[second])


def batches(data: Data, batch_size: int, generator: torch.Generator) -> Iterator[tuple[Tensor, Tensor]]:
    """One epoch of shuffled batches x [batch_size, ...], y [batch_size].

    The incomplete batch at the end is left out: another few samples each epoch, and every batch weighs the
    same in penalties that depend on its size.
    """
    order = torch.randperm(len(data), generator=generator)
    for start in range(0, len(data) - batch_size + 1, batch_size):
        index = order[start : start + batch_size].to(data.x.device)
        yield data.images(index), data.y[index]
