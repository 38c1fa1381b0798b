"""A run: build, resume, the loop, and what happens at an epoch's end.

The loop knows no method. What a method needs between steps and epochs it does in its own hooks
(`methods/base.py`).
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import json
import logging
import math
import os
import random
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any, TypeVar, cast

import numpy as np
import torch
from torch import Tensor, nn

from ddp_ssl import checkpoint, distributed, folder, log, optim
from ddp_ssl.checkpoint import CheckpointError, SaveError
from ddp_ssl.comm import Comm
from ddp_ssl.config import Config, ConfigError, Resolved, load_method
from ddp_ssl.data import datasets
from ddp_ssl.data.augment import views_of
from ddp_ssl.data.batch import Batch
from ddp_ssl.data.loader import StreamLoader, TrainLoader
from ddp_ssl.data.order import hashed
from ddp_ssl.data.source import Agree, BadImages, UnreadableError
from ddp_ssl.distributed import LateFlag, World, others_failed, traffic
from ddp_ssl.evals.probe import Learner
from ddp_ssl.evals.validation import Validation
from ddp_ssl.launch import cpu_share, job_end, layout_lines, rank_and_size, restarts
from ddp_ssl.methods.base import Context, Method, Progress, trainable
from ddp_ssl.models import export, loading_snippet
from ddp_ssl.picture import view_grid
from ddp_ssl.profile import Profiler
from ddp_ssl.recorder import BadDataError, NonFiniteError, Recorder, ViewGroupError
from ddp_ssl.saver import Saver
from ddp_ssl.signals import StopRequest
from ddp_ssl.threads import beside
from ddp_ssl.watchdog import Watchdog

logger = logging.getLogger("ddp_ssl")
T = TypeVar("T")

AHEAD = 20  # steps before the end of an epoch from which on a method's own batches are read
TOGETHER = 16  # batches after which all learn that one of them has no more
LONG_S = 30.0  # a validation worth a checkpoint before it
SAVE_AGAIN_S = 5.0  # between attempts of a save that cannot wait for a later step


class BuildError(ConfigError):
    """What went wrong while the run was built may not do so again."""


@dataclasses.dataclass
class Save:
    """A checkpoint that is being written; or could not be, and what the next one makes up for."""

    step: int = 0
    epoch: int = 0
    failures: int = 0
    permanent: bool = False
    best: bool = False


@dataclasses.dataclass
class Job:
    """Everything a run is made of; `step` steps and `epoch` epochs are done."""

    config: Config
    world: World
    folder: Path
    data: datasets.Dataset
    learner: Learner
    module: nn.Module
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    loader: TrainLoader
    validation: Validation | None
    recorder: Recorder
    watch: Watchdog
    step: int = 0
    epoch: int = 0
    best: float | None = None
    latest: dict[str, float] = dataclasses.field(default_factory=dict)
    first: dict[str, float] = dataclasses.field(default_factory=dict)
    code: dict[str, str] = dataclasses.field(default_factory=dict)
    ahead: Future[Sample] | None = None
    saver: Saver = dataclasses.field(default_factory=Saver)
    saving: Save | None = None
    unsaved: Save | None = None

    @property
    def method(self) -> Method[Any]:
        """The method itself, outside DDP."""
        return self.learner.method


OnStep = Callable[[Job], None]


def run(resolved: Resolved, stop: StopRequest, on_step: OnStep | None = None) -> int:
    """The whole run; returns the exit code. Raises `ConfigError` for what cannot be run."""
    config = resolved.config
    world = join(config)
    log.setup_logging(None, world.rank)
    set_deadlines(config, stop)
    watch = Watchdog(world, config.run)
    claimed: list[Path] = []
    watch.on_end = lambda reason: record_end(claimed, reason)

    def ended(state: log.State, **fields: Any) -> None:
        if world.is_main:
            record_status(claimed, state, **fields)

    code, job = 0, None
    try:
        job = build(resolved, world, watch, claimed)
        try:
            state = train(job, stop, on_step)
        except BadDataError:
            with contextlib.suppress(SaveError):
                save(job, insist=True)  # between two steps, on all processes together
            raise
        world.barrier()  # who is late must not find the others gone
        watch.close()
        if state == "done":
            finish(job)
        elif world.is_main:
            reason = stop.reason or "request of another rank"
            logger.info("stopped on %s at step %d; run.resume=auto goes on", reason, job.step)
        close(job)
        ended(state, step=job.step, epoch=job.epoch)
    except ConfigError as error:  # raised by all ranks together
        close(job)
        ended("failed", error=str(error), retry=isinstance(error, BuildError))
        watch.close()
        distributed.stop()
        raise
    except (NonFiniteError, ViewGroupError, BadDataError, SaveError) as error:  # likewise
        close(job)
        ended("failed", error=str(error), retry=isinstance(error, SaveError))
        if world.is_main:
            logger.error("%s", error)
        code = 1
    except BaseException as error:
        # One rank alone: the others wait in a collective, where leaving the group in order would
        # block too. The process ends as it is, and the launcher ends the others.
        explain(error, world, watch, claimed)
        close(job)  # what is being written comes to its end
        if not isinstance(error, Exception):
            raise
        raise SystemExit(1) from None
    watch.close()
    distributed.stop()
    return code


def close(job: Job | None) -> None:
    """Wait for the checkpoint that is being written, and close the files."""
    if job is None:
        return
    with job.watch.during("saving a checkpoint"):
        job.saver.close()
    let_go(job)
    job.recorder.close()


def explain(error: BaseException, world: World, watch: Watchdog, claimed: list[Path]) -> None:
    """Say once, and in `status.json`, what ended the run: this process's error or another's."""
    reason, speaks = "", True
    if world.size > 1 and others_failed(error):
        reason, speaks = watch.explain()
    if not reason:  # it is this process's own
        name = "" if isinstance(error, UnreadableError) else f"{type(error).__name__}: "
        reason, speaks = one_line(f"{name}{error}"), True
        watch.failed(reason)
        if isinstance(error, Exception) and not isinstance(error, UnreadableError):
            logger.error("%s", reason, exc_info=error)
        else:
            logger.error("%s", reason)
        record_status(claimed, "failed", error=reason, retry=True)
    elif speaks:
        logger.error("%s", reason)
        record_end(claimed, reason)
    watch.close()


def set_deadlines(config: Config, stop: StopRequest) -> None:
    """`run.max_hours` from the start of the process, and some time before the job's end."""
    if config.run.max_hours is not None:
        stop.at(stop.started + 3600 * config.run.max_hours, "run.max_hours")
    end = job_end()
    if end is not None:
        margin = min(config.run.end_margin_s, max(0.0, end - stop.started) / 10)
        stop.at(end - margin, "the end of the Slurm job")


