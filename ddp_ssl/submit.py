"""Submit runs through submitit: `python -m ddp_ssl.submit [CONFIG.yaml] [key=value ...] --nodes 4`.

The config is validated before anything is submitted. `optim.lr=0.1,0.2` is a sweep: one array task
for each combination of values, each in a run folder of its own.

submitit's own signal handler would save on rank 0 alone, inside the handler, where a save by all
ranks cannot work. Therefore the trainer's handlers, which only set a flag, replace it during
training. After all ranks have saved and left the loop, rank 0 calls submitit's handler, which
requeues the job.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import os
import random
import re
import shlex
import shutil
import signal
import socket
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ddp_ssl.commands import common, submit_options
from ddp_ssl.commands.runs import overviews, table
from ddp_ssl.config import ConfigError, check_world_size
from ddp_ssl.config.files import find_config
from ddp_ssl.run.configure import load
from ddp_ssl.utils.files import json_file
from ddp_ssl.utils.programs import output_of

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


class Training:
    """One run, which submitit pickles and calls on every rank.

    `folder` may hold `%A`, the id of the job or of its array.
    """

    def __init__(self, arguments: Sequence[str], folder: str, max_requeues: int) -> None:
        self.arguments = list(arguments)
        self.folder = folder
        self.max_requeues = max_requeues

    def __call__(self) -> str:
        """Train; returns the state in which the run ended."""
        import submitit

        environment = submitit.JobEnvironment()
        requeue = signal.getsignal(signal.SIGUSR2)  # before the trainer's handlers replace it
        group = submitit.helpers.TorchDistributedEnvironment()
        group.master_port = int(os.environ["MASTER_PORT"])
        if environment.cluster == "slurm":
            group.master_addr = os.environ["MASTER_ADDR"]
        else:
            group.master_addr = "127.0.0.1"
        # Every rank sees the GPUs of its node and takes the one of its local rank.
        group.export(set_cuda_visible_devices=False, overwrite=True)

        from ddp_ssl.train import main

        folder = Path(self.folder_of(environment.job_id))
        code = main([*self.arguments, f"run.dir={folder}", "run.resume=auto"])
        if code:
            raise SystemExit(code)
        state = _status(folder)
        if state == "preempted" and environment.cluster == "slurm":
            if (folder / "STOP").exists():
                _say(environment, "stopped by the STOP file, so not requeued")
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
        """The run folder of a job: `%A` is its id without the index in an array."""
        return self.folder.replace("%A", job_id.partition("_")[0])

    def _requeue(self, job_id: str, handler: Any) -> None:
        restarts = int(os.environ.get("SLURM_RESTART_COUNT") or 0)
        about = _about_job(job_id)
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
    if options.cluster == "slurm" and shutil.which("sbatch") is None:
        raise ConfigError(
            "--cluster slurm: there is no sbatch on this machine; submit from a login node of "
            "the cluster, or use --cluster local or torchrun"
        )
    common.share_import_path()  # the jobs inherit the environment
    name = run_name(options.arguments)
    trainings = [
        Training(run, folder, options.max_requeues)
        for run, folder in zip(runs, folders(runs, name, options), strict=True)
    ]
    if options.cluster == "slurm":
        return _submit(trainings, name, per_node, options)
    stamp = f"{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}"  # of two in one second too
    for training in trainings:
        training.folder = training.folder.replace("%A", stamp)
    code = max(_run_here(training, name, per_node, options) for training in trainings)
    if not options.alone:
        print("\n".join(["", *table(overviews([Path(each.folder) for each in trainings]))]))
    return code


# --- a sweep -----------------------------------------------------------------------------------


def sweep(arguments: Sequence[str]) -> list[list[str]]:
    """Every combination of the values in `key=a,b`; a comma in brackets separates no values."""
    choices = []
    for argument in arguments:
        key, equals, value = argument.partition("=")
        values = _split(value) if equals else [""]
        choices.append([f"{key}={v}" for v in values] if equals else [argument])
    return [list(run) for run in itertools.product(*choices)]


def _split(text: str) -> list[str]:
    """Split at the commas outside brackets, braces and quotes."""
    parts, depth, quote = [""], 0, ""
    for character in text:
        if quote:
            quote = "" if character == quote else quote
        elif character in "'\"":
            quote = character
        elif character in "[{(":
            depth += 1
        elif character in "]})":
            depth -= 1
        elif character == "," and depth == 0:
            parts.append("")
            continue
        parts[-1] += character
    # Quotes around a value with a comma are for this split alone: a text is taken as it is.
    return [p[1:-1] if "," in p and p[0] == p[-1] and p[0] in "'\"" else p for p in parts]


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
    for job, job_id, training in zip(jobs, ids, trainings, strict=True):
        _tell(job_id, training, str(job.paths.stderr), options)
    if not options.alone:
        sweep_folder = os.path.dirname(trainings[0].folder_of(ids[0]))
        print(f"the sweep   ddp-ssl runs {shlex.quote(sweep_folder)}")
    return 0


def _run_here(training: Training, name: str, per_node: int, options: argparse.Namespace) -> int:
    """Run to the end in this process (`debug`) or in processes on this machine (`local`)."""
    import submitit

    os.environ["MASTER_PORT"] = str(_free_port())
    executor = submitit.AutoExecutor(folder=_log_folder(options), cluster=options.cluster)
    if options.cluster == "local":
        # Ctrl-C is for the ranks, which the terminal tells as well: they save and end. submitit's
        # controller would kill them a second after it.
        before = signal.signal(signal.SIGINT, signal.SIG_IGN)
        executor.update_parameters(
            name=name,
            timeout_min=options.time,
            tasks_per_node=per_node,
            gpus_per_node=options.gpus_per_node,
        )
    job = executor.submit(training)
    _tell(str(job.job_id), training, str(job.paths.stderr), options)
    try:
        if options.cluster == "debug":
            job.results()
        else:
            while not job.done():
                time.sleep(0.2)
    except SystemExit as end:
        return int(end.code or 0) if isinstance(end.code, (int, type(None))) else 1
    finally:
        if options.cluster == "local":
            signal.signal(signal.SIGINT, before)
    folder = Path(training.folder)
    state = _status(folder)
    print(f"{state}: {folder}")
    if state not in ("done", "preempted"):
        sys.stderr.write(_tail(Path(str(job.paths.stderr))))
    return 0 if state in ("done", "preempted") else 1


def _tell(job_id: str, training: Training, errors: str, options: argparse.Namespace) -> None:
    folder = training.folder_of(job_id)
    again = options.run_dir or (folder if options.alone else os.path.dirname(folder))
    stop = f"touch {folder}/STOP (saves, then ends)"
    if options.cluster == "slurm":
        stop += f"; scancel --signal=USR2 {job_id} (saves, then goes on in a new start)"
    print(
        f"job         {job_id}\n"
        f"run folder  {folder}\n"
        f"watch       tail -f {folder}/train.log; tensorboard --logdir {folder}\n"
        f"            {errors} has what comes before\n"
        f"stop        {stop}\n"
        f"resume      the same command with --run-dir {again}",
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


def _status(folder: Path) -> str:
    """The state in `status.json`, or `not started`."""
    return str(json_file(folder / "status.json").get("state", "not started"))


def _about_job(job_id: str) -> dict[str, str]:
    """Slurm's fields of a job: JobState, Restarts, ...; empty if Slurm does not answer."""
    try:
        text = output_of(["scontrol", "show", "job", "-o", job_id])
    except OSError:
        return {}
    return dict(re.findall(r"(\w+)=(\S*)", text))


def _say(environment: Any, text: str) -> None:
    if environment.global_rank == 0:
        print(text, flush=True)


def _tail(path: Path, lines: int = 5) -> str:
    try:
        return "\n".join(path.read_text(errors="replace").splitlines()[-lines:]) + "\n"
    except OSError:
        return ""


if __name__ == "__main__":
    # By its own name: what is pickled must not belong to __main__.
    from ddp_ssl.submit import main as imported_main

    sys.exit(imported_main())
