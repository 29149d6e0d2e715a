"""Effective Margin Regularization for any PyTorch classifier, exact and without double backward."""

from emr_kernels.linearize import UnsupportedModelError, linearize
from emr_kernels.loss import EffectiveWeightPenalty, EMRLoss
from emr_kernels.margins import effective_margins, effective_weight_norms, effective_weights

__version__ = "0.1.0"

__all__ = [
    "EMRLoss",
    "EffectiveWeightPenalty",
    "UnsupportedModelError",
    "__version__",
    "effective_margins",
    "effective_weight_norms",
    "effective_weights",
    "linearize",
]
