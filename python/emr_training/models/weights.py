"""Weights of published checkpoints, read without executing what they hold."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from emr_training.models.normalized import Normalized

#: Under which checkpoints keep their weights, in this order; averaged ones first only where asked for.
_NESTED = ("state_dict", "model_state_dict", "model", "net", "weights", "params")
#: What wrappers put before the names (DataParallel, torch.compile, a normalising Sequential's second part).
_PREFIXES = ("module.", "_orig_mod.", "model.", "net.", "1.")
#: Parts that the field's wide ResNets carry without using them, and another name for the whole model.
_UNUSED = ("sub_block1.", "attacker.")
#: Under which last names a model that normalises its images keeps their means and standard deviations.
_NORMALISATION = (("mean", "mu", "new_mean"), ("std", "sigma", "new_std"))


def _harmless() -> list[Any]:
    """Types beside tensors that training scripts leave in checkpoints and that do nothing when they are made: numbers
    of NumPy, under their names before and since its version 2, and parsed arguments."""
    scalar = np.float64(0.0).__reduce__()[0]
    kinds = {type(np.dtype(kind)) for kind in "?bBhHiIlLqQefd"}
    names = [(scalar, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")]
    return [*names, np.dtype, *kinds, argparse.Namespace]


def _unpickled(path: Path) -> Any:
    """What torch.save wrote. Raises ValueError naming what in it would have to be executed."""
    allowed = _harmless()
    try:
        with torch.serialization.safe_globals(allowed):
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        fault = (str(error).splitlines() or [type(error).__name__])[0]
        try:
            with torch.serialization.safe_globals(allowed):
                others = torch.serialization.get_unsafe_globals_in_checkpoint(path)
        except Exception:  # no file of torch's at all
            others = []
        if others:
            fault = f"it holds {', '.join(sorted(others))}, which reading would execute; expected a state_dict"
        raise ValueError(f"{path} is not a checkpoint of tensors alone: {fault}") from None


def read_weights(path: Path | str, key: str | None = None) -> dict[str, Tensor]:
    """The named tensors of a checkpoint (torch's format or .safetensors), without the prefixes that wrappers leave.

    key: under which the checkpoint keeps them; None: under one of the usual names, or at its top.

    Raises FileNotFoundError, or ValueError naming what the file holds instead. Nothing in it is executed.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint at {path}")
    found: Any
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        try:
            found = load_file(path)
        except Exception as error:
            raise ValueError(f"{path} is not a checkpoint of tensors alone: {error}") from None
    else:
        found = _unpickled(path)
    for name in (key,) if key is not None else _NESTED:
        if isinstance(found, Mapping) and isinstance(found.get(name), Mapping):
            found = found[name]
            break
    else:
        if key is not None:
            keys = sorted(map(str, found)) if isinstance(found, Mapping) else [type(found).__name__]
            raise ValueError(f"{path} has no weights under {key!r}; it holds {', '.join(keys[:8])}")
    tensors = {str(n): t for n, t in found.items() if isinstance(t, Tensor)} if isinstance(found, Mapping) else {}
    if not tensors:
        raise ValueError(f"{path} holds no tensors by name; expected a state_dict, or one under {', '.join(_NESTED)}")
    return _bare(tensors)


def _bare(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """These without the prefixes that all of them have, and without what is not used."""
    while True:
        tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith(_UNUSED)}
        prefix = next((p for p in _PREFIXES if tensors and all(name.startswith(p) for name in tensors)), None)
        if prefix is None:
            return tensors
        tensors = {name[len(prefix) :]: tensor for name, tensor in tensors.items()}


def without_normalisation(
    weights: dict[str, Tensor],
) -> tuple[dict[str, Tensor], tuple[float, ...] | None, tuple[float, ...] | None]:
    """`weights` without what normalises images, and the means and standard deviations of that, where it is there."""
    rest: dict[str, Tensor] = {}
    numbers: list[tuple[float, ...] | None] = [None, None]
    for name, tensor in weights.items():
        place = next((i for i, names in enumerate(_NORMALISATION) if name.rpartition(".")[2] in names), None)
        if place is None:
            rest[name] = tensor
        else:
            numbers[place] = tuple(tensor.flatten().tolist())
    return _bare(rest), numbers[0], numbers[1]


def _normalised_alike(weights: dict[str, Tensor], model: nn.Module, path: Path | str) -> dict[str, Tensor]:
    """`weights` without what normalises images. Raises ValueError unless `model` does so by the same numbers."""
    rest, *found = without_normalisation(weights)
    own = torch.zeros(1), torch.ones(1)
    if isinstance(model, Normalized):
        own = model.mean.flatten(), model.std.flatten()
    theirs = [mine if given is None else torch.tensor(given) for mine, given in zip(own, found, strict=True)]
    for mine, other in zip(own, theirs, strict=True):
        alike = len(mine) in (1, len(other)) or len(other) == 1
        if not alike or not torch.allclose(mine, other.to(mine), atol=1e-4):
            mean, std = ([round(float(value), 6) for value in values] for values in theirs)
            given = f"model.mean={mean} model.std={std}".replace(", ", ",")
            raise ValueError(f"{path} is of a model that normalises its images; expected {given}")
    return rest


def load_weights(model: nn.Module, path: Path | str, key: str | None = None) -> nn.Module:
    """Put a published checkpoint's weights into `model`; see `read_weights`. Returns the model.

    Where the checkpoint keeps a mean and a standard deviation of images, the model has to be `Normalized` with these;
    where it does not, nothing tells whether the images were normalised.

    Raises ValueError that names what is missing, what the model has no place for, and which shapes differ, before
    anything is changed.
    """
    return put_weights(model, read_weights(path, key), path)


def put_weights(model: nn.Module, weights: dict[str, Tensor], path: Path | str) -> nn.Module:
    """`load_weights` with what was read from `path`."""
    whole = model
    if isinstance(model, Normalized) or not set(weights) <= set(model.state_dict()):
        weights = _normalised_alike(weights, model, path)
    if isinstance(model, Normalized):
        model = model.model
    own = model.state_dict()
    counters = {name for name in own if name.endswith("num_batches_tracked")}
    faults = []
    missing = sorted(set(own) - set(weights) - counters)
    strange = sorted(set(weights) - set(own))
    shapes = sorted(n for n in set(own) & set(weights) if own[n].shape != weights[n].shape)
    if missing:
        faults.append(f"{len(missing)} of the model's tensors are not in it ({', '.join(missing[:3])})")
    if strange:
        faults.append(f"the model has no {', '.join(strange[:3])} ({len(strange)} such)")
    if shapes:
        name = shapes[0]
        faults.append(f"{name} is {list(weights[name].shape)}, expected {list(own[name].shape)} ({len(shapes)} such)")
    if faults:
        raise ValueError(f"{path} is not of this {type(model).__name__}: {'; '.join(faults)}")
    model.load_state_dict({**{name: own[name] for name in counters}, **weights})
    return whole
