"""Export a run's backbone: `ddp-ssl export RUN --format timm|torchvision|safetensors|onnx|hub`.

The backbone alone, in a form that others load without this package, and a model card `README.md`
that says what it is, how it was made, what was measured and how it is loaded. Every export is
loaded again and its features compared with the checkpoint's. `--push USER/NAME` puts it on the
Hugging Face hub. docs/export.md shows each form.

Exit codes: 0 done, 1 the file would not give the checkpoint's features (nothing is written), 2 it
cannot be made.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import importlib
import io
import json
import logging
import math
import os
import sys
import tempfile
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
import yaml
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ddp_ssl import models
from ddp_ssl.commands import common
from ddp_ssl.config import Config, Model
from ddp_ssl.errors import reason, refused
from ddp_ssl.evals.settings import config_of_run
from ddp_ssl.evals.weights import fill, find_source, read_source
from ddp_ssl.models import STEM_PADDING, architecture, build_backbone, loading_snippet
from ddp_ssl.utils import hub
from ddp_ssl.utils.files import json_file, path_of
from ddp_ssl.utils.sealed import sha256_at
from ddp_ssl.utils.text import one_line

Form = Literal["timm", "torchvision", "safetensors", "onnx", "hub"]
Features = Callable[[Tensor], Tensor]

TRAINED = "ddp-ssl train, with the settings below"
FILES: dict[Form, str] = {
    "timm": "backbone.pth",
    "torchvision": "backbone.pth",
    "safetensors": "backbone.safetensors",
    "onnx": "backbone.onnx",
    "hub": "model.safetensors",
}
# Same names, same shapes and same computation as timm's.
TORCHVISION = (
    "resnet18", "resnet34", "resnet50", "resnet101", "resnet152", "resnext50_32x4d",
    "resnext101_32x8d", "resnext101_64x4d", "wide_resnet50_2", "wide_resnet101_2",
)  # fmt: skip
# Keys of `model.backbone_args` that change nothing but training.
ONLY_IN_TRAINING = {"zero_init_last", "drop_rate", "drop_path_rate", "drop_block_rate"}
CARD = "<!-- made by ddp-ssl export -->"  # in every model card: another README.md is left alone
TOLERANCE = 1e-4  # relative; another order of summation is far below, a wrong weight far above


@dataclasses.dataclass(frozen=True)
class Trained:
    """A run's backbone in eval mode as plain timm modules, and the checkpoint it is from."""

    backbone: nn.Module
    width: int
    config: Config
    state: dict[str, Any]
    path: Path
    sha256: str
    """Of the checkpoint, as it was read: the run may have pruned it since."""
    average: bool = False  # the average of the weights (`RUN:ema`)

    @property
    def shape(self) -> tuple[int, int, int]:
        """Channels, height and width of the images that the run evaluates on."""
        side = self.config.data.central_crop.size
        return models.channels(self.config.model), side, side

    @property
    def identity(self) -> dict[str, str]:
        """The settings and the digests of the images that identify the run."""
        return dict(self.state["identity"])

    @property
    def config_hash(self) -> str:
        """SHA-256 of `identity`, so that two models of the same experiment can be told."""
        return hashlib.sha256(json.dumps(self.identity, sort_keys=True).encode()).hexdigest()


# --- reading -------------------------------------------------------------------------------------


def load_trained(source: str, trusted: str = "") -> Trained:
    """The backbone of a run folder's checkpoint; raises `ValueError`, one line.

    `trusted` is that of `config_of_run`.
    """
    found = find_source(source, trusted)
    if found.home is None:
        raise ValueError(
            f"{source}: belongs to no run of ddp_ssl; a run folder, RUN:best, RUN:last or a file "
            "in its checkpoints/ would be accepted"
        )
    config = config_of_run(found.home, trusted)
    path, sha256, state = read_source(found)
    backbone, width = build_backbone(architecture(config.model), [config.data.central_crop.size])
    prefix = "method.backbone."
    own = {n.removeprefix(prefix): v for n, v in state["model"].items() if n.startswith(prefix)}
    fill(backbone, own, path)
    return Trained(backbone.eval(), width, config, state, path, sha256, found.average)


# --- the formats ---------------------------------------------------------------------------------


def write_timm(trained: Trained, file: Path) -> Features:
    """A state dict under timm's names, which loads strictly; read back into a fresh model."""
    torch.save(models.export(trained.backbone), file)
    return _fresh(trained.config.model, torch.load(file, weights_only=True))