def join(config: Config) -> World:
    """The process group; what fails on one rank before there is a group is said by that rank."""
    try:
        # The watchdog keeps the shorter limits, and says who it was; this is behind it.
        patience = max(config.run.start_timeout_s, config.run.timeout_s) + 60
        return distributed.start(config.run.device, patience)
    except distributed.Disagreement as error:
        raise ConfigError(str(error)) from None
    except ValueError as error:
        if rank_and_size()[0]:
            print(f"ddp_ssl: error: {error}", file=sys.stderr, flush=True)
        raise ConfigError(str(error)) from None


def record_status(claimed: list[Path], state: log.State, **fields: Any) -> None:
    """`status.json` in the folder that this process claimed, if it is the one that did."""
    for place in claimed:
        try:
            log.write_status(place, state, **fields)
        except OSError as error:
            logger.warning("status.json cannot be written: %s", error)


def record_end(claimed: list[Path], reason: str) -> None:
    """`failed`, unless the process that failed said so itself."""
    for place in claimed:
        with contextlib.suppress(OSError, ValueError, KeyError):
            if json.loads((place / "status.json").read_text())["state"] != "running":
                return
    record_status(claimed, "failed", error=reason, retry=True)


# --- the loop ----------------------------------------------------------------------------------


def train(job: Job, stop: StopRequest, on_step: OnStep | None = None) -> log.State:
    """Train to the end or until asked to stop; returns `done` or `preempted`.

    `on_step` is called before every step, once its batch is there.
    """
    config, world, method, watch = job.config, job.world, job.method, job.watch
    steps_per_epoch, epochs = job.loader.steps_per_epoch, config.optim.epochs
    total_steps, stop_file = steps_per_epoch * epochs, job.folder / "STOP"
    late, recorder, optimizer, scaler = LateFlag(world), job.recorder, job.optimizer, job.scaler
    profiler = Profiler(config, world, job.folder)
    parameters = [p for p in method.parameters() if p.requires_grad]
    job.module.train()
    profiler.step(job.step)
    recorder.restart_clock()

    while job.epoch < epochs:
        while job.step < (job.epoch + 1) * steps_per_epoch:
            watch.at(job.step, "waiting for data")
            job.learner.timing = recorder.begin_step(job.step + 1)
            with recorder.waiting():
                batch = next(job.loader)
            watch.at(job.step, "a step")
            recorder.saw(batch.ids)
            if on_step is not None:
                on_step(job)
            rate = optim.set_learning_rates(
                optimizer, config.optim, config.data.batch_size, job.step, steps_per_epoch
            )
            total, figures = job.module(batch)
            scaler.scale(total).backward()
            traffic.gradients_reduced()
            scaler.unscale_(optimizer)
            progress = Progress(job.step, total_steps, job.epoch, epochs)
            method.before_optimizer(progress)
            norm = gradient_norm(parameters, config.optim.grad_clip)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad(set_to_none=True)
            method.after_step(progress)
            job.step += 1
            look_ahead(job)

            recorder.add(job.step, figures | {"optim/lr": rate, "optim/grad_norm": norm})
            logging_step = recorder.logs(job.step)
            if logging_step:
                recorder.flush(job.learner.timed)
                settle(job, block=False)
            profiler.step(job.step)
            asked = stop.look_for(stop_file) if world.is_main else stop.reason is not None
            asked = asked or job.loader.failing is not None
            last = job.step == (job.epoch + 1) * steps_per_epoch  # what follows takes long
            stopping = late.now(asked) if last else late.exchange(asked)
            if stopping:
                profiler.close()
                save(job, insist=True)
                late.settle()
                stop_if_bad(world, job.loader.failing)
                return "preempted"
            if is_due(config.checkpoint.every_steps, job.step) and not last:
                save(job)
            elif logging_step and job.unsaved is not None:
                save_again(job)
        if long_validation(job):
            save(job)
        best = end_of_epoch(job)
        job.epoch += 1
        done, permanent = job.epoch == epochs, is_due(config.checkpoint.keep_every, job.epoch)
        if done or permanent or best is not None or is_due(config.checkpoint.every, job.epoch):
            save(job, permanent, best, insist=done)
    profiler.close()
    recorder.share_bad()  # of the last validation; others come up at the next logging step
    late.settle()
    return "done"


