"""The schema of a run: its sections, their keys, defaults and limits.

The docstrings under the keys are the reference (`--help` and docs/config.md). No torch here.
"""

from __future__ import annotations

import os
import re
from typing import Annotated, Any, ClassVar, Literal

from pydantic import (
    Field,
    ModelWrapValidatorHandler,
    PrivateAttr,
    SerializeAsAny,
    field_serializer,
    field_validator,
    model_validator,
)

from ddp_ssl.config.section import (
    Below1,
    Channels,
    PathText,
    PlaceText,
    Positive,
    Seconds,
    Section,
    Side,
    Size,
    is_url,
)
from ddp_ssl.config.text import parse
from ddp_ssl.config.views import CentralCrop, ViewGroup
from ddp_ssl.utils.text import suggest

NORMALISATION: dict[str, tuple[Channels, Channels]] = {
    "digits": ((0.5, 0.5, 0.5), (0.25, 0.25, 0.25)),
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "cifar100": ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "tiny_imagenet": ((0.4802, 0.4481, 0.3975), (0.2770, 0.2691, 0.2821)),
    "stl10": ((0.4914, 0.4823, 0.4466), (0.247, 0.243, 0.261)),  # solo-learn's
    "cinic10": ((0.4789, 0.4723, 0.4305), (0.2421, 0.2383, 0.2587)),  # its authors'
    # MedMNIST's own examples.
    **dict.fromkeys(("blood", "organa", "organc", "organs"), ((0.5,) * 3, (0.5,) * 3)),
}

# Names of a container, and the data set that its content counts as.
SAME_AS = dict.fromkeys(("list", "parquet", "webdataset"), "folder")

# Data sets of small square images, which their sources evaluate without a crop.
WHOLE = ("digits", "cifar10", "cifar100", "stl10", "tiny_imagenet", "cinic10",
         "blood", "organa", "organc", "organs")  # fmt: skip

LOGGERS = ("tensorboard", "wandb")  # those with a name: logs/loggers.py has their classes


class Run(Section):
    """Folder, start, device and time limits of the run."""

    dir: PathText | None = None
    """Run folder. Unset: `runs/DATA-METHOD-BACKBONE-ID`, ID from the job or the start time."""
    seed: int = Field(0, ge=0, lt=2**31)
    """Seed of weights, sample order and augmentations."""
    resume: PathText = "never"
    """`never`; `auto` (continue from the folder's newest good checkpoint, or start); or the path of
    a checkpoint or run folder. A restart by torchrun or Slurm implies `auto`."""
    init_from: PathText | None = None
    """Checkpoint or run folder to take the weights from, and nothing else."""
    device: Literal["auto", "cuda", "cpu"] = "auto"
    """`auto`: the GPUs (NCCL); or the CPU (gloo) if there is no device file, no driver, no GPU in
    the job, or if CUDA_VISIBLE_DEVICES is empty."""
    threads: int = Field(0, ge=0, le=4096)
    """CPU threads per process for torch; 0 shares the machine's cores among its processes."""
    start_timeout_s: Seconds = 1800
    """Seconds without progress after which the run ends, before the first step is done and during
    validation, a checkpoint or a measurement."""
    timeout_s: Seconds = 300
    """Seconds without progress after which a step, or a process that gives no sign of life, ends
    the run on all processes."""
    max_hours: float | None = Field(None, gt=0, le=1e5)
    """Stop, with a checkpoint, this many hours after the start of the process."""
    end_margin_s: float = Field(120, ge=0, le=1e7)
    """Stop this many seconds before a Slurm job's end, or a tenth of the time left at the start if
    that is less."""
    profile: str | None = None
    """`FROM:TO`, such as `20:23`: steps that torch's profiler traces on rank 0 and the last rank,
    into `profile/` of the run folder."""

    @field_validator("profile")
    @classmethod
    def _is_window(cls, value: str | None) -> str | None:
        if value is not None:
            first, _, end = value.partition(":")
            if not (first.isdecimal() and end.isdecimal() and int(first) < int(end)):
                raise ValueError(f"expected FROM:TO with FROM < TO, such as 20:23, got {value}")
        return value


