"""Weights of published checkpoints, read without executing what they hold."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

#: Under which checkpoints keep their weights, in this order; averaged ones first only where asked for.
_NESTED = ("state_dict", "model_state_dict", "model", "net", "weights", "params")
#: What wrappers put before the names (DataParallel, torch.compile, a normalising Sequential's second part).
_PREFIXES = ("module.", "_orig_mod.", "model.", "net.", "1.")
#: Parts that the field's wide ResNets carry without using them.
_UNUSED = ("sub_block1.",)


def read_weights(path: Path | str, key: str | None = None) -> dict[str, Tensor]:
    """The named tensors of a checkpoint (torch's format or .safetensors), without the prefixes that wrappers leave.

    key: under which the checkpoint keeps them; None: under one of the usual names, or at its top.

    Raises FileNotFoundError, or ValueError naming what the file holds instead. Nothing in it is executed.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint at {path}")
    found: Any
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            found = load_file(path)
        else:
            found = torch.load(path, map_location="cpu", weights_only=True)
    except ImportError:
        raise
    except Exception as error:
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(f"{path} is not a checkpoint of tensors alone: {first}") from None
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
    while prefix := next((p for p in _PREFIXES if all(name.startswith(p) for name in tensors)), None):
        tensors = {name[len(prefix) :]: tensor for name, tensor in tensors.items()}
    return {name: tensor for name, tensor in tensors.items() if not name.startswith(_UNUSED)}


def load_weights(model: nn.Module, path: Path | str, key: str | None = None) -> nn.Module:
    """Put a published checkpoint's weights into `model`; see `read_weights`. Returns the model.

    Raises ValueError that names what is missing, what the model has no place for, and which shapes differ, before
    anything is changed.
    """
    weights, own = read_weights(path, key), model.state_dict()
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
    return model
