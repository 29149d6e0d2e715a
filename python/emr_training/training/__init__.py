"""Training: the loop, its schedules, averages, records and checkpoints."""

from emr_training.training.build import make_attack, make_defense, make_penalties
from emr_training.training.metrics import EpochMetrics
from emr_training.training.trainer import TrainResult, train
from emr_training.training.watch import TrainingDiverged

__all__ = ["EpochMetrics", "TrainResult", "TrainingDiverged", "make_attack", "make_defense", "make_penalties", "train"]