class Model(Section):
    """The encoder and its projection head."""

    backbone: str = "resnet18"
    """Any timm model by name."""
    backbone_args: dict[str, Any] = Field({})
    """More arguments for `timm.create_model`, such as `{channels: [16, 32, 64, 128]}`. With
    `{pretrained: true}` a run begins from timm's weights, with `{pretrained: hf-hub:USER/NAME}`
    from the hub's."""
    stem: Literal["standard", "small", "small_pad2"] = "standard"
    """`small`, for ResNets on small images: first convolution 3x3 with stride 1, no max-pool.
    `small_pad2`: the same with a padding of 2 and PyTorch's initial weights, as solo-learn's for
    CIFAR: 34x34 of 32x32 pixels."""
    projector: list[Annotated[int, Field(ge=1, le=2**17)]] = Field([2048, 2048, 2048], min_length=1)
    """Widths of the projection head's linear layers; the last one is the embedding's."""
    projector_norm: Literal["batch", "none"] = "batch"
    """Normalisation between the head's layers."""
    projector_bias: bool = True
    """Whether the head's linear layers, the last one included, have a bias."""
    batch_norm: Literal["global", "local"] = "global"
    """Statistics over the global batch (exact at any world size) or over each process's part."""
    views_forward: Literal["auto", "separate", "stacked"] = "auto"
    """Batch statistics per view or pooled over the views of one size. The choice changes the
    gradient. `auto`: per view for two views, pooled for more."""
    channels_last: bool = True
    """Memory format of weights and images."""
    compile: bool = False
    """`torch.compile` the networks in training: backbone, projector, predictor, momentum networks,
    with their batch norms and the collectives of these. For a GPU; the first step takes minutes."""
    ema: float | None = Field(None, ge=0, lt=1)
    """Share that a moving average of the backbone's weights keeps of itself at a step; at first it
    is (1 + t) / (10 + t) at step t, where that is less. It is evaluated beside the weights
    (`eval/knn_top1_ema`) and exported as `RUN:ema`. Unset: there is none."""
    checkpointing: bool = False
    """Compute each block's activations again in the backward pass: a fraction of the memory, a
    third more time. For timm's models that can, and not for batch norm."""


