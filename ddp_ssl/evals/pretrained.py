"""A pretrained backbone, from a run or from any file of weights; loading executes no code of it."""

import hashlib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from ddp_ssl.comm import ONE_PROCESS
from ddp_ssl.config import Channels, Config, Model
from ddp_ssl.data.build import load_data
from ddp_ssl.data.datasets import registry
from ddp_ssl.data.datasets.base import Dataset
from ddp_ssl.distributed import World
from ddp_ssl.distributed.agreement import on_all_ranks
from ddp_ssl.errors import refused
from ddp_ssl.evals.settings import Backbone, EvaluateConfig, config_of_run
from ddp_ssl.evals.weights import (
    Source,
    find_source,
    make_learner,
    read_source,
    seeded,
)
from ddp_ssl.methods._learner import Learner
from ddp_ssl.methods.base import Method
from ddp_ssl.models import architecture, build_backbone
from ddp_ssl.utils import hub
from ddp_ssl.utils.progress import logger

State = Mapping[str, Tensor]

# Names of networks that follow another one: second choice if both fit.
FOLLOWERS = re.compile(r"momentum|teacher|target|ema|encoder_k|key_encoder|_k\.", re.IGNORECASE)


@dataclass
class Pretrained:
    """A backbone in eval mode on the CPU, `[n, 3, S, S] -> [n, width]`, and its origin."""

    backbone: nn.Module
    width: int
    config: Config | None  # the run's, if the weights are a run's
    learner: Learner | None
    """Method and online probe as in the checkpoint, if the file is a run's checkpoint."""
    step: int | None
    epoch: int | None
    path: Path | None
    description: str  # one line: the weights loaded, their file, and the tensors ignored
    test_images: str | None = None
    """Digest of the validation images that the run chose its best checkpoint by."""
    normalisation: tuple[Channels, Channels] | None = None
    """Mean and standard deviation that the weights were trained with, if timm gives them."""

    @property
    def method(self) -> Method[Any] | None:
        """The whole method, if the file is a run's checkpoint."""
        return None if self.learner is None else self.learner.method

    @property
    def digest(self) -> str:
        """SHA-256 over the backbone's names and weights."""
        content = hashlib.sha256()
        weights = getattr(self.backbone, "vit", self.backbone)
        for name, value in weights.state_dict().items():
            content.update(name.encode())
            content.update(
                value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data
            )
        return content.hexdigest()


def load_pretrained(
    source: Source | str | Path,
    model: Backbone | None = None,
    sizes: Sequence[int] | None = None,
    seed: int = 0,
) -> Pretrained:
    """The weights that `source` names (`weights.find_source`).

    `model` describes the backbone of a file that belongs to no run. `sizes`: the image sizes that
    it must take (by default 224, or the run's own). `seed`: that of a timm model's random weights.
    Raises `ValueError`, one line, if the weights are missing, unsafe to load or incomplete.
    """
    source = source if isinstance(source, Source) else find_source(str(source))
    model = model or Backbone()
    return with_features(_loaded(source, model, sizes, seed), model.features)


def _loaded(source: Source, model: Backbone, sizes: Sequence[int] | None, seed: int) -> Pretrained:
    if source.timm is not None:
        return _of_timm(source.timm, model, sizes or [224], seed)
    if source.home is None:
        assert source.file is not None
        settings = Model(
            backbone=model.backbone or "", backbone_args=model.backbone_args, stem=model.stem
        )
        return _of_file(source.file, settings, sizes or [224], model.prefix, None)
    config = config_of_run(source.home, source.trusted)
    sizes = sizes or [config.data.central_crop.size]
    if source.file is not None and source.file.parent.name != "checkpoints":  # exported weights
        return _of_file(source.file, config.model, sizes, model.prefix, config)
    path, _, state = read_source(source)
    learner = make_learner(config, state["model"], path, ONE_PROCESS, sizes)
    method, step, epoch = learner.method, int(state["step"]), int(state["epoch"])
    return Pretrained(
        method.backbone, method.feature_width, config, learner, step, epoch, path,
        f"{config.model.backbone} of {config.method.name}, {'average at ' * source.average}"
        f"step {step}, epoch {epoch} ({path})",
        test_images=state["identity"].get("validation images"),
    )  # fmt: skip


