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
            inner = getattr(model, attribute, None)
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
def untouched(model: nn.Module) -> Iterator[None]:
    """Whatever the model's forward stores on its modules for a while is thrown away: buffers and attributes.

    Buffers are copies in the meantime, so that what is written into them in place is lost, too.
    """
    scripted = [m for m in model.modules() if isinstance(m, torch.jit.ScriptModule)]
    plain = [m for m in model.modules() if not isinstance(m, torch.jit.ScriptModule)]
    fixed = [(buffer, buffer.clone()) for m in scripted for buffer in m.buffers(recurse=False)]
    before = [(m, dict(vars(m)), dict(m._buffers)) for m in plain]
    for module, _, buffers in before:
        for name, buffer in buffers.items():
            if buffer is not None:
                module._buffers[name] = buffer.clone()
    try:
        yield
    finally:
        for module, attributes, buffers in before:
            vars(module).clear()
            vars(module).update(attributes)
            module._buffers.clear()
            module._buffers.update(buffers)
        with torch.no_grad():
            for buffer, copy in fixed:
                if not torch.equal(buffer, copy):
                    buffer.copy_(copy)


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


@contextmanager
def ordinary_tensors() -> Iterator[None]:
    """Inside `torch.inference_mode`, `torch.no_grad` for a while instead: autograd refuses inference tensors."""
    if not torch.is_inference_mode_enabled():
        yield
        return
    with torch.inference_mode(False), torch.no_grad():
        yield


def ordinary(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor, or a copy of it that autograd takes."""
    return tensor.clone() if tensor.is_inference() else tensor