def write_safetensors(trained: Trained, file: Path) -> Features:
    """The same as safetensors, with `about` as its metadata."""
    weights = {name: value.contiguous() for name, value in models.export(trained.backbone).items()}
    save_file(weights, file, metadata={"format": "pt", **about(trained)})
    return _fresh(trained.config.model, load_file(file))


def write_hub(trained: Trained, file: Path) -> Features:
    """Safetensors, and `config.json` by which timm builds the model; read back as timm does."""
    import timm  # here, so that `--help` does not wait for it

    model = trained.config.model
    entry = timm.models.model_entrypoint(model.backbone.partition(".")[0])
    own = not entry.__module__.startswith("timm.")
    if own or model.stem != "standard":
        what = f"model.backbone={model.backbone}" if own else f"model.stem={model.stem}"
        raise ValueError(
            f"--format hub: timm alone cannot make the run's {what} again; timm and safetensors "
            "take any backbone, and their cards have the lines that load it"
        )
    write_safetensors(trained, file)
    said = hub_config(trained)
    (file.parent / "config.json").write_text(json.dumps(said, indent=2) + "\n")
    cfg = {**said["pretrained_cfg"], "file": str(file)}
    features: nn.Module = timm.create_model(
        said["architecture"], pretrained=True, pretrained_cfg=cfg, **said["model_args"]
    )
    return features.eval()


def hub_config(trained: Trained) -> dict[str, Any]:
    """`config.json` of timm's form: architecture, its arguments, and the images that it takes."""
    config, made = trained.config, trained.backbone.pretrained_cfg
    assert isinstance(made, dict)
    arguments = architecture(config.model).backbone_args
    arguments = {key: v for key, v in arguments.items() if key not in ONLY_IN_TRAINING}
    fixed = bool(made.get("fixed_input_size"))
    if fixed:  # timm has filled it in
        arguments = {"img_size": list(made["input_size"][1:]), **arguments}
    crop, (mean, std) = config.data.central_crop, config.data.normalisation
    return {
        "architecture": config.model.backbone.partition(".")[0],
        "num_classes": 0,
        "num_features": trained.width,
        "model_args": arguments,
        "pretrained_cfg": {
            "num_classes": 0,
            "input_size": [models.channels(config.model), crop.size, crop.size],
            "fixed_input_size": fixed and not arguments.get("dynamic_img_size"),
            "interpolation": crop.interpolation,
            # timm resizes to floor(size / crop_pct); a rounded quotient may be below `resize`.
            "crop_pct": math.nextafter(crop.size / crop.resize, 0),
            "crop_mode": "center",
            "mean": mean,
            "std": std,
            "first_conv": made.get("first_conv"),
            "classifier": made.get("classifier"),
        },
    }


def _fresh(config: Model, weights: dict[str, Tensor]) -> Features:
    backbone, _ = build_backbone(architecture(config), [])
    backbone.load_state_dict(weights)
    return backbone.eval()


def write_torchvision(trained: Trained, file: Path) -> Features:
    """A state dict under torchvision's names, complete but for `fc`; refused where they differ."""
    config = trained.config.model
    name = config.backbone.partition(".")[0]
    if name not in TORCHVISION:
        raise ValueError(
            f"--format torchvision: torchvision has no {config.backbone} that computes the same; "
            f"it has {', '.join(TORCHVISION)}; timm, safetensors and onnx take any backbone"
        )
    changed = sorted(architecture(config).backbone_args.keys() - ONLY_IN_TRAINING)
    if changed:
        raise ValueError(
            f"--format torchvision: the run's model.backbone_args change {name} ({changed[0]}: "
            f"{config.backbone_args[changed[0]]}), torchvision's is the standard one; timm, "
            "safetensors and onnx take any backbone"
        )
    import torchvision  # here, so that `--help` does not wait for it

    torch.save(models.export(trained.backbone), file)
    model = torchvision.models.get_model(name)
    model.fc = nn.Identity()
    if config.stem != "standard":
        model.conv1 = nn.Conv2d(
            3, model.conv1.out_channels, 3, padding=STEM_PADDING[config.stem], bias=False
        )
        model.maxpool = nn.Identity()
    model.load_state_dict(torch.load(file, weights_only=True))
    features: nn.Module = model.eval()
    return features


