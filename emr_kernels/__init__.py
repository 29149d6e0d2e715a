"""Effective Margin Regularization for any PyTorch classifier, exact and without double backward."""

try:
    from emr_kernels._extension import package_version
except ModuleNotFoundError as error:
    if error.name != "torch":
        raise
    message = "emr_kernels needs PyTorch 2.11 or later, and there is none here: pip install torch"
    raise ModuleNotFoundError(message, name="torch") from None
from emr_kernels.info import info
from emr_kernels.linearize import UnsupportedModelError, linearize
from emr_kernels.loss import EMRLoss
from emr_kernels.margins import effective_margins, effective_weight_norms, effective_weights
from emr_kernels.memory import keep_memory
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
    "keep_memory",
    "linearize",
    "robust_loss",
]
