"""How good and how robust a classifier is: accuracies with their sampling error, margins and weight norms."""

from emr_training.evaluation.accuracy import Accuracy, clean_accuracy, robust_accuracy, robust_curve
from emr_training.evaluation.evaluate import Evaluation, evaluate

__all__ = ["Accuracy", "Evaluation", "clean_accuracy", "evaluate", "robust_accuracy", "robust_curve"]