class Tokens(nn.Module):
    """Features of a timm ViT from its last tokens: images to `[n, d]`, or `[n, 2 d]` for `both`."""

    def __init__(self, vit: nn.Module, choice: str) -> None:
        super().__init__()
        self.vit, self.choice = vit, choice

    def extra_repr(self) -> str:
        """The choice, by which features on disk are told apart."""
        return self.choice

    def forward(self, x: Tensor) -> Tensor:
        vit: Any = self.vit
        tokens = vit.forward_features(x)
        parts = []
        if self.choice != "mean":
            parts.append(tokens[:, 0])
        if self.choice != "cls":
            parts.append(tokens[:, vit.num_prefix_tokens :].mean(1))
        return torch.cat([vit.fc_norm(part) for part in parts], 1)


def with_features(pretrained: Pretrained, choice: str | None) -> Pretrained:
    """The same weights with other features (`model.features`). Raises `ValueError`, one line."""
    if choice is None:
        return pretrained
    vit, key = pretrained.backbone, f"model.features: {choice}"
    if not hasattr(vit, "num_prefix_tokens") or not hasattr(vit, "fc_norm"):
        raise ValueError(f"{key} is for timm's ViTs, not {type(vit).__name__}; null is accepted")
    if choice != "mean" and getattr(vit, "cls_token", None) is None:
        raise ValueError(f"{key} needs a class token, and this network has none; mean is accepted")
    width = int(vit.embed_dim) * (2 if choice == "both" else 1)  # type: ignore[arg-type]
    text = f"{pretrained.description}; features: {choice}"
    return replace(pretrained, backbone=Tokens(vit, choice), width=width, description=text)


def load_everywhere(
    source: Source,
    settings: EvaluateConfig,
    world: World,
    check: Callable[[Pretrained], object] = lambda pretrained: None,
) -> Pretrained:
    """The weights, on all processes together; raises `ConfigError`. `check` may refuse them.

    Each process reads them by itself: nodes may hold different revisions of a model of the hub.
    """

    def load() -> Pretrained:
        sizes = [settings.image_size]
        pretrained = load_pretrained(source, settings.model, sizes, settings.run.seed)
        check(pretrained)
        return pretrained

    pretrained = on_all_ranks(world, load)
    own = pretrained.digest
    first = world.broadcast_object(own)

    def compare() -> None:
        if own != first:
            raise ValueError(
                f"{pretrained.description}: other weights than on rank 0; the same file on all "
                "nodes is accepted, or a revision, as in hf-hub:USER/NAME@REVISION"
            )

    on_all_ranks(world, compare)
    logger.info("%s", pretrained.description)
    return pretrained


def prepare(
    source: Source,
    settings: EvaluateConfig,
    world: World,
    pretrained: Pretrained | None = None,
    check: Callable[[Pretrained], object] = lambda pretrained: None,
) -> tuple[Pretrained, EvaluateConfig, Dataset]:
    """The weights, the settings with their normalisation, and the data; on all processes.

    `pretrained`: the weights, where they are loaded already. `check` may refuse the weights, before
    the data is copied and read. Raises `ConfigError`.
    """
    on_all_ranks(world, lambda: registry.find(settings.data))
    if pretrained is None:
        pretrained = load_everywhere(source, settings, world, check)
    settings = normalised(settings, pretrained)
    on_all_ranks(world, lambda: registry.stage(settings.data))
    data = load_data(cast(Config, settings), world)  # it reads `data` and `run.seed`
    return pretrained, settings, data


