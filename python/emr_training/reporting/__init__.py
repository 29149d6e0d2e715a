"""Tables, figures and JSON of results."""

from emr_training.reporting.figures import accuracy_bars, accuracy_curves, margin_distributions, training_curves
from emr_training.reporting.results import environment, write_json
from emr_training.reporting.tables import attacks_table, comparison_table, evaluation_table, margins_table, metrics_line

__all__ = [
    "accuracy_bars",
    "accuracy_curves",
    "attacks_table",
    "comparison_table",
    "environment",
    "evaluation_table",
    "margin_distributions",
    "margins_table",
    "metrics_line",
    "training_curves",
    "write_json",
]
