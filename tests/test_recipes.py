"""Every YAML is the recipe that its header names: its values beside those of the source.

The values are typed from the source, at the place that the header names too, under this project's
keys. `DIFFERS` lists the intended differences: the value here, and the words of the header's
`differs` that say so.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import yaml

from ddp_ssl.config.views import View, views_of
from ddp_ssl.run.configure import load

ROOT = Path(__file__).parents[1]
CONFIGS = ROOT / "configs"
Values = dict[str, Any]
Differs = dict[str, tuple[Any, str]]
"""Key to the value here and the header's words."""
# Places of images, which no source can give.
PLACES = {"data.name", "data.files"}


@dataclass(frozen=True)
class Recipe:
    """What a source says, and where the YAML means to differ."""

    place: str
    """Words of the header's `source`."""
    values: Values
    differs: Differs = field(default_factory=dict)


# --- solo-learn, vturrisi/solo-learn 9187ea3 -----------------------------------------------------


def crop(size: int, area: float, b: float, s: float, h: float, *rest: float) -> View:
    """A view from its `augmentations/*.yaml`; contrast is as brightness there; blur, solarize."""
    blur, solarize = rest
    return View(
        size, (area, 1), (3 / 4, 4 / 3), 0.8, b, b, s, h, 0.2, blur, (0.1, 2), solarize, 0.5
    )


def plain(size: int) -> View:
    """`augmentations/ressl.yaml`, the second view: crop and flip."""
    return View(size, jitter_p=0, gray_p=0, blur_p=0, solarize_p=0)


def solo_views(name: str, cifar: bool) -> list[View]:
    """scripts/pretrain/{cifar,imagenet-100}/augmentations; CIFAR's vicreg.yaml has its own."""
    size = 32 if cifar else 224
    return {
        "asymmetric": [crop(size, 0.08, 0.4, 0.2, 0.1, 0 if cifar else 1, 0),
                       crop(size, 0.08, 0.4, 0.2, 0.1, 0 if cifar else 0.1, 0.2)],
        "symmetric": [crop(size, 0.08, 0.8, 0.8, 0.2, 0.5, 0)] * 2,
        "symmetric_weak": [crop(size, 0.08, 0.4, 0.4, 0.1, 0.5, 0)] * 2,
        "vicreg": [crop(size, 0.2, 0.4, 0.2, 0.1, 0 if cifar else 0.5, 0.1)] * 2,
        "ressl": [crop(size, 0.08, 0.4, 0.2, 0.1, 0.5, 0), plain(size)],
    }[name]  # fmt: skip


SOLO: Values = {
    # solo/methods/base.py: defaults of the schedule; one forward for each view, SyncBN.
    "optim.warmup_epochs": 10, "optim.warmup_lr": 3e-5, "optim.final_lr_fraction": 0,
    "optim.momentum": 0.9, "model.views_forward": "separate", "model.batch_norm": "global",
    "model.backbone_args": {}, "eval.probe_lr": 0.1, "optim.precision": "fp16",
    # batch_size x devices: 256 x 1 for CIFAR, 128 x 2 for ImageNet-100
    "data.batch_size": 256,
}  # fmt: skip
# solo/utils/lars.py; `kwargs` of every YAML with LARS.
SOLO_LARS: Values = {
    "optim.name": "lars", "optim.lars_variant": "solo", "optim.lars_eta": 0.02,
    "optim.lars_clip": True, "optim.lars_bound_1d": None,
}  # fmt: skip
# solo/methods/base.py (stem), solo/data/classification_dataloader.py (evaluation: 256 to 224,
# torchvision's bilinear; CIFAR as it is), solo/data/pretrain_dataloader.py (normalisation).
SOLO_CIFAR: Values = {
    "model.stem": "small_pad2", "crop": (32, 32),
    "normalisation": ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
}  # fmt: skip
SOLO_IMAGENET: Values = {
    "model.stem": "standard", "crop": (256, 224, "bilinear"),
    "normalisation": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
}  # fmt: skip

# Per method: projector, its norm and bias, optimiser, augmentation; then for ImageNet-100 and for
# CIFAR the rate, the decay and the method's keys. From the YAMLs and from solo/methods/*.py.
SoloRow = tuple[Sequence[int], str, bool, str, str, tuple[float, float, Values],
                tuple[float, float, Values]]  # fmt: skip
BARLOW = {"off_diagonal": 0.0051, "multiview": "pairs"}
BYOL = {"momentum": 0.99, "final_momentum": 1}
DEEPCLUSTER = {"prototypes": [3000] * 3, "temperature": 0.1, "iterations": 10}
DINO = {
    "prototypes": 4096, "student_temperature": 0.1, "teacher_temperature": 0.07,
    "warmup_teacher_temperature": 0.04, "momentum": 0.9995, "final_momentum": 1,
    "freeze_epochs": 1, "norm_last_layer": True,
}  # fmt: skip
MOCO2 = {"temperature": 0.2, "momentum": 0.99, "final_momentum": 0.999}
MOCO3 = {"temperature": 0.2, "predictor_hidden": 4096, "momentum": 0.99, "final_momentum": 1}
NNCLR = {"temperature": 0.2, "queue_size": 65536, "predictor_hidden": 4096}
RESSL = {"query_temperature": 0.1, "key_temperature": 0.04, "queue_size": 65536,
         "momentum": 0.99, "final_momentum": 1}  # fmt: skip
