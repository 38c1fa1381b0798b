"""Weights that a command is given: their place, and a run's checkpoint in its modules."""

import contextlib
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ddp_ssl.checkpoint import store
from ddp_ssl.comm import Comm
from ddp_ssl.config import Config, ConfigError, Model
from ddp_ssl.errors import refused
from ddp_ssl.methods._learner import Learner
from ddp_ssl.methods._registry import make_method
from ddp_ssl.models import channels, own_weights
from ddp_ssl.utils import hub


@dataclass(frozen=True)
class Source:
    """The place of the weights: a file, which may belong to a run, or a model of timm's."""

    text: str  # as the user gave it
    home: Path | None = None  # the run folder that the weights belong to
    file: Path | None = None
    """The file of weights; None for a run's newest good checkpoint and for timm's."""
    timm: str | None = None
    """A timm model's name, with a tag for pretrained weights; or `hf-hub:USER/NAME`."""
    average: bool = False
    """Whether the average of the weights is meant (`model.ema`), in place of the backbone's."""
    trusted: str = ""
    """Code from outside the package that the run's config may import: `module:Class`, `*`: any."""

    @property
    def name(self) -> str:
        """The name of the weights, made of letters that a file's name may have."""
        stem = self.timm or (self.file or self.home or Path(self.text)).stem
        return "".join(c if c.isalnum() or c in "._-" else "_" for c in stem)


def find_source(text: str, trusted: str = "") -> Source:
    """The weights that `text` names: `RUN`, `RUN:best`, `RUN:last`, a file, `timm:NAME` or
    `hf-hub:USER/NAME`. A run's with `:ema` after it are the average of its weights.

    `trusted`: code from outside the package that the run's config may import (`Source.trusted`).

    Raises `ConfigError`, one line, for a place that does not exist or is no run folder.
    """
    average = text.endswith(":ema") and not Path(text).exists()
    source = _find_source(text.removesuffix(":ema") if average else text)
    if average and source.home is None:
        raise ConfigError(f"{text}: belongs to no run, which alone has an average; leave :ema out")
    if trusted and source.home is None:
        raise ConfigError(f"{text}: belongs to no run, so nothing is imported; leave --trust out")
    return replace(source, text=text, average=average, trusted=trusted)


def _find_source(text: str) -> Source:
    accepted = (
        "a run folder, RUN:best, RUN:last, a file of weights, timm:NAME or hf-hub:USER/NAME would "
        "be accepted"
    )
    if text.startswith(hub.PREFIX):
        hub.require(text)
    if text.startswith(("timm:", hub.PREFIX)):
        return Source(text, timm=text.removeprefix("timm:"))
    text = os.path.expanduser(text)
    place, _, which = text.rpartition(":")
    if place and which in ("best", "last") and not Path(text).exists():
        path = Path(place)
    else:
        path, which = Path(text), "last"
    if path.is_dir():
        if not (path / "config.yaml").is_file():
            raise ConfigError(f"{path}: no run folder (config.yaml is not there); {accepted}")
        if which == "last":
            return Source(text, home=path)
        best = path / "checkpoints" / "best.pt"
        if not best.is_file():
            raise ConfigError(
                f"{text}: {best} does not exist; {place}:last, the newest checkpoint, or another "
                "file in checkpoints/ would be accepted"
            )
        return Source(text, home=path, file=best)
    if not path.is_file():
        raise ConfigError(f"{path} does not exist; {accepted}")
    if path.suffix in (".yaml", ".yml"):
        raise ConfigError(f"{path}: the weights come first, then the YAML; {accepted}")
    folder = path.absolute().parent
    for home in (folder, folder.parent if folder.name == "checkpoints" else folder):
        # Other programs write a `config.yaml` beside weights too.
        made = (home / "metrics.jsonl").is_file() or (home / "checkpoints").is_dir()
        if made and (home / "config.yaml").is_file():
            return Source(text, home=home, file=path)
    return Source(text, file=path)


def read_source(source: Source) -> tuple[Path, str, dict[str, Any]]:
    """Path, SHA-256 and state of the file, or of the run's newest good checkpoint, read once.

    Raises `ValueError`, one line.
    """
    if source.file is not None:
        path, (sha256, state) = source.file, store.load_file(source.file)
    else:
        assert source.home is not None
        newest = store.load_newest(source.home)
        if newest is None:
            raise ValueError(f"no good checkpoint in {source.home / 'checkpoints'}")
        path, sha256, state = newest[0].path, newest[0].sha256, newest[1]
    state = _of_a_run(path, state)
    if source.average:
        prefix, weights = "average.", state["model"]
        own = {n.removeprefix(prefix): v for n, v in weights.items() if n.startswith(prefix)}
        if not own:
            raise ValueError(
                f"{source.text}: the run averaged no weights (model.ema); leave :ema out"
            )
        state["model"] = weights | {f"method.backbone.{name}": v for name, v in own.items()}
    return path, sha256, state


def read_checkpoint(path: Path, sha256: str | None = None) -> dict[str, Any]:
    """The state in a run's checkpoint. Raises `ValueError`, one line."""
    return _of_a_run(path, store.load(path, sha256=sha256))


def _of_a_run(path: Path, state: dict[str, Any]) -> dict[str, Any]:
    if not ({"model", "step", "identity"} <= state.keys() and isinstance(state["model"], dict)):
        raise ValueError(
            f"{path} is no checkpoint of a run: it has no model, step and identity; a run folder "
            "or a file in its checkpoints/ is accepted (backbone.pt is the backbone alone)"
        )
    return state


def make_learner(
    config: Config, weights: Mapping[str, Any], path: Path, comm: Comm, sizes: Sequence[int]
) -> Learner:
    """Method and probe with the weights of a checkpoint, on the CPU and in eval mode.

    The backbone must take images of `sizes` pixels. Raises `ValueError`, one line.
    """
    probe = weights.get("probe.weight")
    with seeded(0):
        learner = Learner(
            make_method(own_weights(config), comm), 0 if probe is None else len(probe)
        )
    fill(learner, weights, path)
    learner.eval()
    for size in sizes:
        _try_size(learner.method.backbone, config.model, size)
    return learner


def fill(module: nn.Module, weights: Mapping[str, Any], path: Path) -> None:
    """Load weights that must fit. Raises `ValueError`, one line that names their file."""
    with refused(f"{path} does not fit the run's config.yaml"):
        module.load_state_dict(weights)


@torch.no_grad()
def _try_size(backbone: nn.Module, model: Model, size: int) -> None:
    """Raise `ValueError`, one line, unless the backbone takes images of `size` pixels."""
    with refused(
        f"data.val_size: the run's {model.backbone} cannot take images of {size} pixels",
        "the size that it was trained on is accepted",
    ):
        backbone(torch.zeros(1, channels(model), size, size))


@contextlib.contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed torch in the block, and restore its random state afterwards."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield
