"""Penalties: extra loss terms that add to any defense."""

from emr_training.penalties.base import Penalty
from emr_training.penalties.emr import EMR

__all__ = ["EMR", "Penalty"]
