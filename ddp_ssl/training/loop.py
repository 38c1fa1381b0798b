"""The training loop. It names no method: a method acts in its own hooks (`methods/base.py`)."""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor, nn

from ddp_ssl import optim
from ddp_ssl.distributed import StopFlag, comm_stats
from ddp_ssl.methods.base import Progress
from ddp_ssl.run.signals import StopRequest
from ddp_ssl.run.status import State
from ddp_ssl.training.epochs import end_of_epoch, is_due, validation_is_long
from ddp_ssl.training.first_step import FirstStep
from ddp_ssl.training.job import Job
from ddp_ssl.training.measurement import stop_if_bad
from ddp_ssl.training.profiler import Profiler
from ddp_ssl.training.state import save

OnStep = Callable[[Job], None]


def train(job: Job, stop: StopRequest, on_step: OnStep | None = None) -> State:
    """Train to the end or until asked to stop; returns `done` or `preempted`.

    `on_step` is called before every step, once its batch is there.
    """
    config, world, state = job.config, job.world, job.state
    recorder, watch, network = job.recorder, job.setting.watch, job.network
    method, optimizer, scaler = network.method, network.optimizer, network.scaler
    steps_per_epoch, epochs = job.loader.steps_per_epoch, config.optim.epochs
    total_steps, stop_file = steps_per_epoch * epochs, job.setting.folder / "STOP"
    parameters = [p for p in method.parameters() if p.requires_grad]
    stop_flag = StopFlag(world)
    first = FirstStep(job)
    profiler = Profiler(config, world, job.setting.folder)
    network.module.train()
    profiler.step(state.step)
    recorder.restart_clock()

    while state.epoch < epochs:
        end = (state.epoch + 1) * steps_per_epoch
        while state.step < end:
            watch.at(state.step, "waiting for data")
            network.learner.timing = recorder.begin_step(state.step + 1)
            with recorder.waiting():
                batch = next(job.loader)
            first.has_images()
            watch.at(state.step, "a step")
            recorder.saw(batch.ids)
            if on_step is not None:
                on_step(job)
            rate = optim.set_learning_rates(
                optimizer, config.optim, config.data.batch_size, state.step, steps_per_epoch
            )
            loss, metrics = network.module(batch)
            scaler.scale(loss).backward()
            comm_stats.gradients_reduced()
            scaler.unscale_(optimizer)
            progress = Progress(state.step, total_steps, state.epoch, epochs)
            method.before_optimizer(progress)
            norm = gradient_norm(parameters, config.optim.grad_clip)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad(set_to_none=True)
            network.learner.after_step(progress)
            state.step += 1
            first.is_done()
            job.measurement.prefetch(state.epoch, end - state.step)

            recorder.add(state.step, metrics | {"optim/lr": rate, "optim/grad_norm": norm})
            logging_step, last = recorder.logs(state.step), state.step == end
            if logging_step:
                recorder.flush(network.learner.timed)
            profiler.step(state.step)
            asked = stop.look_for(stop_file) if world.is_main else stop.reason is not None
            asked = asked or job.loader.failing is not None
            if stop_flag.now(asked) if last else stop_flag.exchange(asked):
                profiler.close()
                save(job, must_succeed=True)
                stop_flag.wait()
                stop_if_bad(world, job.loader.failing if stop.reason is None else None)
                return "preempted"
            if is_due(config.checkpoint.every_steps, state.step) and not last:
                save(job)
            elif logging_step:
                job.checkpointer.poll()
        if validation_is_long(job):
            save(job)
        best = end_of_epoch(job)
        state.epoch += 1
        done, permanent = state.epoch == epochs, is_due(config.checkpoint.keep_every, state.epoch)
        if done or permanent or best is not None or is_due(config.checkpoint.every, state.epoch):
            save(job, permanent, best, must_succeed=done)
    profiler.close()
    recorder.bad_images.check()  # those of the last validation
    stop_flag.wait()
    return "done"


def gradient_norm(parameters: list[nn.Parameter], bound: float | None) -> Tensor:
    """Global norm of the gradients, clipped to `bound` if there is one; no synchronisation."""
    parameters = [p for p in parameters if p.grad is not None]
    if bound is not None:
        return torch.nn.utils.clip_grad_norm_(parameters, bound, foreach=True)
    return torch.nn.utils.get_total_norm([cast(Tensor, p.grad) for p in parameters], foreach=True)
