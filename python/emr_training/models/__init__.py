"""Small classifiers by name."""

from emr_training.models.registry import MODELS, build_model

__all__ = ["MODELS", "build_model"]
