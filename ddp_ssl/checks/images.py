"""The data set: found, read and decoded as training does it."""

from __future__ import annotations

import os
import shlex
import statistics
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from ddp_ssl import distributed
from ddp_ssl.checks.base import Bench, Check, Finding, by_value, fail, file_system, ok, size, warn
from ddp_ssl.data import datasets
from ddp_ssl.data.augment import Decoding
from ddp_ssl.data.manifest import Split
from ddp_ssl.data.source import BadImages
from ddp_ssl.data.verify import Decoder, first_line, why, worth_trying
from ddp_ssl.engine import train_loader

SCAN_S = 1800.0  # for finding the images, at most (`doctor.LONGEST_S` is the limit of all)
DECODED = 10  # images of each split
READ = 256  # files, at most
READ_S = 4.0  # seconds of reading, at most
PIPELINE_S = 4.0  # seconds of batches
SLOW_READ_S = 0.1  # for one file


# --- found ---------------------------------------------------------------------------------------


def find_first(bench: Bench, before: list[Any]) -> None:
    """Rank 0 finds the images, and keeps what it found of a large folder for the others."""
    if bench.world.is_main:
        bench.found = _load(bench)


def find_all(bench: Bench, before: list[Any]) -> str:
    """Every process finds them; what must be the same everywhere."""
    bench.found = bench.found or _load(bench)
    val = bench.found.val
    return f"{bench.found.train.digest} {'' if val is None else val.digest}"


def keep(bench: Bench, before: list[Any]) -> str:
    """All have found them: other checks may use them."""
    bench.data = bench.found
    digest: str = before[bench.world.rank]
    return digest


def _load(bench: Bench) -> datasets.Dataset:
    # Shards stay where they are: copying them to the node would take longer than all checks.
    return datasets.load(
        bench.config.data.model_copy(update={"stage": None}), bench.config.run.seed
    )


def judge_found(bench: Bench, facts: list[str]) -> Iterator[Finding]:
    assert bench.data is not None
    train, val = bench.data.train, bench.data.val
    others = [rank for rank, fact in enumerate(facts) if fact != facts[0]]
    if others:
        text = f"{bench.who(others)} see other images than rank 0"
        yield fail(text, "data.root with the same files on every host")
    if len(train) < bench.config.data.batch_size:
        text = f"{len(train)} training images, and data.batch_size={bench.config.data.batch_size}"
        yield fail(text, f"a batch of {len(train)} or less")
    elif not others:
        yield ok(
            f"{bench.data.name}: {len(train):,} training and {len(val) if val else 0:,} validation "
            f"images, {bench.data.num_classes or 'no'} classes, {_where(train)}"
        )
    stage = bench.config.data.stage
    if stage and train.shards is not None:
        needed = int(train.shards.size.sum()) + (
            int(val.shards.size.sum()) if val is not None and val.shards is not None else 0
        )
        place = next(p for p in (Path(stage).absolute(), *Path(stage).absolute().parents)
                     if p.is_dir())  # fmt: skip
        disk = os.statvfs(place)
        free = disk.f_bavail * disk.f_frsize
        text = f"data.stage: {size(needed)} are to be copied, {size(free)} are free in {place}"
        yield ok(text) if free > 1.05 * needed else fail(text, "another data.stage, or none")


def _where(split: Split) -> str:
    if split.images is not None:
        return "in memory"
    kind = "shards" if split.shards is not None else "files"
    return f"{kind} in {split.root} ({file_system(Path(split.root))})"


# --- read ----------------------------------------------------------------------------------------


class Reading(NamedTuple):
    """What reading some files took."""

    files: int
    nbytes: int
    seconds: float
    median: float
    problem: str | None


def read_some(bench: Bench, before: list[Any]) -> Reading | None:
    """Read files at random places with the run's threads, other ones on every process."""
    if bench.data is None or bench.data.train.images is not None or bench.config.data.url:
        return None
    split, rank = bench.data.train, bench.world.rank
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
    with ThreadPoolExecutor(bench.config.data.read_threads) as pool:
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


def judge_read(bench: Bench, facts: list[Reading | None]) -> Iterator[Finding]:
    if bench.data is None:
        return  # said already
    read = [fact for fact in facts if fact is not None]
    if not read:
        where = "a URL: read by the pipeline alone" if bench.config.data.url else "in memory"
        yield ok(f"{where}: no files to read one by one")
        return
    for rank, fact in enumerate(read):
        if fact.problem:
            yield fail(f"{bench.who([rank])} cannot read {fact.problem}", _check_data(bench))
            return
    files = sum(fact.files / fact.seconds for fact in read)
    rate = sum(fact.nbytes / fact.seconds for fact in read)
    median = max(fact.median for fact in read)
    text = (
        f"{files:.0f} files/s, {size(rate)}/s with {bench.world.size} x "
        f"{bench.config.data.read_threads} threads, {median * 1000:.2g} ms a file"
    )
    if median > SLOW_READ_S:
        yield warn(text, "ddp-ssl pack-shards, data.stage, or more data.read_threads")
    else:
        yield ok(text)