SIMCLR = {"temperature": 0.2}
SIMSIAM = {"predictor_hidden": 512}
SWAV = {"prototypes": 3000, "temperature": 0.1, "epsilon": 0.05, "iterations": 3,
        "freeze_epochs": 2, "queue_size": 3840, "queue_epoch": 50, "variant": "solo"}  # fmt: skip
VICREG = {"invariance": 25, "variance": 25, "covariance": 1}
ROWS: dict[str, SoloRow] = {
    # scale_loss 0.1; solo/losses/barlow.py all-reduces out of autograd's sight: 0.1 / 2 GPUs
    "barlow_twins": ([2048] * 3, "batch", True, "lars", "asymmetric",
                     (0.3, 1e-4, {**BARLOW, "scale": 0.1 / 2}),
                     (0.3, 1e-4, {**BARLOW, "scale": 0.1})),
    "byol": ([4096, 256], "batch", True, "lars", "asymmetric",
             (0.5, 1e-6, {**BYOL, "predictor_hidden": 8192}),
             (1.0, 1e-5, {**BYOL, "predictor_hidden": 4096})),
    "deepclusterv2": ([2048, 128], "batch", True, "lars", "symmetric",
                      (0.6, 1e-6, DEEPCLUSTER), (0.6, 1e-6, DEEPCLUSTER)),
    "dino": ([2048, 2048, 256], "none", True, "lars", "asymmetric",
             (0.3, 1e-6, {**DINO, "warmup_teacher_epochs": 50}),
             (0.3, 1e-6, {**DINO, "warmup_teacher_epochs": 0})),
    "mocov2plus": ([2048, 256], "none", True, "sgd", "symmetric_weak",
                   (0.3, 1e-4, {**MOCO2, "queue_size": 65536}),
                   (0.3, 1e-4, {**MOCO2, "queue_size": 32768})),
    "mocov3": ([4096, 256], "batch", False, "lars", "asymmetric",
               (0.3, 1e-6, MOCO3), (0.3, 1e-6, MOCO3)),
    "nnclr": ([2048, 2048, 256], "batch", True, "lars", "asymmetric",
              (0.4, 1e-5, NNCLR), (0.4, 1e-5, NNCLR)),
    "ressl": ([4096, 256], "none", True, "sgd", "ressl", (0.3, 1e-4, RESSL), (0.05, 1e-4, RESSL)),
    "simclr": ([4096, 512], "none", True, "lars", "symmetric",
               (0.3, 1e-4, SIMCLR), (0.4, 1e-4, SIMCLR)),
    "simsiam": ([2048] * 3, "batch", False, "sgd", "asymmetric",
                (0.5, 1e-5, SIMSIAM), (0.5, 1e-5, SIMSIAM)),
    "swav": ([2048, 128], "batch", True, "lars", "symmetric",
             (0.6, 1e-6, SWAV), (0.6, 1e-6, SWAV)),
    "vicreg": ([2048] * 3, "batch", True, "lars", "vicreg",
               (0.3, 1e-4, VICREG), (0.3, 1e-4, VICREG)),
}  # fmt: skip
FILES = {"barlow_twins": "barlow"}
HALF: Differs = {"optim.precision": ("bf16", "bf16 for its fp16")}


def solo(method: str, cifar: bool) -> Recipe:
    """scripts/pretrain/{imagenet-100,cifar}/METHOD.yaml."""
    widths, norm, bias, optimiser, views, large, small = ROWS[method]
    lr, decay, keys = small if cifar else large
    if cifar and method == "simclr":
        widths = [2048, 256]
    if cifar and method == "simsiam":
        views = "symmetric_weak"
    values = SOLO | (SOLO_CIFAR if cifar else SOLO_IMAGENET)
    values |= SOLO_LARS if optimiser == "lars" else {"optim.name": "sgd"}
    values |= {f"method.{key}": value for key, value in keys.items()}
    values |= {
        "model.projector": list(widths), "model.projector_norm": norm,
        "model.projector_bias": bias, "optim.lr": lr, "optim.weight_decay": decay,
        "views": solo_views(views, cifar), "model.backbone": "resnet18",
        "optim.epochs": 1000 if cifar else 400,
    }  # fmt: skip
    if method in ("mocov2plus", "mocov3"):
        values["eval.probe_lr"] = 0.3
    if method == "deepclusterv2":  # its `scheduler`; min_lr 6e-4 of 0.6
        values |= {"optim.warmup_epochs": 11, "optim.warmup_lr": 0, "optim.final_lr_fraction": 1e-3}
    differs = dict(HALF)
    folder = "cifar" if cifar else "imagenet-100"
    if cifar and method in ("dino", "ressl", "swav"):  # AdaDim has no figure of these
        words = "ResNet-50 and 400 epochs for its ResNet-18 and 1000"
        differs |= {"model.backbone": ("resnet50", words), "optim.epochs": (400, words)}
    elif cifar:
        values |= {"model.backbone": "resnet50", "optim.epochs": 400}  # AdaDim, section 5
    place = f"solo-learn 9187ea3, scripts/pretrain/{folder}/{FILES.get(method, method)}.yaml"
    return Recipe(place, values, differs)


