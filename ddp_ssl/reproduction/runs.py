"""The runs of a table: their folders, whether they ended, and starting those that did not."""

import fcntl
import os
import queue
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

from ddp_ssl.config import ConfigError
from ddp_ssl.errors import cut, reason
from ddp_ssl.reproduction import configs
from ddp_ssl.reproduction.cells import Cell, Table
from ddp_ssl.utils.files import if_readable, json_file
from ddp_ssl.utils.launcher import visible_gpus
from ddp_ssl.utils.programs import queued_jobs
from ddp_ssl.utils.text import one_line

OFFLINE = "linear"  # the measure that the offline evaluation makes
NEGATIVE = "digits-in-negative"
WAITING = ("queued", "evaluation queued")  # in Slurm's queue or running there


@dataclass(frozen=True)
class Run:
    """One run of one seed: `OUT/SCALE/DATASET/NAME/seed-S`, its config beside it."""

    cell: Cell
    seed: int
    folder: Path
    linear: bool  # whether the offline probe is wanted

    @property
    def config(self) -> Path:
        return self.folder.with_name(f"{self.folder.name}.yaml")

    @property
    def label(self) -> str:
        return f"{self.cell.group}, {self.cell.row}, seed {self.seed}"

    @property
    def other(self) -> str | None:
        """The data set of the offline evaluation where it is another than the training's."""
        named = [e.partition("=")[2] for e in self.cell.evaluate if e.startswith("data.name=")]
        return named[-1] if named else None

    @property
    def evaluation(self) -> str:
        """Name of the offline evaluation's files, by data set."""
        return f"linear-adam-{self.other}" if self.other else "linear-adam"

    @property
    def evaluated(self) -> Path:
        return self.folder / "evaluate" / f"{self.evaluation}.json"

    def state(self) -> str:
        """`not run`, `running`, `preempted`, `failed`, `to evaluate` or `done`.

        While Slurm has its job: `queued`, whatever an earlier start left, or `evaluation queued`.
        """
        state = str(json_file(self.folder / "status.json").get("state", "not run"))
        if state == "done" and self.linear and not self.evaluated.exists():
            return "evaluation queued" if _in_slurm(self.marker("to evaluate")) else "to evaluate"
        if state != "done" and _in_slurm(self.marker(state)):
            return "queued"
        return state

    def marker(self, state: str) -> Path:
        """File with the number of the Slurm job that trains, or that evaluates if `to evaluate`."""
        evaluates = state == "to evaluate"
        return self.config.with_suffix(f".{self.evaluation}.job" if evaluates else ".job")


def plan(
    table: Table, dataset: str, scale: str, seeds: int, out: Path, only: Sequence[str]
) -> list[Run]:
    """Every cell and seed, in the table's order; cells that share a run come with the same folder.

    Raises `ConfigError` for a row that is not there or a scale that is not made.
    """
    cells = table.cells(dataset)
    if scale == "small":
        if table.small is None:
            raise ConfigError(f"--scale: {table.name} is made at full scale only")
        cells = [_small(cell, dataset, out) for cell in cells if table.small(cell)]
    rows = {cell.row for cell in cells} | {cell.group for cell in cells}
    for name in only:
        if name not in rows:
            raise ConfigError(
                f"--only: {name!r} is no row of {table.name}; accepted: {'; '.join(sorted(rows))}"
            )
    if only:
        kept = [cell for cell in cells if cell.row in only or cell.group in only]
        if "minutes" in table.measures:  # the others' time is compared with it
            first = {cell.group: cell for cell in reversed(cells)}
            kept += [first[group] for group in {cell.group for cell in kept}]
        cells = [cell for cell in cells if cell in kept]
    place = out.absolute() / scale / ("digits" if scale == "small" else dataset)
    return [
        Run(cell, seed, place / cell.run / f"seed-{seed}", OFFLINE in table.measures)
        for cell in cells
        for seed in range(seeds)
    ]


def _small(cell: Cell, dataset: str, out: Path) -> Cell:
    """The cell as it is called at small scale; a transfer's other data set is the negative."""
    group = cell.group.replace(dataset, "digits")
    if not cell.evaluate:
        return replace(cell, group=group)
    other = out.absolute() / "small" / NEGATIVE
    return replace(
        cell,
        group=f"{group.partition(' to ')[0]} to their negative",
        evaluate=("data.name=folder", f"data.root={other}"),
    )


