"""A penalty on a DDP model is synchronised only by a backward that also went through the DDP forward."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import nn

from emr_kernels.linearize.wrappers import find_ddp


class SynchronisationGuard:
    """Knows whether the DDP wrapper ran forward since the last backward.

    DDP averages gradients in a backward that its own forward prepared. The penalty differentiates the inner module;
    its `backward()` alone would leave every process with gradients of its own, silently.
    """

    def __init__(self, ddp: nn.parallel.DistributedDataParallel) -> None:
        self._ddp = weakref.ref(ddp)
        self._prepared = False
        me = weakref.ref(self)

        def note(module: nn.Module, args: Any, output: Any) -> None:
            guard = me()
            if guard is not None and torch.is_grad_enabled():
                guard._prepared = True

        ddp.register_forward_hook(note)

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
        if not self._prepared:
            raise RuntimeError(
                "backward() of the effective weight penalty alone on a DistributedDataParallel model would not "
                "synchronise gradients; add the penalty to a loss whose logits come from the DDP model, and call "
                "backward() on the sum"
            )
        # Other losses of the same backward may run after this hook: forget only when it is over.
        torch.autograd.Variable._execution_engine.queue_callback(self._finished)

    def _finished(self) -> None:
        self._prepared = False

    def __getstate__(self) -> dict[str, Any]:
        raise TypeError("a penalty on a DistributedDataParallel model cannot be copied or pickled")
