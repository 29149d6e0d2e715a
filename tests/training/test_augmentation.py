"""Augmentation of batches: each image is what a crop, a mirror, a cutout or CutMix of it can be."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from emr_training.data import Augmentation

N = 400


@pytest.fixture
def x() -> Tensor:
    """Every pixel of every image another byte value, as far as there are any; never 0."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(1, 256, (N, 3, 6, 5), dtype=torch.uint8, generator=generator)


Y = torch.arange(N) % 10


def augmented(options: Augmentation, x: Tensor, seed: int = 0) -> Tensor:
    return options(x, Y, torch.Generator().manual_seed(seed)).x


def test_nothing_is_only_converted(x: Tensor) -> None:
    torch.testing.assert_close(augmented(Augmentation(), x), x.float() / 255)
    floats = x.double() / 255
    assert torch.equal(augmented(Augmentation(), floats), floats)


def test_crops_are_windows_of_the_padded_image_and_all_of_them(x: Tensor) -> None:
    found = augmented(Augmentation(crop_padding=1), x)
    padded = F.pad(x.float() / 255, (1, 1, 1, 1))
    places = set()
    for image, wide in zip(found, padded, strict=True):
        matches = [(i, j) for i in range(3) for j in range(3) if torch.allclose(image, wide[:, i : i + 6, j : j + 5])]
        assert len(matches) == 1
        places.add(matches[0])
    assert len(places) == 9


def test_about_half_are_mirrored(x: Tensor) -> None:
    found, plain = augmented(Augmentation(flip=True), x), x.float() / 255
    same = (found == plain).flatten(1).all(1)
    mirrored = (found == plain.flip(3)).flatten(1).all(1)
    assert (same ^ mirrored).all()
    assert abs(int(mirrored.sum()) - N / 2) < 4 * (N / 4) ** 0.5


def test_cutout_is_one_square(x: Tensor) -> None:
    found, plain = augmented(Augmentation(cutout=3), x), x.float() / 255
    cut = (found == 0).all(1)
    assert torch.equal(found.masked_select(~cut[:, None]), plain.masked_select(~cut[:, None]))
    sizes = set()
    for mask in cut:
        rows, columns = mask.any(1).nonzero().flatten(), mask.any(0).nonzero().flatten()
        assert mask[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1].all()
        assert int(mask.sum()) == len(rows) * len(columns)
        sizes.add((len(rows), len(columns)))
    assert max(sizes) == (3, 3) and min(sizes) == (2, 2)


def test_cutmix_pastes_a_window_of_the_partner(x: Tensor) -> None:
    mixed = Augmentation(cutmix=True)(x, Y, torch.Generator().manual_seed(0))
    assert mixed.other is not None and mixed.share is not None
    plain = x.float() / 255
    own = (mixed.x == plain).all(1)
    torch.testing.assert_close(own.flatten(1).float().mean(1), mixed.share, atol=0.05, rtol=0)
    for place in range(0, N, 7):
        partners = [k for k in range(N) if torch.equal(mixed.x[place][:, ~own[place]], plain[k][:, ~own[place]])]
        assert any(Y[k] == mixed.other[place] for k in partners)
    assert torch.equal(mixed.y, Y)
    # Half of the area on average, less what the borders cut off.
    assert 0.5 < float(mixed.share.mean()) < 0.75 and float(mixed.share.min()) < 0.2


def test_the_generator_decides(x: Tensor) -> None:
    options = Augmentation(2, True, 2)
    assert torch.equal(augmented(options, x), augmented(options, x))
    assert not torch.equal(augmented(options, x), augmented(options, x, seed=1))


@pytest.mark.parametrize("options", [{"crop_padding": -1}, {"cutout": -2}])
def test_bad_settings(options: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=r"is -\d; expected an integer >= 0"):
        Augmentation(**options)
