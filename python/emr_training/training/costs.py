"""What a run costs: time, memory, and passes through the network."""

from __future__ import annotations

import resource
import sys
import time
from dataclasses import dataclass, replace

import torch

from emr_training.attacks.tally import Tally
from emr_training.config.method import (
    EMRConfig,
    FiniteDifferenceConfig,
    InputGradientConfig,
    JacobianConfig,
    LLRConfig,
    PenaltyConfig,
)


@dataclass(frozen=True)
class Costs:
    """Of a run so far, the time before interruptions included; passes and images are those of all devices.

    seconds: wall clock. device_seconds: that times the number of devices.
    peak_memory_bytes: allocated on the GPU, or the resident set of the process on the CPU; the largest of all devices.
    images: trained on. forwards, backwards: images that passed through the network in training and validation; a
    backward pass is that of the inputs, of the parameters, or of both.
    """

    seconds: float = 0.0
    device_seconds: float = 0.0
    peak_memory_bytes: int = 0
    images: int = 0
    forwards: float = 0
    backwards: float = 0


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


def penalty_passes(config: PenaltyConfig) -> tuple[float, float]:
    """How many forward and backward passes a penalty takes for each image of a step, on average.

    The engine's four passes count as two of each; a double backward counts as two forwards and two backwards.
    """
    if isinstance(config, EMRConfig):
        share = config.subset / config.every
        return 2 * share, 2 * share
    if isinstance(config, InputGradientConfig):
        return 2, 2
    if isinstance(config, JacobianConfig):
        count = config.projections or 1
        return 2 * count, 2 * count
    if isinstance(config, FiniteDifferenceConfig):
        return (3 if config.central else 2), 3
    if isinstance(config, LLRConfig):
        # The loss and its slope, the search, and the two points with the double backward.
        return 1 + config.steps + 4, 1 + config.steps + 4
    return 0, 0
