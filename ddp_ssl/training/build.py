"""Building a run: find the data, claim the folder, make the parts, load the checkpoint."""

from __future__ import annotations

import copy
import logging
import random
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import nn

from ddp_ssl import distributed, optim
from ddp_ssl.comm import Comm
from ddp_ssl.config import Config, Resolved
from ddp_ssl.config.views import views_of
from ddp_ssl.data.batch import Batch
from ddp_ssl.data.build import load_data, train_loader
from ddp_ssl.data.datasets import registry
from ddp_ssl.data.datasets.base import Dataset
from ddp_ssl.data.loading.bad_images import BadImages
from ddp_ssl.distributed import World
from ddp_ssl.distributed.agreement import on_all_ranks, on_rank_0
from ddp_ssl.evals.validation import Validation
from ddp_ssl.logs import console
from ddp_ssl.logs.loggers import Logger, load_loggers
from ddp_ssl.logs.writer import MetricsWriter
from ddp_ssl.methods._learner import Learner
from ddp_ssl.methods._registry import make_method
from ddp_ssl.methods.base import trainable
from ddp_ssl.models import channels, own_weights
from ddp_ssl.run import environment, folder
from ddp_ssl.run.identity import identity, whole_identity
from ddp_ssl.run.status import RunStatus
from ddp_ssl.run.watchdog import Watchdog
from ddp_ssl.training import epochs, report
from ddp_ssl.training.bad_images import BadImageList
from ddp_ssl.training.checkpointer import Checkpointer
from ddp_ssl.training.job import Job, Network, Setting
from ddp_ssl.training.measurement import Measurement
from ddp_ssl.training.rank_skew import RankSkew
from ddp_ssl.training.recorder import Recorder
from ddp_ssl.training.state import initial_weights, load, restore
from ddp_ssl.utils.launcher import cpu_share, restarts
from ddp_ssl.utils.seeds import derive

logger = logging.getLogger("ddp_ssl")


def build(
    resolved: Resolved,
    world: World,
    watch: Watchdog,
    status: RunStatus,
    stopped: Callable[[], bool] = lambda: False,
) -> Job:
    """Make all parts of a run, and begin it or continue from its checkpoint.

    `status` gets the claim of the folder at once, and the folder when the parts have been made.
    `stopped`: whether the run was asked to stop. Raises `ConfigError` on all ranks.
    """
    config, device = resolved.config, world.device
    agree(config, world)
    threads = config.run.threads or cpu_share()
    torch.set_num_threads(threads)
    torch.backends.cudnn.benchmark = True  # the image sizes never change
    if device.type == "cuda":
        set_float32_products(config.optim.precision)
    if config.optim.precision == "bf16" and device.type == "cuda":
        on_all_ranks(world, require_bf16)
    watch.next("finding the data")
    on_all_ranks(world, lambda: registry.find(config.data))
    loggers = on_all_ranks(world, lambda: load_loggers(config.log.to) if world.is_main else {})
    watch.next("waiting for the run folder")
    start = claim_folder(config, world, status, stopped)
    comm = distributed.comm_of(world, config.data.view_shards)
    torch.manual_seed(config.run.seed)  # the same weights on every rank
    begun = config if start.checkpoint is None else own_weights(config)
    method = on_all_ranks(world, lambda: make_method(begun, comm))
    watch.next("copying the data to the node")
    on_all_ranks(world, lambda: registry.stage(config.data))
    watch.next("reading the data set")
    data = load_data(config, world)
    watch.next("building the run")
    bad, held = BadImages(), range(config.num_views)[comm.views]
    loader = on_all_ranks(
        world,
        lambda: train_loader(config, comm, data, device, held, bad, agree=comm.view_union),
    )
    learner = Learner(
        method,
        data.num_classes if config.eval.probe else 0,
        some_unlabelled=bool((data.train.labels < 0).any()),
    )
    on_all_ranks(world, lambda: initial_weights(learner, config))
    module = on_device(learner, config, world)  # the optimiser's kernels depend on the device
    groups, backbone = parameter_groups(learner, config), learner.method.backbone
    optimizer = on_all_ranks(world, lambda: optim.build(config.optim, groups, backbone))
    own = whole_identity(config, data)
    watch.next("loading the checkpoint")
    saved = on_all_ranks(world, lambda: load(own, start))
    watch.next("building the run")
    # An error before leaves no trace: the claim and the folder made for it go with the run.
    on_rank_0(world, lambda: folder.create(start.folder))
    status.begin(start.folder)
    console.setup_logging(start.folder, world.rank)

    validation = None
    if data.val is not None and len(data.val):
        validation = Validation(data, config, comm, device, bad)
    scaler = torch.amp.GradScaler(device.type, enabled=config.optim.precision == "fp16")
    network = Network(learner, module, optimizer, scaler)
    if world.size > 1:
        warm_up(module, learner, config, comm, device)
    ranks = distributed.layout(world)
    continued = saved if start.same_folder else None
    writer = on_all_ranks(
        world,
        lambda: open_folder(resolved, start, ranks, continued, loggers) if world.is_main else None,
    )
    bad_images = BadImageList(
        bad, images_of(data), config.data.max_bad_fraction, world, start.folder / "bad_images.txt"
    )
    skew = RankSkew(world, [text.partition(" ")[0] for text in ranks])
    recorder = Recorder(config, world, loader.steps_per_epoch, writer, bad_images, skew)
    measurement = Measurement(method, config, world, data, bad)
    code = environment.code_version() if world.is_main else {}
    checkpointer = Checkpointer(
        start.folder, config.checkpoint, world, watch, status, recorder.sync,
        {"identity": own, "code": code},
    )  # fmt: skip
    job = Job(
        Setting(config, world, start.folder, watch, status), data, network, loader, validation,
        recorder, measurement, checkpointer,
    )  # fmt: skip
    try:
        report.describe(job, threads, ranks)
        begin(job, start, saved)
    except BaseException:
        recorder.close()
        raise
    return job


