"""Losses: pure functions of tensors, over the global batch when given a `Comm`."""

from ddp_ssl.losses.info_nce import info_nce
from ddp_ssl.losses.mutual_information import mutual_information
from ddp_ssl.losses.vicreg import VICReg, vicreg

__all__ = ["VICReg", "info_nce", "mutual_information", "vicreg"]
