"""The run folder, and room for its checkpoints."""

import os
import time
from typing import Any

import torch

from ddp_ssl import optim
from ddp_ssl.checks.base import (
    Check,
    Context,
    Findings,
    fail,
    file_system,
    ok,
    room,
    scratch,
    size,
    warn,
)
from ddp_ssl.comm import ONE_PROCESS
from ddp_ssl.config import Config
from ddp_ssl.methods._learner import Learner
from ddp_ssl.methods._registry import make_method
from ddp_ssl.models import own_weights
from ddp_ssl.run import folder
from ddp_ssl.training.build import parameter_groups

WRITTEN = 32 << 20  # bytes of the file that is written to see how fast that goes
OF_A_RANK = 64 << 10  # bytes of a process's own state in a checkpoint: random numbers, DALI's blob
LONG_S = 60.0  # for one checkpoint


def choose_folder(ctx: Context, before: list[Any]) -> folder.Start | None:
    """Choose the run folder and the checkpoint to resume from; on rank 0."""
    return folder.choose(ctx.config) if ctx.world.is_main else None


def know_folder(ctx: Context, before: list[Any]) -> folder.Start | None:
    """Tell all processes the run folder."""
    if before[0] is not None:
        ctx.folder = before[0].folder
    mine: folder.Start | None = before[ctx.world.rank]
    return mine


def judge_folder(ctx: Context, facts: list[folder.Start | None]) -> Findings:
    start = facts[0]
    assert start is not None
    if start.checkpoint is not None:
        yield ok(f"{start.folder}, would go on from {start.checkpoint}")
    else:
        yield ok(f"{start.folder}, {'is there' if start.folder.exists() else 'would be made'}")


def checkpoint_bytes(config: Config, classes: int, world_size: int) -> int:
    """Approximate size of a checkpoint: model, optimiser, and the state of every process."""
    method = make_method(own_weights(config), ONE_PROCESS)
    learner = Learner(method, classes if config.eval.probe else 0)
    optimizer = optim.build(config.optim, parameter_groups(learner, config))
    copies = 2 if config.optim.name in ("adam", "adamw", "muon") else 1
    tensors = [v for v in learner.state_dict().values() if isinstance(v, torch.Tensor)]
    trained = [p for group in optimizer.param_groups for p in group["params"]]
    nbytes = sum(t.nbytes for t in tensors) + copies * sum(p.nbytes for p in trained)
    return int(nbytes) + world_size * OF_A_RANK


def checkpoint_count(config: Config) -> int:
    """Checkpoints that can exist at once: kept, kept for good, the best, one in writing."""
    every = config.checkpoint.keep_every
    permanent = config.optim.epochs // every if every else 0
    return config.checkpoint.keep + permanent + (config.checkpoint.best is not None) + 1


def look_at_disk(ctx: Context, before: list[Any]) -> dict[str, Any] | None:
    """Free space and the time of a write; on rank 0, which saves."""
    if not ctx.world.is_main:
        return None
    nbytes = checkpoint_bytes(
        ctx.config, 0 if ctx.data is None else ctx.data.num_classes, ctx.world.size
    )
    free, files = room(ctx.home)
    block = os.urandom(WRITTEN)  # a file system that compresses must not look faster than it is
    with scratch(ctx.home) as path, open(path, "wb") as file:
        start = time.perf_counter()
        file.write(block)
        file.flush()
        os.fsync(file.fileno())
        bulk = time.perf_counter() - start
        file.write(b"x")
        file.flush()
        start = time.perf_counter()
        os.fsync(file.fileno())
        sync = time.perf_counter() - start
    ctx.checkpoint_s = nbytes / WRITTEN * bulk
    return {"bytes": nbytes, "free": free, "files": files, "rate": WRITTEN / bulk, "sync": sync}


def judge_disk(ctx: Context, facts: list[dict[str, Any] | None]) -> Findings:
    fact = facts[0]
    assert fact is not None
    assert ctx.checkpoint_s is not None
    count = checkpoint_count(ctx.config)
    needed = count * fact["bytes"]
    text = f"{count} of about {size(fact['bytes'])} each need {size(needed)}"
    there = f"{size(fact['free'])} are free in {ctx.home} ({file_system(ctx.home)})"
    remedy = "another run.dir, fewer of checkpoint.keep, or a larger checkpoint.keep_every"
    if fact["free"] < needed:
        yield fail(f"{text}, {there}", remedy)
    elif fact["free"] < 2 * needed:
        yield warn(f"{text}, only {there}", remedy)
    else:
        yield ok(f"{text}, {there}; a quota is not seen here")
    if fact["files"] is not None and fact["files"] < 1000:
        text = f"only {fact['files']} more files can be made in {ctx.home}"
        yield fail(text, "another file system for run.dir (df -i)")
    rate = f"{size(fact['rate'])}/s, fsync {fact['sync'] * 1000:.0f} ms"
    if ctx.checkpoint_s > LONG_S:
        text = f"a checkpoint would take {ctx.checkpoint_s:.0f} s ({rate})"
        yield warn(text, "a faster run.dir, or fewer saves (checkpoint.every_steps)")
    else:
        yield ok(f"writing goes at {rate}: about {ctx.checkpoint_s:.2g} s for a checkpoint")


FOLDER = Check("run folder", (choose_folder, know_folder), judge_folder)
CHECKPOINTS = Check("checkpoints", (look_at_disk,), judge_disk)
