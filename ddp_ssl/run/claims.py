"""The claim of a run folder, so that one run at a time writes into it.

A claim is a file `claim-N.json` in the folder that names its holder. Its modification time is the
holder's heartbeat. A claim is over when its process is dead (on this machine) or silent for too
long (elsewhere); the heartbeat is compared with the file system's own clock.

The next claim has the next number and is created exclusively. Its maker then lists the claims
again and withdraws if there is one that it has not found to be over. So two processes never hold a
folder together, and nothing is removed that could be another's. This needs no locks of the file
system, which many shared ones lack.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import os
import random
import re
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ddp_ssl.config import ConfigError, Run
from ddp_ssl.utils.files import if_readable, removed_on_error

logger = logging.getLogger("ddp_ssl")

PERIOD_S = 5.0  # between two heartbeats
QUIET = 3  # periods without a heartbeat that a slow file system may explain
ACCEPTED = "another run.dir, or the same one after that run's end, would be accepted"
FILE = re.compile(r"claim-(\d+)\.json")


class FolderInUseError(ConfigError):
    """Another run has the folder."""


@dataclass(frozen=True)
class Holder:
    """The process that holds a claim, and the job that it belongs to."""

    host: str
    machine: str
    """Different for machines, boots and containers in which the same pid is another process."""
    pid: int
    started: int
    """When the process started, in ticks since the boot: a pid may be used again."""
    since: float
    """Seconds since 1970 at which it claimed."""
    timeout_s: float
    """`run.timeout_s`: silent for that long, it counts as dead."""
    job: str | None
    """Slurm's job id, `ARRAY_TASK` for a task of an array."""
    restart: int
    launch: str | None
    """torchrun's run id."""

    def continues(self, other: Holder) -> bool:
        """Whether this is a restart: of torchrun's run, or as a later task of the same array."""
        mine, _, my_task = (self.job or "").partition("_")
        theirs, _, their_task = (other.job or "").partition("_")
        later = mine == theirs and bool(my_task and their_task) and int(my_task) > int(their_task)
        return later or (self.launch is not None and self.launch == other.launch)

    def patience(self, other: Holder) -> float:
        """Seconds of silence after which `other`, on another machine, is over for this process."""
        if self.job and self.job == other.job and self.restart > other.restart:
            return float("-inf")  # Slurm has ended it
        restart = QUIET * PERIOD_S
        return restart if self.continues(other) else max(other.timeout_s, restart)

    def __str__(self) -> str:
        """`process 4711 on n1, Slurm job 99, since 2024-11-29 10:00:00`."""
        job = f", Slurm job {self.job}" if self.job else ""
        since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(self.since))
        return f"process {self.pid} on {self.host}{job}, since {since}"


def this_process(timeout_s: float) -> Holder:
    """This process as a holder."""
    env = os.environ
    job = env.get("SLURM_JOB_ID")
    if "SLURM_ARRAY_JOB_ID" in env and "SLURM_ARRAY_TASK_ID" in env:
        job = f"{env['SLURM_ARRAY_JOB_ID']}_{env['SLURM_ARRAY_TASK_ID']}"
    launch = env.get("TORCHELASTIC_RUN_ID", "none")
    return Holder(
        host=socket.gethostname(),
        machine=f"{Path('/proc/sys/kernel/random/boot_id').read_text().strip()} "
        f"{os.readlink('/proc/self/ns/pid')}",
        pid=os.getpid(),
        started=start_of(os.getpid()),
        since=time.time(),
        timeout_s=timeout_s,
        job=job or None,
        restart=int(env.get("SLURM_RESTART_COUNT") or 0),
        launch=None if launch in ("", "none") else launch,
    )


def start_of(pid: int) -> int:
    """When a process started, in ticks since the boot; 0 if it has ended. May raise `OSError`."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return 0 if fields[0] in "ZX" else int(fields[19])


def alive(pid: int, started: int) -> bool:
    """Whether the process of this machine that started then still runs."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # another user's
        pass
    try:
        return start_of(pid) == started
    except OSError:  # /proc may hide other users' processes
        return True


