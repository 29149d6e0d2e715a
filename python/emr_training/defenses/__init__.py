"""Defenses: each makes its training examples and returns named loss terms, with any penalties added."""

from emr_training.defenses.base import Defense, Losses
from emr_training.defenses.pgd_at import PGDAT
from emr_training.defenses.standard import Standard

__all__ = ["PGDAT", "Defense", "Losses", "Standard"]
