"""A penalty on a DDP model is synchronised only by a backward that also went through the DDP forward."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import nn

from emr_kernels.linearize.wrappers import find_ddp

_watched: weakref.WeakSet[nn.Module] = weakref.WeakSet()
_prepared: weakref.WeakSet[nn.Module] = weakref.WeakSet()


def _note_forward(module: nn.Module, args: Any, output: Any) -> None:
    """Forward hook of a DDP wrapper: its next backward is prepared."""
    if torch.is_grad_enabled():
        _prepared.add(module)


class SynchronisationGuard:
    """Knows whether the DDP wrapper ran forward since the last backward.

    DDP averages gradients in a backward that its own forward prepared. The penalty differentiates the inner module;
    its `backward()` alone would leave every process with gradients of its own, silently.
    """

    def __init__(self, ddp: nn.parallel.DistributedDataParallel) -> None:
        self._ddp = weakref.ref(ddp)
        if ddp not in _watched:
            _watched.add(ddp)
            ddp.register_forward_hook(_note_forward)

    @classmethod
    def of(cls, model: nn.Module) -> SynchronisationGuard | None:
        """A guard for the DDP wrapper around the model, if there is one."""
        ddp = find_ddp(model)
        return None if ddp is None else cls(ddp)

    def check(self, grad: torch.Tensor) -> None:
        """Tensor hook of the penalty, run at the start of its backward.

        Raises:
            RuntimeError: if gradients would not be averaged over the processes.
        """
        ddp = self._ddp()
        if ddp is None or not ddp.require_backward_grad_sync:
            return
        if ddp not in _prepared:
            raise RuntimeError(
                "backward() of the effective weight penalty alone on a DistributedDataParallel model would not "
                "synchronise gradients; add the penalty to a loss whose logits come from the DDP model, and call "
                "backward() on the sum"
            )
        # Other losses of the same backward may run after this hook: forget only when it is over.
        torch.autograd.Variable._execution_engine.queue_callback(self._finished)

    def _finished(self) -> None:
        ddp = self._ddp()
        if ddp is not None:
            _prepared.discard(ddp)

    def __getstate__(self) -> dict[str, Any]:
        raise TypeError("a penalty on a DistributedDataParallel model cannot be copied or pickled")