class Data(Section):
    """The images, the batch size, and the views of each image."""

    name: str = "folder"
    """`imagenet`, `imagenet100`, `inat21`, `inat21_mini`, `cifar10`, `cifar100`, `stl10`,
    `tiny_imagenet`, `cinic10`, `blood`, `organa`, `organc`, `organs`, `food101`, `sun397`, `cars`,
    `aircraft`, `dtd`, `pets`, `caltech101`, `flowers102`, `digits`, `folder`, `train_test`, `list`,
    `parquet`, `webdataset` or `array`; docs/data.md has the layout of each."""
    root: PlaceText | None = None
    """Folder of the data, of shards that `ddp-ssl pack-shards` made of them, of parquet files or of
    tar files (also a pattern: `DIR/*.parquet`, `DIR/train-{000..123}.tar`). These three may lie in
    an object store: `s3://BUCKET/DIR`, `gs://BUCKET/DIR`, `https://HOST/DIR`. `folder`: class
    folders under `train/` and `val/`, class folders, or a flat folder of unlabelled images.
    `[A, B]`: several folders, one after the other, with the classes of all. `array`: an `.npz` or
    `.npy` file, or a folder with some."""
    files: PathText | None = None
    """`name: list`: a text or CSV file with a path and, if there are labels, a class per line;
    paths are relative to `root`, or to the file where that is unset."""
    val_files: PathText | None = None
    """`name: list`: the same for validation. Unset: a `val_fraction` of `files`."""
    columns: list[str] | None = Field(None, min_length=1, max_length=2)
    """Parquet files: the column of images and, if there are labels, that of the labels. Tar files:
    the extensions of these members, `[jpg, cls]`, `[jpg;png, txt]` or `[jpg, json.KEY]`. Arrays:
    their names. Unset: the only ones that may be meant."""
    fraction: float = Field(1.0, gt=0, le=1)
    """Seeded share of the training images used for pretraining; the probe and k-NN of
    `ddp_ssl.evaluate` keep all labels."""
    skip: PathText | None = None
    """File of images to leave out, one path a line, as `ddp-ssl check-data` writes it."""
    max_bad_fraction: float = Field(0.01, ge=0, le=1)
    """Images that cannot be decoded are replaced and listed. A larger share of them stops the
    run."""
    max_pixels: int = Field(150_000_000, ge=1)
    """Width times height of the largest image that is decoded; a larger one is a bad image.
    Decoding takes about 6 bytes a pixel."""
    stage: PathText | None = None
    """Node-local folder that shards, parquet or tar files are copied to first, once per node."""
    stage_gb: float | None = Field(None, ge=0, le=1e6)
    """Copy only the first files, as many as fit into this many GB; the others are read where they
    are. Unset: all."""
    batch_size: int = Field(256, ge=1, le=2**20)
    """Images per step over all processes; must be divisible by the number of data shards."""
    views: list[ViewGroup] = Field([ViewGroup()], min_length=1)
    """View groups, such as `[{count: 2, size: 224, recipe: asym}, {count: 6, size: 96}]`."""
    view_shards: int = Field(1, ge=1, le=2**16)
    """Processes that share the views of an image: each decodes it and makes its part of the views.
    Divides the number of processes and the count of each resolution's views."""
    color_jitter: Literal["fast", "seq", "exact"] = "seq"
    """`fast`: one fused linear operator; `seq`: torchvision's contrast and clamping in a fixed
    order; `exact`: torchvision's hue and random order too, at about five times the cost."""
    mean: tuple[float, ...] | None = None
    """Normalisation mean per channel, for pixels in [0, 1]. Unset: the data set's or ImageNet's; of
    arrays that of their images, for uint16 and float32 in their own values."""
    std: tuple[Positive, ...] | None = None
    """Normalisation standard deviation per channel, likewise."""
    val_fraction: float = Field(0.1, gt=0, lt=1)
    """Seeded share of the images kept for validation where there is no validation split."""
    val_resize: Side | None = None
    """Shorter side after resizing for evaluation. Unset: 8/7 of `val_size` from 64 px on, but
    `val_size` for data sets of small square images, which are seen whole."""
    val_size: Side | None = None
    """Side of the central crop for evaluation. Unset: the size of the largest view."""
    val_interpolation: Literal["bilinear"] | None = None
    """Kernel of that resizing, antialiased: bilinear, torchvision's default; null: bicubic, as for
    training."""
    threads: int = Field(0, ge=0, le=4096)
    """DALI threads per process; 0 shares the machine's cores among its processes."""
    prefetch: int = Field(2, ge=1, le=256)
    """Batches that DALI prepares ahead."""
    read_threads: int | None = Field(None, ge=1, le=1024)
    """Threads per process that read images ahead; more hide a file system's latency. Unset: 16, or
    64 where `root` is in an object store."""
    dtype: Literal["float32", "float16"] = "float32"
    """Type of the views that DALI hands over; float16 halves their memory."""
    hw_decoder_load: float = Field(0.65, ge=0, le=1)
    """GPU: share of the JPEGs that the hardware decoder takes."""
    preallocate: tuple[Size, Size] | None = None
    """GPU: width and height of the largest images expected, so that the decoder's buffers are
    allocated once."""

    _further: tuple[str, ...] = PrivateAttr(())
    """The roots after `root`, where it is given as a list."""

    @model_validator(mode="wrap")
    @classmethod
    def _split_roots(cls, values: Any, validate: ModelWrapValidatorHandler[Data]) -> Data:
        root = values.get("root") if isinstance(values, dict) else None
        if isinstance(root, str) and re.fullmatch(r"\[.*\]", root) and not os.path.exists(root):
            root = parse(root, list[str])
        if not isinstance(root, list):
            return validate(values)
        made = [validate({**values, "root": one}) for one in root]
        if not made or None in (one.root for one in made):
            raise ValueError(f"root: a path or a list of paths is accepted, got {root}")
        made[0]._further = tuple(str(one.root) for one in made[1:])
        return made[0]

    @field_serializer("root")
    def _all_roots(self, root: str | None) -> str | list[str] | None:
        return self.roots if self._further else root

    @property
    def roots(self) -> list[str]:
        """All roots; `root` is the first."""
        return [] if self.root is None else [self.root, *self._further]

    def at(self, root: str) -> Data:
        """The same with this root alone."""
        made = self.model_copy(update={"root": root})
        made._further = ()
        return made

    @property
    def is_far(self) -> bool:
        """Whether a root is in an object store."""
        return any(map(is_url, self.roots))

    @property
    def readers(self) -> int:
        """`read_threads`, or its default for this `root`."""
        return self.read_threads or (64 if self.is_far else 16)

    @property
    def normalisation(self) -> tuple[Channels, Channels]:
        """Mean and standard deviation per channel."""
        mean, std = NORMALISATION.get(self.name, NORMALISATION["imagenet"])
        return self.mean or mean, self.std or std

    @property
    def units(self) -> str:
        """What `normalisation` is of, in words."""
        arrays = self.name == "array"
        return "bytes / 255 or other numbers" if arrays else "pixels in [0, 1]"

    @property
    def shown(self) -> tuple[Channels, Channels]:
        """Mean and deviation that make pixels to show, in [0, 1], of normalised ones.

        Those of arrays have any range: from two deviations below the mean to two above.
        """
        mean, std = self.normalisation
        return ((0.5,) * len(mean), (0.25,) * len(std)) if self.name == "array" else (mean, std)

    @property
    def central_crop(self) -> CentralCrop:
        """How an image is cropped for evaluation."""
        size = self.val_size or max(group.size for group in self.views)
        crops = size >= 64 and self.name not in WHOLE
        resize = self.val_resize or (round(size * 8 / 7) if crops else size)
        return CentralCrop(resize, size, self.val_interpolation or "bicubic")