def _of_timm(name: str, model: Backbone, sizes: Sequence[int], seed: int) -> Pretrained:
    """Random weights for a plain name, pretrained ones for one with a tag or on the hub."""
    import timm  # here, so that `--help` does not wait for it

    given: dict[str, Any] = {}
    network, what = name, f"random weights of seed {seed}"
    if name.startswith(hub.PREFIX):
        network, given, _ = hub.described(name)
        given, what = given | {"pretrained": name}, f"weights of {name}"
    elif "." in name and timm.is_model_pretrained(name):
        given, what = {"pretrained": True}, "weights as timm gives them"
    elif "." in name:
        known = ", ".join(timm.list_pretrained(f"{name.partition('.')[0]}.*")[:5])
        raise ValueError(
            f"timm:{name}: timm has no such weights; accepted: {known or 'a name of timm'}"
        )
    trained = bool(given or model.backbone_args.get("pretrained"))
    if trained and model.stem != "standard":
        raise ValueError(
            f"model.stem: {model.stem} has no weights in {name}; standard would be accepted"
        )
    settings = Model(
        backbone=network, backbone_args={**given, **model.backbone_args}, stem=model.stem
    )
    with seeded(seed):
        backbone, width = build_backbone(settings, sizes)
    return Pretrained(
        backbone.eval(), width, None, None, None, None, None, f"timm's {network}, {what}",
        normalisation=_normalisation_of(backbone) if trained else None,
    )  # fmt: skip


def _normalisation_of(backbone: nn.Module) -> tuple[Channels, Channels] | None:
    """Mean and standard deviation that timm gives for pretrained weights."""
    said = getattr(backbone, "pretrained_cfg", None) or {}
    mean, std = said.get("mean"), said.get("std")
    return (tuple(mean), tuple(std)) if mean and std else None


def normalised(settings: EvaluateConfig, pretrained: Pretrained) -> EvaluateConfig:
    """The settings with the normalisation of the weights, if timm gives one.

    `data.mean` and `data.std`, where they are set, come first.
    """
    if pretrained.normalisation is None:
        return settings
    mean, std = pretrained.normalisation
    data = settings.data.model_copy(
        update={"mean": settings.data.mean or mean, "std": settings.data.std or std}
    )
    return settings.model_copy(update={"data": data})


def _of_file(
    path: Path, model: Model, sizes: Sequence[int], prefix: str | None, config: Config | None
) -> Pretrained:
    """The backbone from a state dict whose names may have a prefix."""
    with seeded(0):
        backbone, width = build_backbone(architecture(model), sizes)
    theirs = dict(_tensors(read_weights(path)))
    if not theirs:
        raise ValueError(f"{path} holds no tensors; a state dict would be accepted")
    own = backbone.state_dict()
    fits = _prefixes(own, theirs)
    if prefix is None:
        prefix = fits[0] if fits else ""
    part = {n.removeprefix(prefix): v for n, v in theirs.items() if n.startswith(prefix)}
    # Older files have no counters of batches; eval mode does not use them.
    needed = [name for name in own if not name.endswith("num_batches_tracked")]
    missing = [name for name in needed if name not in part]
    misfits = [name for name in needed if name in part and part[name].shape != own[name].shape]
    if missing or misfits:
        raise ValueError(_incomplete(path, model, prefix, own, part, missing, misfits, needed))
    larger = _left_over(backbone, part)
    if larger:
        raise ValueError(
            f"{path} holds a larger network than {model.backbone}: {len(larger)} tensors inside "
            f"of its modules are left over, the first {larger[0]}; model.backbone must name the "
            "network of the weights"
        )
    used = {name: part[name] for name in own if name in part}
    backbone.load_state_dict({**own, **used})
    others = [p for p in fits if p != prefix]
    ignored = sorted(set(theirs) - {prefix + name for name in used})
    lines = [f"{model.backbone} from {path}: {len(used)} tensors"]
    lines += [f"under {prefix!r}"] if prefix else []
    lines += [f"also complete: {', '.join(map(repr, others))} (model.prefix)"] if others else []
    counters = len(own) - len(used)
    lines += [f"missing: {counters} counters of batches"] if counters else ["none missing"]
    shown = ", ".join(ignored[:3]) + (", ..." if len(ignored) > 3 else "")
    lines += [f"ignored: {len(ignored)} others ({shown})"] if ignored else ["none ignored"]
    return Pretrained(backbone.eval(), width, config, None, None, None, path, "; ".join(lines))