# --- files ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Found:
    """A claim in a folder."""

    path: Path
    text: str
    heard: float = dataclasses.field(compare=False)
    """Modification time of the file."""

    @property
    def number(self) -> int:
        """The number in its name."""
        match = FILE.fullmatch(self.path.name)
        assert match is not None
        return int(match[1])

    @property
    def holder(self) -> Holder | None:
        """Its holder; None for a file that was not completely written."""
        return if_readable(lambda: Holder(**json.loads(self.text)))


def find(folder: Path) -> list[Found]:
    """The claims in a folder, in the order of their numbers; none where there is no folder."""
    found: list[Found] = []
    with contextlib.suppress(FileNotFoundError):
        for name in os.listdir(folder):
            if FILE.fullmatch(name):
                path = folder / name
                with contextlib.suppress(FileNotFoundError):  # released meanwhile
                    text = path.read_text(errors="replace")
                    found.append(Found(path, text, path.stat().st_mtime))
    return sorted(found, key=lambda claim: claim.number)


def _is_over(claim: Found, me: Holder, now: float) -> bool:
    """Whether a claim's run has ended; `now` is the file system's time."""
    holder = claim.holder
    if holder is not None and holder.machine == me.machine:
        return not alive(holder.pid, holder.started)
    return now - claim.heard > (me.timeout_s if holder is None else me.patience(holder))


def _clock(folder: Path) -> float:
    """The time of the file system that a folder is on; another machine's clock may differ."""
    with tempfile.TemporaryFile(dir=folder) as file:
        return os.fstat(file.fileno()).st_mtime


# --- taking and holding --------------------------------------------------------------------------


def take(
    folder: Path, limits: Run, wait: bool = False, stopped: Callable[[], bool] = lambda: False
) -> Claim:
    """Claim a run folder, which is made if it is not there.

    With `wait` a holder that may be alive is waited for, until its silence would have shown that
    it is dead, or `stopped`; a restart waits in any case.

    Raises `FolderInUseError` if another run holds it, `ConfigError` if it cannot be made.
    """
    me = this_process(limits.timeout_s)
    deadline: float | None = None
    made: list[Path] = []
    while True:
        made = _make(folder) or made
        found = find(folder)
        try:
            now = _clock(folder) if found else 0.0
        except FileNotFoundError:  # its holder has ended and removed it
            continue
        except OSError as error:
            raise ConfigError(f"run.dir: {folder} cannot be written: {error.strerror}") from None
        holding = [claim for claim in found if not _is_over(claim, me, now)]
        if not holding:
            path = _place(folder, me, found)
            if path is not None:
                return Claim(path, me, made)
            time.sleep(random.uniform(0.01, 0.1))
            continue
        claim = holding[-1]
        if claim.holder is None and now - claim.heard < PERIOD_S:  # it is being written
            time.sleep(0.05)
            continue
        text = _in_use(claim, now)
        if deadline is None and (wait or (claim.holder and me.continues(claim.holder))):
            silence = claim.holder.timeout_s if claim.holder else limits.timeout_s
            longest = min(silence + QUIET * PERIOD_S, 0.9 * limits.start_timeout_s)
            deadline = time.monotonic() + longest
            until = time.strftime("%H:%M:%S", time.localtime(time.time() + longest))
            logger.warning("%s; waiting for its end until %s", text, until)
        if deadline is None or time.monotonic() > deadline or stopped():
            raise FolderInUseError(f"{text}; {ACCEPTED}")
        time.sleep(min(1.0, PERIOD_S))


def refuse_if_held(folder: Path) -> None:
    """Raise `FolderInUseError` if a folder is held by a process that may be alive."""
    found = find(folder)
    if found:
        me, now = this_process(0), _clock(folder)
        held = [claim for claim in found if not _is_over(claim, me, now)]
        if held:
            raise FolderInUseError(f"{_in_use(held[-1], now)}; {ACCEPTED}")


