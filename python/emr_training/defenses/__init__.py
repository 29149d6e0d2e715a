"""Defenses: each makes its training examples and returns named loss terms, with any penalties added."""

from emr_training.defenses.adapters import mart_loss, trades_loss
from emr_training.defenses.base import Defense, Losses, likeliest
from emr_training.defenses.burn_in import BurnIn
from emr_training.defenses.mail import MAIL
from emr_training.defenses.mart import MART
from emr_training.defenses.pgd_at import PGDAT
from emr_training.defenses.rising import Rising
from emr_training.defenses.standard import Standard
from emr_training.defenses.trades import TRADES

__all__ = [
    "MAIL",
    "MART",
    "PGDAT",
    "TRADES",
    "BurnIn",
    "Defense",
    "Losses",
    "Rising",
    "Standard",
    "likeliest",
    "mart_loss",
    "trades_loss",
]
