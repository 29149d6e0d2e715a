"""Effective Margin Regularization for any PyTorch classifier, exact and without double backward."""

from emr_kernels._extension import package_version
from emr_kernels.info import info
from emr_kernels.linearize import UnsupportedModelError, linearize
from emr_kernels.loss import EMRLoss
from emr_kernels.margins import effective_margins, effective_weight_norms, effective_weights
from emr_kernels.penalty import EffectiveWeightPenalty
from emr_kernels.robust import robust_loss

__version__ = package_version()

__all__ = [
    "EMRLoss",
    "EffectiveWeightPenalty",
    "UnsupportedModelError",
    "__version__",
    "effective_margins",
    "effective_weight_norms",
    "effective_weights",
    "info",
    "linearize",
    "robust_loss",
]
