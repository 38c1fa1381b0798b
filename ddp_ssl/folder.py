"""The run folder: which one, whether it is free, and what a run continues from."""

from __future__ import annotations

import logging
import os
import re
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from ddp_ssl import checkpoint
from ddp_ssl.config import Config, ConfigError, identity
from ddp_ssl.data.datasets.base import Dataset
from ddp_ssl.launch import restarts

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Start:
    """Where the run lives and the checkpoint it continues from, if any."""

    folder: Path
    checkpoint: Path | None
    same_folder: bool
    """Whether the checkpoint is this folder's own, so that its metrics continue."""
    sha256: str | None = None
    """Of the checkpoint as rank 0 sees it, if its manifest says; every rank must load the same."""


def claim(config: Config, restarted: bool | None = None) -> Start:
    """Choose the folder and the starting point; creates nothing yet. For rank 0 alone.

    `restarted`: whether any process knows of a restart (default: this one); on several nodes
    torchrun's agents count each for itself.

    Raises `ConfigError` for a folder in use and for a checkpoint of another experiment.
    """
    resume = config.run.resume
    restarted = bool(restarts()) if restarted is None else restarted
    if restarted and (resume == "never" or _has_own_checkpoint(config)):
        resume = "auto"  # also where the first start continued from elsewhere
    source = None if resume in ("never", "auto") else Path(resume)
    if source is not None and not source.exists():
        raise ConfigError(
            f"run.resume: {source} does not exist; never, auto, or the path of a checkpoint or run "
            "folder would be accepted"
        )
    if config.run.dir is not None:
        folder = Path(config.run.dir)
    elif source is not None and _home(source) is not None:
        folder = cast(Path, _home(source))
    elif source is not None:
        raise ConfigError(f"run.dir: needed, since {source} lies in no run folder's checkpoints/")
    else:
        folder = Path("runs") / default_name(config)

    parts = folder.parts
    if ".." in parts[parts.count("..") :]:
        raise ConfigError(
            f"run.dir: {folder} leads back up by `..` in its middle; a path without is accepted"
        )
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"run.dir: {folder} is a file; a new or empty folder would be accepted")
    home = None if source is None else _home(source)
    own = home is not None and _same(folder, home)
    if resume == "never" or (source is not None and not own):
        taken = [p.name for p in folder.iterdir()] if folder.exists() else []
        taken = sorted(name for name in taken if not name.endswith((".out", ".err")))
        if taken:
            raise ConfigError(
                f"run.dir: {folder} is not empty ({', '.join(taken[:3])}); run.resume=auto "
                "continues it, or give another run.dir"
            )
    found, sha256 = None, None
    if resume == "auto" or (source is not None and source.is_dir()):
        where = folder if source is None else source
        good = checkpoint.newest_good(where)
        if good is not None:
            found, sha256 = good.path, good.sha256
        if good is None and (source is not None or checkpoint.find(where)):
            raise ConfigError(
                f"run.resume: no good checkpoint in {where / 'checkpoints'}; give another folder, "
                "or another run.dir to start anew"
            )
    elif source is not None:
        found = source
    return Start(folder, found, resume == "auto" or own, sha256)


def create(folder: Path) -> None:
    """Create the run folder; raises `ConfigError` in one line."""
    try:
        (folder / "checkpoints").mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"run.dir: {folder} cannot be created: {error.strerror}") from None


def _has_own_checkpoint(config: Config) -> bool:
    return config.run.dir is not None and bool(checkpoint.find(Path(config.run.dir)))


def whole_identity(config: Config, data: Dataset) -> dict[str, str]:
    """What makes the run this experiment: its config's identity and the images themselves."""
    val = "none" if data.val is None else data.val.digest
    images = {"train images": data.train.digest, "validation images": val}
    return identity(config) | {name: digest[:12] for name, digest in images.items()}


def check_identity(now: dict[str, str], saved: dict[str, str], path: Path) -> None:
    """Raise `ConfigError` if the checkpoint is of another experiment than this one.

    A setting that the checkpoint does not know counts as null: so a new setting's null has to mean
    what was done before there was one.
    """
    off = {key: value for key, value in now.items() if value == "null"}
    differing = checkpoint.compare_identity(off | saved, now)
    if differing:
        raise ConfigError(
            f"run.resume: {path} is another experiment: {'; '.join(differing)}; "
            "run.init_from takes its weights alone"
        )


def default_name(config: Config) -> str:
    """`DATA-METHOD-BACKBONE-ID`, the same after a restart of the job."""
    env = os.environ
    job = env.get("SLURM_ARRAY_JOB_ID") or env.get("SLURM_JOB_ID")
    launch = env.get("TORCHELASTIC_RUN_ID", "none")
    if job:
        suffix = f"job{job}" + (
            f"_{env['SLURM_ARRAY_TASK_ID']}" if "SLURM_ARRAY_TASK_ID" in env else ""
        )
    elif launch not in ("", "none") and int(env.get("GROUP_WORLD_SIZE", "1")) > 1:
        suffix = launch  # on several nodes rank 0 may move to another one
    elif "TORCHELASTIC_RESTART_COUNT" in env:
        # Workers are new after a restart, their parent, torchrun's agent, is not.
        suffix = time.strftime("%Y%m%d-%H%M%S", time.localtime(_started(os.getppid())))
    else:
        suffix = time.strftime("%Y%m%d-%H%M%S")
    backbone = config.model.backbone.partition(".")[0]
    method = config.method.name.rpartition(":")[2].lower()
    # One folder below runs/, whatever a hub's model or torchrun's --rdzv-id is called.
    return re.sub(r"[^\w.=+-]+", "_", f"{config.data.name}-{method}-{backbone}-{suffix}")


def _started(pid: int) -> float:
    """When a process started, in seconds since the epoch."""
    with open(f"/proc/{pid}/stat") as file:
        ticks = int(file.read().rpartition(")")[2].split()[19])
    with open("/proc/stat") as file:
        boot = next(int(line.split()[1]) for line in file if line.startswith("btime"))
    return boot + ticks / os.sysconf("SC_CLK_TCK")


def _home(source: Path) -> Path | None:
    """The run folder of a checkpoint file or the folder itself; None for a file elsewhere."""
    if source.is_dir():
        return source
    return source.parent.parent if source.parent.name == "checkpoints" else None


def _same(a: Path, b: Path) -> bool:
    return a.resolve() == b.resolve()


def per_rank(states: list[Any], rank: int) -> dict[str, Any]:
    """The state that rank saved; with more ranks than then, rank 0's, to compare with."""
    mine = states[rank] if rank < len(states) else states[0]
    if isinstance(mine, dict):  # of a version that did not pack them
        return mine
    return checkpoint.unpack(mine.numpy().tobytes())
