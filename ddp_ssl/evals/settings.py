"""Settings of an evaluation: the schema of `ddp_ssl.evaluate`, and how its values are read."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from ddp_ssl.config import (
    Config,
    ConfigError,
    Data,
    Eval,
    Measure,
    Positive,
    Section,
    load_as,
)
from ddp_ssl.config.section import PathText, Seconds
from ddp_ssl.evals.weights import Source
from ddp_ssl.run.arrays import facts_of, with_statistics
from ddp_ssl.run.configure import load

Fraction = Annotated[float, Field(ge=0, lt=1)]
Seed = Annotated[int, Field(ge=0, lt=2**31)]
# One value stands for a list of one.
Listed = BeforeValidator(lambda value: value if isinstance(value, list) else [value])

# The sections that a command reads; of `eval` all read the batch size.
SECTIONS = {
    "linear": ("run", "model", "data", "linear"),
    "knn": ("run", "model", "data", "knn"),
    "finetune": ("run", "model", "data", "finetune"),
    "dynamics": ("run", "data", "eval", "measure"),
    "suite": ("run", "model", "data", "linear", "knn"),
}
# Defaults of the suite, in place of a run's: the same for all runs. It reads features four times.
OF_SUITE = {"run": {"cache_mb": 0}, "data": {"val_fraction": 0.1}, "knn": {"k": [20]}}


class EvaluateRun(Section):
    """The folder of the results, and the machine."""

    dir: PathText | None = None
    """The results go into `evaluate/` of this folder. Unset: the run's own, or
    `runs/evaluate-SOURCE` for weights without a run."""
    name: str | None = None
    """Name of the result files. Unset: COMMAND-DATA-CHECKPOINT."""
    seed: int = Field(0, ge=0, lt=2**31)
    """Seed of a timm model's random weights, of the patches and of subsets."""
    device: Literal["auto", "cuda", "cpu"] = "auto"
    """`auto` takes the GPUs (NCCL), or the CPU (gloo) where no GPU is meant: no device file, no
    driver, none given to the job, or CUDA_VISIBLE_DEVICES empty."""
    threads: int = Field(0, ge=0)
    """CPU threads per process for torch; 0 shares the machine's cores among its processes."""
    timeout_s: Seconds = 1800
    """Seconds that a process waits for another one."""
    cache_mb: float = Field(64, ge=0)
    """Features larger than this, in MiB over all images of a split, are kept on disk. The next
    evaluation of the same weights and images reads them; 0 keeps all."""


class Backbone(Section):
    """The encoder that the weights belong to; a run knows its own."""

    backbone: str | None = None
    """Any timm model by name; needed for a file of weights that belongs to no run."""
    backbone_args: dict[str, Any] = Field({})
    """More arguments for `timm.create_model`."""
    stem: Literal["standard", "small"] = "standard"
    """`small`, for ResNets on small images: first convolution 3x3 with stride 1, no max-pool."""
    features: Literal["cls", "mean", "both"] | None = None
    """ViTs: the class token, the mean of the patches, or both side by side. Unset: as the network
    was trained."""
    prefix: str | None = None
    """Prefix of the backbone's names in the file, such as `teacher.backbone.`. Unset: the one that
    fits best."""
    channels_last: bool = True
    """Memory format of weights and images."""


class Linear(Section):
    """A linear classifier on frozen features; unset values are the protocol's."""

    protocol: Literal["sgd", "adam"] = "sgd"
    """`sgd`: SGD with momentum and a cosine, one central crop; `adam`: Adam at a constant rate with
    label smoothing, features averaged over 16 patches."""
    lr: Annotated[list[Positive], Listed] | None = Field(None, min_length=1)
    """Learning rates, all tried in one pass. `sgd`: per 256 images (0.1, 0.3, 1, 3); `adam`: as
    given (0.001)."""
    epochs: int | None = Field(None, ge=1)
    """Passes over the training images: 100 (`sgd`), 200 (`adam`)."""
    batch_size: int | None = Field(None, ge=1)
    """Images per step over all processes: 256 (`sgd`), 512 (`adam`)."""
    weight_decay: float | None = Field(None, ge=0)
    """L2 penalty: 0 (`sgd`), 1e-6 (`adam`)."""
    label_smoothing: Fraction | None = None
    """0 (`sgd`), 0.1 (`adam`)."""
    patches: int | None = Field(None, ge=1)
    """Views per image whose features are averaged, in training and testing: one central crop, the
    others augmented as view 0 of `data.views`: 1 (`sgd`), 16 (`adam`)."""
    augment: bool = False
    """Train on random crops and flips (scale, ratio and flip of view 0 of `data.views`). They pass
    through the frozen backbone in every epoch; no features of the training images are cached."""
    held_out: Fraction = 0.1
    """Share of the training images on which one of several learning rates is chosen; 0: none is
    chosen, all are reported."""
    per_class: int | None = Field(None, ge=1)
    """Labelled training images of each class. Fewer of one seed are part of more. Of several
    learning rates none is chosen. Unset: all images."""
    seeds: Annotated[list[Seed], Listed] = Field([0, 1, 2], min_length=1)
    """The training of the classifier is repeated with each; a seed also chooses the images of
    `per_class`."""


