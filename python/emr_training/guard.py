"""Lending a model out for evaluation: unwrapped, and left as it was found."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


@contextmanager
def left_as_found(
    model: Callable[[Tensor], Tensor], device: torch.device, *, evaluation: bool = True
) -> Iterator[None]:
    """The model in evaluation mode, parameters frozen; all as it was on leaving, also by an exception.

    Restored are: each module's training flag, each parameter's requires_grad, each buffer (a model may write into its
    buffers, or put others in their place, even in evaluation mode), and the global random state of the CPU and of
    `device`. Without `evaluation` each module stays in its mode, and what it writes into its buffers stays written. Of
    a callable that is no module nothing is known but the random state.
    """
    module = model if isinstance(model, nn.Module) else nn.Module()
    modes = [(part, part.training) for part in module.modules()]
    parameters = [(p, p.requires_grad) for p in module.parameters()]
    held = [(part, *entry) for part, _ in modes for entry in part.named_buffers(recurse=False)] if evaluation else []
    buffers = [(part, name, b, b.detach().clone()) for part, name, b in held]
    cuda = [device] if device.type == "cuda" else []
    try:
        with torch.random.fork_rng(devices=cuda), torch.inference_mode(False), torch.enable_grad():
            # The flag itself rather than .eval(), which users override to keep some modules in another mode.
            for part, training in modes:
                part.training = training and not evaluation
            for p, _ in parameters:
                p.requires_grad_(False)
            yield
    finally:
        for part, training in modes:
            part.training = training
        for p, requires_grad in parameters:
            p.requires_grad_(requires_grad)
        with torch.no_grad():
            for part, name, b, value in buffers:
                if getattr(part, name, None) is not b:  # as after `self.mean = 0.9 * self.mean + 0.1 * x.mean()`
                    setattr(part, name, b)
                # By value: BatchNorm's update of its statistics does not count as a new version. And only
                # where it changed: writing would invalidate a graph the caller has yet to differentiate.
                if not torch.equal(b, value):
                    b.copy_(value)


def logits_of(model: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """model(x), x left as it is: models normalise what they are given in place, and x is used again."""
    return model(x.clone())


def bare(model: nn.Module) -> nn.Module:
    """The model inside Fabric's and DistributedDataParallel's wrappers, for passes beside the training step.

    Fabric's wrapper refuses a gradient taken behind its back in mixed precision, and DDP would synchronise
    for it.
    """
    # By name: Fabric need not be installed where only attacks are used.
    while any(kind.__name__ in ("_FabricModule", "DistributedDataParallel") for kind in type(model).__mro__):
        assert isinstance(model.module, nn.Module)
        model = model.module
    return model
