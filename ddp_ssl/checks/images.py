"""The data set: found, read and decoded as training does it."""

import contextlib
import itertools
import os
import shlex
import statistics
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from ddp_ssl import distributed
from ddp_ssl.checks.base import (
    Check,
    Context,
    Findings,
    by_value,
    existing,
    fail,
    file_system,
    ok,
    room,
    size,
    warn,
)
from ddp_ssl.config.section import is_url
from ddp_ssl.data.batch import Batch
from ddp_ssl.data.build import train_loader
from ddp_ssl.data.datasets import registry
from ddp_ssl.data.datasets.base import Dataset
from ddp_ssl.data.datasets.split import Split
from ddp_ssl.data.loading.bad_images import BadImages
from ddp_ssl.data.loading.decodable import Decoder, first_line, why, worth_trying
from ddp_ssl.data.loading.formats import Decoding
from ddp_ssl.evals.validation import Validation, central_crops
from ddp_ssl.utils.device_memory import held_by_others

SCAN_S = 1800.0  # for finding the images, at most (`examination.LONGEST_S` is the limit of all)
DECODED = 10  # images of each split
READ = 256  # files, at most
READ_S = 4.0  # seconds of reading, at most
PIPELINE_S = 4.0  # seconds of batches
SLOW_READ_S = 0.1  # for one file


def find_first(ctx: Context, before: list[Any]) -> None:
    """Rank 0 finds the images, and caches its listing of a large folder for the others."""
    if ctx.world.is_main:
        ctx.found = _load(ctx)


def find_all(ctx: Context, before: list[Any]) -> str:
    """Every process finds the images; returns a digest that must be the same everywhere."""
    ctx.found = ctx.found or _load(ctx)
    val = ctx.found.val
    return f"{ctx.found.train.digest} {'' if val is None else val.digest}"


def keep(ctx: Context, before: list[Any]) -> str:
    """All processes have found the images: other checks may use them."""
    ctx.data = ctx.found
    digest: str = before[ctx.world.rank]
    return digest


def _load(ctx: Context) -> Dataset:
    # Shards stay where they are: copying them to the node would take longer than all checks.
    return registry.load(ctx.config.data.model_copy(update={"stage": None}), ctx.config.run.seed)


def judge_found(ctx: Context, facts: list[str]) -> Findings:
    assert ctx.data is not None
    train, val = ctx.data.train, ctx.data.val
    others = [rank for rank, fact in enumerate(facts) if fact != facts[0]]
    if others:
        text = f"{ctx.who(others)} see other images than rank 0"
        yield fail(text, "data.root with the same files on every host")
    if len(train) < ctx.config.data.batch_size:
        text = f"{len(train)} training images, and data.batch_size={ctx.config.data.batch_size}"
        yield fail(text, f"a batch of {len(train)} or less")
    elif not others:
        yield ok(
            f"{ctx.data.name}: {len(train):,} training and {len(val) if val else 0:,} "
            f"validation images, {ctx.data.num_classes or 'no'} classes, {_where(train)}"
        )
    stage = ctx.config.data.stage
    if stage and train.shards is not None:
        packed = [split.shards for split in (train, val) if split is not None]
        needed = sum(int(shards.size.sum()) for shards in packed if shards is not None)
        if ctx.config.data.stage_gb is not None:
            needed = min(needed, int(ctx.config.data.stage_gb * 1e9))
        place = existing(Path(stage))
        free, _ = room(place)
        text = f"data.stage: {size(needed)} are to be copied, {size(free)} are free in {place}"
        yield ok(text) if free > 1.05 * needed else fail(text, "another data.stage, or none")


def _where(split: Split) -> str:
    if split.images is not None:
        return "in memory"
    if split.roots:
        return f"files in {', '.join(split.roots)}"
    kind, folder = "files", Path(split.root)
    if split.shards is not None:
        kind = split.shards.kind
        place = os.path.dirname(split.shards.paths[0])
        if is_url(place):
            return f"{kind} in {place}"
        folder = Path(place)
    return f"{kind} in {folder} ({file_system(folder)})"


class Reading(NamedTuple):
    """Times of reading some files."""

    files: int
    nbytes: int
    seconds: float
    median: float
    problem: str | None


