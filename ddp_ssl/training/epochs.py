"""Step 0 and the ends of epochs: the method's own measurements, and the validation."""

from __future__ import annotations

import logging
import math
import time

from ddp_ssl.training import report
from ddp_ssl.training.job import Job

logger = logging.getLogger("ddp_ssl")

LONG_S = 30.0  # seconds of a validation that is worth a checkpoint before it


def is_due(every: int, count: int) -> bool:
    """Whether something that happens every `every` times is due; 0: never."""
    return bool(every and count % every == 0)


def begin(job: Job) -> None:
    """A fresh start: the metrics at step 0, and a picture of the views."""
    config, recorder, method = job.config, job.recorder, job.network.method
    if job.world.is_main:
        recorder.bad_images.restore({})  # of an earlier start that came to no checkpoint
    if config.run.init_from is not None:
        logger.info(f"weights from {config.run.init_from}")
    with job.setting.watch.during("the method's start"):
        log_measured(job, job.measurement.call(method.on_start, job.state.epoch))
    method.train()
    if config.eval.raw_pixels and job.validation is not None and job.validation.labelled:
        accuracy = job.validation.raw_pixels()
        if accuracy is not None:
            job.state.latest |= {"eval/knn_raw_pixels": accuracy}
            recorder.row(0, {"eval/knn_raw_pixels": accuracy})
            logger.info(f"k-NN top-1 of the raw pixels: {accuracy:.4f}")
    metrics = evaluate(job, accuracy=True, measure=True)
    recorder.bad_images.check()
    best = config.checkpoint.best
    if best is not None and metrics and best.lstrip("-") not in metrics and job.data.labelled:
        logger.info(
            f"checkpoint.best: {best} is not measured here, so no best checkpoint is kept; "
            f"measured are {', '.join(name for name in metrics if not name.startswith('perf/'))}"
        )
    if job.world.is_main:
        report.picture(job)


def end_of_epoch(job: Job) -> float | None:
    """Measure and validate before the epoch counts as done; the score if it is the best so far."""
    job.recorder.flush()
    method, config, done = job.network.method, job.config, job.state.epoch + 1
    with job.setting.watch.during("the method's measurement between epochs"):
        log_measured(job, job.measurement.call(method.after_epoch, job.state.epoch))
    method.train()
    last = done == config.optim.epochs
    metrics = evaluate(
        job,
        last or is_due(config.eval.every, done),
        last or is_due(config.measure.every, done),
    )
    job.recorder.restart_clock()
    return best_score(job, metrics)


def log_measured(job: Job, metrics: dict[str, float]) -> None:
    """Log the metrics that a method reports between epochs."""
    if metrics:
        job.state.latest.update(metrics)
        # Each step's row has these already; they would be a second point at this step.
        new = {n: v for n, v in metrics.items() if n not in job.recorder.step_metrics}
        job.recorder.row(job.state.step, new)


def validation_is_long(job: Job) -> bool:
    """Whether a validation is due that took long the last time or reads from an object store.

    A checkpoint comes first, since a store may be away in the middle of it.
    """
    seconds = job.state.latest.get("perf/validation_s", 0.0)
    done, config = job.state.epoch + 1, job.config
    due = is_due(config.eval.every, done) or is_due(config.measure.every, done)
    return due and bool(job.world.broadcast_object(seconds > LONG_S or config.data.is_far))


def best_score(job: Job, metrics: dict[str, float]) -> float | None:
    """This epoch's value of `checkpoint.best`, if it beats all before; higher is better."""
    name = job.config.checkpoint.best or ""
    value = metrics.get(name.lstrip("-"))
    if value is None or not math.isfinite(value):
        return None
    score, best = -value if name.startswith("-") else value, job.state.best
    return score if best is None or score > best else None


def evaluate(job: Job, accuracy: bool, measure: bool) -> dict[str, float]:
    """The validation metrics that are due, on all processes."""
    state, learner = job.state, job.network.learner
    if job.validation is None or not (accuracy or measure):
        return {}
    start = time.perf_counter()
    with job.setting.watch.during("validation"):
        metrics = job.validation.metrics(
            learner.method, learner.probe, accuracy, measure, learner.average
        )
    metrics["perf/validation_s"] = time.perf_counter() - start
    if measure:
        metrics["perf/measure_s"] = job.validation.measure_s
        for space, shares in job.validation.spectra.items():
            job.recorder.spectrum(state.step, space, shares)
    state.first = state.first or metrics
    state.latest |= metrics
    job.recorder.row(state.step, metrics)
    names = (
        "eval/knn_top1", "eval/knn_top1_ema", "eval/probe_top1", "rep/effective_rank_r",
        "rep/effective_rank_z",
    )  # fmt: skip
    shown = [f"{n.partition('/')[2]} {metrics[n]:.4g}" for n in names if n in metrics]
    if "eval/knn_bank" in metrics:
        shown.append(f"(bank of {metrics['eval/knn_bank']:.0f} images)")
    logger.info(f"validation at step {state.step}: {'  '.join(shown)}")
    report.judge(job)
    return metrics
