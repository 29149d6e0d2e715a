"""Small classifiers by name."""

from emr_training.models.normalized import Normalized
from emr_training.models.registry import MODELS, build_model
from emr_training.models.weights import load_weights

__all__ = ["MODELS", "Normalized", "build_model", "load_weights"]
