"""Settings of Slurm that are known to cause trouble."""

import contextlib
import os
import re
import shutil
from collections.abc import Mapping
from typing import Any

from ddp_ssl.checks.base import Check, Context, Findings, ok, warn
from ddp_ssl.utils.files import if_readable
from ddp_ssl.utils.launcher import under_srun
from ddp_ssl.utils.programs import output_of, scontrol_fields, slurm_seconds

STEP_S = 10.0  # for the step under way to end, and for the others to agree
SHORT_S = 900  # a job shorter than this spends its time on starting


def look_at_slurm(ctx: Context, before: list[Any]) -> dict[str, Any] | None:
    """Slurm's configuration and this job, on rank 0; None where there is no Slurm."""
    if not ctx.world.is_main or shutil.which("scontrol") is None:
        return None
    job = os.environ.get("SLURM_JOB_ID")
    try:
        config = pairs(ask("show", "config"))
    except OSError:
        if job is None:
            return None  # a machine with Slurm's programs, but of no cluster
        raise
    found: dict[str, Any] = {"config": config, "job": {}, "script": "", "partition": {}}
    if job is not None:
        found["job"] = scontrol_fields("show", "job", "-o", job)
        name = found["job"].get("Partition", "")
        found["partition"] = scontrol_fields("show", "partition", "-o", name) if name else {}
        with contextlib.suppress(OSError):  # an interactive job has none
            found["script"] = ask("write", "batch_script", job, "-")
    return found


def ask(*words: str) -> str:
    """The output of scontrol; raises `OSError`."""
    return output_of(["scontrol", *words], timeout_s=20)


def pairs(text: str) -> dict[str, str]:
    """`scontrol show config`: a `Name = value` a line."""
    found = (line.partition("=") for line in text.splitlines() if "=" in line)
    return {name.strip(): value.strip() for name, _, value in found}


def judge_slurm(ctx: Context, facts: list[dict[str, Any] | None]) -> Findings:
    found, env = facts[0], os.environ
    if found is None:
        if "SLURM_JOB_ID" in env:
            yield warn(
                "in a Slurm job, but there is no scontrol here to ask",
                "bind it into the container, to have Slurm's settings checked and jobs requeued",
            )
        else:
            yield ok("not in use here")
        return
    problems = [*_of_cluster(ctx, found["config"], env), *_of_environment(ctx, env)]
    if found["job"]:
        problems += _of_job(found, env)
    yield from problems
    if not problems:
        names = ("ProctrackType", "PreemptMode", "KillWait", "JobRequeue")
        shown = [f"{name} {found['config'].get(name, 'unknown')}" for name in names]
        if found["job"]:
            shown.append(f"time limit {found['job'].get('TimeLimit', 'unknown')}")
        yield ok(", ".join(shown))


def _of_cluster(ctx: Context, config: Mapping[str, str], env: Mapping[str, str]) -> Findings:
    tracker = config.get("ProctrackType", "")
    if tracker.endswith("cgroup") and "TORCHELASTIC_RUN_ID" in env:
        yield warn(
            "ProctrackType is proctrack/cgroup: only srun's own children get signals, and "
            "torchrun dies of them without telling its workers",
            "one task per GPU under srun, or slurm/'s torchrun mode, which makes a STOP file",
        )
    elif tracker and not tracker.endswith("cgroup"):
        yield warn(
            f"ProctrackType is {tracker}: signals reach all processes here, which they do not "
            "on a cluster with proctrack/cgroup, and processes can outlive the job",
            "do not take signals that work here for a proof that they do elsewhere",
        )
    wait = re.match(r"\d+", config.get("KillWait", ""))
    needed = STEP_S + 2 * (ctx.checkpoint_s or 0)
    if wait and int(wait[0]) < needed:
        yield warn(
            f"KillWait is {wait[0]} s: between SIGTERM and SIGKILL a step and a checkpoint "
            f"(about {needed:.0f} s) do not fit",
            "#SBATCH --signal=B:USR2@300 warns earlier of the time limit; "
            "checkpoint.every_steps bounds what a preemption costs",
        )
    mode = config.get("PreemptMode", "OFF").upper()
    if (
        config.get("PreemptType", "(null)") not in ("preempt/none", "(null)")
        and "REQUEUE" not in mode
    ):
        what = "suspended, while its timeouts go on" if "SUSPEND" in mode else "cancelled"
        text = f"PreemptMode is {mode}: a preempted job is {what} and not queued again"
        yield warn(text, "submit it again with run.dir=THE SAME run.resume=auto")
    if config.get("JobRequeue") == "0" and "SLURM_JOB_ID" not in env:
        yield warn("JobRequeue is 0: jobs are not queued again", "#SBATCH --requeue")


def _of_job(found: dict[str, Any], env: Mapping[str, str]) -> Findings:
    job, partition, script = found["job"], found["partition"], found["script"]
    if job.get("Requeue") == "0":
        yield warn("this job is not queued again after a preemption", "#SBATCH --requeue")
    if "--signal" not in script and "SBATCH_SIGNAL" not in env and script:
        yield warn(
            "the batch script asks for no signal before the time limit",
            "#SBATCH --signal=B:USR2@300, as the scripts in slurm/ have it",
        )
    limit = if_readable(lambda: slurm_seconds(job.get("TimeLimit", "")))  # None: UNLIMITED
    if limit is not None and limit < SHORT_S:
        text = f"the time limit is {job['TimeLimit']}: much of it goes into starting"
        yield warn(text, "#SBATCH --time; the run goes on after a requeue")
    mode = partition.get("PreemptMode", "")
    if "CANCEL" in mode.upper():
        text = f"jobs in partition {job.get('Partition')} are cancelled by a preemption"
        yield warn(text, "another partition, or submit again with run.resume=auto")


def _of_environment(ctx: Context, env: Mapping[str, str]) -> Findings:
    if env.get("SLURM_GPUS_PER_TASK") and ctx.config.run.device != "cpu":
        yield warn(
            "--gpus-per-task shows each task one GPU, and NCCL may not connect GPUs directly "
            "that do not see each other",
            "--gpus-per-node with --ntasks-per-node; each rank takes its own",
        )
    cpus = env.get("SLURM_CPUS_PER_TASK", "")
    # A task that has its cores from srun is fine.
    short = not under_srun() or len(os.sched_getaffinity(0)) < int(cpus or 0)
    if cpus and not env.get("SRUN_CPUS_PER_TASK") and short:
        yield warn(
            "SRUN_CPUS_PER_TASK is unset: since Slurm 22.05 srun does not take over "
            f"--cpus-per-task={cpus}",
            "export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK in the batch script",
        )
    tasks = env.get("SLURM_NTASKS", "1")
    if ctx.world.size == 1 and tasks.isdigit() and int(tasks) > 1:
        text = f"one process of a job with {tasks} tasks was looked at"
        yield warn(text, "srun ddp-ssl doctor ... looks at all")


CHECKS = (Check("slurm", (look_at_slurm,), judge_slurm),)
