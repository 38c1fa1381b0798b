"""The run's schema: YAML and `key=value` in, one frozen and validated tree out.

Precedence, later wins: the schema's defaults, the method's own recipe, the embedded default's
overrides (only where no YAML is given), the YAML file, `key=value`. The tree remembers where each
value came from. What is wrong is a `ConfigError` of one line: what, where, what would be accepted.

No torch here: everything but the method's own section is checked before torch is imported.
"""

from __future__ import annotations

import difflib
import importlib
import pkgutil
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, ClassVar, Literal, TypeVar, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, ConfigDict, Field, SerializeAsAny, ValidationError, field_validator

from ddp_ssl import config_files
from ddp_ssl.data.augment import AUGMENTATION_FIELDS, RECIPES, CentralCrop

Probability = Annotated[float, Field(ge=0, le=1)]
Strength = Annotated[float, Field(ge=0)]
Below1 = Annotated[float, Field(ge=0, lt=1)]
Positive = Annotated[float, Field(gt=0)]
Size = Annotated[int, Field(ge=1)]
Channels = tuple[float, float, float]
S = TypeVar("S", bound="Section")

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

# Data sets of small square images, which their sources evaluate uncropped.
WHOLE = ("digits", "cifar10", "cifar100", "stl10", "tiny_imagenet", "cinic10",
         "blood", "organa", "organc", "organs")  # fmt: skip


class ConfigError(ValueError):
    """What the user asked for cannot be run; the message is one line for the user."""


