"""Text and pictures for people: at a run's start, and its result."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator
from pathlib import Path

import torch
from PIL import Image
from torch import nn

from ddp_ssl.data.build import train_loader
from ddp_ssl.logs.picture import view_grid
from ddp_ssl.models import export, loading_snippet
from ddp_ssl.training.forecast import forecast
from ddp_ssl.training.job import Job
from ddp_ssl.training.verdict import ADVICE, FINE, verdict
from ddp_ssl.utils.files import replace_text, replaced, sync
from ddp_ssl.utils.launcher import cpu_share, layout_lines
from ddp_ssl.utils.text import markdown_lines, one_line

logger = logging.getLogger("ddp_ssl")


def describe(job: Job, threads: int, ranks: list[str]) -> None:
    """The method, the data, the processes and their places: lines at the start, on rank 0."""
    config, data, total = job.config, job.data, job.config.optim
    val = 0 if data.val is None else len(data.val)
    network = sum(p.numel() for p in job.network.method.parameters() if p.requires_grad)
    logger.info(
        f"{config.method.name} on {data.name}: {len(data.train)} images in "
        f"{data.num_classes or 'no'} classes, {val} for validation; {config.data.batch_size} "
        f"images x {config.num_views} views a step, {job.loader.steps_per_epoch} steps an epoch, "
        f"{total.epochs} epochs"
    )
    logger.info(
        f"{job.world.size} process(es) on {job.world.device.type}, {threads} thread(s) each; "
        f"{network / 1e6:.2f} M parameters; peak learning rate "
        f"{total.lr * config.data.batch_size / 256:g}; folder {job.setting.folder}"
    )
    if job.world.size > 1:
        logger.info(
            f"rendezvous {os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}; threads per "
            f"process: torch {threads}, DALI {config.data.threads or cpu_share()}, reading "
            f"{config.data.readers}, OMP_NUM_THREADS "
            f"{os.environ.get('OMP_NUM_THREADS', 'unset')}"
        )
    for line in layout_lines(ranks):
        logger.info("%s", line)
    on_cpu = job.world.device.type == "cpu"
    for line in forecast(config, job.loader.steps_per_epoch, on_cpu):
        logger.warning("%s", line)


def verdict_of(job: Job, ended: bool = False) -> str | None:
    """The verdict on the run so far: `training/verdict.py`. None during the warm-up.

    A healthy network may pass through few dimensions there: DINO's embeddings do on the digits.
    """
    images, config = 0 if job.data.val is None else len(job.data.val), job.setting.config
    if not ended and job.state.step < config.optim.warmup_epochs * job.loader.steps_per_epoch:
        return None
    # A network that had learned before may fall without having collapsed.
    trained = config.run.init_from or config.model.backbone_args.get("pretrained")
    return verdict(job.state.first, job.state.latest, images, ended and not trained)


def judge(job: Job) -> None:
    """After a validation: say that the run has collapsed, or no longer has, if that is new."""
    now, status = verdict_of(job), job.setting.status
    before, status.verdict = status.verdict, now
    if now is None or (now == FINE) == (before in (None, FINE)):
        return
    text = "it has recovered" if now == FINE else f"{now}; {ADVICE}"
    (logger.info if now == FINE else logger.warning)("step %d: %s", job.state.step, text)
    if job.world.is_main:
        status.record("running", step=job.state.step, epoch=job.state.epoch)


def picture(job: Job) -> None:
    """The views of some images as `views.png` and for the loggers, from a pipeline of its own."""
    views, bad = range(job.config.num_views), job.recorder.bad_images.found
    comm = job.network.method.comm
    loader = train_loader(job.config, comm, job.data, job.world.device, views, bad)
    image = view_grid(next(loader).views, *job.config.data.shown)
    loader.close()
    path = job.setting.folder / "views.png"
    with warned(path), replaced(path) as temporary:
        Image.fromarray(image).save(temporary, "PNG")
    job.recorder.image("data/views", image)


def finish(job: Job) -> None:
    """Export the backbone; print the result and how to load it."""
    if not job.world.is_main:
        return
    config, state, folder = job.config, job.state, job.setting.folder
    weights, average = folder / "backbone.pt", job.network.learner.average
    written: dict[Path, nn.Module] = {weights: job.network.method.backbone}
    if average is not None:
        written[folder / "backbone_ema.pt"] = average
    for path, network in written.items():
        with warned(path), replaced(path) as temporary:
            torch.save(export(network), temporary)
            sync(temporary)
    names = {
        "eval/knn_raw_pixels": "k-NN top-1, raw pixels",
        "eval/knn_top1": "k-NN top-1",
        "eval/knn_top1_ema": "k-NN top-1, average of weights",
        "eval/probe_top1": "online probe top-1",
        "rep/alpha": "alpha",
        "rep/effective_rank_z": "effective rank of z",
        "rep/effective_rank_r": "effective rank of r",
        "rep/mutual_information": "I(R;Z), nats",
        "rep/embedding_std": "embedding std",
    }
    rows = [
        ("", ""),
        ("run", str(folder)),
        ("method", config.method.name),
        ("steps", str(state.step)),
    ]
    for name, label in names.items():
        if name in state.latest:
            before = f"{state.first[name]:.4f} at step 0, " if name in state.first else ""
            rows.append(
                (label, f"{before}{state.latest[name]:.4f}" + (" at the end" if before else ""))
            )
    judged = verdict_of(job, ended=True)
    if judged is not None:
        rows.append(("verdict", judged))
    table = "\n".join(markdown_lines(rows))
    snippet = loading_snippet(config.model, config.data, weights)
    with warned(folder / "result.md"):
        replace_text(folder / "result.md", f"{table}\n\n```python\n{snippet}\n```\n")
    logger.info(f"\n{table}\n\nThe backbone, without ddp_ssl:\n\n{snippet}\n")
    if judged is not None and judged != FINE:
        logger.warning("%s; %s", judged, ADVICE)
    if config.data.name == "digits":
        logger.info(
            "These digits are easy: raw pixels classify as well. The run shows that everything "
            "works, from JPEG files to a learned representation. It does not show that the method "
            "is better than another."
        )


@contextlib.contextmanager
def warned(path: Path) -> Iterator[None]:
    """A file that cannot be written is a warning: the run needs none of them to go on."""
    try:
        yield
    except (OSError, RuntimeError) as error:  # torch.save reports a full disk as the latter
        logger.warning("%s cannot be written: %s", path, one_line(error))