def write_onnx(trained: Trained, file: Path) -> Features:
    """An ONNX graph `images` -> `features` of any batch size, at the run's image size."""
    for package in ("onnx", "onnxscript", "onnxruntime"):
        try:
            onnxruntime: Any = importlib.import_module(package)
        except ImportError:
            raise ValueError(
                f"--format onnx: {package} is not installed; pip install 'ddp_ssl[onnx]'"
            ) from None
    images = torch.randn(2, *trained.shape)
    # The exporter tells its progress on stdout and warns about itself.
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            program = torch.onnx.export(
                trained.backbone,
                (images,),
                input_names=["images"],
                output_names=["features"],
                dynamic_shapes=({0: torch.export.Dim("batch")},),
                dynamo=True,
                verbose=False,
            )
        except torch.onnx.errors.OnnxExporterError as error:
            reason = one_line(error, 160)
            raise ValueError(
                f"--format onnx: torch cannot export {trained.config.model.backbone}: {reason}"
            ) from None
    assert program is not None
    program.model.metadata_props.update(about(trained))
    size = sum(p.numel() * p.element_size() for p in trained.backbone.parameters())
    program.save(file, external_data=size > 1_900_000_000)  # protobuf ends at 2 GiB
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])

    def features(images: Tensor) -> Tensor:
        return torch.from_numpy(session.run(["features"], {"images": images.numpy()})[0])

    return features


WRITERS: dict[Form, Callable[[Trained, Path], Features]] = {
    "timm": write_timm,
    "torchvision": write_torchvision,
    "safetensors": write_safetensors,
    "onnx": write_onnx,
    "hub": write_hub,
}


class MismatchError(RuntimeError):
    """The written file does not give the checkpoint's features."""


@torch.no_grad()
def difference(a: Features, b: Features, shape: tuple[int, int, int]) -> float:
    """|a - b| / |b| of the features of five images of noise."""
    images = torch.randn(5, *shape, generator=torch.Generator().manual_seed(0))
    ours, theirs = a(images).flatten(1), b(images).flatten(1)
    return float((ours - theirs).norm() / theirs.norm().clamp(min=1e-30))


def equal(off: float) -> str:
    """In words, how far features are off."""
    return (
        "the checkpoint's to the last bit" if off == 0 else f"within {off:.1e} of the checkpoint's"
    )


# --- the model card ------------------------------------------------------------------------------


def about(trained: Trained) -> dict[str, str]:
    """The metadata in a file, as strings."""
    config, state = trained.config, trained.state
    mean, std = config.data.normalisation
    return {
        "architecture": f"timm {config.model.backbone}",
        "architecture_arguments": json.dumps(architecture(config.model).backbone_args),
        "stem": config.model.stem,
        "image_size": str(trained.shape[1]),
        "mean": json.dumps(mean),
        "std": json.dumps(std),
        "method": config.method.name,
        "data": config.data.name,
        "epoch": str(state["epoch"]),
        "step": str(state["step"]),
        "config_hash": trained.config_hash,
        "made_by": f"ddp_ssl {state.get('code', {}).get('ddp_ssl', '')}".strip(),
    }


METRICS = {
    "eval/knn_top1": "k-NN top-1",
    "eval/knn_top1_ema": "k-NN top-1 of the average",
    "eval/probe_top1": "online linear probe, top-1",
    "rep/effective_rank_r": "effective rank of the features",
    "rep/effective_rank_z": "effective rank of the embeddings",
    "rep/mutual_information": "I(R;Z), nats",
    "rep/embedding_std": "standard deviation of the normalised embeddings",
    "rep/alpha": "α",
}


