"""Data sets as tensors in memory, split into train, validation and test."""

from emr_training.data.digits import load_digits
from emr_training.data.splits import Data, Splits, batches, stratified_split

__all__ = ["Data", "Splits", "batches", "load_digits", "stratified_split"]