def distinct(runs: Sequence[Run]) -> list[Run]:
    """Each folder once (with each of its evaluations)."""
    return list({(run.folder, run.evaluation): run for run in reversed(runs)}.values())[::-1]


def train_command(run: Run, processes: int, extra: Sequence[str] = ()) -> list[str]:
    """Train, or go on where an interrupted run stopped."""
    start = [sys.executable, "-m"]
    if processes > 1:
        start += ["torch.distributed.run", "--standalone", f"--nproc_per_node={processes}", "-m"]
    return [*start, "ddp_ssl.train", str(run.config), f"run.dir={run.folder}",
            "run.resume=auto", *extra]  # fmt: skip


def evaluate_command(run: Run, roots: dict[str, str], extra: Sequence[str] = ()) -> list[str]:
    """The multi-view paper's probe: Adam, label smoothing, 16 patches."""
    root = [f"data.root={roots[run.other]}"] if run.other in roots else []
    return [sys.executable, "-m", "ddp_ssl.evaluate", "linear", str(run.folder),
            "linear.protocol=adam", "linear.seeds=[0]", f"run.name={run.evaluation}",
            *run.cell.evaluate, *root, *extra]  # fmt: skip


def submit_commands(
    runs: Sequence[Run], options: Sequence[str], sbatch: Sequence[str], roots: dict[str, str]
) -> list[tuple[list[Run], list[str]]]:
    """Commands that submit runs: the seeds of a cell as one array, an evaluation as its own job.

    `options` are those of `ddp_ssl.submit`, for training; `sbatch` are sbatch's, for evaluations.
    """
    by_cell: dict[Path, list[Run]] = {}
    commands: list[tuple[list[Run], list[str]]] = []
    evaluation = ["sbatch", "--parsable", *sbatch]
    for run in runs:
        if run.state() == "to evaluate":
            wrapped = shlex.join(evaluate_command(run, roots))
            log = run.config.with_suffix(".evaluate.out")
            commands.append(([run], [*evaluation, f"--output={log}", "--wrap", wrapped]))
        else:
            by_cell.setdefault(run.folder.parent, []).append(run)
    for folder, group in by_cell.items():
        seeds = ",".join(str(run.seed) for run in group)
        place = folder if len(group) > 1 else group[0].folder
        commands.append((group, [
            sys.executable, "-m", "ddp_ssl.submit", str(group[0].config), f"run.seed={seeds}",
            "--run-dir", str(place), *options,
        ]))  # fmt: skip
    return commands


def run_here(
    runs: Sequence[Run],
    parallel: int,
    processes: int,
    roots: dict[str, str],
    tell: Callable[[str], None],
) -> list[str]:
    """Run, `parallel` at a time; returns the failures, one line each."""
    slots: queue.SimpleQueue[int] = queue.SimpleQueue()
    for slot in range(parallel):
        slots.put(slot)
    began, ended = time.monotonic(), 0
    problems: list[str] = []

    def one(run: Run) -> None:
        nonlocal ended
        slot, since = slots.get(), time.monotonic()
        try:
            problem = _one(run, slot, parallel, processes, roots)
        finally:
            slots.put(slot)
        ended += 1
        left = (time.monotonic() - began) / ended * (len(runs) - ended) / 60
        took = f"{time.monotonic() - since:.0f} s"
        tell(f"[{ended}/{len(runs)}] {run.label}: {problem or f'done in {took}'}"
             f"{f'; about {left:.0f} min left' if ended < len(runs) else ''}")  # fmt: skip
        if problem:
            problems.append(f"{run.label}: {problem}")

    with ThreadPoolExecutor(parallel) as pool:
        futures = [pool.submit(one, run) for run in runs]
        try:
            for future in futures:
                future.result()
        except KeyboardInterrupt:  # the terminal tells the runs too: they save and end
            tell("stopping: the runs under way save and end; the same command goes on")
            pool.shutdown(cancel_futures=True)
            problems.append("stopped by Ctrl-C")
    return problems


