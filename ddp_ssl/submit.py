"""Submit runs through submitit: `python -m ddp_ssl.submit [CONFIG.yaml] [key=value ...] --nodes 4`.

The config is validated before anything is submitted. `optim.lr=0.1,0.2` is a sweep: one array task
for each combination of values, each in a run folder of its own inside the sweep's. There every run
that ends writes the table of all.

submitit's own signal handler would save on rank 0 alone, inside the handler, where a save by all
ranks cannot work. Therefore the trainer's handlers, which only set a flag, replace it during
training. After all ranks have saved and left the loop, rank 0 calls submitit's handler, which
requeues the job.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import re
import shlex
import shutil
import signal
import socket
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ddp_ssl.commands import common, submit_options
from ddp_ssl.commands.live import TABLE, Live, write_table
from ddp_ssl.commands.runs import table
from ddp_ssl.commands.sweeps import sweep
from ddp_ssl.config import ConfigError, check_world_size
from ddp_ssl.config.files import find_config
from ddp_ssl.run.configure import load
from ddp_ssl.utils.files import if_readable, json_file, replace_text
from ddp_ssl.utils.launcher import visible_gpus
from ddp_ssl.utils.programs import queued_jobs, scontrol_fields
from ddp_ssl.utils.streams import say, tell
from ddp_ssl.utils.text import counted

# Run once per job, before srun. Node addresses are used because node names need not resolve. The
# CPUs of a node are shared among its tasks here, because sbatch's CPUs per task do not reach srun.
SETUP = """\
head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n1)
MASTER_ADDR=$(scontrol show node -o "$head" | sed -n 's/.* NodeAddr=\\([^ ]*\\).*/\\1/p')
export MASTER_ADDR=${MASTER_ADDR:-$head} MASTER_PORT=$((10000 + SLURM_JOB_ID % 20000))
end=$(scontrol show job -o "$SLURM_JOB_ID" | tr ' ' '\\n' | sed -n 's/^EndTime=//p' | head -n1)
export SLURM_JOB_END_TIME=${SLURM_JOB_END_TIME:-$(date -d "$end" +%s 2>/dev/null)}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
cpus=$((SLURM_CPUS_ON_NODE / ${SLURM_NTASKS_PER_NODE:-1}))
unset SLURM_CPUS_PER_GPU SLURM_CPUS_PER_TASK
export SRUN_CPUS_PER_TASK=$((cpus > 0 ? cpus : 1))"""

SAVE_BEFORE_END_S = 300
ASK_EVERY_S = 5.0  # for Slurm's queue
LOOK_EVERY_S = 1.0  # at the folders of runs on this machine
FINE = ("done", "stopped")  # states that are no failure


class Training:
    """One run, which submitit pickles and calls on every rank.

    `folder` may hold `%A`, the id of the job or of its array. `swept`: the folders of all runs of
    the sweep, this one's too. `gpus`: those of this run alone, as in `CUDA_VISIBLE_DEVICES`.
    """

    # Attributes of the class too: jobs that were submitted with an earlier version lack their own.
    swept: Sequence[str] = ()
    gpus = ""
    on_step: Callable[[Any], None] | None = None

    def __init__(
        self, arguments: Sequence[str], folder: str, max_requeues: int, swept: Sequence[str] = ()
    ) -> None:
        self.arguments = list(arguments)
        self.folder = folder
        self.max_requeues = max_requeues
        self.swept = list(swept)

    def __call__(self) -> str:
        """Train; returns the state in which the run ended."""
        import submitit

        environment = submitit.JobEnvironment()
        requeue = signal.getsignal(signal.SIGUSR2)  # before the trainer's handlers replace it
        group = submitit.helpers.TorchDistributedEnvironment()
        group.master_port = int(os.environ["MASTER_PORT"])
        here = environment.cluster != "slurm"
        group.master_addr = "127.0.0.1" if here else os.environ["MASTER_ADDR"]
        # Every rank sees the GPUs of its node and takes the one of its local rank.
        group.export(set_cuda_visible_devices=False, overwrite=True)
        if self.gpus:
            os.environ["CUDA_VISIBLE_DEVICES"] = self.gpus

        from ddp_ssl.train import main

        folder = Path(self.folder_of(environment.job_id))
        try:
            code = main([*self.arguments, f"run.dir={folder}", "run.resume=auto"], self.on_step)
        finally:
            if self.swept and environment.global_rank == 0:
                every = [Path(_with_id(each, environment.job_id)) for each in self.swept]
                with contextlib.suppress(OSError):
                    write_table(every)
        if code:
            raise SystemExit(code)
        state = _status(folder)
        if state == "preempted" and environment.cluster == "slurm":
            if (folder / "STOP").exists():
                say("stopped by the STOP file, so not requeued")
            elif environment.global_rank == 0:
                self._requeue(environment.job_id, requeue)
            else:
                raise SystemExit(0)  # leaves no result: the job is not over
        return state

    def checkpoint(self) -> Any:
        """The job that submitit requeues: the same, which resumes from the newest checkpoint."""
        import submitit

        return submitit.helpers.DelayedSubmission(self)

    def folder_of(self, job_id: str) -> str:
        """The run folder of a job."""
        return _with_id(self.folder, job_id)

    def _requeue(self, job_id: str, handler: Any) -> None:
        restarts = int(os.environ.get("SLURM_RESTART_COUNT") or 0)
        # Empty if Slurm does not answer.
        about = if_readable(lambda: scontrol_fields("show", "job", "-o", job_id)) or {}
        if int(about.get("Restarts", restarts)) > restarts:
            print("Slurm has requeued the job by itself", flush=True)
            raise SystemExit(0)
        if about.get("JobState", "RUNNING") != "RUNNING":
            print("the job was cancelled, so it is not requeued", flush=True)
        elif restarts >= self.max_requeues:
            print(f"started again {restarts} times already: not requeued", flush=True)
        else:
            handler(signal.SIGUSR2, None)


def main(arguments: Sequence[str] | None = None) -> int:
    """Submit from the command line; returns the exit code."""
    return common.exit_code(lambda: _main(arguments))


def _main(arguments: Sequence[str] | None) -> int:
    options = submit_options.parser().parse_intermixed_args(arguments)
    per_node = options.tasks_per_node or options.gpus_per_node or 1
    runs = sweep(options.arguments)
    options.alone = len(runs) == 1
    for run in runs:
        resolved = load(run)
        config = resolved.config
        if not resolved.for_this_machine:  # else the job chooses for itself
            check_world_size(config, options.nodes * per_node)
        if config.run.dir is not None:
            raise ConfigError("run.dir: --run-dir names the folder of a submitted run")
    if options.cluster != "slurm" and options.nodes > 1:
        raise ConfigError(f"--nodes: {options.cluster} is this machine alone; 1 is accepted")
    if options.cluster == "debug" and per_node > 1:
        raise ConfigError("--cluster debug: one process; --cluster local starts several")
    if options.cluster == "debug" and (options.parallel or 1) > 1:
        raise ConfigError("--parallel: debug has one process; 1 is accepted")
    if options.cluster == "slurm" and shutil.which("sbatch") is None:
        raise ConfigError(
            "--cluster slurm: there is no sbatch on this machine; submit from a login node of "
            "the cluster, or use --cluster local or torchrun"
        )
    common.share_import_path()  # the jobs inherit the environment
    name = run_name(options.arguments)
    places = folders(runs, name, options)
    if options.cluster != "slurm":
        stamp = f"{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}"  # of two in one second too
        places = [place.replace("%A", stamp) for place in places]
    swept = () if options.alone else places
    trainings = [
        Training(run, place, options.max_requeues, swept)
        for run, place in zip(runs, places, strict=True)
    ]
    start = {"slurm": _submit, "local": _run_local, "debug": _run_debug}[options.cluster]
    return start(trainings, name, per_node, options)


# --- names -------------------------------------------------------------------------------------


def run_name(arguments: Sequence[str]) -> str:
    """The config's name: `imagenet100-adadim`; without a config that of the images."""
    for argument in arguments:
        if "=" not in argument:
            path = (find_config(argument) or Path(argument)).resolve()
            return re.sub(r"[^\w.-]", "_", f"{path.parent.name}-{path.stem}")
    images = (a.partition("=")[2] for a in arguments if a.startswith(("data.root=", "data.files=")))
    return re.sub(r"[^\w.-]", "_", Path(next(images, "digits")).resolve().stem)