def is_due(every: int, count: int) -> bool:
    """Whether it is the turn of what is done every so many; 0: never."""
    return bool(every and count % every == 0)


def stop_if_bad(world: World, reason: str | None) -> None:
    """`BadDataError` on all processes together if one of them has a reason."""
    if world.any(reason is not None):
        reasons = world.gather_objects(reason) or []
        raise BadDataError(world.broadcast_object(next((r for r in reasons if r), None)))


def end_of_epoch(job: Job) -> float | None:
    """What is measured between epochs, before the epoch counts as done; the score, if the best."""
    job.recorder.flush()
    with job.watch.during("what the method measures between epochs"):
        job.method.after_epoch(context_of(job))
    let_go(job)
    done, config = job.epoch + 1, job.config
    job.method.train()
    last = done == config.optim.epochs
    figures = evaluate(
        job,
        last or is_due(config.eval.every, done),
        last or is_due(config.measure.every, done),
    )
    job.recorder.restart_clock()
    return best_score(job, figures)


def long_validation(job: Job) -> bool:
    """Whether a validation is due that took long the last time: a checkpoint comes first."""
    seconds = job.latest.get("perf/validation_s", 0.0)
    done, config = job.epoch + 1, job.config
    due = is_due(config.eval.every, done) or is_due(config.measure.every, done)
    return due and bool(job.world.broadcast_object(seconds > LONG_S))


def best_score(job: Job, figures: dict[str, float]) -> float | None:
    """This epoch's figure of `checkpoint.best`, if it beats all before; higher is better."""
    name = job.config.checkpoint.best or ""
    value = figures.get(name.lstrip("-"))
    if value is None or not math.isfinite(value):
        return None
    score = -value if name.startswith("-") else value
    return score if job.best is None or score > job.best else None


def evaluate(job: Job, accuracy: bool, measure: bool) -> dict[str, float]:
    """The validation figures that are due, on all processes."""
    if job.validation is None or not (accuracy or measure):
        return {}
    start = time.perf_counter()
    with job.watch.during("validation"):
        figures = job.validation.figures(job.method, job.learner.probe, accuracy, measure)
    figures["perf/validation_s"] = time.perf_counter() - start
    if measure:
        figures["perf/measure_s"] = job.validation.measure_s
        for space, shares in job.validation.spectra.items():
            job.recorder.spectrum(job.step, space, shares)
    job.first = job.first or figures
    job.latest |= figures
    job.recorder.row(job.step, figures)
    names = ("eval/knn_top1", "eval/probe_top1", "rep/effective_rank_r", "rep/effective_rank_z")
    shown = [f"{n.partition('/')[2]} {figures[n]:.4g}" for n in names if n in figures]
    if "eval/knn_bank" in figures:
        shown.append(f"(bank of {figures['eval/knn_bank']:.0f} images)")
    job.recorder.tell(f"validation at step {job.step}: {'  '.join(shown)}")
    return figures


def finish(job: Job) -> None:
    """Export the backbone; print the result and how to load it."""
    if not job.world.is_main:
        return
    config, weights = job.config, job.folder / "backbone.pt"
    with warned(weights):
        torch.save(export(job.method.backbone), weights)
    names = {
        "eval/knn_raw_pixels": "k-NN top-1, raw pixels",
        "eval/knn_top1": "k-NN top-1",
        "eval/probe_top1": "online probe top-1",
        "rep/alpha": "alpha",
        "rep/effective_rank_z": "effective rank of z",
        "rep/effective_rank_r": "effective rank of r",
        "rep/mutual_information": "I(R;Z), nats",
        "rep/embedding_std": "embedding std",
    }
    rows = [("run", str(job.folder)), ("method", config.method.name), ("steps", str(job.step))]
    for name, label in names.items():
        if name in job.latest:
            before = f"{job.first[name]:.4f} at step 0, " if name in job.first else ""
            rows.append(
                (label, f"{before}{job.latest[name]:.4f}" + (" at the end" if before else ""))
            )
    table = log.markdown_table(rows)
    snippet = loading_snippet(config.model, str(weights))
    with warned(job.folder / "result.md"):
        (job.folder / "result.md").write_text(f"{table}\n\n```python\n{snippet}\n```\n")
    job.recorder.tell(f"\n{table}\n\nThe backbone, without ddp_ssl:\n\n{snippet}\n")
    if config.data.name == "digits":
        job.recorder.tell(
            "These digits are easy: raw pixels classify as well. The run shows that everything "
            "works, from JPEG files to a learned representation and a measured alpha; it does not "
            "show that the method is better than another."
        )


# --- building ----------------------------------------------------------------------------------


