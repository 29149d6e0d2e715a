"""The networks: parameters as published, names as in the field's checkpoints, shortcuts as stated."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from emr_kernels import EffectiveWeightPenalty
from emr_training.models import MODELS, build_model
from emr_training.models.wide_resnet import WideResNet


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("resnet-18", 11_173_962),
        ("preactresnet-18", 11_172_170),
        ("wrn-28-10", 36_479_194),
        ("wrn-34-10", 46_160_474),
        ("wrn-34-10-pad", 45_901_914),
    ],
)
def test_parameter_counts(name: str, parameters: int) -> None:
    with torch.device("meta"):
        model = build_model(name, (3, 32, 32), 10)
    assert sum(p.numel() for p in model.parameters()) == parameters


@pytest.mark.parametrize("name", [*MODELS, "wrn-10-2", "wrn-10-2-pad"])
def test_every_model_takes_other_shapes_and_classes(name: str) -> None:
    with torch.device("meta"):
        model = build_model(name, (1, 28, 28), 7)
        assert model(torch.zeros(2, 1, 28, 28)).shape == (2, 7)


def test_names_of_the_fields_checkpoints() -> None:
    with torch.device("meta"):
        wide = set(build_model("wrn-10-2", (3, 32, 32), 10).state_dict())
        preact = set(build_model("preactresnet-18", (3, 32, 32), 10).state_dict())
        plain = set(build_model("resnet-18", (3, 32, 32), 10).state_dict())
    assert {"conv1.weight", "block1.layer.0.convShortcut.weight", "block3.layer.0.bn2.running_var", "fc.bias"} <= wide
    assert {"layer2.0.shortcut.0.weight", "layer4.1.bn1.weight", "bn.weight", "linear.bias"} <= preact
    assert {"layer2.0.shortcut.1.running_mean", "bn1.weight", "layer1.1.conv2.weight"} <= plain


def test_padded_shortcut() -> None:
    block = WideResNet((3, 8, 8), 10, depth=10, width=2, negative_slope=0.1, shortcut="pad").eval().block2.layer[0]
    block.conv2.weight.data.zero_()
    x = torch.randn(2, 32, 8, 8)
    h = F.leaky_relu(block.bn1(x), 0.1)
    expected = torch.zeros(2, 64, 4, 4)
    expected[:, 16:48] = F.avg_pool2d(h, 2)
    torch.testing.assert_close(block(x), expected)


@pytest.mark.parametrize("name", ["wrn-10-1-pad", "preactresnet-18"])
def test_the_engine_takes_them(name: str) -> None:
    model = build_model(name, (3, 8, 8), 10)
    penalty = EffectiveWeightPenalty(model)
    penalty.prepare(torch.rand(2, 3, 8, 8))
    assert penalty.engine == "linearized", penalty.engine_reason


@pytest.mark.parametrize(
    ("name", "message"),
    [("wrn-15-4", "depth is 15; expected 6n"), ("preactresnet18", "did you mean 'preactresnet-18'")],
)
def test_unknown_models(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_model(name, (3, 32, 32), 10)
