"""Which network published weights are of, by the names and shapes of its parameters."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from emr_training.models.registry import build_model
from emr_training.models.weights import without_normalisation

_BLOCK = re.compile(r"block1\.layer\.(\d+)\.conv1\.weight")


class Recognised(NamedTuple):
    """The options of `model` in a configuration, and the channels and classes of the network."""

    options: dict[str, Any]
    channels: int
    classes: int


def recognise(weights: Mapping[str, Tensor]) -> Recognised:
    """What these are of, among the convolutional networks here; see `read_weights`.

    Raises ValueError if that cannot be told.
    """
    weights, mean, std = without_normalisation(dict(weights))
    options: dict[str, Any] = {}
    mean, std = mean or (0.0,), std or (1.0,)
    if any(mean) or any(value != 1 for value in std):
        options = {"mean": mean, "std": std}
    candidates = ((_wide(weights), "fc.weight"), ("resnet-18", "linear.weight"), ("preactresnet-18", "linear.weight"))
    for name, last in candidates:
        if name is None or "conv1.weight" not in weights or last not in weights:
            continue
        channels, classes = weights["conv1.weight"].shape[1], weights[last].shape[0]
        if _shapes(name, channels, classes) == {n: tuple(t.shape) for n, t in weights.items() if not _counter(n)}:
            return Recognised({"name": name, **options}, channels, classes)
    raise ValueError(
        f"its tensors ({', '.join(list(weights)[:3])}, ...) are of none of the networks that are known by their "
        "parameters (wrn-D-W, resnet-18, preactresnet-18); expected load_weights(model, path), or --model"
    )


def _wide(weights: Mapping[str, Tensor]) -> str | None:
    """The wide ResNet that has this many blocks of this width; the activation's slope leaves no trace but the shortcut,
    which comes with it in the code of Madry et al."""
    blocks = [found for name in weights if (found := _BLOCK.fullmatch(name))]
    if not blocks:
        return None
    width, odd = divmod(weights[blocks[0][0]].shape[0], 16)
    padded = "" if "block2.layer.0.convShortcut.weight" in weights else "-pad"
    return None if odd else f"wrn-{6 * len(blocks) + 4}-{width}{padded}"


def _shapes(name: str, channels: int, classes: int) -> dict[str, tuple[int, ...]]:
    with torch.device("meta"):
        model = build_model(name, (channels, 32, 32), classes)
    return {n: tuple(t.shape) for n, t in model.state_dict().items() if not _counter(n)}


def _counter(name: str) -> bool:
    return name.endswith("num_batches_tracked")
