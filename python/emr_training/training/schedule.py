"""The learning rate as a function of the step."""

from __future__ import annotations

import math

from emr_training.config.optimization import ScheduleConfig


def learning_rate_factor(config: ScheduleConfig, step: int, steps_per_epoch: int, steps: int) -> float:
    """What multiplies the learning rate at this step (the first is 0) out of `steps`, in [0, 1].

    A milestone of m epochs is passed after m * steps_per_epoch steps: with 60 the 61st epoch is the first at the lower
    rate. cosine: (1 + cos(pi t)) / 2 with t the part of the steps that is done; cyclic: t / peak up to the peak, then
    (1 - t) / (1 - peak). A warm-up of w steps comes before: (step + 1) / w.
    """
    warmup = round(config.warmup * steps_per_epoch)
    if step < warmup:
        return (step + 1) / warmup
    if config.name == "piecewise":
        return config.gamma ** sum(step >= round(m * steps_per_epoch) for m in config.milestones)
    done = (step - warmup) / max(1, steps - warmup)
    if config.name == "cosine":
        return (1 + math.cos(math.pi * done)) / 2
    if config.name == "cyclic":
        # The middle of the step: the first one is not at 0.
        middle = done + 0.5 / max(1, steps - warmup)
        return middle / config.peak if middle < config.peak else (1 - middle) / (1 - config.peak)
    return 1.0