class Section(BaseModel):
    """A frozen part of the tree. Unknown keys are errors; docstrings are the reference."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        use_attribute_docstrings=True,
        coerce_numbers_to_str=True,
        allow_inf_nan=False,
        protected_namespaces=(),
    )


class Run(Section):
    """Where the run lives, how it starts, what it runs on."""

    dir: str | None = None
    """Run folder. Unset: `runs/DATA-METHOD-BACKBONE-ID`, ID from the job or the start time."""
    seed: int = Field(0, ge=0, lt=2**31)
    """Seed of weights, sample order and augmentations."""
    resume: str = "never"
    """`never`; `auto` (continue from the folder's newest good checkpoint, or start); or the path of
    a checkpoint or run folder. A restart by torchrun or Slurm implies `auto`."""
    init_from: str | None = None
    """Checkpoint or run folder to take the weights from, and nothing else."""
    device: Literal["auto", "cuda", "cpu"] = "auto"
    """`auto` takes the GPUs (NCCL), or the CPU (gloo) where no GPU is meant: no device file, no
    driver, none given to the job, or CUDA_VISIBLE_DEVICES empty."""
    threads: int = Field(0, ge=0)
    """CPU threads per process for torch; 0 shares the machine's cores among its processes."""
    start_timeout_s: float = Field(1800, gt=0)
    """Seconds that may pass without progress until the first step is done, and at any time while
    something else than a step is under way (validation, a checkpoint, a measurement)."""
    timeout_s: float = Field(300, gt=0)
    """Seconds without progress after which a step, or a process that gives no sign of life, ends
    the run on all processes."""
    max_hours: float | None = Field(None, gt=0)
    """Stop, with a checkpoint, this many hours after the start of the process."""
    end_margin_s: float = Field(120, ge=0)
    """Stop this many seconds before a Slurm job's end (a tenth of what is left at the start, if
    that is less)."""
    profile: str | None = None
    """`FROM:TO`, steps to trace with torch's profiler, such as `20:23`, into `profile/` of the run
    folder: rank 0 and the last rank."""

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
    backbone_args: dict[str, Any] = {}
    """More arguments for `timm.create_model`, such as `{channels: [16, 32, 64, 128]}`."""
    stem: Literal["standard", "small", "small_pad2"] = "standard"
    """`small`, for ResNets on small images: first convolution 3x3 with stride 1, no max-pool.
    `small_pad2`: the same with a padding of 2 and PyTorch's initial weights, as solo-learn's for
    CIFAR: 34x34 of 32x32 pixels."""
    projector: list[Annotated[int, Field(ge=1)]] = Field([2048, 2048, 2048], min_length=1)
    """Widths of the projection head's linear layers; the last one is the embedding's."""
    projector_norm: Literal["batch", "none"] = "batch"
    """Normalisation between the head's layers."""
    projector_bias: bool = True
    """Whether the head's linear layers have a bias (the last one always follows this too)."""
    batch_norm: Literal["global", "local"] = "global"
    """Statistics over the global batch (exact at any world size) or over each process's part."""
    views_forward: Literal["auto", "separate", "stacked"] = "auto"
    """Batch statistics per view or pooled over the views of one size. The choice changes the
    gradient. `auto`: per view for two views, pooled for more."""
    channels_last: bool = True
    """Memory format of weights and images."""
    compile: bool = False
    """`torch.compile` the backbone."""


class ViewGroup(Section):
    """`count` views of one size from a recipe. Unset augmentations are the recipe's."""

    count: int = Field(2, ge=1)
    """Number of views."""
    size: int = Field(224, ge=8)
    """Side of the crops, in pixels."""
    recipe: str = "asym"
    """Named augmentations: asym, sym, weak, vic, ressl, multiview, crop."""
    scale: tuple[Probability, Probability] | None = None
    """Range of the crop's area, as a fraction of the image's."""
    ratio: tuple[Strength, Strength] | None = None
    """Range of the crop's aspect ratio."""
    jitter_p: Probability | None = None
    """Probability of colour jitter."""
    brightness: Strength | None = None
    """Brightness jitter, as torchvision's."""
    contrast: Strength | None = None
    """Contrast jitter, as torchvision's."""
    saturation: Strength | None = None
    """Saturation jitter, as torchvision's."""
    hue: Annotated[float, Field(ge=0, le=0.5)] | None = None
    """Hue jitter, as a fraction of a turn."""
    gray_p: Probability | None = None
    """Probability of grayscale."""
    blur_p: Probability | None = None
    """Probability of Gaussian blur."""
    blur_sigma: tuple[Strength, Strength] | None = None
    """Range of the blur's standard deviation, in pixels."""
    solarize_p: Probability | None = None
    """Probability of solarisation at 128."""
    flip_p: Probability | None = None
    """Probability of a horizontal flip."""

    @field_validator("recipe")
    @classmethod
    def _known_recipe(cls, value: str) -> str:
        if value not in RECIPES:
            raise ValueError(f"unknown recipe {value!r}{_suggest(value, RECIPES)}")
        return value

    @field_validator("scale", "ratio", "blur_sigma")
    @classmethod
    def _is_range(cls, value: tuple[float, float] | None) -> tuple[float, float] | None:
        if value is not None and not 0 < value[0] <= value[1]:
            raise ValueError(f"expected [low, high] with 0 < low <= high, got {list(value)}")
        return value

    @property
    def overrides(self) -> dict[str, Any]:
        """The augmentation fields that are set here."""
        values = {name: getattr(self, name) for name in AUGMENTATION_FIELDS}
        return {name: value for name, value in values.items() if value is not None}


class Data(Section):
    """Which images, how many at a time, and the views made of each."""

    name: str = "folder"
    """`imagenet`, `imagenet100`, `inat21`, `inat21_mini`, `cifar10`, `cifar100`, `stl10`,
    `tiny_imagenet`, `cinic10`, `blood`, `organa`, `organc`, `organs`, `digits`, `folder` or `list`;
    docs/data.md says what each one looks for."""
    root: str | None = None
    """Folder of the data, or of shards that `ddp-ssl pack-shards` made of them. `folder`: class
    folders under `train/` and `val/`, class folders, or a flat folder of unlabelled images."""
    files: str | None = None
    """`name: list`: a text or CSV file with a path and, if there are labels, a class per line;
    paths are relative to `root`, or to the file where that is unset."""
    val_files: str | None = None
    """`name: list`: the same for validation. Unset: a `val_fraction` of `files`."""
    fraction: float = Field(1.0, gt=0, le=1)
    """Seeded share of the training images used for pretraining; the probe and k-NN of
    `ddp_ssl.evaluate` keep all labels."""
    skip: str | None = None
    """File of images to leave out, one path a line, as `ddp-ssl check-data` writes it."""
    max_bad_fraction: float = Field(0.01, ge=0, le=1)
    """Images that cannot be decoded are replaced and listed; a larger share stops the run."""
    reader: Literal["indexed", "streamed"] = "indexed"
    """Shards: `indexed` reads each image by its offset, in the run's own order; `streamed` reads
    them in sequence through DALI, for object storage, and gives up what docs/data.md lists."""
    url: str | None = None
    """Streamed shards: where the training tar files are if not in `root`, such as
    `s3://bucket/folder`; the index stays in `root`."""
    stage: str | None = None
    """Node-local folder that shards are copied to first, once per node."""
    batch_size: int = Field(256, ge=1)
    """Images per step over all processes; must be divisible by the number of data shards."""
    views: list[ViewGroup] = Field([ViewGroup()], min_length=1)
    """View groups, such as `[{count: 2, size: 224, recipe: asym}, {count: 6, size: 96}]`."""
    view_shards: int = Field(1, ge=1)
    """Processes that share the views of an image: each decodes it and makes its part of the views.
    Divides the number of processes and the count of each resolution's views."""
    color_jitter: Literal["fast", "seq", "exact"] = "seq"
    """`fast`: one fused linear operator; `seq`: torchvision's contrast and clamping in a fixed
    order; `exact`: torchvision's hue and random order too, at about five times the cost."""
    mean: tuple[float, float, float] | None = None
    """Normalisation mean per channel, for pixels in [0, 1]. Unset: the data set's or ImageNet's."""
    std: tuple[Positive, Positive, Positive] | None = None
    """Normalisation standard deviation per channel. Unset: the data set's or ImageNet's."""
    val_fraction: float = Field(0.1, gt=0, lt=1)
    """Seeded share of the images kept for validation where there is no validation split."""
    val_resize: int | None = Field(None, ge=8)
    """Shorter side after resizing for evaluation. Unset: 8/7 of `val_size` from 64 px on, but
    `val_size` for data sets of small square images, which are seen whole."""
    val_size: int | None = Field(None, ge=8)
    """Side of the central crop for evaluation. Unset: the size of the largest view."""
    val_interpolation: Literal["bilinear"] | None = None
    """Kernel of that resizing, antialiased: bilinear, torchvision's default; null: bicubic, as for
    training."""
    threads: int = Field(0, ge=0)
    """DALI threads per process; 0 shares the machine's cores among its processes."""
    prefetch: int = Field(2, ge=1)
    """Batches that DALI prepares ahead."""
    read_threads: int = Field(16, ge=1)
    """Threads per process that read files ahead; more hide a file system's latency."""
    dtype: Literal["float32", "float16"] = "float32"
    """Type of the views that DALI hands over; float16 halves their memory."""
    hw_decoder_load: float = Field(0.65, ge=0, le=1)
    """GPU: share of the JPEGs that the hardware decoder takes."""
    preallocate: tuple[Size, Size] | None = None
    """GPU: width and height of the largest images expected, so that the decoder's buffers are
    allocated once."""

    @property
    def normalisation(self) -> tuple[Channels, Channels]:
        """Mean and standard deviation per channel."""
        mean, std = NORMALISATION.get(self.name, NORMALISATION["imagenet"])
        return self.mean or mean, self.std or std

    @property
    def central_crop(self) -> CentralCrop:
        """How an image is cropped for evaluation."""
        size = self.val_size or max(group.size for group in self.views)
        crops = size >= 64 and self.name not in WHOLE
        resize = self.val_resize or (round(size * 8 / 7) if crops else size)
        return CentralCrop(resize, size, self.val_interpolation or "bicubic")


class Optim(Section):
    """Optimiser, schedule and precision."""

    name: Literal["lars", "sgd", "adam", "adamw"] = "lars"
    """`adam` couples weight decay to the gradient (L2), `adamw` decouples it."""
    epochs: int = Field(100, ge=1)
    """Passes over the training images."""
    lr: float = Field(0.4, gt=0)
    """Base learning rate per 256 images: the peak is `lr * data.batch_size / 256`."""
    warmup_epochs: float = Field(10, ge=0)
    """Epochs of linear warm-up, clipped to the epochs there are."""
    warmup_lr: float = Field(3e-5, ge=0)
    """Learning rate (not scaled) where the warm-up starts."""
    final_lr_fraction: float = Field(0.0, ge=0, le=1)
    """The cosine ends at this fraction of the peak."""
    weight_decay: float = Field(1e-4, ge=0)
    """Weight decay; under LARS, Adam and AdamW not on 1-D parameters (biases, norms)."""
    momentum: float = Field(0.9, ge=0, lt=1)
    """Momentum of LARS and SGD."""
    betas: tuple[Below1, Below1] = (0.9, 0.999)
    """Adam's and AdamW's averages."""
    lars_variant: Literal["solo", "vicreg"] = "solo"
    """`solo`: solo-learn's trust ratio; `vicreg`: the official VICReg's."""
    lars_eta: float = Field(0.02, gt=0)
    """LARS trust coefficient (official VICReg: 0.001)."""
    lars_clip: bool = True
    """Bound the `solo` variant's trust ratio so that a step is never longer than SGD's."""
    lars_bound_1d: float | None = Field(0.5, gt=0)
    """Under LARS, the most that one step, momentum included, moves an element of a bias or norm
    (which have no trust ratio); null: no bound, as solo-learn, where a steep gradient can end in
    NaN."""
    grad_clip: float | None = Field(None, gt=0)
    """Upper bound of the gradient's global norm; unset: none."""
    accumulate: int = Field(1, ge=1)
    """Only 1: gradient accumulation is not the large batch for losses that couple images."""
    precision: Literal["bf16", "fp16", "fp32"] = "bf16"
    """Autocast of the networks. fp16 uses a gradient scaler, which waits for the device at every
    step. Losses are always in float32."""
    gradient_compression: Literal["bf16"] | None = None
    """Send gradients in bf16: half the bytes, rounded to 8 bits before and while they are added,
    so that a run is no longer the same at every number of processes. Only with several."""


class Eval(Section):
    """k-NN and the online linear probe on the validation split."""

    every: int = Field(10, ge=0)
    """Epochs between evaluations; 0 evaluates only at the start and at the end."""
    batch_size: int = Field(256, ge=1)
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
    """Also print k-NN accuracy on the raw pixels, the figure to compare with."""


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
    """What is kept of the run."""

    every: int = Field(1, ge=1)
    """Epochs between checkpoints; after the last, the best, and those of `keep_every` there is
    always one."""
    every_steps: int = Field(0, ge=0)
    """Steps between checkpoints within an epoch; 0: none."""
    keep: int = Field(2, ge=2)
    """Newest checkpoints kept."""
    keep_every: int = Field(0, ge=0)
    """Epochs between checkpoints that are kept for good; 0: none."""
    max_failures: int = Field(10, ge=1)
    """Failing saves in a row after which the run ends; each is tried again at the next logging
    step."""
    best: str | None = "eval/knn_top1"
    """Figure of the validation (`eval/*`, `rep/*`) whose best epoch is kept as `best.pt`; with a
    leading `-` the lowest is the best; null: none."""


class Log(Section):
    """What is written while the run goes on."""

    every_steps: int = Field(10, ge=1)
    """Steps between progress lines; metrics have one row per step, written at these steps."""
    tensorboard: bool = True
    """Write TensorBoard events beside `metrics.jsonl`."""


class MethodConfig(Section):
    """Base of a method's own section. A subclass sits in the method's file, with its `recipe`."""

    name: str = "adadim"
    """A built-in method, or `module:Class` from outside the package."""

    recipe: ClassVar[dict[str, Any]] = {}
    """The method's defaults for the other sections: nested, as in a YAML file."""
    embedded: ClassVar[dict[str, Any]] = {}
    """What the method needs otherwise on the embedded default's 1,797 digits, its own section
    included: nested like `recipe`, applied over `EMBEDDED_DEFAULT` and only without a YAML."""
    min_views: ClassVar[int] = 2
    max_views: ClassVar[int | None] = None
    small_crops: ClassVar[bool] = True
    batch_coupled: ClassVar[bool] = True

    def check(self, config: Config) -> None:
        """Raise `ValueError` for a combination that the method cannot run."""


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


# What `ddp_ssl.train` runs when no YAML is given: AdaDim on 1,797 handwritten digits.
EMBEDDED_DEFAULT: dict[str, Any] = {
    "method": {"alpha_every": 2, "temperature": 0.2},
    "model": {
        "backbone": "resnet18",
        "backbone_args": {"channels": [16, 32, 64, 128]},
        "projector": [512, 512, 512],
    },
    "data": {
        "name": "digits",
        "batch_size": 128,
        "views": [
            {
                "count": 2,
                "size": 32,
                "recipe": "sym",
                "scale": [0.4, 1.0],
                "blur_p": 0.0,
                "flip_p": 0.0,
            }
        ],
    },
    "optim": {"epochs": 20, "lr": 0.1, "warmup_epochs": 2, "precision": "fp32"},
    "eval": {"every": 5, "raw_pixels": True},
    "measure": {"every": 5},
    "log": {"every_steps": 11},
}

# Keys that may differ when a run is resumed; all others are its identity, and so are the images.
FREE_ON_RESUME = re.compile(
    r"run\.(?!seed$).*|(checkpoint|eval|measure|log)\..*|data\.(root|url|stage|files|val_files|"
    r"skip|view_shards|threads|"
    r"prefetch|read_threads|hw_decoder_load|preallocate|max_bad_fraction)"
)


@dataclass(frozen=True)
class Resolved:
    """The frozen config and, for each dotted key, where its value came from."""

    config: Config
    origins: Mapping[str, str]

    def to_yaml(self, origins: bool = True) -> str:
        """The whole tree as YAML, one leaf a line, each with its origin as a comment."""
        lines: list[str] = []
        for name, section in self.config.model_dump(mode="json").items():
            lines.append(f"{name}:")
            for key, value in section.items():
                text = f"  {key}: {_flow(value)}"
                origin = self.origins.get(f"{name}.{key}", "default")
                lines.append(f"{text:<60}  # {origin}" if origins else text)
        return "\n".join(lines) + "\n"


# --- reading ---------------------------------------------------------------------------------


class _Loader(yaml.SafeLoader):
    """Safe YAML that reads `1e-4` as a number, `off` and `20:23` as words, and refuses a key given
    twice."""

    yaml_implicit_resolvers = {  # noqa: RUF012 (declared by the base class)
        first: [
            (tag, pattern)
            for tag, pattern in pairs
            if tag not in ("tag:yaml.org,2002:bool", "tag:yaml.org,2002:int")
        ]
        for first, pairs in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"key {key!r} is given twice", key_node.start_mark
                )
            seen.add(key)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:bool", re.compile(r"(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF")
)
# As YAML 1.1 has it, but for numbers to base 60: a time or a range of steps is none.
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:int",
    re.compile(r"[-+]?(0b[01_]+|0x[0-9a-fA-F_]+|0[0-7_]*|[1-9][0-9_]*)$"),
    list("-+0123456789"),
)
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+$"), list("-+0123456789")
)


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file; a `ConfigError` of one line if there is none."""
    try:
        text = path.read_text()
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror or error}") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{path}: not a text file; a YAML file would be accepted") from None
    try:
        tree = yaml.load(text, _Loader)  # a SafeLoader
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not valid YAML: {_one_line(error)}") from None
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: expected sections such as `optim:`, got {_flow(tree)[:60]}")
    return tree


def load(arguments: Sequence[str]) -> Resolved:
    """Resolve `[CONFIG.yaml] [key=value ...]` into a validated tree.

    Everything but the keys of `method` is validated first; then the method's file is imported
    (and torch with it) for its own section and recipe. Raises `ConfigError`.
    """
    path, overrides = _split(arguments)
    layers: list[tuple[str, dict[str, Any]]] = []
    if path is None:
        layers.append(("embedded default", _embedded_default(overrides)))
    else:
        layers.append((str(path), read_yaml(path)))
    if overrides:
        layers.append(("command line", _tree_of(overrides, layers)))

    merged, origins = _merge(layers)
    _check_sections(merged, Config, origins)
    method = merged.get("method", {})
    if not isinstance(method, dict):
        raise ConfigError(f"method: expected keys such as `name:`, got {_flow(method)}")
    rest = {name: value for name, value in merged.items() if name != "method"}
    name = str(method.get("name", MethodConfig.model_fields["name"].default))
    _validate({**rest, "method": {"name": name}}, Config, origins)
    _check_method_name(name)

    method_config = load_method(name).config_class
    if path is None:
        demo = _for_method(layers[0][1], method_config)
        layers = [("embedded default", demo), ("embedded default", method_config.embedded)]
        if overrides:
            layers.append(("command line", _tree_of(overrides, layers)))
    layers.insert(0, (f"recipe of {name}", method_config.recipe))
    merged, origins = _merge(layers)
    merged["method"] = {**merged.get("method", {}), "name": name}
    typed = _with_method(method_config)
    config = _validate(merged, typed, origins)
    try:
        _check(config)
        config.method.check(config)
    except ValueError as error:
        raise ConfigError(_one_line(error)) from None
    return Resolved(config, origins)


def load_as(
    schema: type[S], arguments: Sequence[str], below: Sequence[tuple[str, dict[str, Any]]] = ()
) -> tuple[S, dict[str, str]]:
    """Resolve `[CONFIG.yaml] [key=value ...]` into another tree of sections than a run's.

    `below`: layers (origin, tree) under the YAML, the first the lowest. Returns the tree and where
    each value that is no default came from. Raises `ConfigError`.
    """
    path, overrides = _split(arguments)
    layers = list(below)
    if path is not None:
        layers.append((str(path), read_yaml(path)))
    if overrides:
        layers.append(("command line", _tree_of(overrides, layers, schema)))
    merged, origins = _merge(layers)
    _check_sections(merged, schema, origins)
    return _validate(merged, schema, origins), origins


def builtin_methods() -> list[str]:
    """Names of the methods in the package: the files of `ddp_ssl/methods`, but for `base` and
    those with a leading underscore, which hold what several methods share."""
    files = pkgutil.iter_modules([str(Path(__file__).parent / "methods")])
    return sorted(m.name for m in files if m.name != "base" and not m.name.startswith("_"))


def load_method(name: str) -> Any:
    """The method's class, from its file (`simclr`) or from outside (`module:Class`)."""
    if ":" not in name:
        module = importlib.import_module(f"ddp_ssl.methods.{name}")
        from ddp_ssl.methods.base import Method

        (found,) = (
            value
            for value in vars(module).values()
            if isinstance(value, type)
            and issubclass(value, Method)
            and value.__module__ == module.__name__
        )
        return found
    module_name, _, class_name = name.partition(":")
    try:
        outside = getattr(importlib.import_module(module_name), class_name)
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"method.name: cannot import {name!r}: {_one_line(error)}") from None
    from ddp_ssl.methods.base import Method

    if not (isinstance(outside, type) and issubclass(outside, Method)):
        raise ConfigError(f"method.name: {name!r} is not a subclass of ddp_ssl.methods.base.Method")
    return outside