# --- AdaDim: Kokilepersaud, Prabhushankar & AlRegib 2025 ------------------------------------------

# Section 5 and Table 17 ("AdaDim - Baseline"); Table 6 for beta. Its code is solo-learn's.
ADADIM: Values = {
    **SOLO, **SOLO_LARS, "model.projector": [2048] * 3, "optim.lr": 0.4,
    "optim.weight_decay": 1e-4, "optim.epochs": 400, "model.backbone": "resnet50",
    "method.alpha_every": 20, "method.alpha": "adaptive", "method.beta": "adaptive",
    "method.beta_scale": 1e-4, "model.projector_norm": "batch", "model.projector_bias": True,
}  # fmt: skip
LOST = "not in the text: 25, 25 and 1 (VICReg's), temperature 0.1"
BOUND = "biases and norms are bounded (lars_bound_1d), there not"
ADADIM_DIFFERS: Differs = {
    "optim.precision": ("bf16", "bf16 for the code base's fp16"),
    "optim.lars_bound_1d": (0.5, BOUND),
    "method.temperature": (0.1, LOST), "method.invariance": (25, LOST),
    "method.variance": (25, LOST), "method.covariance": (1, LOST),
}  # fmt: skip
STRONG, WEAK = "augmentations asym (solo-learn's)", "augmentations weak (solo-learn's)"


def adadim(
    values: Values,
    differs: Differs | None = None,
    *,
    size: int = 32,
    weak: bool = False,
) -> Recipe:
    """AdaDim's own recipe, and what a YAML has besides."""
    cifar = size < 64
    name = "symmetric_weak" if weak else "asymmetric"
    views = solo_views(name, cifar)
    if size == 28 or size in (64, 96):
        views = [View(**{**vars(v), "size": size}) for v in solo_views(name, size == 28)]
    words = WEAK if weak else STRONG
    own = ADADIM_DIFFERS | {"views": (views, words)} | (differs or {})
    return Recipe("AdaDim's Table 17, section 5 and Table 6; solo-learn 9187ea3", ADADIM | values,
                  own)  # fmt: skip


CIFAR_STEM: Values = {"model.stem": "small_pad2", "crop": (32, 32)}
SIZES = "crop size, stem and blur are CIFAR's"
STANDARD: Values = {"model.stem": "standard", "crop": (256, 224, "bilinear")}
OURS: Differs = {"crop": ((256, 224), "evaluated at 256 to 224 pixels, bicubic")}


def alpha(value: float, beta: str = "off") -> Values:
    """A row of Tables 6, 9 and 19."""
    return {"method.alpha": "fixed", "method.alpha_value": value, "method.beta": beta}


# Table 6: alpha, beta_0, its factor.
ABLATION: dict[str, Values] = {
    "alpha_0": alpha(0), "alpha_1": alpha(1), "alpha_0.5": alpha(0.5),
    "alpha_cosine": {"method.alpha": "cosine", "method.beta": "off"},
    "alpha_linear": {"method.alpha": "linear", "method.beta": "off"},
    "beta_off": {"method.beta": "off"}, "beta_fixed": {"method.beta": "fixed"},
    "beta_adaptive": {"method.beta": "adaptive"},
    "alpha_0_beta_fixed": alpha(0, "fixed"), "alpha_1_beta_fixed": alpha(1, "fixed"),
    # Table 19
    "alpha_0.2": alpha(0.2), "alpha_0.4": alpha(0.4), "alpha_0.6": alpha(0.6),
    "alpha_0.8": alpha(0.8), "beta_negative": {},
}  # fmt: skip
RESNET18: Values = {**STANDARD, "model.backbone": "resnet18"}  # Table 12
# Table 9, "SimCLR + I" and "VICReg + I" [32]; Table 17's projector of SimCLR, which has no norm in
# solo/methods/simclr.py.
MI = {
    "simclr_mi": alpha(1, "fixed")
    | {"model.projector": [2048, 2048, 128], "model.projector_norm": "none"},
    "vicreg_mi": alpha(0, "fixed"),
}
NORM: Differs = {"model.projector_norm": ("batch", "the projector's batch norm is ours")}
NEGATIVE: Differs = {"method.beta_scale": (-1e-4, "beta's sign is the opposite one")}


# --- the multi-view paper: kumarkrishna/fastssl 96dfa37 and 856d67e ------------------------------