class Optim(Section):
    """Optimiser, schedule and precision."""

    name: Literal["lars", "sgd", "adam", "adamw", "muon"] = "lars"
    """`adam` couples weight decay to the gradient (L2), `adamw` decouples it. `muon`: for matrices,
    and `adamw` for all else, convolutions among it, at one rate."""
    epochs: int = Field(100, ge=1, le=10**7)
    """Passes over the training images."""
    lr: float = Field(0.4, gt=0)
    """Base learning rate per 256 images: the peak is `lr * data.batch_size / 256`."""
    warmup_epochs: float = Field(10, ge=0, le=1e7)
    """Epochs of linear warm-up, at most all of the run."""
    warmup_lr: float = Field(3e-5, ge=0)
    """Learning rate (not scaled) where the warm-up starts."""
    final_lr_fraction: float = Field(0.0, ge=0, le=1)
    """The cosine ends at this fraction of the peak."""
    weight_decay: float = Field(1e-4, ge=0)
    """Weight decay. All but SGD leave out 1-D parameters (biases, norms) and a ViT's tokens and
    position embeddings."""
    final_weight_decay: float | None = Field(None, ge=0)
    """Weight decay at the end, towards which it follows a cosine over all steps. Unset: it stays
    as it is."""
    layer_decay: float | None = Field(None, gt=0, le=1)
    """Factor of the learning rate from each of the backbone's layers to the one before it. Unset:
    one rate for all."""
    momentum: float = Field(0.9, ge=0, lt=1)
    """Momentum of LARS, SGD and Muon (whose author has 0.95)."""
    betas: tuple[Below1, Below1] = (0.9, 0.999)
    """Averages of Adam and of AdamW, beside Muon too."""
    lars_variant: Literal["solo", "vicreg"] = "solo"
    """`solo`: solo-learn's trust ratio; `vicreg`: the official VICReg's."""
    lars_eta: float = Field(0.02, gt=0)
    """LARS trust coefficient (official VICReg: 0.001)."""
    lars_clip: bool = True
    """Bound the `solo` variant's trust ratio so that a step is never longer than SGD's."""
    lars_bound_1d: float | None = Field(0.5, gt=0)
    """LARS: the largest change of an element of a bias or norm in one step, momentum included.
    These have no trust ratio. null: no bound, as solo-learn; a steep gradient can then end in
    NaN."""
    grad_clip: float | None = Field(None, gt=0)
    """Upper bound of the gradient's global norm; unset: none."""
    accumulate: int = Field(1, ge=1)
    """Parts in which a process's batch goes through the backbone. Only one part's activations are
    in memory, and the gradient is the whole batch's: projector and loss see all of it at once, and
    each part goes through the backbone again in the backward pass, a third more time. Not for
    backbones with batch norm."""
    precision: Literal["bf16", "fp16", "tf32", "fp32"] = "bf16"
    """Autocast of the networks: bf16 or fp16. fp16 uses a gradient scaler, which waits for the
    device at every step under LARS, SGD and Muon. Losses are in float32. Without autocast: `fp32`
    and `tf32`, where a GPU rounds the factors of float32 products to 10 bits, in the networks,
    losses and validations. With `fp32` it does so in convolutions alone, as torch. On a CPU the
    two are the same."""
    gradient_compression: Literal["bf16"] | None = None
    """Send gradients in bf16. That halves the bytes, but rounds to 8 bits before and while
    gradients are added, so that results depend on the number of processes. Only with several
    processes."""


class Eval(Section):
    """k-NN and the online linear probe on the validation split."""

    every: int = Field(10, ge=0)
    """Epochs between evaluations; 0 evaluates only at the start and at the end."""
    batch_size: int = Field(256, ge=1, le=2**16)
    """Images per process and step."""
    knn: bool = True
    """Weighted k-NN on the representation, with the training images as bank."""
    knn_k: int = Field(20, ge=1)
    """Neighbours."""
    knn_temperature: float = Field(0.07, gt=0)
    """A neighbour's vote weighs exp(cosine / temperature)."""
    knn_bank: int = Field(50_000, ge=1)
    """Training images in the bank at most, a seeded subset."""
    probe: bool = True
    """Train a linear classifier on detached representations alongside."""
    probe_lr: float = Field(0.1, gt=0)
    """The probe's base learning rate per 256 images."""
    raw_pixels: bool = False
    """Also print k-NN accuracy on the raw pixels, for comparison."""