def build(resolved: Resolved, world: World, watch: Watchdog, claimed: list[Path]) -> Job:
    """Find the data, claim the folder, make everything, and load what the run continues from.

    Appends the folder to `claimed` as soon as it is this run's.
    """
    config, device = resolved.config, world.device
    threads = config.run.threads or cpu_share()
    torch.set_num_threads(threads)
    torch.backends.cudnn.benchmark = True  # the image sizes never change
    if config.optim.precision == "bf16" and device.type == "cuda":
        together(world, require_bf16)
    watch.next("finding the data")
    together(world, lambda: datasets.find(config.data))
    start = claim_folder(config, world)
    comm = distributed.comm_of(world, config.data.view_shards)
    bad = BadImages()

    torch.manual_seed(config.run.seed)  # the same weights on every rank
    method = together(world, lambda: make_method(config, comm))
    watch.next("copying the data to the node")
    together(world, lambda: datasets.stage(config.data))
    watch.next("reading the data set")
    data = load_data(config, world)
    watch.next("building the run")
    held = range(config.num_views)[comm.views]
    loader = together(
        world,
        lambda: train_loader(config, comm, data, device, held, bad, agree=comm.view_union),
    )
    learner = Learner(
        method,
        data.num_classes if config.eval.probe else 0,
        some_unlabelled=bool((data.train.labels < 0).any()),
    )
    together(world, lambda: initial_weights(learner, config))
    # The folder is created last: whatever is wrong before leaves no trace.
    identity = folder.whole_identity(config, data)
    watch.next("loading the checkpoint")
    state, path = together(world, lambda: load(identity, start))
    watch.next("building the run")
    together(world, lambda: folder.create(start.folder) if world.is_main else None)
    claimed.append(start.folder)
    log.setup_logging(start.folder if world.is_main else None, world.rank)
    validation = (
        Validation(data, config, comm, device, bad)
        if data.val is not None and len(data.val)
        else None
    )
    module = on_device(learner, config, world)
    optimizer = optim.build(config.optim, parameter_groups(learner, config))
    scaler = torch.amp.GradScaler(device.type, enabled=config.optim.precision == "fp16")
    if world.size > 1:
        warm_up(module, learner, config, comm, device)
    ranks = distributed.layout(world)
    continued = state if start.same_folder else None
    writer = together(
        world, lambda: open_folder(resolved, start, ranks, continued) if world.is_main else None
    )
    parts = (max(data.train, data.labelled or data.train, key=len), data.val)
    images = sum(len(part) for part in parts if part is not None)
    recorder = Recorder(
        config, world, loader.steps_per_epoch, writer, bad, images, start.folder / "bad_images.txt"
    )
    job = Job(
        config, world, start.folder, data, learner, module, optimizer, scaler, loader, validation,
        recorder, watch, code=log.code_version() if world.is_main else {},
    )  # fmt: skip
    recorder.hosts = {rank: text.partition(" ")[0] for rank, text in enumerate(ranks)}
    describe(job, threads, ranks)
    for seed_all in (torch.manual_seed, random.seed, np.random.seed):
        seed_all(derive(config.run.seed, "rank", world.rank))
    if state:
        together(world, lambda: restore(job, state, cast(Path, path)))
    else:
        begin(job)
    return job


def claim_folder(config: Config, world: World) -> folder.Start:
    """The run folder and the starting point that rank 0 chose."""
    # On several nodes torchrun's agents count restarts each for itself.
    restarted = max(count for (count,) in world.gather_numbers([restarts()])) > 0
    start = world.broadcast_object(
        together(world, lambda: folder.claim(config, restarted) if world.is_main else None)
    )
    assert isinstance(start, folder.Start)
    return start


def on_device(learner: Learner, config: Config, world: World) -> nn.Module:
    """The learner on its device, in its memory format, under DDP."""
    learner.to(world.device)
    if config.model.channels_last:
        learner.to(memory_format=torch.channels_last)
    if config.model.compile:
        learner.method.backbone.compile()
    return distributed.data_parallel(learner, world, config.optim.gradient_compression)


def open_folder(
    resolved: Resolved, start: folder.Start, ranks: list[str], continued: dict[str, Any] | None
) -> log.MetricsWriter:
    """Who runs what, in the folder; and its metrics, going on where `continued` was saved."""
    step = None if continued is None else continued["step"]
    write_folder(resolved, start, ranks, step or 0)
    writer = log.MetricsWriter(
        start.folder,
        tensorboard=resolved.config.log.tensorboard,
        resumed_step=step,
        offset=0 if continued is None else continued["metrics_offset"],
    )
    writer.text("config", f"```yaml\n{resolved.to_yaml()}```", step or 0)
    return writer


def make_method(config: Config, comm: Any) -> Method[Any]:
    """The configured method, its batch norms global."""
    method = cast(Method[Any], load_method(config.method.name)(config, comm))
    method.finish()
    return method


def load_data(config: Config, world: World) -> datasets.Dataset:
    """The data set on every rank, the same on all; rank 0 first, which writes what is cached."""

    def read() -> datasets.Dataset:
        return datasets.load(config.data, config.run.seed)

    first = together(world, lambda: read() if world.is_main else None)
    data = together(world, lambda: read() if first is None else first)
    parts = (data.train, data.val, data.labelled)
    splits = [None if s is None else s.digest for s in parts]
    everyones = world.broadcast_object((splits, data.class_names))

    def compare() -> None:
        if everyones != (splits, data.class_names):
            raise ValueError(f"data.root: rank {world.rank} sees other files than rank 0 does")

    together(world, compare)
    return data


