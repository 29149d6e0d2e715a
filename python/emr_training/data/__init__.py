"""Data sets as tensors in memory, split into train, validation and test."""

from emr_training.data.archive import load_npz
from emr_training.data.augmentation import Augmentation, Mixed
from emr_training.data.digits import load_digits
from emr_training.data.files import DataError
from emr_training.data.load import DATA_SETS, load_data
from emr_training.data.splits import Data, Splits, as_floats, batches, held_out, stratified_split

__all__ = [
    "DATA_SETS",
    "Augmentation",
    "Data",
    "DataError",
    "Mixed",
    "Splits",
    "as_floats",
    "batches",
    "held_out",
    "load_data",
    "load_digits",
    "load_npz",
    "stratified_split",
]
