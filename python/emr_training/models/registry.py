"""Which classifier each name builds."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from functools import partial

from torch import nn

from emr_training.errors import nearest
from emr_training.models.cnn import SmallCNN
from emr_training.models.mlp import MLP
from emr_training.models.resnet import PreActResNet18, ResNet18
from emr_training.models.wide_resnet import WideResNet

_PADDED = partial(WideResNet, negative_slope=0.1, shortcut="pad")

#: Called with the shape of an image (channels, height, width) and the number of classes. Names "wrn-D-W" and
#: "wrn-D-W-pad" (LeakyReLU and padded shortcuts, as Madry et al. have it) build any other size, too.
MODELS: dict[str, Callable[[Sequence[int], int], nn.Module]] = {
    "mlp": MLP,
    "cnn": SmallCNN,
    "resnet-18": ResNet18,
    "preactresnet-18": PreActResNet18,
    "wrn-16-4": partial(WideResNet, depth=16, width=4),
    "wrn-28-10": partial(WideResNet, depth=28, width=10),
    "wrn-34-10": partial(WideResNet, depth=34, width=10),
    "wrn-34-10-pad": partial(_PADDED, depth=34, width=10),
}
_WIDE = re.compile(r"wrn-(\d+)-(\d+)(-pad)?")


def build_model(name: str, input_shape: Sequence[int], classes: int) -> nn.Module:
    """The classifier `name`, freshly initialised, for images of `input_shape` (without the batch dimension).

    Weights are drawn from torch's global random state. Raises ValueError for an unknown name.
    """
    wide = _WIDE.fullmatch(name)
    if name not in MODELS and wide:
        family = _PADDED if wide[3] else WideResNet
        return family(input_shape, classes, depth=int(wide[1]), width=int(wide[2]))
    if name not in MODELS:
        raise ValueError(f"model is {name!r}; {nearest(name, list(MODELS))}")
    return MODELS[name](input_shape, classes)