def read_some(ctx: Context, before: list[Any]) -> Reading | None:
    """Read random files with the run's threads, different ones on every process."""
    if ctx.data is None or ctx.data.train.images is not None:
        return None
    split, rank = ctx.data.train, ctx.world.rank
    some = np.random.default_rng(rank).permutation(len(split))[:READ]
    deadline = time.perf_counter() + READ_S

    def read(i: int) -> tuple[int, float] | str | None:
        if time.perf_counter() > deadline:
            return None
        forget(split, i)
        start = time.perf_counter()
        try:
            return len(split.read(i)), time.perf_counter() - start
        except OSError as error:
            return f"{split.where(i)}: {first_line(error)}"

    start = time.perf_counter()
    with ThreadPoolExecutor(ctx.config.data.readers) as pool:
        results = list(pool.map(read, map(int, some)))
    seconds = time.perf_counter() - start
    done = [r for r in results if isinstance(r, tuple)]
    problem = next((r for r in results if isinstance(r, str)), None)
    median = statistics.median(s for _, s in done) if done else 0.0
    return Reading(len(done), sum(n for n, _ in done), seconds, median, problem)


def forget(split: Split, i: int) -> None:
    """Ask the kernel to drop a file from memory, so that it is read from the file system."""
    if split.shards is None:
        file = os.open(split.path(i), os.O_RDONLY)
        try:
            os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(file)


def judge_read(ctx: Context, facts: list[Reading | None]) -> Findings:
    if ctx.data is None:
        return  # said already
    read = [fact for fact in facts if fact is not None]
    if not read:
        yield ok("in memory: no files to read one by one")
        return
    for rank, fact in enumerate(read):
        if fact.problem:
            yield fail(f"{ctx.who([rank])} cannot read {fact.problem}", _check_data(ctx))
            return
    files = sum(fact.files / fact.seconds for fact in read)
    rate = sum(fact.nbytes / fact.seconds for fact in read)
    median = max(fact.median for fact in read)
    text = (
        f"{files:.0f} files/s, {size(rate)}/s with {ctx.world.size} x "
        f"{ctx.config.data.readers} threads, {median * 1000:.2g} ms a file"
    )
    if median > SLOW_READ_S:
        yield warn(text, "ddp-ssl pack-shards, data.stage, or more data.read_threads")
    else:
        yield ok(text)


class Decoded(NamedTuple):
    """Result of decoding images on this process."""

    tried: int
    bad: tuple[str, ...]
    rate: float  # images per second, of which all views are made
    gpu_bytes: tuple[int, int] | None = None
    """Memory that DALI takes on the GPU: in training, and at most with one more pipeline."""


def know_place(ctx: Context, before: list[Any]) -> None:
    """Find which part of a batch is made here; all processes form the view groups together."""
    if ctx.device.type == "cuda":
        ctx.gpu_bytes = held_by_others(ctx.device)
    ctx.comm = distributed.comm_of(ctx.world, ctx.config.data.view_shards)


def decode_some(ctx: Context, before: list[Any]) -> tuple[int, list[str]]:
    """Decode ten images of each split, one by one; returns their number and the bad ones."""
    config, tried, bad = ctx.config.data, 0, list[str]()
    index = ctx.device.index if ctx.device.type == "cuda" else None
    decoder = Decoder(index, Decoding(config.hw_decoder_load, config.preallocate))
    for split in () if ctx.data is None else (ctx.data.train, ctx.data.val):
        if split is None or split.images is not None:
            continue
        for i in np.linspace(0, len(split) - 1, min(DECODED, len(split)), dtype=np.int64):
            tried += 1
            try:
                encoded = split.read(int(i))
                # The decoder prints lines about files that are no images.
                problem = None if worth_trying(encoded) else why(encoded)
                problem = problem or decoder.problem(encoded)
            except OSError as error:
                problem = first_line(error)
            if problem is not None:
                bad.append(f"{split.where(int(i))}: {problem}")
    return tried, bad