def identity(config: Config) -> dict[str, str]:
    """What must be equal when a run is resumed: dotted key -> value as text."""
    return {
        f"{section}.{key}": _flow(value)
        for section, values in config.model_dump(mode="json").items()
        for key, value in values.items()
        if not FREE_ON_RESUME.fullmatch(f"{section}.{key}")
    }


def check_world_size(config: Config, world_size: int) -> None:
    """Raise `ConfigError` unless images and views split evenly over the processes."""
    batch, shares = config.data.batch_size, config.data.view_shards
    if world_size % shares:
        raise ConfigError(
            f"data.view_shards: {shares} does not divide the {world_size} processes; "
            f"{_divisors(world_size)} would be accepted"
        )
    parts = world_size // shares
    over = f"{parts} processes" if shares == 1 else f"{parts} groups of {shares} processes"
    if batch % parts:
        below, above = batch // parts * parts, -(-batch // parts) * parts
        nearest = f"{below} or {above}" if below else f"{above}"
        raise ConfigError(
            f"data.batch_size: {batch} images cannot be split evenly over {over}; "
            f"{nearest} would be accepted"
        )
    if config.model.batch_norm == "local" and batch < 2 * parts:
        raise ConfigError(
            f"data.batch_size: {batch} images over {over} leave one each; a "
            f"local batch norm needs 2; {2 * parts} or model.batch_norm=global is accepted"
        )