def _one(run: Run, slot: int, parallel: int, processes: int, roots: dict[str, str]) -> str | None:
    """Train and evaluate one run, unless another shell does; returns why it failed, or None."""
    with open(run.config.with_suffix(".lock"), "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return "not started: another reproduce is at it on this machine"
        environment, threads = _environment(slot, parallel, processes)
        log, commands = run.config.with_suffix(".out"), []
        state = run.state()  # it may have ended in the meantime
        if state not in ("done", "to evaluate"):
            extra = [*threads, "data.threads=1"] if threads else []
            commands.append(train_command(run, processes, extra))
        if state != "done" and run.linear:
            commands.append(evaluate_command(run, roots, threads))
        for command in commands:
            with open(log, "ab") as file:
                file.write(f"$ {shlex.join(command)}\n".encode())
                file.flush()
                # A run that outlives a killed shell keeps the lock.
                done = subprocess.run(command, stdout=file, stderr=file, env=environment,
                                      pass_fds=[lock.fileno()])  # fmt: skip
            if done.returncode:
                return f"failed with {done.returncode}: {_last_line(log)} ({log})"
            if run.state() == "preempted":
                return "stopped before its end; the same command goes on"
    return None


def _environment(slot: int, parallel: int, processes: int) -> tuple[dict[str, str], list[str]]:
    """GPUs shared out among runs at the same time; on CPUs one thread each."""
    environment = os.environ | {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
    gpus = visible_gpus()
    if gpus:
        mine = gpus[slot * processes : (slot + 1) * processes]
        environment["CUDA_VISIBLE_DEVICES"] = ",".join(mine)
        return environment, []
    return environment, ["run.threads=1"] if parallel > 1 else []


def _last_line(path: Path) -> str:
    """The last line that says what went wrong."""
    lines = [x.strip() for x in path.read_text(errors="replace").splitlines() if x.strip()]
    wrong = [line for line in lines if "error" in line.lower()]
    return cut((wrong or lines or ["nothing was said"])[-1])


def submit(
    commands: Sequence[tuple[list[Run], list[str]]], tell: Callable[[str], None]
) -> list[str]:
    """Submit, and write each job's number beside its config; returns the failures."""
    problems = []
    for group, command in commands:
        if len(group) > 1:
            _link_array(group)
        done = subprocess.run(command, capture_output=True, text=True)
        name = f"{group[0].cell.group}, {group[0].cell.row}"
        numbers = re.findall(r"^(?:job +)?(\d+(?:_\d+)?)", done.stdout, re.MULTILINE)
        if done.returncode or not numbers:
            text = one_line(done.stderr or done.stdout)[-300:]
            problems.append(f"{name}: not submitted: {text}")
            continue
        for index, run in enumerate(group):
            job = numbers[min(index, len(numbers) - 1)]
            run.marker(run.state()).write_text(f"{job}\n")
            slurm_jobs().add(job)
        tell(f"{name}: {len(group)} run(s) as {', '.join(numbers)}")
    return problems


def _link_array(group: Sequence[Run]) -> None:
    """An array's runs lie in `seed=S`; a path with `=` cannot be told from `key=value`."""
    for run in group:
        run.folder.mkdir(parents=True, exist_ok=True)
        link = run.folder.with_name(f"seed={run.seed}")
        if not link.is_symlink():
            link.symlink_to(run.folder.name)


def _in_slurm(marker: Path) -> bool:
    """Whether Slurm still has the job whose number is in `marker`."""
    job = if_readable(lambda: marker.read_text().strip())
    return job is not None and job in slurm_jobs()


@cache
def slurm_jobs() -> set[str]:
    """Numbers of one's jobs that wait or run, asked once; array tasks as `41_0`.

    Raises `ConfigError` if Slurm does not answer: a job taken for ended would be submitted twice.
    """
    try:
        return queued_jobs()
    except FileNotFoundError:
        return set()  # jobs of another machine, or of a cluster that this one has left
    except OSError as error:
        raise ConfigError(f"{reason(error)}; try again when Slurm answers") from None


def write_configs(
    runs: Sequence[Run], scale: str, overrides: Sequence[str], roots: dict[str, str], what: str
) -> None:
    """One YAML per run, each a whole config. Raises `ConfigError`.

    A queued job will read its file, which therefore stays as it was submitted.
    """
    if scale == "small" and any(run.other for run in runs):
        configs.negative_digits(runs[0].folder.parents[2] / NEGATIVE)
    for run in runs:
        keys = list(overrides)
        resolved = configs.resolve(run.cell, scale, run.seed, keys)
        root = roots.get(resolved.config.data.name)
        if root is not None:
            resolved = configs.resolve(run.cell, scale, run.seed, [*keys, f"data.root={root}"])
        heading = f"{what}: {run.label}; written by ddp-ssl reproduce"
        configs.write(run.config, resolved, heading, keep=run.state() == "queued")