class Measure(Section):
    """Spectrum, mutual information and uniformity of the validation split, for every method."""

    every: int = Field(10, ge=0)
    """Epochs between measurements; 0 measures only at the start and at the end."""
    max_images: int = Field(10_000, ge=2)
    """Validation images used at most."""
    views: int = Field(0, ge=0)
    """Also draw this many training views of validation images, for alignment and LiDAR: 2 or more;
    0: neither is measured. Each costs a pass over `view_images`."""
    view_images: int = Field(1000, ge=2)
    """Images whose views are drawn, at most; a seeded subset of those measured."""

    @field_validator("views")
    @classmethod
    def _none_or_two(cls, value: int) -> int:
        if value == 1:
            raise ValueError("one view cannot be compared; 0 or 2 and more are accepted")
        return value


class Checkpoint(Section):
    """When checkpoints are saved, and which are kept."""

    every: int = Field(1, ge=1)
    """Epochs between checkpoints. The last epoch, the best one and those of `keep_every` always
    have one."""
    every_steps: int = Field(0, ge=0)
    """Steps between checkpoints within an epoch; 0: none."""
    keep: int = Field(2, ge=2)
    """Newest checkpoints kept."""
    keep_every: int = Field(0, ge=0)
    """Epochs between checkpoints that are kept for good; 0: none."""
    max_failures: int = Field(10, ge=1)
    """The run ends after this many failed saves in a row. A failed save is tried again at the next
    logging step."""
    best: str | None = "eval/knn_top1"
    """Metric of the validation (`eval/*`, `rep/*`) whose best epoch is kept as `best.pt`. With a
    leading `-` the lowest value is the best; null: none."""


class Log(Section):
    """Progress lines and metrics."""

    every_steps: int = Field(10, ge=1)
    """Steps between progress lines; metrics have one row per step, written at these steps."""
    to: list[str] = Field(["tensorboard"])
    """Loggers that get the rows of `metrics.jsonl` too: `tensorboard` (events beside it), `wandb`
    (Weights & Biases), or `module:Class`, a class of one's own; docs/metrics.md. `[]`: none."""

    @field_validator("to")
    @classmethod
    def _has_loggers(cls, value: list[str]) -> list[str]:
        for name in value:
            if name not in LOGGERS and not re.fullmatch(r"[\w.]+:\w+", name):
                raise ValueError(
                    f"unknown logger {name!r}{suggest(name, LOGGERS)}; accepted: "
                    f"{', '.join(LOGGERS)}, or module:Class"
                )
            if value.count(name) > 1:
                raise ValueError(f"{name} is given twice; once is accepted")
        return value


class MethodConfig(Section):
    """Base of a method's own section; the subclass stands in the method's file."""

    name: str = "adadim"
    """A built-in method, or `module:Class` from outside the package."""

    recipe: ClassVar[dict[str, Any]] = {}
    """The method's defaults for the other sections: nested, as in a YAML file."""
    embedded: ClassVar[dict[str, Any]] = {}
    """Settings for the embedded default, nested like `recipe`, the method's own section included.
    They count only where no YAML is given. Those of the package's methods are in `digits/`."""
    min_views: ClassVar[int] = 2
    max_views: ClassVar[int | None] = None
    small_crops: ClassVar[bool] = True

    def check(self, config: Config) -> None:
        """Raise `ValueError` for a combination that the method cannot run."""

    def remarks(self, config: Config) -> list[str]:
        """A line for each setting that the method can run but that will disappoint."""
        return []


class Config(Section):
    """A whole run."""

    run: Run = Run()
    method: SerializeAsAny[MethodConfig] = MethodConfig()
    model: Model = Model()
    data: Data = Data()
    optim: Optim = Optim()
    eval: Eval = Eval()
    measure: Measure = Measure()
    checkpoint: Checkpoint = Checkpoint()
    log: Log = Log()

    @property
    def num_views(self) -> int:
        """K, the number of views of one image."""
        return sum(group.count for group in self.data.views)


def with_method(method: type[MethodConfig]) -> type[Config]:
    """`Config` with the method's own section in place."""

    class Typed(Config):
        method: method  # type: ignore[valid-type]

    Typed.__name__ = "Config"
    Typed.model_rebuild(_types_namespace={"method": method})
    return Typed
