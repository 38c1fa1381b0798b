"""Runs in processes of their own, under torchrun or alone, for tests that kill and stop them."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent.parent
TORCHRUN = str(Path(sys.executable).parent / "torchrun")
PATIENCE = 300  # seconds; two cores may be busy with other things
TRAIN = ("-m", "ddp_ssl.train")


def until(condition: Callable[[], Any], seconds: float = PATIENCE) -> Any:
    """The condition's first true value; an `AssertionError` if there is none in time."""
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < deadline, "nothing happened in time"
        time.sleep(0.01)
    return value


class Launched:
    """A launcher's process, its workers, and what they print."""

    def __init__(self, command: list[str], output: Path, **environment: str) -> None:
        clean = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE")}
        self.output = output
        with open(output, "a") as file:
            self.process = subprocess.Popen(
                command, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT,
                env=clean | {"OMP_NUM_THREADS": "1"} | environment,
            )  # fmt: skip

    def text(self) -> str:
        return self.output.read_text(errors="replace")

    def workers(self) -> dict[int, int]:
        """rank -> pid of the launcher's living children."""
        found = {}
        for entry in Path("/proc").iterdir():
            with contextlib.suppress(OSError, ValueError, IndexError):
                parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
                if parent == self.process.pid:
                    variables = (entry / "environ").read_bytes().split(b"\0")
                    named = dict(v.split(b"=", 1) for v in variables if b"=" in v)
                    if b"RANK" in named:
                        found[int(named[b"RANK"])] = int(entry.name)
        return found

    def wait(self, seconds: float = PATIENCE) -> int:
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"still running:\n{self.text()[-5000:]}") from None

    def going(self) -> bool:
        """True while the launcher lives; fails with its output if it has ended."""
        assert self.process.poll() is None, self.text()[-5000:]
        return True


@contextlib.contextmanager
def torchrun(
    size: int, arguments: list[str], output: Path, *options: str, **environment: str
) -> Iterator[Launched]:
    """`torchrun --nproc_per_node size -m ddp_ssl.train arguments`; killed at the end."""
    command = [TORCHRUN, "--standalone", "--nproc_per_node", str(size), *options, *TRAIN]
    run = Launched([*command, *arguments], output, **environment)
    workers: dict[int, int] = {}
    try:
        yield run
    finally:
        workers = run.workers()
        for pid in (run.process.pid, *workers.values()):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        run.process.wait()


@contextlib.contextmanager
def ranks_alone(
    size: int,
    port: int,
    arguments: list[str],
    outputs: Path,
    prefix: Callable[[int], list[str]] = lambda rank: [],
    module: tuple[str, ...] = TRAIN,
    **environment: str,
) -> Iterator[list[Launched]]:
    """One process per rank and no launcher that would end the others, as srun without -K."""
    runs = []
    try:
        for rank in range(size):
            variables = {
                "RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_RANK": str(rank),
                "LOCAL_WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
            } | environment  # fmt: skip
            command = [*prefix(rank), sys.executable, *module, *arguments]
            runs.append(Launched(command, outputs / f"rank{rank}.out", **variables))
        yield runs
    finally:
        for run in runs:
            with contextlib.suppress(ProcessLookupError):
                run.process.kill()
            run.process.wait()


def last_step(folder: Path) -> int:
    """The last step in `metrics.jsonl`."""
    try:
        lines = (folder / "metrics.jsonl").read_bytes().split(b"\n")[:-1]
    except OSError:
        return -1
    steps = [row["step"] for row in map(json.loads, lines) if "train/loss" in row]
    return max(steps, default=0)


def arguments_of(base: list[str], **changes: Any) -> list[str]:
    """`base` with keys set anew; a double underscore stands for the dot."""
    new = {name.replace("__", "."): value for name, value in changes.items()}
    kept = [a for a in base if a.partition("=")[0] not in new]
    return kept + [f"{name}={value}" for name, value in new.items()]
