"""Small classifiers with and without BatchNorm, for `model.name` as an import path."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from emr_training.models.mlp import MLP


def mlp(input_shape: Sequence[int], classes: int, widths: Sequence[int], batch_norm: bool = False) -> nn.Module:
    """An MLP, with BatchNorm before each ReLU if asked for."""
    model = MLP(input_shape, classes, widths)
    if batch_norm:
        model.layers = _normalized(model.layers)
    return model


def cnn(input_shape: Sequence[int], classes: int, width: int, batch_norm: bool = False) -> nn.Module:
    """Two 4x4 convolutions of stride 2, of `width` and 2 * `width` channels, a layer of 100 units, and the logits.

    The network of Wong and Kolter (2018) at width 16.
    """
    channels, height, width_px = input_shape
    layers = nn.Sequential(
        nn.Conv2d(channels, width, 4, stride=2, padding=1),
        nn.ReLU(),
        nn.Conv2d(width, 2 * width, 4, stride=2, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(2 * width * (height // 4) * (width_px // 4), 100),
        nn.ReLU(),
        nn.Linear(100, classes),
    )
    return _normalized(layers) if batch_norm else layers


def _normalized(layers: nn.Sequential) -> nn.Sequential:
    """The same layers with BatchNorm between each linear layer and its ReLU."""
    result: list[nn.Module] = []
    for layer in layers:
        if isinstance(layer, nn.ReLU):
            before = result[-1]
            if isinstance(before, nn.Conv2d):
                result.append(nn.BatchNorm2d(before.out_channels))
            elif isinstance(before, nn.Linear):
                result.append(nn.BatchNorm1d(before.out_features))
        result.append(layer)
    return nn.Sequential(*result)
