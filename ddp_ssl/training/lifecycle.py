"""A run from joining the other processes to its exit code: build, loop, end."""

from __future__ import annotations

import contextlib
import logging

from ddp_ssl import distributed
from ddp_ssl.config import Config, ConfigError, Resolved
from ddp_ssl.data.loading.reader import UnreadableError
from ddp_ssl.distributed import World, others_failed
from ddp_ssl.errors import (
    BadDataError,
    BuildError,
    MeasurementError,
    NonFiniteError,
    SaveError,
    VanishedError,
    ViewGroupError,
)
from ddp_ssl.logs import console
from ddp_ssl.run.signals import StopRequest
from ddp_ssl.run.status import RunStatus
from ddp_ssl.run.watchdog import Watchdog
from ddp_ssl.training import loop, report
from ddp_ssl.training.build import build
from ddp_ssl.training.job import Job
from ddp_ssl.training.state import save
from ddp_ssl.utils.launcher import job_end, resume_command
from ddp_ssl.utils.text import one_line
from ddp_ssl.utils.waits import leaving, limits

logger = logging.getLogger("ddp_ssl")

# Errors that all ranks raise together.
ENDS_ALL_RANKS = (NonFiniteError, ViewGroupError, BadDataError, MeasurementError, SaveError)


def run(resolved: Resolved, stop: StopRequest, on_step: loop.OnStep | None = None) -> int:
    """The whole run; returns the exit code. Raises `ConfigError` for a run that cannot start.

    `on_step` is called before every step.
    """
    config = resolved.config
    world = join(config)
    console.setup_logging(None, world.rank)
    set_deadlines(config, stop)
    watch, status = Watchdog(world, config.run), RunStatus()
    watch.on_end = status.record_failure
    code, job = 0, None
    limits.timeout_s = config.run.timeout_s
    try:
        job = build(resolved, world, watch, status, lambda: stop.reason is not None)
        train_to_the_end(job, stop, status, on_step)
    except ConfigError as error:
        error.together = True
        settle(job)
        if world.is_main:
            status.record("failed", error=str(error), retry=isinstance(error, BuildError))
            # The line is printed by the command; `train.log` has what led to it.
            logger.debug("%s", error, exc_info=error)
        close(job)
        watch.close()
        distributed.stop()
        raise
    except ENDS_ALL_RANKS as error:  # likewise
        settle(job)
        if world.is_main:
            in_store = isinstance(error, VanishedError) and config.data.is_far
            again = in_store or isinstance(error, SaveError)
            status.record("failed", error=str(error), retry=again)
            logger.error("%s", error)
        close(job)
        code = 1
    except BaseException as error:
        # One rank alone: the others wait in a collective, where leaving the group in order would
        # block too. The process ends as it is, and the launcher ends the others.
        explain(error, world, watch, status)
        settle(job)
        close(job)
        if not isinstance(error, Exception):
            raise
        raise SystemExit(1) from None
    finally:
        status.release()
    watch.close()
    distributed.stop()
    return code


def train_to_the_end(
    job: Job, stop: StopRequest, status: RunStatus, on_step: loop.OnStep | None
) -> None:
    """Train, and record how the training ended."""
    world, watch, state = job.world, job.setting.watch, job.state
    try:
        end = loop.train(job, stop, on_step)
    except BadDataError:
        with contextlib.suppress(SaveError):
            save(job, must_succeed=True)  # between two steps, on all processes together
        raise
    world.barrier()  # a late process must not find the others gone
    watch.close()
    if end == "done":
        report.finish(job)
    elif world.is_main:
        reason = stop.reason or "request of another rank"
        again = resume_command(str(job.setting.folder))
        name, to = job.setting.config.method.name, job.setting.config.log.to
        again += f" method.name={name}" if ":" in name else ""  # consent to import it
        views = job.setting.config.data.views
        again += " --trust" if any(":" in view.recipe for view in views) else ""
        again += f" 'log.to=[{', '.join(to)}]'" if ":" in "".join(to) else ""
        logger.info("stopped on %s at step %d; to go on: %s", reason, state.step, again)
    settle(job)
    if world.is_main:
        status.verdict = report.verdict_of(job, ended=end == "done")
        status.record(end, step=state.step, epoch=state.epoch)
    close(job)


def settle(job: Job | None) -> None:
    """Wait for the checkpoint that is being written; after it the end of the run is recorded.

    Nothing waits for an object store any more.
    """
    leaving.set()
    if job is not None:
        job.checkpointer.close()
        job.measurement.cancel_prefetch()
        job.recorder.sync()


def close(job: Job | None) -> None:
    """Close the files and the loggers. These may take a minute, in which a launcher may kill."""
    if job is not None:
        job.recorder.close()


def explain(error: BaseException, world: World, watch: Watchdog, status: RunStatus) -> None:
    """Log once, and record in `status.json`, whose error ended the run: this process's or not."""
    reason, speaks = "", True
    if world.size > 1 and others_failed(error):
        reason, speaks = watch.explain()
    if not reason:  # it is this process's own
        name = "" if isinstance(error, UnreadableError) else f"{type(error).__name__}: "
        reason = one_line(f"{name}{error}")
        watch.failed(reason)
        if isinstance(error, Exception) and not isinstance(error, UnreadableError):
            logger.error("%s", reason, exc_info=error)
        else:
            logger.error("%s", reason)
        status.record("failed", error=reason, retry=True)
    elif speaks:
        logger.error("%s", reason)
        status.record_failure(reason)
    watch.close()


def set_deadlines(config: Config, stop: StopRequest) -> None:
    """Stop at `run.max_hours` from the start of the process, and some time before the job's end."""
    if config.run.max_hours is not None:
        stop.at(stop.started + 3600 * config.run.max_hours, "run.max_hours")
    end = job_end()
    if end is not None:
        margin = min(config.run.end_margin_s, max(0.0, end - stop.started) / 10)
        stop.at(end - margin, "the end of the Slurm job")


def join(config: Config) -> World:
    """Join the process group."""
    # The watchdog keeps the shorter limits and names the rank at fault; this is behind it.
    patience = max(config.run.start_timeout_s, config.run.timeout_s) + 60
    return distributed.start(config.run.device, patience)