def folders(runs: Sequence[Sequence[str]], name: str, options: argparse.Namespace) -> list[str]:
    """The folder of each run: `--run-dir` or `runs/NAME-JOB`; for a sweep one per run inside it."""
    base = os.path.abspath(options.run_dir or f"runs/{name}-%A")
    if len(runs) == 1:
        return [base]
    swept = [index for index, same in enumerate(zip(*runs, strict=True)) if len(set(same)) > 1]
    names = []
    for number, run in enumerate(runs):
        values = ",".join(run[index].partition(".")[2] for index in swept)
        readable = re.sub(r"[^\w.,=+-]", "_", values)
        names.append(readable if readable not in names else f"{readable}-{number}")
    return [f"{base}/{each}" for each in names]


# --- starting ----------------------------------------------------------------------------------


def _submit(
    trainings: Sequence[Training], name: str, per_node: int, options: argparse.Namespace
) -> int:
    import submitit

    executor = submitit.AutoExecutor(
        folder=_log_folder(options), cluster="slurm", slurm_max_num_timeout=options.max_requeues
    )
    minutes = options.time
    executor.update_parameters(
        name=name,
        nodes=options.nodes,
        tasks_per_node=per_node,
        gpus_per_node=options.gpus_per_node,
        cpus_per_task=options.cpus_per_task,
        timeout_min=minutes,
        slurm_partition=options.partition,
        slurm_account=options.account,
        slurm_array_parallelism=options.parallel,
        slurm_signal_delay_s=min(SAVE_BEFORE_END_S, minutes * 60 // 4),
        slurm_setup=SETUP.splitlines(),
        slurm_srun_args=["--kill-on-bad-exit=1"],
        slurm_additional_parameters={"requeue": True} | dict(options.sbatch),
    )
    try:
        with executor.batch():
            jobs = [executor.submit(training) for training in trainings]
        ids = [str(job.job_id) for job in jobs]
    except Exception as error:  # sbatch's own words: submitit has classes for some failures only
        return common.refuse(f"nothing was submitted: {' '.join(str(error).split())}", 1)
    places = [training.folder_of(job_id) for training, job_id in zip(trainings, ids, strict=True)]
    stop = "; scancel --signal=USR2 {} (saves, then goes on in a new start)"
    if options.alone:
        _tell(ids[0], places[0], str(jobs[0].paths.stderr), stop.format(ids[0]), options)
    else:
        for job_id, place in zip(ids, places, strict=True):
            print(f"job         {job_id}  {os.path.basename(place)}")
        _tell_sweep(places, stop.format(ids[0].partition("_")[0]), options)
    return _watch(ids, places, options) if options.wait else 0


def _watch(ids: Sequence[str], places: Sequence[str], options: argparse.Namespace) -> int:
    """Show the jobs until Slurm has none of them any more."""
    live = Live([Path(place) for place in places])
    over: set[int] = set()
    try:
        while len(over) < len(ids):
            with contextlib.suppress(OSError):  # a Slurm that does not answer for a while
                queued = queued_jobs()
                over = {index for index, job_id in enumerate(ids) if job_id not in queued}
            live.update(over)
            time.sleep(ASK_EVERY_S if len(over) < len(ids) else 0)
    except KeyboardInterrupt:
        shown = shlex.quote(places[0] if options.alone else os.path.dirname(places[0]))
        raise KeyboardInterrupt(f"the jobs go on; ddp-ssl runs {shown} shows them") from None
    return _end(live, options)


def _run_local(
    trainings: Sequence[Training], name: str, per_node: int, options: argparse.Namespace
) -> int:
    """Run to the end in processes on this machine, `--parallel` runs at a time."""
    import submitit

    parallel = min(options.parallel or 1, len(trainings))
    gpus, cores = _shares(options.gpus_per_node or 0, parallel)
    executor = submitit.AutoExecutor(folder=_log_folder(options), cluster="local")
    executor.update_parameters(
        name=name,
        timeout_min=options.time,
        tasks_per_node=per_node,
        gpus_per_node=options.gpus_per_node,
    )
    places = [training.folder for training in trainings]
    live = Live([Path(place) for place in places])
    if not options.alone:
        _tell_sweep(places, "; Ctrl-C (all save, then end)", options)
    free, waiting = list(range(parallel)), list(range(len(trainings)))
    over: set[int] = set()
    running: dict[int, tuple[Any, int]] = {}  # by number, the job and its share of the machine
    stopping = False

    def stop(*_: object) -> None:
        nonlocal stopping
        stopping = True

    failed = False
    # Ctrl-C is for the ranks, which the terminal tells as well: they save and end.
    before = signal.signal(signal.SIGINT, stop)
    try:
        while running or waiting:
            while free and waiting and not stopping:
                number, slot = waiting.pop(0), free.pop(0)
                trainings[number].gpus = ",".join(gpus[slot])
                job = _started(executor, trainings[number], cores[slot])
                running[number] = job, slot
                if options.alone:
                    _tell(str(job.job_id), places[0], str(job.paths.stderr), "", options)
            if stopping and waiting:
                waiting.clear()
                live.clear()
                tell("Ctrl-C: the runs under way save and end; no other is started")
            time.sleep(0.2)
            ended = [number for number, (job, _) in running.items() if job.done()]
            over.update(ended)
            live.update(over, 0 if ended else LOOK_EVERY_S)
            for number in ended:
                job, slot = running.pop(number)
                free.append(slot)
                # A run that was refused leaves the state that an earlier start wrote.
                refused = if_readable(lambda job=job: job.exception() is None) is not True  # type: ignore[misc]
                failed |= refused
                if refused or live.found[number].state not in FINE:
                    live.clear()
                    tell(_tail(Path(str(job.paths.stderr))))
    finally:
        signal.signal(signal.SIGINT, before)
    return max(_end(live, options), int(failed))


def _started(executor: Any, training: Training, cores: Sequence[int]) -> Any:
    """The job of a run that is started on these cores."""
    os.environ["MASTER_PORT"] = str(_free_port())
    whole = os.sched_getaffinity(0)
    # submitit's controller, which inherits both, would kill the ranks a second after a Ctrl-C.
    handler = signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.sched_setaffinity(0, cores)
    try:
        return executor.submit(training)
    finally:
        os.sched_setaffinity(0, whole)
        signal.signal(signal.SIGINT, handler)


def _shares(gpus: int, parallel: int) -> tuple[list[list[str]], list[list[int]]]:
    """The GPUs and the cores of this machine for each of the runs at the same time."""
    visible = visible_gpus() if gpus else []
    if len(visible) < gpus * parallel:
        raise ConfigError(
            f"--gpus-per-node: {gpus} for {counted(parallel, 'run')} at a time, and there are "
            f"{len(visible)}; fewer, or --tasks-per-node for the CPU, would be accepted"
        )
    cores = sorted(os.sched_getaffinity(0))
    each = max(1, len(cores) // parallel)
    wide = range(parallel)
    return (
        [visible[slot * gpus : (slot + 1) * gpus] for slot in wide],
        [[cores[(slot * each + i) % len(cores)] for i in range(each)] for slot in wide],
    )


def _run_debug(
    trainings: Sequence[Training], name: str, per_node: int, options: argparse.Namespace
) -> int:
    """Run to the end in this process, one run after the other."""
    import submitit

    places = [training.folder for training in trainings]
    live = Live([Path(place) for place in places], in_place=False)
    if not options.alone:
        _tell_sweep(places, "; Ctrl-C (saves, then ends)", options)
    executor = submitit.AutoExecutor(folder=_log_folder(options), cluster="debug")
    worst = 0
    for number, training in enumerate(trainings):
        os.environ["MASTER_PORT"] = str(_free_port())
        job = executor.submit(training)
        if options.alone:
            _tell(str(job.job_id), places[0], str(job.paths.stderr), "", options)
        else:
            ended = range(number)
            training.on_step = lambda _, ended=ended: live.update(ended, LOOK_EVERY_S)
        try:
            job.results()
        except SystemExit as end:
            worst = max(worst, end.code if isinstance(end.code, int) else 1)
        live.update(range(number + 1))
        place = Path(training.folder)
        if _status(place) == "preempted" and not (place / "STOP").exists():
            break  # by Ctrl-C, which is for all
    return max(worst, _end(live, options))


def _end(live: Live, options: argparse.Namespace) -> int:
    """The last lines; returns the exit code."""
    live.update(range(len(live.folders)))
    if options.alone:
        print(f"{_status(live.folders[0])}: {live.folders[0]}")
    else:
        lines, base = table(live.found), live.folders[0].parent
        print("\n".join(["", *lines]))
        if base.is_dir():
            replace_text(base / TABLE, "\n".join(lines) + "\n")
    return 0 if all(found.state in FINE for found in live.found) else 1


def _tell(job_id: str, folder: str, errors: str, more: str, options: argparse.Namespace) -> None:
    """About a single run; `more`: another way to stop it."""
    print(
        f"job         {job_id}\n"
        f"run folder  {folder}\n"
        f"watch       tail -f {folder}/train.log; tensorboard --logdir {folder}\n"
        f"            {errors} has what comes before\n"
        f"stop        touch {folder}/STOP (saves, then ends){more}\n"
        f"resume      the same command with --run-dir {options.run_dir or folder}",
        flush=True,
    )


def _tell_sweep(places: Sequence[str], more: str, options: argparse.Namespace) -> None:
    """About a sweep; `more`: another way to stop it."""
    base = os.path.dirname(places[0])
    print(
        f"sweep       {len(places)} runs in {base}\n"
        f"watch       ddp-ssl runs {shlex.quote(base)}; tail -f {places[0]}/train.log\n"
        f"            {_log_folder(options)} has what comes before\n"
        f"stop        touch {places[0]}/STOP (that run saves, then ends){more}\n"
        f"resume      the same command with --run-dir {options.run_dir or base}\n"
        f"table       {base}/{TABLE}, written again when a run ends",
        flush=True,
    )


def _log_folder(options: argparse.Namespace) -> Path:
    """Where submitit keeps its pickles and the output of every rank."""
    return Path(options.run_dir or "runs").absolute() / "submitit"


# --- parts -------------------------------------------------------------------------------------


def _free_port() -> int:
    """A port of this machine that is free, below those that Linux gives to outgoing connections."""
    while True:
        port = random.randrange(10_000, 30_000)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("", port))
            return port


def _with_id(folder: str, job_id: str) -> str:
    """A folder of a job: `%A` is its id without the index in an array."""
    return folder.replace("%A", job_id.partition("_")[0])


def _status(folder: Path) -> str:
    """The state in `status.json`, or `not started`."""
    return str(json_file(folder / "status.json").get("state", "not started"))


def _tail(path: Path) -> str:
    """The last lines of a file; empty if it cannot be read."""
    text = if_readable(lambda: path.read_text(errors="replace")) or ""
    return "\n".join(text.splitlines()[-5:])


if __name__ == "__main__":
    # By its own name: what is pickled must not belong to __main__.
    from ddp_ssl.submit import main as imported_main

    sys.exit(imported_main())