@dataclass(frozen=True)
class Protocol:
    """`Linear` with every value set."""

    name: str
    lrs: tuple[float, ...]  # as given
    epochs: int
    batch_size: int
    weight_decay: float
    label_smoothing: float
    patches: int

    @property
    def peaks(self) -> tuple[float, ...]:
        """The rates of the first step: under SGD `lr * batch_size / 256`."""
        scale = self.batch_size / 256 if self.name == "sgd" else 1.0
        return tuple(lr * scale for lr in self.lrs)


PROTOCOLS = {
    "sgd": Protocol("sgd", (0.1, 0.3, 1.0, 3.0), 100, 256, 0.0, 0.0, 1),
    "adam": Protocol("adam", (1e-3,), 200, 512, 1e-6, 0.1, 16),
}


def protocol_of(linear: Linear) -> Protocol:
    """The protocol, with the values that are set replacing its own."""
    given = linear.model_dump(include=set(Protocol.__annotations__), exclude_none=True)
    if linear.lr is not None:
        given["lrs"] = tuple(linear.lr)
    return replace(PROTOCOLS[linear.protocol], **given)


class Knn(Section):
    """Weighted k-nearest-neighbour vote; the labelled training images are the bank."""

    k: Annotated[list[Annotated[int, Field(ge=1)]], Listed] = Field(
        [1, 5, 10, 20, 50, 100, 200], min_length=1
    )
    """Numbers of neighbours, all in one pass."""
    temperature: float = Field(0.07, gt=0)
    """A neighbour's vote weighs exp(cosine / temperature)."""
    patches: int = Field(1, ge=1)
    """Views per image whose features are averaged, as in `linear.patches`."""


class Finetune(Section):
    """Training of the whole network on a share of the labels."""

    fraction: float = Field(1.0, gt=0, le=1)
    """Share of the labelled training images, of each class the same, one image at least. A smaller
    share of one seed is part of a larger one."""
    optimizer: Literal["sgd", "adamw"] = "sgd"
    """`sgd` with momentum 0.9, or `adamw`."""
    lr: float = Field(0.1, gt=0)
    """Learning rate of the classifier, per 256 images; warm-up, then a cosine to 0."""
    backbone_lr: float = Field(0.1, ge=0)
    """The backbone's learning rate as a multiple of the classifier's; 0 freezes its weights (its
    batch norms still adapt)."""
    layer_decay: float | None = Field(None, gt=0, le=1)
    """Factor of the backbone's rate from each layer to the one before it, as in
    `optim.layer_decay`; 0.65 to 0.75 are usual for ViTs."""
    epochs: int = Field(30, ge=1)
    """Passes over these images."""
    warmup_epochs: float = Field(1, ge=0)
    """Epochs of linear warm-up."""
    batch_size: int = Field(256, ge=1)
    """Images per step over all processes; at most as many as there are."""
    weight_decay: float = Field(0.0, ge=0)
    """Weight decay; under AdamW not on biases and norms."""
    label_smoothing: Fraction = 0.0
    """Share of the target that is spread over all classes."""
    precision: Literal["bf16", "fp32"] = "fp32"
    """Autocast of the network in training; testing is in float32."""
    seeds: Annotated[list[Seed], Listed] = Field([0], min_length=1)
    """The training is repeated with each; a seed also chooses the images."""