# Table 4a; fastssl/models/{backbone,barlow_twins,vicreg}.py: `torch.vstack` of all views.
FASTSSL: Values = {
    "optim.name": "adam", "optim.lr": 1e-3, "optim.weight_decay": 1e-6, "optim.epochs": 100,
    "optim.warmup_epochs": 0, "optim.final_lr_fraction": 1, "optim.betas": (0.9, 0.999),
    "model.stem": "small", "model.projector": [256, 256], "model.projector_norm": "batch",
    "model.views_forward": "stacked", "optim.precision": "fp16", "method.multiview": "fastssl",
}  # fmt: skip
SECOND = "no bias in the projector's second layer, there one"
FASTSSL_DIFFERS: Differs = HALF | {"model.projector_bias": (False, SECOND)}
# fastssl/data: `CifarTransformFFCV` in cifar_transforms.py, `ImagenetTransformFFCV` in
# misc_transforms.py.
CIFAR_VIEW = View(32, (0.08, 1), (0.75, 4 / 3), 0.8, 0.4, 0.4, 0.4, 0, 0.2, 0, (0.1, 2), 0, 0.5)
IMAGENET_VIEW = View(
    128, (0.08, 1), (0.75, 4 / 3), 0.8, 0.4, 0.4, 0.4, 0.1, 0.2, 0, (0.1, 2), 0.2, 0.5
)
# lambd and mu are equal there and the covariance's weight is 1.
FASTSSL_LOSS = {
    "barlow_twins": {"method.off_diagonal": 0.01, "method.scale": 1},
    "vicreg": {"method.invariance": 25, "method.variance": 25, "method.covariance": 1},
}


def multiview(loss: str, cifar: bool) -> Recipe:
    """Four views."""
    values = FASTSSL | FASTSSL_LOSS[loss]
    if cifar:
        place = "fastssl 96dfa37: sbatch_sh_files/multiPatch/multiPatch_"
        return Recipe(place, values | {
            "model.backbone": "resnet50", "data.batch_size": 256, "views": [CIFAR_VIEW] * 4,
            "crop": (32, 32),
        }, FASTSSL_DIFFERS)  # fmt: skip
    words = "the paper's batch of 128 is read as that of each of its 2 GPUs"
    return Recipe("branch arna/imagenet-try 856d67e", values | {
        # CenterCropRGBImageDecoder, ratio 128 / 256
        "model.backbone": "resnet18", "data.batch_size": 128, "views": [IMAGENET_VIEW] * 4,
        "crop": (256, 128, "area"),
    }, FASTSSL_DIFFERS | {
        "data.batch_size": (256, words),
        "crop": ((256, 128), "evaluation resizes bicubic, there by area"),
    })  # fmt: skip


# --- MMCR: ThomasYerxa/mmcr fafd3a9 --------------------------------------------------------------

MMCR_CIFAR = Recipe(
    "mmcr fafd3a9: pretrain_cifar_stl.py",
    {
        "method.weight": 0, "data.batch_size": 32, "optim.epochs": 500, "optim.name": "adam",
        "optim.lr": 1e-3 * 256 / 32, "optim.weight_decay": 1e-6, "optim.warmup_epochs": 0,
        "optim.final_lr_fraction": 1, "model.backbone": "resnet50", "model.backbone_args": {},
        "model.stem": "small", "model.projector": [512, 128], "model.projector_norm": "batch",
        "model.projector_bias": False, "model.views_forward": "stacked",
        "optim.precision": "fp32", "crop": (32, 32),
        "normalisation": ((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)),
        # `CifarBatchTransform`
        "views": [View(32, (0.08, 1), (3 / 4, 4 / 3), 0.8, 0.4, 0.4, 0.4, 0.1, 0.2, 0, (0.1, 2),
                       0, 0.5)] * 40,
    },
    {"optim.precision": ("bf16", "bf16 for its fp32")},
)  # fmt: skip
AS_OTHERS = "400 epochs, batch 256 and ResNet-18 as the other methods here"
MMCR_IMAGENET = Recipe(
    "mmcr fafd3a9: pretrain_imagenet.py",
    {
        "method.weight": 0, "data.batch_size": 2048, "optim.epochs": 100, "optim.lr": 0.6,
        "optim.name": "lars", "optim.weight_decay": 1e-6, "optim.momentum": 0.9,
        # misc.py: Barlow Twins' LARS; composer's schedule with alpha_f 0.001
        "optim.lars_variant": "vicreg", "optim.lars_eta": 0.001, "optim.lars_bound_1d": None,
        "optim.warmup_epochs": 10, "optim.warmup_lr": 0, "optim.final_lr_fraction": 1e-3,
        "model.backbone": "resnet50", "model.backbone_args": {"zero_init_last": True},
        "model.stem": "standard", "model.projector": [8192, 8192, 512],
        "model.projector_norm": "batch", "model.projector_bias": False,
        "model.views_forward": "stacked", "optim.precision": "fp16",
        "crop": (256, 224, "bilinear"), "views": solo_views("asymmetric", False),
    },
    HALF | {
        "data.batch_size": (256, AS_OTHERS), "optim.epochs": (400, AS_OTHERS),
        "model.backbone": ("resnet18", AS_OTHERS),
    },
)  # fmt: skip