def _divisors(*numbers: int) -> str:
    """What divides all of them, as a list to read."""
    common = [str(d) for d in range(1, min(numbers) + 1) if not any(n % d for n in numbers)]
    return " or ".join(common) if len(common) < 3 else f"one of {', '.join(common)}"


def reference(method: type[MethodConfig] | None = None) -> Iterator[tuple[str, str, str, str]]:
    """Rows (key, type, default, description) of the whole schema."""
    return reference_of(_with_method(method) if method else Config)


def reference_of(tree: type[Section]) -> Iterator[tuple[str, str, str, str]]:
    """Rows (key, type, default, description) of a tree of sections."""
    for section, field in tree.model_fields.items():
        assert isinstance(field.annotation, type)
        yield from describe_fields(section, field.annotation)
        if section == "data":
            yield from describe_fields("data.views.N", ViewGroup)


def describe_fields(prefix: str, section: type[BaseModel]) -> Iterator[tuple[str, str, str, str]]:
    """Rows (key, type, default, description) of one section."""
    for key, item in section.model_fields.items():
        default = item.get_default(call_default_factory=True)
        if isinstance(default, list):
            default = [
                x.model_dump(exclude_none=True) if isinstance(x, BaseModel) else x for x in default
            ]
        # A subclass that only changes a default (a method's `name`) keeps the base's description.
        fields = (k.model_fields.get(key) for k in section.mro() if issubclass(k, BaseModel))
        described = (f.description for f in fields if f is not None and f.description)
        text = " ".join(next(described, "").split())
        yield f"{prefix}.{key}", _type_name(item.annotation), _flow(default), text


