"""An end of the time that is given, which loses nothing that was computed."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class TimeUp(Exception):
    """The minutes have passed."""


@contextmanager
def deadline(minutes: float) -> Iterator[None]:
    """Raise TimeUp inside once `minutes` have passed.

    Training is asked to stop as by SIGTERM, so that it ends its step and saves its state; its caller has to raise
    TimeUp. Attacks are interrupted where they are: AutoAttack's state is on disk.
    """
    ends = time.monotonic() + minutes * 60

    def ring(number: int, frame: FrameType | None) -> None:
        if callable(signal.getsignal(signal.SIGTERM)):
            signal.raise_signal(signal.SIGTERM)
        else:
            raise TimeUp

    before = signal.signal(signal.SIGALRM, ring)
    # Again and again: the first may come between training and what follows it.
    signal.setitimer(signal.ITIMER_REAL, max(ends - time.monotonic(), 1e-6), 5)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
