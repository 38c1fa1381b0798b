"""The state of a run: made for a checkpoint, and put back from one."""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ddp_ssl import optim
from ddp_ssl.checkpoint import store
from ddp_ssl.config import Config
from ddp_ssl.evals.weights import read_checkpoint
from ddp_ssl.methods._learner import Learner
from ddp_ssl.methods._momentum import MomentumMethod
from ddp_ssl.methods.base import Method
from ddp_ssl.run import folder
from ddp_ssl.run.identity import check_identity, compare_identity
from ddp_ssl.training.job import Job

logger = logging.getLogger("ddp_ssl")


def save(
    job: Job, permanent: bool = False, best: float | None = None, *, must_succeed: bool = False
) -> None:
    """Save on all ranks together; `best` is this epoch's score if it is the best so far.

    Raises `NonFiniteError` before a non-finite state is saved, and `SaveError` like
    `Checkpointer.save`.
    """
    job.recorder.flush()
    began = time.perf_counter()
    if best is not None:
        job.state.best = best
    with job.setting.watch.during("saving a checkpoint"):
        job.checkpointer.save(
            whole_state(job),
            rank_state(job),
            permanent=permanent,
            best=best is not None,
            must_succeed=must_succeed,
        )
    job.recorder.saved(time.perf_counter() - began)
    job.recorder.restart_clock()


def whole_state(job: Job) -> dict[str, Any]:
    """The state that all ranks share. Only rank 0 returns more than its step and epoch."""
    state, network = job.state, job.network
    if not job.world.is_main:
        return {"step": state.step, "epoch": state.epoch}
    offset, crc = job.recorder.offset()
    return {
        "model": network.learner.state_dict(),
        "optimizer": optim.state_by_name(network.optimizer),
        "scaler": network.scaler.state_dict(),
        "step": state.step,
        "epoch": state.epoch,
        "best": state.best,
        "first": state.first,
        "latest": state.latest,
        "metrics_offset": offset,
        "metrics_crc": crc,
        "of_steps": sorted(job.recorder.step_metrics),
        "bad_images": job.recorder.bad_images.state(),
    }


def rank_state(job: Job) -> dict[str, Any]:
    """The state of this rank alone: its place in the data and its random numbers."""
    kind, keys, *rest = np.random.get_state()  # as plain numbers, which load without code
    state = {
        "loader": job.loader.state(),
        "torch_rng": torch.get_rng_state(),
        "python_rng": random.getstate(),
        "numpy_rng": (kind, np.asarray(keys).tolist(), *rest),
    }
    if job.world.device.type == "cuda":
        state["cuda_rng"] = torch.cuda.get_rng_state()
    return state


def load(identity: dict[str, str], start: folder.Start) -> dict[str, Any] | None:
    """The checkpoint to continue from, if there is one, checked to be of this experiment."""
    if start.checkpoint is None:
        return None
    state = store.load(start.checkpoint, sha256=start.sha256)
    check_identity(identity, state["identity"], start.checkpoint)
    return state


def restore(job: Job, saved: dict[str, Any]) -> None:
    """Continue from a checkpoint: weights, optimiser, random numbers, data, metrics."""
    state, network = job.state, job.network
    load_model(network.learner, saved["model"])
    optim.load_state_by_name(network.optimizer, saved["optimizer"])
    network.scaler.load_state_dict(saved["scaler"])
    state.step, state.epoch, state.best = saved["step"], saved["epoch"], saved["best"]
    state.first, state.latest = dict(saved["first"]), dict(saved["latest"])
    if job.world.is_main:
        job.recorder.bad_images.restore(saved.get("bad_images", {}))
    job.recorder.step_metrics = set(saved.get("of_steps", ()))
    own = state_of_rank(saved["ranks"], job.world.rank)
    warning = job.loader.load_state(own["loader"], state.step)
    if warning:
        logger.warning("%s", warning)
    differing = compare_identity(saved.get("code", {}), job.checkpointer.origin["code"])
    if differing:
        logger.warning("the code has changed, numbers may: %s", "; ".join(differing))
    for change in changed_since(saved["identity"], network.learner.method, job.setting.config):
        logger.warning("the checkpoint is of an earlier version: from here on %s", change)
    if len(saved["ranks"]) == job.world.size:
        torch.set_rng_state(own["torch_rng"].cpu())
        random.setstate(own["python_rng"])
        np.random.set_state(tuple(own["numpy_rng"]))
        if "cuda_rng" in own and job.world.device.type == "cuda":
            torch.cuda.set_rng_state(own["cuda_rng"].cpu())


def changed_since(saved: Mapping[str, str], method: Method[Any], config: Config) -> list[str]:
    """What this run computes otherwise than the version that saved the identity `saved`."""
    if "optim.layer_decay" in saved:  # this setting came together with both changes
        return []
    from timm.layers.drop import DropPath

    decays = config.optim.name != "sgd" and config.optim.weight_decay > 0
    drops = any(isinstance(module, DropPath) for module in method.backbone.modules())
    changes = {
        "tokens and position embeddings are not decayed": (
            decays and len(optim.undecayed(method.backbone)) > 0
        ),
        "the momentum network drops no paths": isinstance(method, MomentumMethod) and drops,
    }
    return [change for change, holds in changes.items() if holds]


def state_of_rank(states: list[Any], rank: int) -> dict[str, Any]:
    """The state that `rank` saved; rank 0's, to compare with, if there were fewer ranks then."""
    own = states[rank] if rank < len(states) else states[0]
    if isinstance(own, dict):  # saved by a version that did not turn them into bytes
        return own
    return store.from_bytes(own.numpy().tobytes())


def load_model(learner: Learner, state: dict[str, Any]) -> None:
    """Load weights and state; the probe's only if the run has the same probe."""
    own = learner.state_dict()
    probe = {name for name in own.keys() | state.keys() if name.startswith("probe.")}
    state = {name: value for name, value in state.items() if name not in probe or name in own}
    state |= {name: own[name] for name in probe & own.keys() if name not in state}
    learner.load_state_dict(state)


def initial_weights(learner: Learner, config: Config) -> None:
    """`run.init_from`: load the method's parameters and buffers, and no training state."""
    if config.run.init_from is None:
        return
    path = Path(config.run.init_from)
    try:
        theirs, own = read_checkpoint(path)["model"], learner.state_dict()
    except ValueError as error:
        raise ValueError(f"run.init_from: {error}") from None
    ours = [n for n, v in own.items() if n.startswith("method.") and isinstance(v, Tensor)]
    wrong = [n for n in ours if getattr(theirs.get(n), "shape", None) != own[n].shape]
    if wrong:
        raise ValueError(
            f"run.init_from: {path} does not fit this model: {len(wrong)} tensors are missing or "
            f"of another shape, the first is {wrong[0].removeprefix('method.')}"
        )
    learner.load_state_dict({**own, **{name: theirs[name] for name in ours}})
    if learner.average is not None:
        learner.average.load_state_dict(learner.method.backbone.state_dict())
