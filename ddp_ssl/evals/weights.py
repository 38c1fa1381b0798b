"""The place of the weights that a command is given, found without torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ddp_ssl.config import ConfigError


@dataclass(frozen=True)
class Source:
    """The place of the weights: a file, which may belong to a run, or a timm model."""

    text: str
    """As the user gave it."""
    home: Path | None = None
    """The run folder that the weights belong to."""
    file: Path | None = None
    """The file of weights; None for a run's newest good checkpoint and for timm's."""
    timm: str | None = None
    """A timm model's name, with a tag for pretrained weights."""

    @property
    def name(self) -> str:
        """The name of the weights, made of letters that a file's name may have."""
        stem = self.timm or (self.file or self.home or Path(self.text)).stem
        return "".join(c if c.isalnum() or c in "._-" else "_" for c in stem)


def find_source(text: str) -> Source:
    """The weights named by `RUN`, `RUN:best`, `RUN:last`, a file or `timm:NAME`.

    Raises `ConfigError`, one line, for a place that does not exist or is no run folder.
    """
    accepted = "a run folder, RUN:best, RUN:last, a file of weights or timm:NAME would be accepted"
    if text.startswith("timm:"):
        return Source(text, timm=text.removeprefix("timm:"))
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
        if is_run(home):
            return Source(text, home=home, file=path)
    return Source(text, file=path)


def is_run(folder: Path) -> bool:
    """Whether a folder is a run's. Other programs write a `config.yaml` beside weights too."""
    made = (folder / "metrics.jsonl").is_file() or (folder / "checkpoints").is_dir()
    return made and (folder / "config.yaml").is_file()