def train_loader(
    config: Config,
    comm: Comm,
    data: datasets.Dataset,
    device: torch.device,
    views: Sequence[int],
    bad: BadImages,
    seed: int | None = None,
    agree: Agree = dict,
) -> TrainLoader:
    """The training batches of this process, with some of the run's views of each image.

    `agree` only where all processes of a view group load the same batches.
    """
    d, every = config.data, views_of(config.data.views)
    kind: Callable[..., TrainLoader] = TrainLoader
    if d.reader == "streamed":
        assert data.train.shards is not None
        kind = functools.partial(StreamLoader, **data.train.shards.stream(d.url))
    return kind(
        data.train,
        [every[k] for k in views],
        view_ids=views,
        global_batch=d.batch_size,
        shard=comm.data_rank,
        num_shards=comm.data_shards,
        seed=config.run.seed if seed is None else seed,
        salt=comm.rank,
        color_jitter=d.color_jitter,
        **datasets.reading(d, half=d.dtype == "float16"),
        device=device,
        bad=bad,
        agree=agree,
    )


def parameter_groups(learner: Learner, config: Config) -> list[dict[str, Any]]:
    """The method's groups and the probe's own."""
    groups = learner.method.parameter_groups()
    if learner.probe is not None:
        rate = {"base_lr": config.eval.probe_lr, "weight_decay": 0.0}
        groups.append({"name": "probe", "params": trainable(learner.probe, "probe."), **rate})
    return groups


def warm_up(
    module: nn.Module, learner: Learner, config: Config, comm: Comm, device: torch.device
) -> None:
    """One throwaway forward and backward, whose traces are removed.

    DDP fixes its buckets, and so the order in which gradients are summed, after the first backward.
    With this a resumed run sums in the same order as an uninterrupted one, to the last bit.
    """
    saved = copy.deepcopy(learner.state_dict())
    images = config.data.batch_size // comm.data_shards
    views = [
        torch.rand(images, 3, v.size, v.size, device=device).contiguous(
            memory_format=torch.channels_last
        )
        for v in views_of(config.data.views)[comm.views]
    ]
    labels = torch.zeros(images, dtype=torch.long, device=device)
    module.train()
    module(Batch(views, torch.zeros(images, dtype=torch.long), labels))[0].backward()
    module.zero_grad(set_to_none=True)
    learner.load_state_dict(saved)


def begin(job: Job) -> None:
    """A fresh start: figures at step 0."""
    if job.world.is_main:
        job.recorder.restore_bad({})  # of an earlier start that came to no checkpoint
    if job.config.run.init_from is not None:
        job.recorder.tell(f"weights from {job.config.run.init_from}")
    with job.watch.during("what the method does at the start"):
        job.method.on_start(context_of(job))
    job.method.train()
    if job.config.eval.raw_pixels and job.validation is not None and job.validation.labelled:
        accuracy = job.validation.raw_pixels()
        if accuracy is not None:
            job.latest |= {"eval/knn_raw_pixels": accuracy}
            job.recorder.row(0, {"eval/knn_raw_pixels": accuracy})
            job.recorder.tell(f"k-NN top-1 of the raw pixels: {accuracy:.4f}")
    figures = evaluate(job, accuracy=True, measure=True)
    job.recorder.share_bad()
    best = job.config.checkpoint.best
    if best is not None and figures and best.lstrip("-") not in figures and job.data.labelled:
        job.recorder.tell(
            f"checkpoint.best: {best} is not measured here, so no best checkpoint is kept; "
            f"measured are {', '.join(name for name in figures if not name.startswith('perf/'))}"
        )
    if job.world.is_main:
        picture(job)


def picture(job: Job) -> None:
    """What the views look like: `views.png` and TensorBoard, from a pipeline of its own."""
    views = range(job.config.num_views)
    loader = train_loader(
        job.config, job.method.comm, job.data, job.world.device, views, job.recorder.bad
    )
    image = view_grid(next(loader).views, *job.config.data.normalisation)
    loader.close()
    job.recorder.image("data/views", image, job.folder / "views.png")


def describe(job: Job, threads: int, ranks: list[str]) -> None:
    """Who runs on what, once, on rank 0; and the config as text."""
    config, data, total = job.config, job.data, job.config.optim
    val = 0 if data.val is None else len(data.val)
    network = sum(p.numel() for p in job.method.parameters() if p.requires_grad)
    job.recorder.tell(
        f"{config.method.name} on {data.name}: {len(data.train)} images in "
        f"{data.num_classes or 'no'} classes, {val} for validation; {config.data.batch_size} "
        f"images x {config.num_views} views a step, {job.loader.steps_per_epoch} steps an epoch, "
        f"{total.epochs} epochs"
    )
    job.recorder.tell(
        f"{job.world.size} process(es) on {job.world.device.type}, {threads} thread(s) each; "
        f"{network / 1e6:.2f} M parameters; peak learning rate "
        f"{total.lr * config.data.batch_size / 256:g}; folder {job.folder}"
    )
    if job.world.size > 1:
        job.recorder.tell(
            f"rendezvous {os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}; threads per "
            f"process: torch {threads}, DALI {config.data.threads or cpu_share()}, reading "
            f"{config.data.read_threads}, OMP_NUM_THREADS "
            f"{os.environ.get('OMP_NUM_THREADS', 'unset')}"
        )
    for line in layout_lines(ranks):
        job.recorder.tell(line)


