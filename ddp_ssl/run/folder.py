"""The run folder: its choice, its claim, and the checkpoint that a run continues from."""

from __future__ import annotations

import contextlib
import json
import os
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ddp_ssl.checkpoint import store
from ddp_ssl.config import Config, ConfigError, read_yaml, tree_of
from ddp_ssl.run import claims, environment
from ddp_ssl.run.identity import bound_settings, identity
from ddp_ssl.run.status import write_status
from ddp_ssl.utils.files import TEMPORARY, if_readable, json_file, replace_text
from ddp_ssl.utils.launcher import job_name, restarts

# Files of a run that are written beside and renamed.
WRITTEN = (
    "config.yaml", "environment.json", "status.json", "views.png", "bad_images.txt",
    "metrics.jsonl", "given.json", "backbone.pt", "backbone_ema.pt", "result.md",
)  # fmt: skip


@dataclass(frozen=True)
class Start:
    """The folder of a run and the checkpoint it continues from, if any."""

    folder: Path
    checkpoint: Path | None
    same_folder: bool
    """Whether the checkpoint is this folder's own, so that its metrics continue."""
    sha256: str | None = None
    """Of the checkpoint as rank 0 sees it, if its manifest has one; every rank must load it."""


@dataclass(frozen=True)
class _Plan:
    """The folder of a run, and where it may continue from."""

    folder: Path
    resume: str
    """`never`, `auto`, or the path of a checkpoint or run folder."""
    same_folder: bool


def choose(config: Config) -> Start:
    """Choose the folder and the starting point; creates nothing.

    Another process may choose the same: a run takes them with `claim`. Raises `ConfigError` for a
    folder in use and for a starting point that is not there.
    """
    plan = _plan(config, None)
    _refuse(plan)
    claims.refuse_if_held(plan.folder)
    return _start(plan)


def claim(
    config: Config,
    restarted: bool | None = None,
    stopped: Callable[[], bool] = lambda: False,
) -> tuple[Start, claims.Claim]:
    """Take the folder for this run alone, and choose the starting point. For rank 0 alone.

    `restarted`: whether any process knows of a restart (default: this one); on several nodes
    torchrun's agents count each for itself. With `run.resume=auto` the run that has the folder is
    waited for, until it must be dead or `stopped`.

    Raises `ConfigError` for a folder in use and for a starting point that is not there.
    """
    number = 1
    while True:
        plan = _plan(config, restarted, number)
        chosen = config.run.dir is not None or plan.resume not in ("never", "auto")
        try:
            if chosen or not _another_experiment(plan.folder, config):
                _refuse(plan)  # before anything is made in it
                wait = chosen and plan.resume == "auto"
                taken = claims.take(plan.folder, config.run, wait, stopped)
                try:
                    plan = _plan(config, restarted, number)  # another run may have come and gone
                    _refuse(plan)
                    return _start(plan), taken
                except BaseException:
                    taken.release()
                    raise
        except claims.FolderInUseError:
            if chosen:
                raise
        number += 1  # a name of this project's own, which another run has taken


def _plan(config: Config, restarted: bool | None, number: int = 1) -> _Plan:
    """`number`: which of the names a run without `run.dir` gets."""
    resume = config.run.resume
    restarted = bool(restarts()) if restarted is None else restarted
    given = config.run.dir
    if restarted and (resume == "never" or (given is not None and store.find(Path(given)))):
        resume = "auto"  # also where the first start continued from elsewhere
    source = None if resume in ("never", "auto") else Path(resume)
    if source is not None and not source.exists():
        raise ConfigError(
            f"run.resume: {source} does not exist; never, auto, or the path of a checkpoint or run "
            "folder would be accepted"
        )
    folder = _choose(config, source, number)
    home = None if source is None else _home(source)
    own = resume == "auto" or (home is not None and folder.resolve() == home.resolve())
    return _Plan(folder, resume, own)


def _start(plan: _Plan) -> Start:
    """The starting point in a folder, or the one that `run.resume` names."""
    source = None if plan.resume in ("never", "auto") else Path(plan.resume)
    if plan.resume == "never":
        return Start(plan.folder, None, False)
    if source is not None and source.is_file():
        return Start(plan.folder, source, plan.same_folder)
    found = _newest_checkpoint(source or plan.folder, needed=source is not None)
    if found is None:
        return Start(plan.folder, None, plan.same_folder)
    return Start(plan.folder, found.path, plan.same_folder, found.sha256)


def _choose(config: Config, source: Path | None, number: int) -> Path:
    """`run.dir`, the folder of the checkpoint, or a new one."""
    if config.run.dir is not None:
        return Path(config.run.dir)
    if source is None:
        again = f"-{number}" if number > 1 else ""
        return Path("runs") / f"{default_name(config)}{again}"
    home = _home(source)
    if home is None:
        raise ConfigError(f"run.dir: needed, since {source} lies in no run folder's checkpoints/")
    return home


