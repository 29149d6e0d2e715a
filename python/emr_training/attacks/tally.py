"""How many images attacks ran through their models, for whoever wants to know."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass


@dataclass
class Tally:
    """Images that went forward and backward through a model."""

    forwards: float = 0
    backwards: float = 0

    def add(self, forwards: float, backwards: float) -> None:
        """Count further images."""
        self.forwards += forwards
        self.backwards += backwards


_ACTIVE: ContextVar[Tally | None] = ContextVar("tally", default=None)


@contextmanager
def counting(tally: Tally) -> Iterator[Tally]:
    """Add what attacks run inside to `tally`."""
    token = _ACTIVE.set(tally)
    try:
        yield tally
    finally:
        _ACTIVE.reset(token)


def record(forwards: float, backwards: float) -> None:
    """Add to the tally that is being kept, if one is."""
    tally = _ACTIVE.get()
    if tally is not None:
        tally.add(forwards, backwards)
