"""Networks that the benchmarks time; random weights, for shapes alone."""

from __future__ import annotations

import torch
from torch import nn

from emr_training.models import build_model


def build(name: str, input_shape: tuple[int, ...] = (3, 32, 32)) -> tuple[nn.Module, tuple[int, ...]]:
    """A network of ten classes and the shape of one input, by name ("wrn-16-4", "preactresnet-18")."""
    torch.manual_seed(0)
    model = build_model(name, input_shape, 10)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_mean, -0.1, 0.1)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
    return model, input_shape