def write_folder(resolved: Resolved, start: folder.Start, ranks: list[str], step: int) -> None:
    """The config and the environment, for whoever reads the folder later."""
    tree = resolved.to_yaml()
    (start.folder / "config.yaml").write_text(tree)
    environment = log.environment() | {"world_size": len(ranks), "ranks": ranks}
    (start.folder / "environment.json").write_text(json.dumps(environment, indent=1) + "\n")
    remove_old_stop(start.folder)
    log.write_status(start.folder, "running", step=step)
    checkpoint.sweep(start.folder)


def remove_old_stop(place: Path) -> None:
    """The STOP that an earlier start obeyed; one made since then is for this start."""
    stop, status = place / "STOP", place / "status.json"
    with contextlib.suppress(FileNotFoundError):
        if stop.stat().st_mtime <= status.stat().st_mtime:
            stop.unlink()


class Sample:
    """Random global batches of view 0, for what a method measures, from a pipeline of its own."""

    def __init__(self, job: Job, purpose: str) -> None:
        self.purpose, self.epoch, self.data = purpose, job.epoch, job.data.train
        self.bad = job.recorder.bad.copy(self.data)  # another thread may come upon more of them
        self.open = functools.partial(
            train_loader,
            job.config,
            job.method.comm,
            job.data,
            job.world.device,
            [0],
            self.bad,
            derive(job.config.run.seed, purpose, job.epoch),
        )
        self.device = job.world.device
        self.problem: str | None = None
        self._loader: TrainLoader | None = None
        self._read: list[Batch] = []

    @property
    def loader(self) -> TrainLoader:
        """Opened when it is first asked for."""
        self._loader = self._loader or self.open()
        return self._loader

    def read_ahead(self) -> Sample:
        """Have the first batch ready; in any thread."""
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)  # each thread has its own
        self._read = [self.next()]
        return self

    def next(self) -> Batch:
        """The next batch; black images once there is none, for the `problem`'s reason.

        The other processes do not know of it yet and would wait for this one.
        """
        if self._read:
            return self._read.pop()
        try:
            return next(self.loader)
        except UnreadableError as error:
            self.problem, size = str(error), self.loader.views[0].size
        images = self.loader.order.local_batch
        ids = torch.zeros(images, dtype=torch.long)
        black = torch.zeros(images, 3, size, size, device=self.device)
        return Batch([black], ids, ids.to(self.device))

    def close(self) -> None:
        """Let go of the pipeline."""
        if self._loader is not None:
            self._loader.close()


def look_ahead(job: Job) -> None:
    """Before the end of an epoch: begin to read what the method will measure after it."""
    left = (job.epoch + 1) * job.loader.steps_per_epoch - job.step
    if left > AHEAD or job.ahead is not None:
        return
    purpose = job.method.reads_after(job.epoch)
    if purpose is not None:
        job.ahead = beside(Sample(job, purpose).read_ahead)


def let_go(job: Job) -> None:
    """Close what was read ahead and nobody took, as soon as it is there."""
    ahead, job.ahead = job.ahead, None
    if ahead is not None:
        ahead.add_done_callback(lambda done: None if done.exception() else done.result().close())


def sample_of(job: Job, purpose: str) -> Sample:
    """The sample that was read ahead, or one from now on."""
    ahead = job.ahead
    if ahead is not None:
        sample = ahead.result()
        if (sample.purpose, sample.epoch) == (purpose, job.epoch):
            job.ahead = None
            return sample
    return Sample(job, purpose)


def context_of(job: Job) -> Context:
    """What a method sees of the run between epochs."""
    seed, epoch, comm = job.config.run.seed, job.epoch, job.method.comm

    def batches(count: int, purpose: str) -> Iterator[Batch]:
        sample = sample_of(job, purpose)
        try:
            count = min(count, sample.loader.steps_per_epoch)
            for number in range(1, count + 1):
                batch = sample.next()
                if number % TOGETHER == 0 or number == count:
                    stop_if_bad(job.world, sample.problem)
                yield batch
        finally:
            sample.close()
            job.recorder.bad.take(sample.bad, sample.data)

    def report(figures: dict[str, float]) -> None:
        job.latest.update(figures)
        # What each step's row says anyway would be a second point at this step.
        new = {n: v for n, v in figures.items() if n not in job.recorder.of_steps}
        job.recorder.row(job.step, new)

    return Context(comm, seed, epoch, job.config.optim.epochs, batches, report, job.recorder.tell)


# --- checkpoints -------------------------------------------------------------------------------