# --- LeJEPA: the authors' code a0d6745, lightly 4394f8f ------------------------------------------


def lejepa(backbone: str) -> Recipe:
    """README.md of the authors; lightly's vitb16/lejepa.py, lejepa_loss.py and heads.py."""
    jitter = (0.8, 0.4, 0.4, 0.2, 0.1, 0.2, 0.5, (0.1, 2), 0.2, 0.5)
    views = [View(size, scale, (3 / 4, 4 / 3), *jitter)
             for size, scale, count in ((224, (0.3, 1), 2), (98, (0.05, 0.3), 6))
             for _ in range(count)]  # fmt: skip
    ours = [View(**{**vars(v), "size": 96}) if v.size == 98 else v for v in views]
    vit = backbone.startswith("vit")
    words = "400 epochs and ResNet-18 as the other methods here"
    return Recipe(
        "the authors' code a0d6745: README.md",
        {
            "method.sigreg": 0.05, "method.slices": 1024, "method.t_max": 3, "method.knots": 33,
            "model.backbone": backbone, "model.projector": [2048, 2048, 64],
            "model.projector_norm": "batch",
            "model.backbone_args": {"dynamic_img_size": True, "drop_path_rate": 0.1} if vit else {},
            "views": views, "optim.name": "adamw", "optim.epochs": 100, "optim.lr": 5e-4,
            "optim.weight_decay": 0.05 if vit else 5e-4, "optim.warmup_epochs": 1,
            "optim.final_lr_fraction": 1e-3,
            "optim.precision": "bf16",
        },
        {
            "views": (ours, "96 pixels for 98"),
            "data.batch_size": (256, "batch 256, which the source leaves open"),
        } | ({} if vit else {"optim.epochs": (400, words)}),
    )  # fmt: skip


# --- MoCo v3: facebookresearch/moco-v3 -----------------------------------------------------------


def moco3(size: str) -> Recipe:
    """CONFIG.md; main_moco.py (defaults, augmentations, schedule), builder.py, optimizer.py."""
    area = 0.2 if size == "resnet50" else 0.08  # --crop-min
    values: Values = {
        "method.momentum": 0.99, "method.final_momentum": 1, "method.predictor_hidden": 4096,
        "method.predictor_last_norm": True, "model.projector_bias": False,
        "model.projector_norm": "batch", "data.batch_size": 4096, "optim.precision": "fp16",
        "optim.warmup_lr": 0, "optim.final_lr_fraction": 0, "model.views_forward": "separate",
        "views": [crop(224, area, 0.4, 0.2, 0.1, 1, 0), crop(224, area, 0.4, 0.2, 0.1, 0.1, 0.2)],
        "crop": (256, 224, "bilinear"),
    }  # fmt: skip
    if size == "resnet50":
        return Recipe("facebookresearch/moco-v3 38aae44: CONFIG.md", values | {
            "method.temperature": 1, "model.backbone": "resnet50", "model.projector": [4096, 256],
            "model.backbone_args": {"zero_init_last": True}, "optim.name": "lars",
            # moco/optimizer.py: trust coefficient 0.001, 1-D parameters neither adapted nor bounded
            "optim.lars_variant": "vicreg", "optim.lars_eta": 1e-3, "optim.lars_bound_1d": None,
            "optim.epochs": 100, "optim.lr": 0.45, "optim.weight_decay": 1e-6,
            "optim.warmup_epochs": 10,
        }, HALF)  # fmt: skip
    return Recipe("facebookresearch/moco-v3 38aae44: CONFIG.md", values | {
        "method.temperature": 0.2, "method.freeze_patch_embed": True,
        "model.backbone": f"vit_{size}_patch16_224", "model.projector": [4096, 4096, 256],
        "model.backbone_args": {"num_heads": 12} if size == "small" else {},  # vits.py
        "optim.name": "adamw", "optim.epochs": 300, "optim.lr": 1.5e-4,
        "optim.weight_decay": 0.1, "optim.warmup_epochs": 40,
    }, HALF)  # fmt: skip


# --- ResNet-50 on ImageNet: the papers' own code -------------------------------------------------

