"""A check: stages that every process runs, and a judgement on rank 0."""

import contextlib
import os
import secrets
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar

import torch

from ddp_ssl.comm import ONE_PROCESS, Comm
from ddp_ssl.config import Config
from ddp_ssl.data.datasets.base import Dataset
from ddp_ssl.data.loading.bad_images import BadImages
from ddp_ssl.data.loading.loader import TrainLoader
from ddp_ssl.distributed import World
from ddp_ssl.utils.launcher import ranges

T = TypeVar("T")


class Finding(NamedTuple):
    """A line of the report."""

    level: Literal["ok", "warn", "fail"]
    text: str
    remedy: str = ""


Findings = Iterator[Finding]


def ok(text: str) -> Finding:
    """Nothing to do."""
    return Finding("ok", text)


def warn(text: str, remedy: str) -> Finding:
    """A run would start, and be slow, or be lost at some event."""
    return Finding("warn", text, remedy)


def fail(text: str, remedy: str) -> Finding:
    """A run would not start, or end badly."""
    return Finding("fail", text, remedy)


@dataclass
class Context:
    """State that the checks of a process share."""

    config: Config
    arguments: Sequence[str]
    world: World  # the process group of the checks: on the CPU, whatever device the run uses
    hosts: list[str]  # host name of every rank
    device: torch.device  # where the run would compute
    timeout_s: float
    folder: Path | None = None  # the run folder, once a check has chosen it
    data: Dataset | None = None  # the images, once a check has found them on all processes
    found: Dataset | None = None  # the same, on this process alone
    comm: Comm = ONE_PROCESS  # the images and views of a batch that are this process's
    loader: TrainLoader | None = None  # the training pipeline while it is timed
    bad: BadImages | None = None  # the bad images that the pipeline met
    gpu_bytes: int = 0  # held on the GPU before there was a pipeline
    checkpoint_s: float | None = None
    """Seconds to write a checkpoint, on rank 0, once a check has measured it."""
    cleanup: contextlib.ExitStack = field(default_factory=contextlib.ExitStack)
    """Callbacks for the moment when the check has ended on all processes."""

    @property
    def one_per_host(self) -> list[int]:
        """The first rank of every host."""
        return [rank for rank, host in enumerate(self.hosts) if host not in self.hosts[:rank]]

    @property
    def home(self) -> Path:
        """The run folder, or as much of its path as exists."""
        return existing(self.folder or Path(self.config.run.dir or "runs"))

    @property
    def home_above(self) -> Path:
        """The folder that the run folder is or will be made in, as far as it exists."""
        home = self.home
        return home if home != (self.folder or home).absolute() else home.parent

    def ranks_of(self, host: str) -> str:
        """`ranks 0-7`."""
        ranks = ranges(rank for rank, name in enumerate(self.hosts) if name == host)
        return f"ranks {ranks}" if ranks.strip("0123456789") else f"rank {ranks}"

    def who(self, ranks: Iterable[int]) -> str:
        """`rank 3 (n2)`, `ranks 0, 1 (n1)`, `all ranks`."""
        these = sorted(set(ranks))
        if len(these) == self.world.size:
            return "the one process" if self.world.size == 1 else f"all {len(these)} ranks"
        hosts = ", ".join(dict.fromkeys(self.hosts[rank] for rank in these))
        shown = ", ".join(map(str, these[:8])) + (", ..." if len(these) > 8 else "")
        return f"rank{'s' * (len(these) > 1)} {shown} ({hosts})"


Stage = Callable[[Context, list[Any]], Any]
"""Runs on every process, with the results of all processes in the stage before. If one process
raises, the others are told, and no further stage runs."""


class Check(NamedTuple):
    """One subject. `judge` runs on rank 0, with every process's result of the last stage."""

    name: str
    stages: tuple[Stage, ...]
    judge: Callable[[Context, list[Any]], Iterable[Finding]]
    timeout_s: float | None = None
    """Seconds for a stage, if it may need more than the usual limit."""


def by_value(facts: Sequence[T]) -> dict[T, list[int]]:
    """The ranks of each value, the most frequent value first."""
    ranks: dict[T, list[int]] = {}
    for rank, fact in enumerate(facts):
        ranks.setdefault(fact, []).append(rank)
    return dict(sorted(ranks.items(), key=lambda item: -len(item[1])))


@contextlib.contextmanager
def scratch(folder: Path) -> Iterator[Path]:
    """The path of a file to write in `folder`, which is removed afterwards."""
    path = folder / f".ddp_ssl-doctor-{os.getpid()}-{secrets.token_hex(4)}"
    try:
        yield path
    finally:
        with contextlib.suppress(OSError):
            path.unlink(missing_ok=True)


def existing(path: Path) -> Path:
    """The folder, or the nearest one above it that exists."""
    return next(p for p in (path.absolute(), *path.absolute().parents) if p.is_dir())


def room(place: Path) -> tuple[int, int | None]:
    """Free bytes, and how many files can still be made where there is a limit."""
    disk = os.statvfs(place)
    return disk.f_bavail * disk.f_frsize, disk.f_favail if disk.f_files else None


def size(nbytes: float) -> str:
    """`123 MiB`, `4.5 GiB`."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if nbytes < 1024:
            return f"{nbytes:.3g} {unit}" if nbytes < 100 else f"{nbytes:.0f} {unit}"
        nbytes /= 1024
    return f"{nbytes:.3g} TiB"


def file_system(path: Path, mounts: Path = Path("/proc/mounts")) -> str:
    """The type of the file system that holds `path`, such as `nfs4`."""
    kind, longest = "unknown", -1
    for line in mounts.read_text().splitlines():
        _, point, found, *_ = line.split()
        point = point.replace("\\040", " ")
        inside = path.is_relative_to(point)
        if inside and len(point) >= longest:
            kind, longest = found, len(point)
    return kind
