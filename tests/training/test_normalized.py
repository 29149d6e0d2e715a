"""Models that normalise their images: the same function, exact penalties, and a run that keeps it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from emr_kernels import EffectiveWeightPenalty
from emr_training.checkpoint import load_checkpoint
from emr_training.config import ConfigError, make_config
from emr_training.data import Data, Splits
from emr_training.models import Normalized, build_model
from emr_training.training import train
from emr_training.training.build import make_model

MEAN, STD = (0.3, 0.4, 0.5), (0.2, 0.3, 0.25)


def test_penalty_is_of_the_images_as_they_are() -> None:
    net = build_model("wrn-10-1", (3, 8, 8), 10).double().eval()
    model = Normalized(net, MEAN, STD, 3).double()
    x = torch.rand(4, 3, 8, 8, dtype=torch.float64)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (MEAN, STD))
    torch.testing.assert_close(model(x), net((x - mean) / std))

    penalty = EffectiveWeightPenalty(model, temperature=1.0)
    value = penalty(x)
    assert penalty.engine == "linearized"
    leaf = x.clone().requires_grad_()
    logits = model(leaf)
    total = (logits.softmax(1).detach() * logits).sum() / 4
    (gradient,) = torch.autograd.grad(total, leaf, create_graph=True)
    expected = gradient.square().sum()
    torch.testing.assert_close(value, expected, rtol=1e-9, atol=0)
    found = torch.autograd.grad(value, net.conv1.weight)[0]
    torch.testing.assert_close(found, torch.autograd.grad(expected, net.conv1.weight)[0], rtol=1e-8, atol=1e-12)


def test_a_run_keeps_it(splits: Splits, tmp_path: Path) -> None:
    data = Data(splits.train.x[:128], splits.train.y[:128])
    options = {"model": {"name": "cnn", "mean": [0.3], "std": [0.4]}, "trainer.epochs": 1, "trainer.average": "ema"}
    result = train(make_config(options), data, data, 10, output=tmp_path)
    assert isinstance(result.model, Normalized)
    again = load_checkpoint(tmp_path / "last.pt").model
    assert torch.equal(again(data.images()), result.model(data.images()))
    plain = again.model(data.images())
    assert not torch.allclose(again(data.images()), plain)


def test_bad_settings() -> None:
    with pytest.raises(ConfigError, match="model: expected both mean and std, or none"):
        make_config({"model.mean": [0.5]})
    for options, message in (
        ({"mean": [0.5, 0.5], "std": [0.2]}, r"model.mean is \[0.5, 0.5\]; expected one number, or one for each of 3"),
        ({"mean": [0.5], "std": [0.2, 0.0, 0.2]}, r"model.std is \[0.2, 0.0, 0.2\]; expected numbers > 0"),
    ):
        with pytest.raises(ValueError, match=message):
            make_model(make_config({"model": {"name": "cnn", **options}}), (3, 8, 8), 10)
