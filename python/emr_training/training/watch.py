"""What may stop a run: a loss that is no number, and a signal."""

from __future__ import annotations

import math
import signal
import threading
from types import FrameType, TracebackType
from typing import Any

import torch
from torch import Tensor


class TrainingDiverged(ArithmeticError):
    """The loss stopped being a number."""


class LossWatch:
    """Looks at the losses of the last steps, all at once: reading one waits for the device."""

    def __init__(self, every: int) -> None:
        self._every = every
        self._kept: list[tuple[int, int, Tensor, dict[str, Tensor]]] = []

    def add(self, epoch: int, step: int, index: Tensor, terms: dict[str, Tensor]) -> str | None:
        """Keep one step's loss terms, and look at those kept if there are enough."""
        self._kept.append((epoch, step, index, terms))
        return self.look() if len(self._kept) >= self._every else None

    def look(self) -> str | None:
        """None if all losses are finite; else what to say of the first step that is not."""
        kept, self._kept = self._kept, []
        if not kept:
            return None
        totals = torch.stack([torch.stack(list(terms.values())).sum() for *_, terms in kept]).tolist()
        for (epoch, step, index, terms), total in zip(kept, totals, strict=True):
            if not math.isfinite(total):
                losses = {name: float(term) for name, term in terms.items()}
                return (
                    f"training diverged in epoch {epoch} at step {step}: losses {losses} on the training images "
                    f"{index.tolist()}"
                )
        return None


class StopSignal:
    """Inside, SIGTERM (and in a terminal Ctrl-C) only asks to stop: `name` tells which came; outside all is as it was.

    A second signal does what it does without this. Signals are left alone outside the main thread.
    """

    def __init__(self) -> None:
        self.name: str | None = None
        self._before: dict[signal.Signals, Any] = {}

    def _ask(self, number: int, frame: FrameType | None) -> None:
        self.name = signal.Signals(number).name
        for which, handler in self._before.items():
            signal.signal(which, handler)

    def __enter__(self) -> StopSignal:
        if threading.current_thread() is threading.main_thread():
            for which in (signal.SIGTERM, signal.SIGINT):
                self._before[which] = signal.signal(which, self._ask)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for which, handler in self._before.items():
            signal.signal(which, handler)