def read_weights(path: Path) -> Any:
    """Contents of a `.safetensors` file or one of `torch.save`; raises `ValueError`, one line."""
    if path.suffix == ".safetensors":
        with refused(f"{path} is no safetensors file"):
            return load_file(path)
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # bytes that are no checkpoint make the unpickler raise anything
        text = str(error)
        if forbidden := re.search(r"GLOBAL (\S+)", text):
            raise ValueError(
                f"{path} is not loaded: {forbidden[1]} in it could execute code; save its state "
                "dict alone: torch.save(torch.load(FILE, weights_only=False)['state_dict'], NEW) "
                "where you trust the file"
            ) from None
        raise ValueError(
            f"{path} is no file of weights, or damaged; what torch.save has written, or a "
            ".safetensors file is accepted"
        ) from error


def _tensors(tree: Any, prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    """All tensors of nested dicts under dotted names: `state_dict.backbone.conv1.weight`."""
    if isinstance(tree, Tensor):
        yield prefix.removesuffix("."), tree
    elif isinstance(tree, Mapping):
        for name, value in tree.items():
            yield from _tensors(value, f"{prefix}{name}.")


def _prefixes(own: State, theirs: State) -> list[str]:
    """The prefixes under which most of the backbone is found; those of followers come last."""
    counts: dict[str, int] = {}
    for name, value in theirs.items():
        parts = name.split(".")
        for i in range(len(parts)):
            head = ".".join(parts[:i]) + ("." if i else "")
            rest = ".".join(parts[i:])
            if rest in own and own[rest].shape == value.shape:
                counts[head] = counts.get(head, 0) + 1
    most = max(counts.values(), default=0)
    best = [prefix for prefix, count in counts.items() if count == most]
    return sorted(best, key=lambda prefix: bool(FOLLOWERS.search(prefix)))


def _left_over(backbone: nn.Module, part: State) -> list[str]:
    """Tensors of a file that belong inside of the backbone's modules, where it has none.

    The classifier's are not among them, nor buffers that torch does not save.
    """
    modules, own = dict(backbone.named_modules()), backbone.state_dict()
    tops = {name.partition(".")[0] for name in own if "." in name}
    said = (getattr(backbone, "pretrained_cfg", None) or {}).get("classifier") or ()
    classifiers = tuple(f"{name}." for name in ([said] if isinstance(said, str) else said))
    found = []
    for name in part:
        *path, leaf = name.split(".")
        if name in own or not path or path[0] not in tops or name.startswith(classifiers):
            continue
        while ".".join(path) not in modules:
            path.pop()
        if leaf != "num_batches_tracked" and leaf not in modules[".".join(path)]._buffers:
            found.append(name)
    return found


def _incomplete(
    path: Path, model: Model, prefix: str, own: State, part: State, missing: list[str],
    misfits: list[str], needed: list[str],
) -> str:  # fmt: skip
    """One line on why these weights do not fill the backbone."""
    where = f" under {prefix!r}" if prefix else ""
    problems = []
    if misfits:
        name = misfits[0]
        problems.append(
            f"{len(misfits)} of another shape, the first {name} {list(part[name].shape)}, not "
            f"{list(own[name].shape)}"
        )
    if missing:
        problems.append(f"{len(missing)} missing, the first {missing[0]}")
    hint = ""
    if misfits == ["conv1.weight"]:
        hint = f"; model.stem={'small' if model.stem == 'standard' else 'standard'} may be meant"
    elif len(missing) == len(needed):
        hint = f"; its names are such as {next(iter(part), 'none')}; timm's names are accepted"
    return (
        f"{path} holds no complete {model.backbone}{where}: of {len(needed)} tensors "
        f"{' and '.join(problems)}{hint}"
    )
