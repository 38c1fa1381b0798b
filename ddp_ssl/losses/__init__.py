"""Losses: pure functions of tensors, over the global batch when given a `Comm`."""

from ddp_ssl.losses.barlow_twins import barlow_twins as barlow_twins
from ddp_ssl.losses.barlow_twins import barlow_twins_multiview as barlow_twins_multiview
from ddp_ssl.losses.byol import byol as byol
from ddp_ssl.losses.deepclusterv2 import deepclusterv2 as deepclusterv2
from ddp_ssl.losses.deepclusterv2 import spherical_kmeans as spherical_kmeans
from ddp_ssl.losses.dino import dino as dino
from ddp_ssl.losses.info_nce import info_nce as info_nce
from ddp_ssl.losses.mmcr import mmcr as mmcr
from ddp_ssl.losses.moco import moco as moco
from ddp_ssl.losses.moco import mocov3 as mocov3
from ddp_ssl.losses.mutual_information import mutual_information as mutual_information
from ddp_ssl.losses.nnclr import nearest_rows as nearest_rows
from ddp_ssl.losses.nnclr import nnclr as nnclr
from ddp_ssl.losses.ressl import ressl as ressl
from ddp_ssl.losses.sigreg import sigreg as sigreg
from ddp_ssl.losses.simsiam import simsiam as simsiam
from ddp_ssl.losses.spectral_contrastive import spectral_contrastive as spectral_contrastive
from ddp_ssl.losses.swav import sinkhorn as sinkhorn
from ddp_ssl.losses.swav import swav as swav
from ddp_ssl.losses.vicreg import VICReg as VICReg
from ddp_ssl.losses.vicreg import vicreg as vicreg
from ddp_ssl.losses.vicreg import vicreg_multiview as vicreg_multiview