def start_pipeline(ctx: Context, before: list[Any]) -> tuple[int, list[str]]:
    """Start the run's own pipeline and take the batches that it prepares ahead."""
    if ctx.data is not None:
        held = range(ctx.config.num_views)[ctx.comm.views]
        ctx.bad = BadImages()
        loader = train_loader(ctx.config, ctx.comm, ctx.data, ctx.device, held, ctx.bad)
        ctx.cleanup.callback(loader.close)
        for _ in range(1 + ctx.config.data.prefetch):
            next(loader)
        ctx.loader = loader
    mine: tuple[int, list[str]] = before[ctx.world.rank]
    return mine


def time_pipeline(ctx: Context, before: list[Any]) -> Decoded | None:
    """Images per second of the pipeline, while it runs on all processes."""
    if ctx.data is None or ctx.loader is None or ctx.bad is None:
        return None
    done, start = 0, time.perf_counter()
    while done == 0 or time.perf_counter() - start < PIPELINE_S:
        done += len(next(ctx.loader).ids)
        if ctx.device.type == "cuda":
            torch.cuda.synchronize(ctx.device)
    rate = done / (time.perf_counter() - start) / ctx.config.data.view_shards
    tried, bad = before[ctx.world.rank]
    replaced = [f"{where}: {reason}" for where, reason in ctx.bad.known.items()]
    return Decoded(tried, tuple(dict.fromkeys(bad + replaced)), rate, memory_of_pipelines(ctx))


def memory_of_pipelines(ctx: Context) -> tuple[int, int] | None:
    """`Decoded.gpu_bytes`; None on a CPU. Training's pipeline is running.

    A run opens others beside it, one at a time: for a method's measurement, to validate, and for
    the views of `measure.views`.
    """
    if ctx.device.type != "cuda" or ctx.data is None or ctx.bad is None:
        return None
    config, val, bad = ctx.config, ctx.data.val, ctx.bad

    def held() -> int:
        return held_by_others(ctx.device) - ctx.gpu_bytes

    def peak(loader: Iterable[Batch]) -> int:
        return max(held() for _ in itertools.islice(loader, 1 + config.data.prefetch))

    alone = held()
    measuring = train_loader(config, ctx.comm, ctx.data, ctx.device, [0], bad)
    with contextlib.closing(measuring):
        most = max(alone, peak(measuring))
    if val is not None:
        crops = central_crops(val, np.arange(len(val)), config, ctx.comm, ctx.device, bad)
        most = max(most, peak(crops))
    if val is not None and config.measure.views:
        drawn, _ = Validation(ctx.data, config, ctx.comm, ctx.device, bad).view_loader()
        with contextlib.closing(drawn):
            most = max(most, peak(drawn))
    return alone, most


def judge_decoded(ctx: Context, facts: list[Decoded | None]) -> Findings:
    decoded = [fact for fact in facts if fact is not None]
    if not decoded:
        return  # said already
    bad = by_value([name for fact in decoded for name in fact.bad])
    if bad:
        shown = "; ".join(list(bad)[:3]) + ("; ..." if len(bad) > 3 else "")
        yield fail(f"{len(bad)} bad image(s): {shown}", _check_data(ctx))
    rate, slowest = sum(fact.rate for fact in decoded), min(fact.rate for fact in decoded)
    tried = f"{decoded[0].tried} images decode; " if decoded[0].tried and not bad else ""
    yield ok(
        f"{tried}the pipeline makes {ctx.config.num_views} views of {rate:.0f} images/s "
        f"(at least {slowest * ctx.config.data.view_shards:.0f} a process)"
    )
    held = [fact.gpu_bytes for fact in decoded if fact.gpu_bytes is not None]
    if held:
        alone, most = (max(numbers) for numbers in zip(*held, strict=True))
        yield ok(
            f"DALI takes {size(alone)} of a GPU in training, and up to {size(most)} while a "
            "validation or a measurement runs"
        )


def _check_data(ctx: Context) -> str:
    given = shlex.join(a for a in ctx.arguments if not a.startswith("run."))
    return f"ddp-ssl check-data {given} finds all; data.skip leaves them out"


CHECKS = (
    # As long as a run would wait: a large folder is scanned here for the first time.
    Check("data", (find_first, find_all, keep), judge_found, SCAN_S),
    Check("reading", (read_some,), judge_read),
    Check("decoding", (know_place, decode_some, start_pipeline, time_pipeline), judge_decoded),
)
