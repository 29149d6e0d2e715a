"""How good and how robust a classifier is: accuracies with their sampling error, margins and weight norms."""

from emr_training.evaluation.accuracy import Accuracy, clean_accuracy, robust_accuracy, robust_curve
from emr_training.evaluation.evaluate import evaluate
from emr_training.evaluation.result import AttackResult, Evaluation, Margins
from emr_training.evaluation.settings import Settings

__all__ = [
    "Accuracy",
    "AttackResult",
    "Evaluation",
    "Margins",
    "Settings",
    "clean_accuracy",
    "evaluate",
    "robust_accuracy",
    "robust_curve",
]