PAPERS_LARS: Values = {
    "optim.name": "lars", "optim.lars_variant": "vicreg", "optim.lars_eta": 1e-3,
    "optim.lars_bound_1d": None, "optim.momentum": 0.9, "optim.warmup_epochs": 10,
    "optim.warmup_lr": 0, "optim.final_lr_fraction": 0, "model.backbone": "resnet50",
    "model.backbone_args": {}, "model.projector_norm": "batch", "model.stem": "standard",
    "optim.precision": "fp16", "crop": (256, 224, "bilinear"), "model.batch_norm": "global",
    "model.views_forward": "separate",
}  # fmt: skip
ASYM = [crop(224, 0.08, 0.4, 0.2, 0.1, 1, 0), crop(224, 0.08, 0.4, 0.2, 0.1, 0.1, 0.2)]
ZERO = {"model.backbone_args": {"zero_init_last": True}}
FULL: Differs = {"optim.precision": ("bf16", "bf16 for its float32")}
OWN = {
    # README.md: --learning_rate=0.075 with sqrt is 0.3 per 256; model_util.py; CROP_PROPORTION
    "simclr": Recipe("google-research/simclr 383d414", PAPERS_LARS | ZERO | {
        "method.temperature": 0.1, "model.projector": [2048, 2048, 128], "data.batch_size": 4096,
        "optim.epochs": 100, "optim.lr": 0.3, "optim.weight_decay": 1e-4, "crop": (256, 224),
        "views": [crop(224, 0.08, 0.8, 0.8, 0.2, 0.5, 0)] * 2, "optim.precision": "fp32",
    }, FULL),
    # run_with_submitit's command of README.md; std_loss is a mean over the two views
    "vicreg": Recipe("facebookresearch/vicreg 4e12602", PAPERS_LARS | ZERO | {
        "method.invariance": 25, "method.variance": 25, "method.covariance": 1,
        "method.average_variance": True, "model.projector": [8192] * 3,
        "model.projector_bias": False, "data.batch_size": 2048, "optim.epochs": 1000,
        "optim.lr": 0.2, "optim.weight_decay": 1e-6, "optim.final_lr_fraction": 1e-3,
        "views": ASYM,
    }, HALF),
    "barlow_twins": Recipe("facebookresearch/barlowtwins 8e8d284", PAPERS_LARS | ZERO | {
        "method.off_diagonal": 0.0051, "method.scale": 1 / 16, "model.projector": [8192] * 3,
        "model.projector_bias": False, "data.batch_size": 2048, "optim.epochs": 1000,
        "optim.lr": 0.2, "optim.weight_decay": 1e-6, "optim.final_lr_fraction": 1e-3,
        "views": ASYM,
    }, HALF | {"optim.lars_bound_1d": (0.5, "are bounded (lars_bound_1d), there 0.0048")}),
    "byol": Recipe("google-deepmind/deepmind-research, byol/", PAPERS_LARS | ZERO | {
        "method.momentum": 0.996, "method.final_momentum": 1, "method.predictor_hidden": 4096,
        "model.projector": [4096, 256], "model.projector_bias": False, "data.batch_size": 4096,
        "optim.epochs": 1000, "optim.lr": 0.2, "optim.weight_decay": 1.5e-6, "views": ASYM,
        "optim.precision": "fp32", "crop": (256, 224),
    }, FULL),
    # scripts/swav_800ep_pretrain.sh: rates of a batch of 4096, 313 steps are an epoch
    "swav": Recipe("facebookresearch/swav 06b1b7c", PAPERS_LARS | {
        "method.prototypes": 3000, "method.temperature": 0.1, "method.epsilon": 0.05,
        "method.iterations": 3, "method.freeze_epochs": 1, "method.queue_size": 0,
        "model.projector": [2048, 128], "data.batch_size": 4096, "optim.epochs": 800,
        "optim.lr": 4.8 / 16, "optim.weight_decay": 1e-6, "optim.warmup_lr": 0.3,
        "optim.final_lr_fraction": 1e-3, "model.views_forward": "stacked",
        # main_swav.py: apex's LARC(trust_coefficient=0.001, clip=False)
        "optim.lars_variant": "solo", "optim.lars_clip": False,
        "normalisation": ((0.485, 0.456, 0.406), (0.228, 0.224, 0.225)),
        "views": [View(size, (low, high), (3 / 4, 4 / 3), 0.8, 0.8, 0.8, 0.8, 0.2, 0.2, 0.5,
                       (0.1, 2), 0, 0.5)
                  for size, low, high, count in ((224, 0.14, 1, 2), (96, 0.05, 0.14, 6))
                  for _ in range(count)],
    }, HALF),
}  # fmt: skip


# --- ViT-S/16 ------------------------------------------------------------------------------------


