"""What surrounds a user's model: wrappers to look through, modes to set for a while and put back."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

_WRAPPED = {
    "OptimizedModule": "_orig_mod",
    "DistributedDataParallel": "module",
    "DataParallel": "module",
    "_FabricModule": "_original_module",
}


def unwrap(model: nn.Module) -> nn.Module:
    """The user's own module under `torch.compile`, DDP, DataParallel and Lightning Fabric wrappers."""
    while True:
        attribute = next((_WRAPPED[t.__name__] for t in type(model).__mro__ if t.__name__ in _WRAPPED), None)
        inner = getattr(model, attribute, None) if attribute else None
        if not isinstance(inner, nn.Module):
            return model
        model = inner


def find_ddp(model: nn.Module) -> nn.parallel.DistributedDataParallel | None:
    """The DDP wrapper around the model, wherever it stands in the chain of wrappers; None without one."""
    while True:
        if isinstance(model, nn.parallel.DistributedDataParallel):
            return model
        for attribute in ("_orig_mod", "_forward_module", "module"):
            inner = model.__dict__.get(attribute) or model._modules.get(attribute)
            if isinstance(inner, nn.Module) and type(model).__name__ in _WRAPPED:
                model = inner
                break
        else:
            return None


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Every module in evaluation mode for a while.

    The flag is set module by module: users override `eval()` and `train()`, and freeze single modules.
    """
    modes = [(module, module.training) for module in model.modules()]
    for module, _ in modes:
        module.training = False
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


@contextmanager
def exact_attention() -> Iterator[None]:
    """No fused attention: its kernels have no second derivative."""
    fastpath = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fastpath)


@contextmanager
def plain_kernels(device_type: str) -> Iterator[None]:
    """Autocast off and no fused attention: the model's own arithmetic, twice differentiable."""
    with torch.autocast(device_type, enabled=False), exact_attention():
        yield