def save(
    job: Job, permanent: bool = False, best: float | None = None, *, insist: bool = False
) -> None:
    """Save on all ranks together; `best` is the score of the best epoch so far, if this is it.

    Rank 0 writes while training goes on; at a logging step, and before the next save, all ranks
    learn how it ended. A save that failed warns, keeps the older checkpoints, and is written again
    from then on at logging steps, unless a newer one takes its place; with `insist` the run waits,
    and tries again at once. `SaveError` after `checkpoint.max_failures` in a row.
    """
    job.recorder.flush()  # raises before a non-finite state can be saved
    began = time.perf_counter()
    settle(job)
    owed = job.unsaved or Save()
    owed.step, owed.epoch = job.step, job.epoch
    owed.permanent = owed.permanent or permanent
    owed.best = owed.best or best is not None
    job.best = job.best if best is None else best
    with job.watch.during("saving a checkpoint"):
        ranks = job.world.gather_objects(checkpoint.pack(rank_state(job)))
        if job.world.is_main:
            job.saver.start(whole_state(job, ranks or []), writer_of(job, owed))
    job.saving, job.unsaved = owed, None
    if insist:
        settle(job)
        while job.unsaved is not None:
            time.sleep(SAVE_AGAIN_S)
            save_again(job)
            settle(job)
    job.recorder.saved(time.perf_counter() - began)
    job.recorder.restart_clock()


def save_again(job: Job) -> None:
    """Write what could not be written once more, on all ranks together."""
    job.saving, job.unsaved = job.unsaved, None
    if job.world.is_main:
        job.saver.again()


def settle(job: Job, block: bool = True) -> None:
    """How the checkpoint that is being written ended, on all ranks together.

    Without `block` it may still be under way. Raises `SaveError` as `save` does.
    """
    if job.saving is None:
        return
    with job.watch.during("saving a checkpoint"):
        outcome = job.saver.outcome(block) if job.world.is_main else None
        outcome = job.world.broadcast_object(outcome)
    if outcome is None:
        return
    owed, job.saving = job.saving, None
    problem, lasting = outcome
    if lasting:
        raise SaveError(f"the checkpoint of step {owed.step} cannot be saved: {problem}")
    if not problem:
        if job.world.is_main:
            record_status([job.folder], "running", step=owed.step, epoch=owed.epoch)
        return
    owed.failures += 1
    job.unsaved = owed
    bound = job.config.checkpoint.max_failures
    if owed.failures >= bound:
        raise SaveError(
            f"checkpoint.max_failures: {bound} saves in a row failed, the last at step "
            f"{owed.step}: {problem}; the checkpoints there are can be continued with "
            "run.resume=auto"
        )
    if job.world.is_main:
        logger.warning(
            "checkpoint at step %d not saved (%d of %d failures that end the run), going on: %s",
            owed.step, owed.failures, bound, problem,
        )  # fmt: skip


def rank_state(job: Job) -> dict[str, Any]:
    """What each process has of its own: its place in the data and its random numbers."""
    state = {
        "loader": job.loader.state(),
        "torch_rng": torch.get_rng_state(),
        "python_rng": random.getstate(),
        "numpy_rng": numpy_rng(),
    }
    if job.world.device.type == "cuda":
        state["cuda_rng"] = torch.cuda.get_rng_state()
    return state


def whole_state(job: Job, ranks: list[bytes]) -> dict[str, Any]:
    """All that a checkpoint holds, on rank 0."""
    return {
        "model": job.learner.state_dict(),
        "optimizer": optim.state_by_name(job.optimizer),
        "scaler": job.scaler.state_dict(),
        "step": job.step,
        "epoch": job.epoch,
        "best": job.best,
        "first": job.first,
        "latest": job.latest,
        "metrics_offset": job.recorder.offset(),
        "of_steps": sorted(job.recorder.of_steps),
        "bad_images": job.recorder.bad_images(),
        "identity": folder.whole_identity(job.config, job.data),
        "code": job.code,
        "ranks": [torch.frombuffer(bytearray(own), dtype=torch.uint8) for own in ranks],
    }


def writer_of(job: Job, owed: Save) -> Callable[[dict[str, Any]], None]:
    """What writes the file, and what follows from it, in the saver's thread."""
    place, kept, world_size = job.folder, job.config.checkpoint.keep, job.world.size
    permanent, best, sync = owed.permanent, owed.best, job.recorder.sync

    def write(state: dict[str, Any]) -> None:
        try:
            sync()  # the rows of the steps that the checkpoint has done
        except OSError as error:
            raise CheckpointError(f"metrics.jsonl: {error.strerror}") from error
        path = checkpoint.save(
            place,
            state,
            step=state["step"],
            epoch=state["epoch"],
            identity=state["identity"],
            world_size=world_size,
            keep=kept,
            permanent=permanent,
        )
        if best:
            checkpoint.save_best(place, path)

    return write


def load(
    identity: dict[str, str], start: folder.Start
) -> tuple[dict[str, Any] | None, Path | None]:
    """The checkpoint to continue from, if there is one, checked to be of this experiment."""
    if start.checkpoint is None:
        return None, None
    state = checkpoint.load(start.checkpoint, sha256=start.sha256)
    folder.check_identity(identity, state["identity"], start.checkpoint)
    return state, start.checkpoint


