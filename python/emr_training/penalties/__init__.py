"""Penalties: extra loss terms that add to any defense."""

from emr_training.penalties.base import Penalty
from emr_training.penalties.effective_weight import EMR, InputGradient, Jacobian
from emr_training.penalties.linearity import LLR, FiniteDifference
from emr_training.penalties.weissi import WEISSI

__all__ = ["EMR", "LLR", "WEISSI", "FiniteDifference", "InputGradient", "Jacobian", "Penalty"]