def model_card(trained: Trained, form: Form, file: Path, place: str, off: float) -> str:
    """The text of `README.md`. `file`: the weights as they lie now; `place`: where they will."""
    config, state, model = trained.config, trained.state, trained.config.model
    arguments = ", ".join(f"{k}={v}" for k, v in architecture(model).backbone_args.items())
    parameters = sum(p.numel() for p in trained.backbone.parameters())
    stem = ""
    if model.stem != "standard":
        padding = STEM_PADDING[model.stem]
        stem = f", first convolution 3x3 with stride 1 and padding {padding}, no max-pool"
    images = {name: digest for name, digest in trained.identity.items() if " images" in name}
    code = state.get("code", {})
    digest = sha256_at(file)
    rows = {
        "architecture": f"timm `{model.backbone}`{f' ({arguments})' if arguments else ''}{stem}",
        "output": f"{trained.width} features; {parameters / 1e6:.2f} M parameters",
        "pretrained with": f"{config.method.name}, without labels"
        + f"; moving average of the weights ({config.model.ema})" * trained.average,
        "data": f"{config.data.name} ({', '.join(f'{k} {v}' for k, v in images.items())})",
        "training": f"{state['epoch']} of {config.optim.epochs} epochs, {state['step']} steps of "
        f"{config.data.batch_size} images x {config.num_views} views on {len(state['ranks'])} "
        f"process{'es' if len(state['ranks']) != 1 else ''}",
        "config hash": f"`{trained.config_hash[:16]}` (SHA-256 of the settings below)",
        "checkpoint": f"{trained.path.name}, SHA-256 `{trained.sha256[:16]}`",
        "code": ", ".join(f"{name} {version}" for name, version in code.items()),
        "file": f"{file.name}, {file.stat().st_size / 1e6:.1f} MB, SHA-256 `{digest[:16]}`",
        "checked": f"read back, its features are {equal(off)} (images of noise, CPU)",
    }
    latest: dict[str, float] = state.get("latest", {})
    measured = [(label, latest[name]) for name, label in METRICS.items() if name in latest]
    mean, std = config.data.normalisation
    crop = config.data.central_crop
    lines = [
        *(_front_matter(config.method.name) if form == "hub" else []),
        f"# {model.backbone}, {config.method.name} on {config.data.name}",
        "",
        *_table("", "", rows.items()),
        "",
        "## Measured",
        "",
        f"On the run's validation images, at or before step {state['step']}.",
        "",
        *(
            _table("figure", "value", [(label, f"{value:.4g}") for label, value in measured])
            if measured
            else ["Nothing was measured: the run had no validation images."]
        ),
        "",
        "k-NN and the probe use labels, the pretraining did not; the probe was trained alongside.",
        "The figures to compare with others' are those of `python -m ddp_ssl.evaluate`.",
        "",
        "## Loading",
        "",
        "```python",
        loading_snippet(model, config.data, place, form),
        "```",
        "",
        f"Input: float32 `[n, {', '.join(map(str, trained.shape))}]`, "
        f"{'RGB, ' * (trained.shape[0] == 3)}{config.data.units}, minus",
        f"{_numbers(mean)}, divided by {_numbers(std)}.",
        f"The run evaluates on images resized to {crop.resize} pixels (shorter side, "
        f"{crop.interpolation}), central crop.",
        "",
        "## How it was made",
        "",
        # A published card names no folder of this machine.
        f"`{TRAINED if form == 'hub' else _command(trained.path)}`",
        "",
        "<details><summary>The settings that make the run what it is</summary>",
        "",
        "```yaml",
        *_settings(trained.identity),
        "```",
        "",
        "</details>",
        "",
        "## Licence",
        "",
        "Weights are made of their training images: who uses or passes them on is bound by the",
        f"terms of the data set ({config.data.name}), whatever the licence of the code is.",
        "",
        CARD,
    ]
    return "\n".join(lines) + "\n"


def _front_matter(method: str) -> list[str]:
    """By which the hub lists a model and says how it is loaded."""
    kind = "image-feature-extraction"
    said = {
        "library_name": "timm",
        "pipeline_tag": kind,
        "tags": [kind, "timm", "self-supervised-learning", method],
    }
    return ["---", yaml.safe_dump(said, sort_keys=False).rstrip(), "---"]


def _table(left: str, right: str, rows: Any) -> list[str]:
    return [f"| {left} | {right} |", "| --- | --- |", *(f"| {a} | {b} |" for a, b in rows)]


def _numbers(values: Sequence[float]) -> str:
    return f"({', '.join(f'{v:g}' for v in values)})"


def _settings(identity: dict[str, str]) -> list[str]:
    """`section.key: value` as YAML, a key a line; what is no setting is left out."""
    lines: list[str] = []
    for name, value in identity.items():
        section, _, key = name.partition(".")
        if not key:
            continue
        if f"{section}:" not in lines:
            lines.append(f"{section}:")
        if name == "data.views":  # most keys of a view are unset
            views = [{k: v for k, v in g.items() if v is not None} for g in yaml.safe_load(value)]
            value = yaml.safe_dump(views, default_flow_style=True, sort_keys=False).strip()
        lines.append(f"  {key}: {value}")
    return lines


