"""What a run or an attack costs: time, memory, and passes through the network."""

from __future__ import annotations

import resource
import sys
import time
from dataclasses import dataclass, replace

import torch

from emr_training.attacks.tally import Tally


@dataclass(frozen=True)
class Costs:
    """Of a run so far, the time before interruptions included; passes and images are those of all devices.

    seconds: wall clock. device_seconds: that times the number of devices.
    peak_memory_bytes: allocated on the GPU, or the resident set of the process on the CPU; the largest of all devices.
    images: trained on, or attacked. forwards, backwards: images that passed through the network, also in validation; a
    backward pass is that of the inputs, of the parameters, or of both.
    """

    seconds: float = 0.0
    device_seconds: float = 0.0
    peak_memory_bytes: int = 0
    images: int = 0
    forwards: float = 0
    backwards: float = 0

    def plus(self, other: Costs) -> Costs:
        """Those of both, of one run after the other on the same images."""
        added = ("seconds", "device_seconds", "forwards", "backwards")
        return Costs(
            **{name: getattr(self, name) + getattr(other, name) for name in added},
            **{name: max(getattr(self, name), getattr(other, name)) for name in ("peak_memory_bytes", "images")},
        )


class Meter:
    """Measures `Costs` from its making on, on top of those of an earlier part of the run.

    Passes are counted in this process; those of a distributed run have equal shares, but for short batches.
    """

    def __init__(self, device: torch.device, devices: int, before: Costs | None = None) -> None:
        self._device, self._devices = device, devices
        self._before = before or Costs()
        self._started = time.perf_counter()
        self.tally = Tally()
        self.images = 0
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)

    def go_on(self, before: Costs) -> None:
        """Add what an earlier part of the run has cost."""
        self._before = before

    def read(self) -> Costs:
        """The costs so far."""
        seconds = time.perf_counter() - self._started
        before, devices = self._before, self._devices
        return replace(
            before,
            seconds=before.seconds + seconds,
            device_seconds=before.device_seconds + seconds * devices,
            peak_memory_bytes=max(before.peak_memory_bytes, _peak_memory(self._device)),
            images=before.images + self.images,
            forwards=before.forwards + self.tally.forwards * devices,
            backwards=before.backwards + self.tally.backwards * devices,
        )


def _peak_memory(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    size = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return size if sys.platform == "darwin" else size * 1024