def dino_vit(small: bool) -> Recipe:
    """README.md's command for 300 epochs; main_dino.py; `min_lr` 1e-6 of the peak."""
    batch = 256 if small else 1024
    views = [View(224, (0.4, 1), *([*vars(v).values()][2:])) for v in ASYM]
    local = crop(96, 0.05, 0.4, 0.2, 0.1, 0.5, 0)
    views += [View(96, (0.05, 0.4), *([*vars(local).values()][2:]))] * 8
    values: Values = {
        "method.prototypes": 65536, "method.student_temperature": 0.1,
        "method.teacher_temperature": 0.07, "method.warmup_teacher_temperature": 0.04,
        "method.warmup_teacher_epochs": 30, "method.momentum": 0.9995 if small else 0.996,
        "method.final_momentum": 1, "method.freeze_epochs": 1, "method.norm_last_layer": False,
        "model.backbone": "vit_small_patch16_224", "model.backbone_args": {"drop_path_rate": 0.1},
        "model.projector": [2048, 2048, 256], "model.projector_norm": "none",
        "data.batch_size": 1024, "views": views, "optim.name": "adamw", "optim.epochs": 300,
        "optim.lr": 5e-4, "optim.weight_decay": 0.04, "optim.final_weight_decay": 0.4,
        "optim.warmup_epochs": 10, "optim.warmup_lr": 0,
        "optim.final_lr_fraction": pytest.approx(1e-6 / (5e-4 * batch / 256)),
        "optim.grad_clip": 3, "optim.precision": "fp16", "crop": (256, 224),
    }  # fmt: skip
    return Recipe("facebookresearch/dino 7c446df", values, HALF | (FEW if small else {}))


FEW: Differs = {
    "optim.epochs": (400, "400 epochs and batch 256 as the other methods here"),
    "data.batch_size": (256, "400 epochs and batch 256 as the other methods here"),
}


def mocos_vit(method: str, small: bool) -> Recipe:
    """MoCo v3's optimiser for a ViT-S under another method's loss, projector and views."""
    values = dict(moco3("small").values)
    heads = "6 heads as timm's ViT-S for its 12"
    differs: Differs = HALF | {"model.backbone_args": ({}, heads)} | (FEW if small else {})
    own = ADADIM if method == "adadim" else solo(method, False).values
    taken = {k: v for k, v in own.items() if k.startswith(("method.", "model.projector", "views"))}
    if method == "adadim":
        taken["views"] = None
        lost = "not in AdaDim's text: 25, 25 and 1 (VICReg's), temperature 0.1"
        differs |= {k: (v, lost) for k, (v, _) in ADADIM_DIFFERS.items() if "method." in k}
        differs["views"] = (solo_views("asymmetric", False), "augmentations asym (solo-learn's)")
    values = {k: v for k, v in values.items() if not k.startswith(("method.", "model.projector"))}
    return Recipe("facebookresearch/moco-v3 38aae44: CONFIG.md", values | taken, differs)


# --- iNaturalist 2021: AdaDim's Table 9 ----------------------------------------------------------


def inat21(name: str) -> Recipe:
    """A row of the table."""
    weak = solo_views("symmetric_weak", False)
    if name in ("simclr", "vicreg"):
        own = {k: v for k, v in ADADIM.items() if not k.startswith("method.")} | STANDARD
        differs = {k: v for k, v in ADADIM_DIFFERS.items() if not k.startswith("method.")}
        if name == "simclr":  # Table 17
            own |= {"method.temperature": 0.1, "model.projector": [2048, 2048, 128],
                    "model.projector_norm": "none"}  # fmt: skip
        else:
            words = "not in the text: 25, 25 and 1 (VICReg's)"
            differs |= {f"method.{key}": (value, words) for key, value in VICREG.items()}
        return Recipe("AdaDim's Table 17, section 5", own, differs | {"views": (weak, WEAK)})
    values = MI[name] if name in MI else ABLATION[name]
    return adadim(STANDARD | values, NORM if name == "simclr_mi" else {}, size=224, weak=True)