class EvaluateConfig(Section):
    """A whole evaluation. For a run `data`, `model`, `eval` and `measure` are its own."""

    run: EvaluateRun = EvaluateRun()
    model: Backbone = Backbone()
    data: Data = Data()
    linear: Linear = Linear()
    knn: Knn = Knn()
    finetune: Finetune = Finetune()
    eval: Eval = Eval()
    measure: Measure = Measure()

    @property
    def image_size(self) -> int:
        """Side of the crop that is evaluated."""
        return self.data.central_crop.size


# Keys of a run's data that describe one data set and mean nothing for another.
OF_ONE_DATA_SET = (
    *("root", "files", "val_files", "columns", "skip", "stage", "stage_gb"),
    *("val_resize", "val_interpolation"),
)
# Keys that only pretraining uses, and what an evaluation uses instead.
OF_PRETRAINING = {
    "data.batch_size": "linear.batch_size, finetune.batch_size and eval.batch_size are",
    "data.fraction": "finetune.fraction is; the bank and the classifier take all labels",
    "data.view_shards": "processes share the images here",
    "data.dtype": "images are float32 here",
}


def load_settings(
    source: Source, arguments: Sequence[str], suite: bool = False
) -> tuple[EvaluateConfig, Mapping[str, str]]:
    """Resolve `[CONFIG.yaml] [key=value ...]` over the run's config; returns the origins too.

    In the `suite` no data set is the run's own. Raises `ConfigError`.
    """
    run = None if source.home is None else config_of_run(source.home, source.trusted)
    layers: list[tuple[str, dict[str, Any]]] = [("the suite", OF_SUITE)] if suite else []
    plain, origins = load_as(EvaluateConfig, arguments, layers)
    for key, instead in OF_PRETRAINING.items():
        if key in origins:
            raise ConfigError(f"{key}: not used in an evaluation; {instead}")
    if run is None:
        if source.timm is None and plain.model.backbone is None:
            raise ConfigError(
                f"model.backbone: needed for {source.text}, which belongs to no run: the timm "
                "model whose weights they are, such as model.backbone=resnet50"
            )
        if source.timm is not None and plain.model.backbone not in (None, source.timm):
            raise ConfigError(
                f"model.backbone: {source.text} names the model already; leave it out"
            )
        facts = facts_of(plain.data)
        if facts is not None:
            model = plain.model
            if facts.channels != 3:
                own = {"in_chans": facts.channels, **model.backbone_args}
                model = model.model_copy(update={"backbone_args": own})
            data = plain.data
            # timm's weights say how they see bytes of three channels, in files or in an array
            if source.timm is None or (facts.channels, facts.dtype) != (3, "uint8"):
                data = with_statistics(data, facts)
            plain = plain.model_copy(update={"data": data, "model": model})
        return plain, origins
    for key in ("backbone", "backbone_args", "stem"):
        if f"model.{key}" in origins:
            raise ConfigError(f"model.{key}: {source.home} says what its model is; leave it out")
    transfer = suite or ("data.name" in origins and plain.data.name != run.data.name)
    tree = _of_run(run, transfer)
    if suite:
        del tree["data"]["name"]
    return load_as(EvaluateConfig, arguments, [(f"{source.home}/config.yaml", tree), *layers])


def config_of_run(home: Path, trusted: str = "") -> Config:
    """The run's own config.

    A folder may come from anybody. So a method from outside the package (`module:Class`), whose
    file would be executed, must be `trusted`: see `load`. Raises `ConfigError`.
    """
    path = str(home / "config.yaml")
    try:
        return load([path], trusted).config
    except ConfigError as error:
        text = str(error)
        raise ConfigError(text if path in text else f"{path}: {text}") from None


def _of_run(run: Config, transfer: bool) -> dict[str, Any]:
    """The run's settings of data, model and measurements, for the same or another data set.

    Pixels are normalised as in pretraining.
    """
    tree = run.model_dump(mode="json", exclude_none=True)
    data = tree["data"]
    data |= dict(zip(("mean", "std"), map(list, run.data.normalisation), strict=True))
    for key in ("fraction", "dtype"):
        data.pop(key, None)
    if transfer:
        data = {key: value for key, value in data.items() if key not in OF_ONE_DATA_SET}
    model = {
        key: tree["model"][key] for key in ("backbone", "backbone_args", "stem", "channels_last")
    }
    return {"data": data, "model": model, "eval": tree["eval"], "measure": tree["measure"]}