def restore(job: Job, state: dict[str, Any], path: Path) -> None:
    """Continue from a checkpoint: weights, optimiser, random numbers, data, figures."""
    load_model(job.learner, state["model"])
    optim.load_state_by_name(job.optimizer, state["optimizer"])
    job.scaler.load_state_dict(state["scaler"])
    job.step, job.epoch, job.best = state["step"], state["epoch"], state["best"]
    job.first, job.latest = dict(state["first"]), dict(state["latest"])
    if job.world.is_main:
        job.recorder.restore_bad(state.get("bad_images", {}))
    job.recorder.of_steps = set(state.get("of_steps", ()))
    mine = folder.per_rank(state["ranks"], job.world.rank)
    warning = job.loader.load_state(mine["loader"], job.step)
    if warning and job.world.is_main:
        logger.warning("%s", warning)
    differing = checkpoint.compare_identity(state.get("code", {}), job.code)
    if job.world.is_main and differing:
        logger.warning("the code has changed, numbers may: %s", "; ".join(differing))
    if len(state["ranks"]) == job.world.size:
        torch.set_rng_state(mine["torch_rng"].cpu())
        random.setstate(mine["python_rng"])
        np.random.set_state(tuple(mine["numpy_rng"]))
        if "cuda_rng" in mine and job.world.device.type == "cuda":
            torch.cuda.set_rng_state(mine["cuda_rng"].cpu())
    job.recorder.tell(f"resumed from {path} at step {job.step}, epoch {job.epoch}")


def load_model(learner: Learner, state: dict[str, Any]) -> None:
    """Weights and state; the probe's only if the run has the same probe."""
    own = learner.state_dict()
    probe = {name for name in own.keys() | state.keys() if name.startswith("probe.")}
    state = {name: value for name, value in state.items() if name not in probe or name in own}
    state |= {name: own[name] for name in probe & own.keys() if name not in state}
    learner.load_state_dict(state)


def initial_weights(learner: Learner, config: Config) -> None:
    """`run.init_from`: the method's parameters and buffers, nothing of how far it was."""
    if config.run.init_from is None:
        return
    path = Path(config.run.init_from)
    theirs, own = checkpoint.load(path)["model"], learner.state_dict()
    ours = [n for n, v in own.items() if n.startswith("method.") and isinstance(v, Tensor)]
    wrong = [n for n in ours if n not in theirs or theirs[n].shape != own[n].shape]
    if wrong:
        raise ValueError(
            f"run.init_from: {path} does not fit this model: {len(wrong)} tensors are missing or "
            f"of another shape, the first is {wrong[0].removeprefix('method.')}"
        )
    learner.load_state_dict({**own, **{name: theirs[name] for name in ours}})


def numpy_rng() -> tuple[Any, ...]:
    """NumPy's global state as plain numbers, which load without executing anything."""
    kind, keys, *rest = np.random.get_state()
    return (kind, np.asarray(keys).tolist(), *rest)


# --- parts -------------------------------------------------------------------------------------


def gradient_norm(parameters: list[nn.Parameter], bound: float | None) -> Tensor:
    """Global norm of the gradients, clipped to `bound` if there is one; no synchronisation."""
    parameters = [p for p in parameters if p.grad is not None]
    limit = float("inf") if bound is None else bound
    if bound is not None:
        return torch.nn.utils.clip_grad_norm_(parameters, limit, foreach=True)
    return torch.nn.utils.get_total_norm([cast(Tensor, p.grad) for p in parameters], foreach=True)


def derive(seed: int, *names: object) -> int:
    """A seed of its own, of 31 bits, for each purpose."""
    return hashed(seed, *names, bits=32) >> 1


def require_bf16() -> None:
    """Raise `ValueError` if this GPU has no bfloat16."""
    if not torch.cuda.is_bf16_supported(including_emulation=False):
        raise ValueError("optim.precision: this GPU has no bf16; fp16 or fp32 would be accepted")


@contextlib.contextmanager
def warned(path: Path) -> Iterator[None]:
    """A file that cannot be written is a warning: what the run is for lies elsewhere."""
    try:
        yield
    except (OSError, RuntimeError) as error:  # torch.save reports a full disk as the latter
        logger.warning("%s cannot be written: %s", path, one_line(error))


def one_line(text: object) -> str:
    """Without line breaks."""
    return " ".join(str(text).split())


def together(world: World, action: Callable[[], T]) -> T:
    """Do something that may fail; if it fails on one rank, it fails on all, and none waits.

    What a user can mend (`ValueError`, `OSError`) becomes the same `ConfigError` on every rank,
    which rank 0 prints. Anything else is raised where it happened, and as a `ConfigError` that
    names the rank elsewhere.
    """
    result: T | None = None
    problem: str | None = None
    lasting = True
    unexpected: Exception | None = None
    try:
        result = action()
    except OSError as error:
        lasting = False
        problem = f"{error.filename}: {error.strerror}" if error.filename else one_line(error)
    except ValueError as error:
        problem = one_line(error)
    except Exception as error:
        unexpected, lasting = error, False
        problem = one_line(f"{type(error).__name__}: {error}")
    problems = world.gather_objects((problem, lasting)) or []
    failed = next(((r, *p) for r, p in enumerate(problems) if p[0] is not None), None)
    first = world.broadcast_object(failed)
    if unexpected is not None:
        raise unexpected
    if first is not None:
        rank, problem, lasting = first
        kind = ConfigError if lasting else BuildError
        raise kind(problem + (f" [rank {rank}]" if rank else ""))
    return cast(T, result)