def recipes() -> dict[str, Recipe]:
    """By YAML below `configs/`."""
    made = {f"imagenet100/{m}.yaml": solo(m, False) for m in ROWS}
    made |= {f"cifar/{m}.yaml": solo(m, True) for m in ROWS}
    for loss in FASTSSL_LOSS:
        made[f"cifar/{loss}_multiview.yaml"] = multiview(loss, True)
        made[f"imagenet100/{loss}_multiview.yaml"] = multiview(loss, False)
    made |= {"cifar/mmcr.yaml": MMCR_CIFAR, "imagenet100/mmcr.yaml": MMCR_IMAGENET}
    for folder in ("imagenet100", "imagenet"):
        for name, net in (("vits16", "vit_small"), ("vitb16", "vit_base")):
            made[f"{folder}/lejepa_{name}.yaml"] = lejepa(f"{net}_patch16_224")
    made["imagenet100/lejepa.yaml"] = lejepa("resnet18")
    made["imagenet/mocov3.yaml"] = moco3("resnet50")
    for net in ("small", "base"):
        own = moco3(net)
        made[f"imagenet/mocov3_vit{net[0]}16.yaml"] = own
        made[f"imagenet100/mocov3_vit{net[0]}16.yaml"] = Recipe(own.place, own.values, HALF | FEW)
    for folder in ("imagenet", "imagenet100"):
        made[f"{folder}/dino_vits16.yaml"] = dino_vit(folder != "imagenet")
        for method in ("simclr", "vicreg", "adadim"):
            made[f"{folder}/{method}_vits16.yaml"] = mocos_vit(method, folder != "imagenet")
    made |= {f"imagenet/{name}.yaml": recipe for name, recipe in OWN.items()}
    for name in ("simclr", "vicreg", "simclr_mi", "vicreg_mi", "alpha_0.5"):
        made[f"inat21/{name}.yaml"] = inat21(name)
    small = dict(CIFAR_STEM)
    made["cifar/adadim.yaml"] = adadim(small)
    made["cinic10/adadim.yaml"] = adadim({}, {
        key: (value, SIZES) for key, value in CIFAR_STEM.items()})  # fmt: skip
    made["medmnist/adadim.yaml"] = adadim({}, {
        "model.stem": ("small_pad2", "stem and blur are CIFAR's"),
        "crop": ((28, 28), "crop size 28")}, size=28)  # fmt: skip
    made["tiny_imagenet/adadim.yaml"] = adadim({}, {
        "model.stem": ("small_pad2", "crop size 64 and stem are ours"),
        "crop": ((64, 64), "images are evaluated whole")}, size=64)  # fmt: skip
    # solo/data/classification_dataloader.py: Resize((96, 96)); solo's stem is for CIFAR alone.
    made["stl10/adadim.yaml"] = adadim({"model.stem": "standard", "crop": (96, 96)}, size=96)
    made["imagenet/adadim.yaml"] = adadim(STANDARD, size=224)
    made["inat21/adadim.yaml"] = adadim(STANDARD, size=224, weak=True)
    for own in ("folder", "list"):
        made[f"{own}/adadim.yaml"] = adadim(STANDARD, OURS, size=224)
    made["imagenet100/adadim.yaml"] = adadim(RESNET18, size=224)
    for name, values in ABLATION.items():
        if (CONFIGS / f"cifar/ablation/{name}.yaml").exists():
            made[f"cifar/ablation/{name}.yaml"] = adadim(small | values)
        if (CONFIGS / f"imagenet100/ablation/{name}.yaml").exists():
            differs = NEGATIVE if name == "beta_negative" else None
            made[f"imagenet100/ablation/{name}.yaml"] = adadim(RESNET18 | values, differs, size=224)
    for name, values in MI.items():
        differs = NORM if name == "simclr_mi" else {}
        made[f"cifar/{name}.yaml"] = adadim(small | values, differs, weak=True)
        made[f"imagenet100/{name}.yaml"] = adadim(RESNET18 | values, differs, size=224, weak=True)
    return made


RECIPES = recipes()


def flat(path: Path) -> Values:
    """The YAML's values, the defaults of what it leaves out included."""
    config = load([str(path)]).config
    tree = config.model_dump()
    values = {f"{s}.{key}": value for s, part in tree.items() for key, value in part.items()}
    if values["model.views_forward"] == "auto":
        values["model.views_forward"] = "separate" if config.num_views == 2 else "stacked"
    size = config.data.central_crop
    # A resizing that changes nothing has no kernel.
    values["crop"] = size[:2] if size.interpolation == "bicubic" else tuple(size)
    values["normalisation"] = config.data.normalisation
    values["views"] = views_of(config.data.views)
    return values


def header(path: Path) -> dict[str, str]:
    """Its lines by their word, joined."""
    parts: dict[str, str] = {}
    word = "title"
    for line in path.read_text().splitlines():
        if not line.startswith("#"):
            break
        text = line.removeprefix("#")
        if text.startswith(" ") and not text.startswith("  "):
            first, _, rest = text.strip().partition(" ")
            word, text = (first, rest) if parts else ("title", text)
        parts[word] = f"{parts.get(word, '')} {text.strip()}".strip()
    return parts


def test_every_yaml_has_its_source_here() -> None:
    # Presets have no source but their trial, whose figures are in their headers.
    found = {str(path.relative_to(CONFIGS)) for path in CONFIGS.rglob("*.yaml")}
    found = {name for name in found if not name.startswith("preset/")}
    assert found == RECIPES.keys()


@pytest.mark.parametrize("name", sorted(RECIPES))
def test_the_values_are_the_sources(name: str) -> None:
    recipe, path = RECIPES[name], CONFIGS / name
    ours, said = flat(path), header(path)
    assert recipe.place in said["source"]
    assert said["equal"]
    for key, value in recipe.values.items():
        if key not in recipe.differs:
            assert ours[key] == value, f"{key}: {ours[key]}, the source has {value}"
    for key, (value, words) in recipe.differs.items():
        assert ours[key] == value, f"{key}: {ours[key]}, meant to be {value}"
        assert recipe.values.get(key) != value, f"{key} is as in the source"
        assert words in said["differs"], f"{key}: {words!r} is not in the header"
    # Every key of the YAML is compared.
    typed = recipe.values.keys() | recipe.differs.keys()
    for section, part in yaml.safe_load(path.read_text()).items():
        for key in part:
            known = {"views": "views", "std": "normalisation", "val_resize": "crop",
                     "val_interpolation": "crop"}.get(key, f"{section}.{key}")  # fmt: skip
            assert known in typed | PLACES | {"method.name"}, f"{section}.{key} has no source"
