"""The digits and their splits: real, disjoint, stratified, deterministic; and their batches."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn import datasets

from emr_training.data import Data, Splits, batches, load_digits, stratified_split


def parts(splits: Splits) -> list[Data]:
    return [splits.train, splits.validation, splits.test]


def test_splits_hold_every_real_digit_once(splits: Splits) -> None:
    images, labels = datasets.load_digits(return_X_y=True)
    rows = sorted([*row, label] for row, label in zip((images / 16).tolist(), labels.tolist(), strict=True))
    found = torch.cat([torch.cat([p.x.flatten(1), p.y[:, None]], 1) for p in parts(splits)])
    assert sorted(found.tolist()) == rows


def test_splits_are_in_the_unit_box(splits: Splits) -> None:
    for part in parts(splits):
        assert part.x.dtype == torch.float32 and part.x.shape[1:] == (1, 8, 8)
        assert part.x.min() == 0 and part.x.max() == 1
    assert splits.input_shape == (1, 8, 8) and splits.classes == 10


def test_splits_are_stratified(splits: Splits) -> None:
    total = torch.cat([part.y for part in parts(splits)]).bincount()
    for part, fraction in zip(parts(splits), (0.55, 0.15, 0.30), strict=True):
        assert (part.y.bincount() - fraction * total).abs().max() <= 1


def test_splits_follow_the_seed(splits: Splits) -> None:
    again, other = load_digits(seed=0), load_digits(seed=1)
    for part, same, different in zip(parts(splits), parts(again), parts(other), strict=True):
        assert torch.equal(part.x, same.x) and torch.equal(part.y, same.y)
        assert not torch.equal(part.y, different.y)


def test_stratified_split_covers_disjointly() -> None:
    labels = np.repeat([3, 7, 8], [11, 50, 2])
    pieces = stratified_split(labels, (0.5, 0.25, 0.25), seed=3)
    assert sorted(np.concatenate(pieces)) == list(range(63))


@pytest.mark.parametrize("fractions", [(0.5, 0.4), (1.2, -0.2), (1.0, 0.0)])
def test_bad_fractions(fractions: tuple[float, ...]) -> None:
    with pytest.raises(ValueError, match=r"fractions is .* expected positive numbers that sum to 1"):
        stratified_split(np.zeros(4), fractions, seed=0)


def test_batches_shuffle_and_are_full() -> None:
    data = Data(torch.arange(10.0)[:, None] / 10, torch.arange(10))
    generator = torch.Generator().manual_seed(0)
    epochs = [[y.tolist() for _, y in batches(data, 4, generator)] for _ in range(20)]
    assert all([len(b) for b in epoch] == [4, 4] for epoch in epochs)
    assert all(len({i for b in epoch for i in b}) == 8 for epoch in epochs)
    assert len({str(epoch) for epoch in epochs}) > 15
    assert {i for epoch in epochs for b in epoch for i in b} == set(range(10))


def test_batches_keep_images_with_their_labels() -> None:
    data = Data(torch.arange(10.0)[:, None] / 10, torch.arange(10))
    for x, y in batches(data, 5, torch.Generator().manual_seed(1)):
        torch.testing.assert_close(x[:, 0] * 10, y.float())


def test_data_is_checked() -> None:
    with pytest.raises(ValueError, match=r"expected \[0, 1\]"):
        Data(torch.full((2, 3), 16.0), torch.zeros(2, dtype=torch.int64))