def begin(job: Job, start: folder.Start, saved: dict[str, Any] | None) -> None:
    """Begin the run, or go on from the checkpoint `saved`."""
    world, done, status = job.world, job.state, job.setting.status
    for seed_all in (torch.manual_seed, random.seed, np.random.seed):
        seed_all(derive(job.setting.config.run.seed, "rank", world.rank))
    if saved is None:
        epochs.begin(job)
        return
    on_all_ranks(world, lambda: restore(job, saved))
    logger.info(f"resumed from {start.checkpoint} at step {done.step}, epoch {done.epoch}")
    status.verdict = report.verdict_of(job)
    if world.is_main:
        status.record("running", step=done.step)


def agree(config: Config, world: World) -> None:
    """Raise `ConfigError` unless all processes have the same settings.

    A preset depends on the machine and on the images that it sees.
    """
    mine = identity(config)
    first = world.broadcast_object(mine if world.is_main else None)

    def compare() -> None:
        for key, value in mine.items():
            if value != first.get(key):
                raise ValueError(
                    f"{key}: {value} here and {first.get(key)} on rank 0; one value for all "
                    f"processes is accepted, such as {key}={first.get(key)}"
                )

    on_all_ranks(world, compare)


def set_float32_products(precision: str) -> None:
    """TF32 on a GPU for `tf32`, none for `fp32`; other runs keep the process's own choice."""
    if precision in ("tf32", "fp32"):
        torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")


def require_bf16() -> None:
    """Raise `ValueError` if this GPU has no bfloat16."""
    if not torch.cuda.is_bf16_supported(including_emulation=False):
        raise ValueError("optim.precision: this GPU has no bf16; fp16 or fp32 would be accepted")


def claim_folder(
    config: Config, world: World, status: RunStatus, stopped: Callable[[], bool]
) -> folder.Start:
    """The run folder, which rank 0 claims, and the starting point that it chose."""
    # On several nodes each of torchrun's agents counts its own restarts.
    restarted = max(count for (count,) in world.gather_numbers([restarts()])) > 0

    def claim() -> folder.Start:
        start, status.claim = folder.claim(config, restarted, stopped)
        return start

    return on_rank_0(world, claim)


def open_folder(
    resolved: Resolved,
    start: folder.Start,
    ranks: list[str],
    continued: dict[str, Any] | None,
    loggers: Mapping[str, type[Logger]],
) -> MetricsWriter:
    """Write the files about the run, and open its metrics, which go on after `continued`."""
    step = None if continued is None else continued["step"]
    folder.write_about(start.folder, resolved.to_yaml(), ranks, step or 0)
    writer = MetricsWriter(
        start.folder,
        resumed_step=step,
        offset=0 if continued is None else continued["metrics_offset"],
        crc=None if continued is None else continued.get("metrics_crc"),
        loggers=loggers,
        config=resolved.config.model_dump(mode="json"),
    )
    writer.loggers.text("config", f"```yaml\n{resolved.to_yaml()}```", step or 0)
    return writer


def images_of(data: Dataset) -> int:
    """Number of images that a run reads."""
    parts = (max(data.train, data.labelled or data.train, key=len), data.val)
    return sum(len(part) for part in parts if part is not None)


def on_device(learner: Learner, config: Config, world: World) -> nn.Module:
    """The learner on its device, in its memory format, under DDP."""
    learner.to(world.device)
    if config.model.channels_last:
        learner.to(memory_format=torch.channels_last)
    return distributed.data_parallel(learner, world, config.optim.gradient_compression)


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
        torch.rand(images, channels(config.model), v.size, v.size, device=device).contiguous(
            memory_format=torch.channels_last
        )
        for v in views_of(config.data.views)[comm.views]
    ]
    labels = torch.zeros(images, dtype=torch.long, device=device)
    module.train()
    module(Batch(views, torch.zeros(images, dtype=torch.long), labels))[0].backward()
    module.zero_grad(set_to_none=True)
    learner.load_state_dict(saved)