# --- parts -----------------------------------------------------------------------------------


def _split(arguments: Sequence[str]) -> tuple[Path | None, list[str]]:
    path: Path | None = None
    overrides: list[str] = []
    for argument in arguments:
        if "=" in argument and not Path(argument).is_file():  # a sweep's folders are seed=0, ...
            overrides.append(argument)
        elif argument.startswith("-"):
            raise ConfigError(
                f"{argument}: unknown option; --help and --print-config are the options, "
                "everything else is written key=value"
            )
        elif path is not None:
            raise ConfigError(f"{argument}: one config file is accepted, {path} is given already")
        elif (path := config_files.find(argument)) is None:
            raise ConfigError(config_files.unknown(argument))
    return path, overrides


def _embedded_default(overrides: Sequence[str]) -> dict[str, Any]:
    """The embedded default; its backbone's arguments are for its backbone alone."""
    if not any(override.startswith("model.backbone=") for override in overrides):
        return EMBEDDED_DEFAULT
    model = {k: v for k, v in EMBEDDED_DEFAULT["model"].items() if k != "backbone_args"}
    return {**EMBEDDED_DEFAULT, "model": model}


def _for_method(demo: dict[str, Any], method: type[MethodConfig]) -> dict[str, Any]:
    """The embedded default without the keys of `method` that this one does not have."""
    known = {key: value for key, value in demo["method"].items() if key in method.model_fields}
    return {**demo, "method": known}


