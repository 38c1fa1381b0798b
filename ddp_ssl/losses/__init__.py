"""Losses: pure functions of tensors, over the global batch when given a `Comm`."""

from ddp_ssl.losses.barlow_twins import barlow_twins, barlow_twins_multiview
from ddp_ssl.losses.byol import byol
from ddp_ssl.losses.deepclusterv2 import deepclusterv2, spherical_kmeans
from ddp_ssl.losses.dino import dino
from ddp_ssl.losses.info_nce import info_nce
from ddp_ssl.losses.mmcr import mmcr
from ddp_ssl.losses.moco import moco, mocov3
from ddp_ssl.losses.mutual_information import mutual_information
from ddp_ssl.losses.nnclr import nearest_rows, nnclr
from ddp_ssl.losses.ressl import ressl
from ddp_ssl.losses.simsiam import simsiam
from ddp_ssl.losses.spectral_contrastive import spectral_contrastive
from ddp_ssl.losses.swav import sinkhorn, swav
from ddp_ssl.losses.vicreg import VICReg, vicreg, vicreg_multiview

__all__ = [
    "VICReg",
    "barlow_twins",
    "barlow_twins_multiview",
    "byol",
    "deepclusterv2",
    "dino",
    "info_nce",
    "mmcr",
    "moco",
    "mocov3",
    "mutual_information",
    "nearest_rows",
    "nnclr",
    "ressl",
    "simsiam",
    "sinkhorn",
    "spectral_contrastive",
    "spherical_kmeans",
    "swav",
    "vicreg",
    "vicreg_multiview",
]