def _refuse(plan: _Plan) -> None:
    """Raise `ConfigError` for a folder that cannot be this run's."""
    folder, parts = plan.folder, plan.folder.parts
    if ".." in parts[parts.count("..") :]:
        raise ConfigError(
            f"run.dir: {folder} leads back up by `..` in its middle; a path without is accepted"
        )
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"run.dir: {folder} is a file; a new or empty folder would be accepted")
    if plan.same_folder or not folder.exists():
        return
    # Slurm's output may be there before the run.
    taken = sorted(
        p.name
        for p in folder.iterdir()
        if not (p.name.endswith((".out", ".err")) or claims.FILE.fullmatch(p.name))
    )
    if taken:
        claims.refuse_if_held(folder)
        raise claims.FolderInUseError(
            f"run.dir: {folder} is not empty ({', '.join(taken[:3])}); run.resume=auto "
            "continues it, or give another run.dir"
        )


def _another_experiment(folder: Path, config: Config) -> bool:
    """Whether a folder's checkpoints are of other settings."""
    found, mine = store.find(folder), identity(config)
    return bool(found) and any(found[0].identity.get(k, "null") != v for k, v in mine.items())


def _newest_checkpoint(folder: Path, needed: bool) -> store.CheckpointInfo | None:
    """The newest good checkpoint; `ConfigError` if there is none but should be one."""
    good = store.newest_good(folder)
    if good is None and (needed or store.find(folder)):
        raise ConfigError(
            f"run.resume: no good checkpoint in {folder / 'checkpoints'}; give another folder, "
            "or another run.dir to start anew"
        )
    return good


def create(folder: Path) -> None:
    """Create the run folder; raises `ConfigError` in one line."""
    try:
        (folder / "checkpoints").mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"run.dir: {folder} cannot be created: {error.strerror}") from None


def write_about(folder: Path, config: str, ranks: list[str], step: int) -> None:
    """Write the config (YAML) and the environment, and clean up after an earlier start."""
    for name in WRITTEN:
        for path in folder.glob(f"{name}.*{TEMPORARY}"):
            path.unlink(missing_ok=True)
    if not step:
        _drop_rows_of_another(folder, config)
    replace_text(folder / "config.yaml", config)
    about = environment.environment() | {"world_size": len(ranks), "ranks": ranks}
    replace_text(folder / "environment.json", json.dumps(about, indent=1) + "\n")
    _remove_old_stop(folder)
    write_status(folder, "running", step=step)
    store.clean_up(folder)


def _drop_rows_of_another(folder: Path, config: str) -> None:
    """Remove the rows of other settings that came to no checkpoint: loggers begin anew then."""
    path = folder / "config.yaml"
    old = if_readable(lambda: bound_settings(read_yaml(path)))
    new = bound_settings(tree_of(path, config))
    if old and any(old.get(key, value) != value for key, value in new.items()):
        for name in ("metrics.jsonl", "given.json"):
            (folder / name).unlink(missing_ok=True)


def _remove_old_stop(folder: Path) -> None:
    """Remove the STOP file that an earlier start obeyed; another one is for this start."""
    stop, status = folder / "STOP", folder / "status.json"
    with contextlib.suppress(FileNotFoundError):
        obeyed = json_file(status).get("state") in ("preempted", "done")
        if obeyed and stop.stat().st_mtime <= status.stat().st_mtime:
            stop.unlink()


def default_name(config: Config) -> str:
    """`DATA-METHOD-BACKBONE-ID`, the same after a restart of the job."""
    suffix = job_name()
    if suffix is None and "TORCHELASTIC_RESTART_COUNT" in os.environ:
        # A restart makes new workers; their parent, torchrun's agent, stays the same. Its pid tells
        # agents apart that started in one second.
        agent = os.getppid()
        suffix = time.strftime("%Y%m%d-%H%M%S", time.localtime(_started(agent))) + f"-{agent}"
    elif suffix is None:
        suffix = time.strftime("%Y%m%d-%H%M%S")
    backbone = config.model.backbone.partition(".")[0]
    method = config.method.name.rpartition(":")[2].lower()
    # One folder below runs/, whatever a hub's model or torchrun's --rdzv-id is called.
    return re.sub(r"[^\w.=+-]+", "_", f"{config.data.name}-{method}-{backbone}-{suffix}")


def _started(pid: int) -> float:
    """When a process started, in seconds since the epoch."""
    with open("/proc/stat") as file:
        boot = next(int(line.split()[1]) for line in file if line.startswith("btime"))
    return boot + claims.start_of(pid) / os.sysconf("SC_CLK_TCK")


def _home(source: Path) -> Path | None:
    """The run folder of a checkpoint file or the folder itself; None for a file elsewhere."""
    if source.is_dir():
        return source
    return source.parent.parent if source.parent.name == "checkpoints" else None
