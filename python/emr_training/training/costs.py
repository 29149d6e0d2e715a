"""How many passes through the network a penalty takes."""

from __future__ import annotations

from emr_training.config.method import (
    EMRConfig,
    FiniteDifferenceConfig,
    InputGradientConfig,
    JacobianConfig,
    LLRConfig,
    PenaltyConfig,
)


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
        # The loss and its slope, the search, the slope's four passes, and the two points.
        return 1 + config.steps + 4, 1 + config.steps + 4
    return 0, 0