def life(folder: Path, me: Holder, now: float) -> Literal["alive", "silent", "over"]:
    """Whether a folder's holder is alive, silent for too long to be sure, or over or absent.

    `me`: this process. `now`: this machine's time, since asking the file system's writes a file.
    """
    found = find(folder)
    if not found or _is_over(found[-1], me, now):
        return "over"
    return "alive" if now - found[-1].heard <= QUIET * PERIOD_S else "silent"


def _in_use(claim: Found, now: float) -> str:
    return (
        f"run.dir: {claim.path.parent} is in use by {claim.holder or claim.path.name}, heard of "
        f"{max(now - claim.heard, 0):.0f} s ago"
    )


def _make(folder: Path) -> list[Path]:
    """Make a folder; returns the folders that were not there, the innermost first."""
    try:
        missing = [path for path in (folder, *folder.parents) if not path.exists()]
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"run.dir: {folder} cannot be created: {error.strerror}") from None
    return missing


def _place(folder: Path, me: Holder, over: list[Found]) -> Path | None:
    """Write the next claim and remove those that are `over`; None if another was quicker."""
    number = 1 + max((claim.number for claim in over), default=0)
    path = folder / f"claim-{number}.json"
    try:
        if not _write(path, me):
            return None
        if any(claim.path != path and claim not in over for claim in find(folder)):
            path.unlink(missing_ok=True)
            return None
    except FileNotFoundError:  # the folder was removed by the process that had made it
        return None
    except OSError as error:
        raise ConfigError(f"run.dir: {path} cannot be written: {error.strerror}") from None
    for claim in over:
        claim.path.unlink(missing_ok=True)
        logger.info("run.dir: was held by %s, which has ended", claim.holder or claim.path.name)
    return path


def _write(path: Path, me: Holder) -> bool:
    """Write a claim; false if there is one of its name."""
    try:
        file = open(path, "x")  # noqa: SIM115
    except FileExistsError:
        return False
    with removed_on_error(path), file:
        file.write(_text(me))
    return True


def _text(holder: Holder) -> str:
    return json.dumps(dataclasses.asdict(holder), indent=1)


def _since_boot() -> float:
    """Seconds that a suspension of the machine counts in."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


class Claim:
    """A folder that this process holds, with a heartbeat from a thread."""

    def __init__(self, path: Path, holder: Holder, made: list[Path]) -> None:
        """`made`: the folders that were made for it, the innermost first."""
        self.path, self._holder, self._made = path, holder, made
        self._released = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="claim", daemon=True)
        self._thread.start()

    def release(self) -> None:
        """Give the folder up. The folders made for it go if nothing else is in them."""
        self._released.set()
        self._thread.join(PERIOD_S)
        with contextlib.suppress(OSError):
            if self._is_mine():
                self.path.unlink()
            for folder in self._made:
                folder.rmdir()

    def _is_mine(self) -> bool:
        """Whether the file is there; another process may have one of the same name by now."""
        try:
            return self.path.read_text(errors="replace") == _text(self._holder)
        except FileNotFoundError:
            return False

    def _beat(self) -> None:
        heard = _since_boot()
        while not self._released.wait(PERIOD_S):
            with contextlib.suppress(OSError):  # a file system that fails for a moment
                if self._is_mine():
                    os.utime(self.path)
                    heard = _since_boot()
                    continue
                found = find(self.path.parent)
                others = [claim for claim in found if claim.holder not in (None, self._holder)]
                silent = _since_boot() - heard > QUIET * PERIOD_S
                if others or (silent and self.path.parent.is_dir() and not found):
                    self._end(others)
                if any(claim.path == self.path for claim in found):  # not to be read
                    self.path.unlink()
                _write(self.path, self._holder)

    def _end(self, others: list[Found]) -> None:
        """End this process: another had the folder, and may have given it up again."""
        by = f" by {others[-1].holder or others[-1].path.name}" if others else ""
        # Not to the log, which is the other run's now.
        sys.stderr.write(
            f"error: run.dir: {self.path.parent} was taken over{by}, which this process was too "
            "silent for; it ends\n"
        )
        sys.stderr.flush()
        os._exit(1)