def _tree_of(
    overrides: Sequence[str],
    layers: list[tuple[str, dict[str, Any]]],
    schema: type[Section] = Config,
) -> dict[str, Any]:
    """`["optim.lr=0.1", "data.views.0.size=96"]` as a nested dict; list items start from below."""
    below, _ = _merge(layers)
    tree: dict[str, Any] = {}
    for override in overrides:
        dotted, _, text = override.partition("=")
        try:
            value = yaml.load(text, _Loader)
        except yaml.YAMLError as error:
            raise ConfigError(f"{dotted}: not a YAML value: {_one_line(error)}") from None
        parts = dotted.split(".")
        if len(parts) < 2 or not all(parts):
            same = [k for k in _known_keys(schema) if k.rpartition(".")[2] == dotted]
            sections = ", ".join(schema.model_fields)
            hint = f"did you mean {' or '.join(same)}?" if same else f"sections are {sections}"
            raise ConfigError(f"{dotted}: expected section.key=value; {hint}")
        if len(parts) > 2 and parts[2].isdigit():
            value = _set_item(tree, below, parts, value, schema)
            parts = parts[:2]
        node = tree
        for part in parts[:-1]:
            node = node.setdefault(part, {})
            if not isinstance(node, dict):
                raise ConfigError(f"{dotted}: {part} is not a section")
        node[parts[-1]] = value
    return tree


