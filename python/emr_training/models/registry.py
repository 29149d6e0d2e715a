"""Which classifier each name builds."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import nn

from emr_training.errors import nearest
from emr_training.models.cnn import SmallCNN
from emr_training.models.mlp import MLP

MODELS: dict[str, Callable[[Sequence[int], int], nn.Module]] = {"mlp": MLP, "cnn": SmallCNN}


def build_model(name: str, input_shape: Sequence[int], classes: int) -> nn.Module:
    """The classifier `name`, freshly initialised, for images of `input_shape` (without the batch dimension).

    Weights are drawn from torch's global random state. Raises ValueError for an unknown name.
    """
    if name not in MODELS:
        raise ValueError(f"model is {name!r}; {nearest(name, list(MODELS))}")
    return MODELS[name](input_shape, classes)
