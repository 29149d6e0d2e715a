"""Classifiers of other packages, and users' own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from emr_training.guard import left_as_found
from emr_training.importing import import_callable


def import_model(name: str, options: Mapping[str, Any], input_shape: Sequence[int], classes: int) -> nn.Module:
    """What the callable at the import path `name` returns for `options` as keyword arguments, and nothing else.

    How many classes there are is the options' business, such as num_classes=10 for torchvision; `check_fits` looks.

    Raises ValueError for a path without a callable, options that it does not take, or a model of another shape.
    """
    make = import_callable("model.name", name)
    given = ", ".join(f"{key}={value!r}" for key, value in options.items())
    try:
        model = make(**options)
    except TypeError as error:
        raise ValueError(f"model.options do not suit {name}({given}): {error}") from error
    if not isinstance(model, nn.Module):
        raise ValueError(f"{name}({given}) returns an object of type {type(model).__name__}; expected a Module")
    check_fits(model, f"{name}({given})", input_shape, classes, hint="; model.options are its arguments")
    return model


def check_fits(
    model: nn.Module, what: str, input_shape: Sequence[int], classes: int, *, more: bool = False, hint: str = ""
) -> None:
    """Raise ValueError unless the model takes images of `input_shape` and returns logits of so many classes, or `more`.

    what: the model, and hint: what to do, in the error's words. The model is left as it was found.
    """
    images = torch.zeros(2, *input_shape)
    try:
        with left_as_found(model, images.device), torch.no_grad():
            logits = model(images)
    except (RuntimeError, ValueError, IndexError, TypeError) as error:
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(f"{what} cannot take images {list(images.shape)}: {first}") from error
    found = list(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
    enough = more and isinstance(logits, Tensor) and logits.dim() == 2 and logits.shape[1] >= classes
    if found != [2, classes] and not enough:
        raise ValueError(
            f"{what} returns {found} for images {list(images.shape)}; expected logits {[2, classes]}, for the "
            f"{classes} classes of the data{hint}"
        )