def _set_item(
    tree: dict[str, Any],
    below: dict[str, Any],
    parts: list[str],
    value: Any,
    schema: type[Section],
) -> Any:
    """The list at `parts[:2]` with the item (or the item's key) that `parts` names replaced."""
    section, key, index, *rest = parts
    default: Any = None
    if section in schema.model_fields:
        kind = schema.model_fields[section].annotation
        assert isinstance(kind, type)
        if key in kind.model_fields:
            default = kind().model_dump(mode="json", exclude_none=True).get(key)
    current = tree.get(section, {}).get(key) or below.get(section, {}).get(key) or default
    if not isinstance(current, list) or int(index) >= len(current) or len(rest) > 1:
        length = len(current) if isinstance(current, list) else 0
        raise ConfigError(f"{'.'.join(parts)}: {section}.{key} has {length} items to set")
    items = list(current)
    if rest and not isinstance(items[int(index)], dict):
        raise ConfigError(f"{'.'.join(parts)}: {section}.{key}.{index} is {items[int(index)]}")
    items[int(index)] = {**items[int(index)], rest[0]: value} if rest else value
    return items


def _merge(layers: Sequence[tuple[str, dict[str, Any]]]) -> tuple[dict[str, Any], dict[str, str]]:
    merged: dict[str, Any] = {}
    origins: dict[str, str] = {}
    for source, tree in layers:
        for section, values in tree.items():
            if isinstance(values, dict) and isinstance(merged.get(section, {}), dict):
                merged[section] = {**merged.get(section, {}), **values}
                origins.update({f"{section}.{key}": source for key in values})
            elif values is not None:
                merged[section] = values
                origins[section] = source
    return merged, origins


def _check_sections(
    tree: Mapping[str, Any], schema: type[Section], origins: Mapping[str, str]
) -> None:
    """Raise `ConfigError` for a section that the schema does not have."""
    for section in tree:
        if section not in schema.model_fields:
            sections = ", ".join(schema.model_fields)
            hint = _suggest(str(section), schema.model_fields) or f"; sections are {sections}"
            raise ConfigError(f"{section}: unknown section{_where(section, origins)}{hint}")


def _check_method_name(name: str) -> None:
    names = builtin_methods()
    if ":" not in name and name not in names:
        raise ConfigError(
            f"method.name: unknown method {name!r}{_suggest(name, names)}; "
            f"accepted: {', '.join(names)}, or module:Class"
        )


def _with_method(method: type[MethodConfig]) -> type[Config]:
    """`Config` with the method's own section in place."""

    class Typed(Config):
        method: method  # type: ignore[valid-type]

    Typed.__name__ = "Config"
    Typed.model_rebuild(_types_namespace={"method": method})
    return Typed


def _validate(tree: dict[str, Any], schema: type[S], origins: Mapping[str, str]) -> S:
    try:
        return schema.model_validate(tree)
    except ValidationError as error:
        problems = [_problem(dict(e), schema, origins) for e in error.errors()]
    more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
    raise ConfigError(problems[0] + more)


def _problem(error: dict[str, Any], schema: type[Section], origins: Mapping[str, str]) -> str:
    location = [str(part) for part in error["loc"]]
    key = ".".join(location)
    if error["type"] == "extra_forbidden":
        return _unknown(location[-1], key, _known_keys(schema), origins)
    message = error["msg"].removeprefix("Value error, ")
    message = message[:1].lower() + message[1:]
    got = "" if error["type"] in ("value_error", "missing") else f", got {_flow(error['input'])}"
    if len(got) > 80:
        got = got[:77] + "..."
    return f"{key}: {message}{got}{_where(key, origins)}"