# --- decoded -------------------------------------------------------------------------------------


class Decoded(NamedTuple):
    """What became of the images here."""

    tried: int
    bad: tuple[str, ...]
    rate: float
    """Images per second, of which all views are made."""


def know_place(bench: Bench, before: list[Any]) -> None:
    """Which part of a batch is made here; view groups are made by all together."""
    bench.comm = distributed.comm_of(bench.world, bench.config.data.view_shards)


def decode_some(bench: Bench, before: list[Any]) -> tuple[int, list[str]]:
    """Decode ten images of each split, one by one; how many, and the bad ones."""
    config, tried, bad = bench.config.data, 0, list[str]()
    index = bench.device.index if bench.device.type == "cuda" else None
    decoder = Decoder(index, Decoding(config.hw_decoder_load, config.preallocate))
    for split in () if bench.data is None else (bench.data.train, bench.data.val):
        if split is None or split.images is not None or config.url:
            continue
        for i in np.linspace(0, len(split) - 1, min(DECODED, len(split)), dtype=np.int64):
            tried += 1
            try:
                encoded = split.read(int(i))
                # The decoder writes lines of its own about what is plainly no image.
                problem = None if worth_trying(encoded) else why(encoded)
                problem = problem or decoder.problem(encoded)
            except OSError as error:
                problem = first_line(error)
            if problem is not None:
                bad.append(f"{split.where(int(i))}: {problem}")
    return tried, bad


def start_pipeline(bench: Bench, before: list[Any]) -> tuple[int, list[str]]:
    """The run's own pipeline, beyond what it has ready before it is asked."""
    if bench.data is not None:
        held = range(bench.config.num_views)[bench.comm.views]
        bench.bad = BadImages()
        loader = train_loader(bench.config, bench.comm, bench.data, bench.device, held, bench.bad)
        bench.cleanup.callback(loader.close)
        for _ in range(1 + bench.config.data.prefetch):
            next(loader)
        bench.loader = loader
    mine: tuple[int, list[str]] = before[bench.world.rank]
    return mine


def time_pipeline(bench: Bench, before: list[Any]) -> Decoded | None:
    """Its images per second, while it works on all processes."""
    if bench.data is None or bench.loader is None or bench.bad is None:
        return None
    done, start = 0, time.perf_counter()
    while done == 0 or time.perf_counter() - start < PIPELINE_S:
        done += len(next(bench.loader).ids)
        if bench.device.type == "cuda":
            torch.cuda.synchronize(bench.device)
    rate = done / (time.perf_counter() - start) / bench.config.data.view_shards
    tried, bad = before[bench.world.rank]
    replaced = [f"{where}: {reason}" for where, reason in bench.bad.known.items()]
    return Decoded(tried, tuple(dict.fromkeys(bad + replaced)), rate)


def judge_decoded(bench: Bench, facts: list[Decoded | None]) -> Iterator[Finding]:
    decoded = [fact for fact in facts if fact is not None]
    if not decoded:
        return  # said already
    bad = by_value([name for fact in decoded for name in fact.bad])
    if bad:
        shown = "; ".join(list(bad)[:3]) + ("; ..." if len(bad) > 3 else "")
        yield fail(f"{len(bad)} bad image(s): {shown}", _check_data(bench))
    rate, slowest = sum(fact.rate for fact in decoded), min(fact.rate for fact in decoded)
    tried = f"{decoded[0].tried} images decode; " if decoded[0].tried and not bad else ""
    yield ok(
        f"{tried}the pipeline makes {bench.config.num_views} views of {rate:.0f} images/s "
        f"(at least {slowest * bench.config.data.view_shards:.0f} a process)"
    )


def _check_data(bench: Bench) -> str:
    given = shlex.join(a for a in bench.arguments if not a.startswith("run."))
    return f"ddp-ssl check-data {given} finds all; data.skip leaves them out"


CHECKS = (
    # As long as a run would wait: a large folder is scanned at first sight.
    Check("data", (find_first, find_all, keep), judge_found, SCAN_S),
    Check("reading", (read_some,), judge_read),
    Check("decoding", (know_place, decode_some, start_pipeline, time_pipeline), judge_decoded),
)
