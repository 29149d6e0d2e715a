"""Which classifier each name builds."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from torch import nn

from emr_training.errors import nearest
from emr_training.importing import is_import_path
from emr_training.models.cnn import SmallCNN
from emr_training.models.imported import import_model
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


def build_model(
    name: str, input_shape: Sequence[int], classes: int, options: Mapping[str, Any] | None = None
) -> nn.Module:
    """The classifier `name`, freshly initialised, for images of `input_shape` (without the batch dimension).

    name: of those here, or an import path, whose callable gets `options` as keyword arguments; see `import_model`.

    Weights are drawn from torch's global random state. Raises ValueError for an unknown name, or options that it does
    not take.
    """
    if is_import_path(name):
        return import_model(name, options or {}, input_shape, classes)
    if options:
        raise ValueError(f"model.options are {dict(options)!r} with model {name!r}; expected none")
    wide = _WIDE.fullmatch(name)
    if name not in MODELS and wide:
        family = _PADDED if wide[3] else WideResNet
        return family(input_shape, classes, depth=int(wide[1]), width=int(wide[2]))
    if name not in MODELS:
        raise ValueError(f"model is {name!r}; {nearest(name, list(MODELS))}, or 'package.module:callable'")
    return MODELS[name](input_shape, classes)