def _unknown(last: str, key: str, known: Sequence[str], origins: Mapping[str, str]) -> str:
    siblings = [k for k in known if k.rpartition(".")[0] == key.rpartition(".")[0]]
    close = (
        difflib.get_close_matches(key, siblings, 1, 0.5)
        or difflib.get_close_matches(key, known, 1, 0.6)
        or [k for k in known if k.rpartition(".")[2] == last][:1]
    )
    hint = f"; did you mean {close[0]}?" if close else "; --help lists the keys"
    return f"{key}: unknown key{_where(key, origins)}{hint}"


def _known_keys(schema: type[Section]) -> list[str]:
    keys: list[str] = []
    for section, field in schema.model_fields.items():
        kind = field.annotation
        assert isinstance(kind, type)
        keys += [f"{section}.{key}" for key in kind.model_fields]
    keys += [f"data.views.0.{key}" for key in ViewGroup.model_fields]
    return keys


def _check(config: Config) -> None:
    """Combinations that no method can run."""
    method, views = config.method, config.num_views
    if config.optim.accumulate > 1 and method.batch_coupled:
        raise ValueError(
            f"optim.accumulate: only 1 is accepted with {method.name}: its loss couples all images "
            "of a batch, so the mean over small batches is another loss, not the large batch's"
        )
    if config.optim.accumulate > 1:
        raise ValueError("optim.accumulate: only 1 is accepted")
    if views < method.min_views:
        raise ValueError(
            f"data.views: {method.name} compares views of an image and needs at least "
            f"{method.min_views}, got {views}"
        )
    if method.max_views is not None and views > method.max_views:
        raise ValueError(
            f"data.views: {method.name} takes {method.max_views} views at most, got {views}"
        )
    if not method.small_crops and len({group.size for group in config.data.views}) > 1:
        raise ValueError(f"data.views: {method.name} takes views of one size only")
    if config.model.batch_norm == "global" and config.data.batch_size < 2:
        raise ValueError(
            "data.batch_size: batch normalisation needs 2 images or more, got "
            f"{config.data.batch_size}"
        )
    counts: dict[int, int] = {}
    for group in config.data.views:
        counts[group.size] = counts.get(group.size, 0) + group.count
    for size, count in counts.items():
        if count % config.data.view_shards:
            raise ValueError(
                f"data.view_shards: {config.data.view_shards} does not divide the {count} views of "
                f"{size} pixels; {_divisors(*counts.values())} would be accepted"
            )
    if config.data.url and (config.eval.knn or config.eval.raw_pixels):
        key = "knn" if config.eval.knn else "raw_pixels"
        raise ValueError(
            f"eval.{key}: its bank reads training images by their place in a file, which data.url "
            f"has none of; eval.{key}=false is accepted"
        )
    if config.data.dtype == "float16" and config.optim.precision == "fp32":
        raise ValueError(
            "data.dtype: float16 images need autocast; float32 or optim.precision=bf16 is accepted"
        )
    size = config.data.central_crop.size
    if config.data.central_crop.resize < size:
        raise ValueError(
            f"data.val_resize: {config.data.val_resize} is smaller than the crop of {size} pixels "
            f"taken from it; {size} or more would be accepted"
        )
    if config.run.resume not in ("never", "") and config.run.init_from:
        raise ValueError("run.init_from: starts anew from weights; run.resume continues: give one")


def _suggest(word: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(word, list(known), 1, 0.4)
    return f"; did you mean {close[0]}?" if close else ""


def _where(key: str, origins: Mapping[str, str]) -> str:
    parts = key.split(".")
    for end in range(len(parts), 0, -1):
        origin = origins.get(".".join(parts[:end]))
        if origin and origin != "command line":
            return f" ({origin})"
        if origin:
            return ""
    return ""


def _flow(value: Any) -> str:
    """A value as one line of YAML."""
    text: str = yaml.safe_dump(value, default_flow_style=True, width=10**6, sort_keys=False)
    return text.strip().removesuffix("...").strip()


def _one_line(error: object) -> str:
    return " ".join(str(error).split())


def _type_name(annotation: Any) -> str:
    """A field's type as a reader would write it."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _type_name(arguments[0])
    if origin is Literal:
        return " | ".join(str(a) for a in arguments)
    if origin in (Union, UnionType):
        return " | ".join(_type_name(a) for a in arguments)
    if origin is not None:
        return f"{origin.__name__}[{', '.join(_type_name(a) for a in arguments)}]"
    return "none" if annotation is type(None) else str(getattr(annotation, "__name__", annotation))