def _command(path: Path) -> str:
    """The command that started the run, as its folder says."""
    about = json_file(path.parent.parent / "environment.json")
    return str(about.get("command", TRAINED))


# --- the command ---------------------------------------------------------------------------------


def export(
    source: str,
    form: Form,
    out: Path | None,
    trusted: str = "",
    push: str = "",
    private: bool = False,
) -> tuple[Path, float]:
    """Write the files; returns the main one and how far its features are off, relatively.

    `push`: the repository `USER/NAME` on the hub that gets the files of the form `hub` too; if it
    has to be made, it is `private` or as the account's settings say.

    Raises `ValueError` or `OSError` for what cannot be exported, `MismatchError` for a file that
    does not give the checkpoint's features. Nothing of it is left then.
    """
    trained = load_trained(source, trusted)
    # `RUN/checkpoints/x.pt` lies two below the run.
    form_folder = form + "-ema" * trained.average
    folder = out or trained.path.absolute().parent.parent / "export" / form_folder
    with refused(f"--out: {folder} cannot be created", "a folder is accepted"):
        folder.mkdir(parents=True, exist_ok=True)
    card = folder / "README.md"
    if card.exists() and CARD not in card.read_text(errors="replace"):
        raise ValueError(
            f"--out: {card} is no model card of an export and would be lost; another folder is "
            "accepted"
        )
    with tempfile.TemporaryDirectory(prefix=".export-", dir=folder) as place:
        file = Path(place) / FILES[form]
        off = difference(WRITERS[form](trained, file), trained.backbone, trained.shape)
        if not off <= TOLERANCE:
            raise MismatchError(
                f"features read back from the {form} file are {off:.1e} off (relative), more than "
                f"{TOLERANCE:g}: it would not be what the run trained"
            )
        name = f"{hub.PREFIX}{push}" if push else str(folder / file.name)
        card_text = model_card(trained, form, file, name, off)
        (file.parent / "README.md").write_text(card_text, encoding="utf-8", errors="replace")
        made = sorted(p.name for p in file.parent.iterdir())
        for each in made:  # large ONNX graphs have their weights beside them
            os.replace(file.parent / each, folder / each)
    if push:
        hub.push(push, [folder / each for each in made], private)
    return folder / file.name, off


def main(arguments: Sequence[str] | None = None) -> int:
    """Run from the command line; returns the exit code."""
    parser = common.Parser(
        "ddp-ssl export", "Export a run's backbone, with a model card, for use without ddp_ssl."
    )
    parser.add_argument(
        "source", metavar="RUN", help="a run folder, RUN:best, RUN:ema or a checkpoint in it"
    )
    parser.add_argument(
        "--format", choices=list(FILES), dest="form",
        help="timm or torchvision: a state dict; safetensors; onnx: a graph for onnxruntime; hub: "
        "the files that timm loads from the Hugging Face hub",
    )  # fmt: skip
    parser.add_argument(
        "--push", metavar="USER/NAME", default="",
        help="put the files of --format hub into this repository of the hub",
    )  # fmt: skip
    parser.add_argument("--private", action="store_true", help="if --push makes the repository")
    parser.add_argument("--out", type=path_of, help="folder; RUN/export/FORMAT if not given")
    parser.add_argument("--trust", action="store_true", help=common.TRUST)

    def run() -> int:
        trusted, words = common.split_trust(sys.argv[1:] if arguments is None else arguments)
        options = parser.parse_args(words)
        form, push = options.form, options.push
        if push and form in (None, "timm"):  # the hub's form is timm's too
            form = "hub"
        if form is None:
            parser.error(f"--format ({', '.join(FILES)}) or --push USER/NAME is needed")
        if push and form != "hub":
            parser.error(f"--push: --format {form} given; hub or none would be accepted")
        if push:
            hub.check_push(push)
        try:
            file, off = export(options.source, form, options.out, trusted, push, options.private)
        except MismatchError as error:
            return common.refuse(reason(error), 1)
        print(f"{file}, and README.md beside it; read back, its features are {equal(off)}")
        if push:
            print(f"pushed: timm.create_model({hub.PREFIX + push!r}, pretrained=True) loads it")
        return 0

    return common.exit_code(run)


if __name__ == "__main__":
    sys.exit(main())
