"""Find images that cannot be used: ddp-ssl check-data [CONFIG] [key=value ...].

The config is the training run's: `data.name=imagenet
data.root=/data/imagenet`. All training and validation images are checked by
their first and last bytes; suspicious ones are decoded as in training.
`--full` decodes all images, and so finds damage in the middle too.

Bad images are written to `--out`, one `path<TAB>reason` a line, a list for
`data.skip`. No file is written if all are good. Exit code: 0 all are good, 1
some are bad, 2 something else is wrong.
"""

from __future__ import annotations

import argparse
import contextlib
import multiprocessing
import os
import shlex
import signal
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor, as_completed
from pathlib import Path

import numpy as np

from ddp_ssl.commands import common
from ddp_ssl.config import ConfigError
from ddp_ssl.data.datasets import registry
from ddp_ssl.data.datasets.split import Split
from ddp_ssl.data.loading.decodable import (
    Bytes,
    Decoder,
    first_line,
    looks_whole,
    pixels,
    too_large,
)
from ddp_ssl.run.configure import load
from ddp_ssl.utils.files import path_of
from ddp_ssl.utils.progress import Progress
from ddp_ssl.utils.streams import tell

PART = 256  # images a worker is given at a time
READERS = 16  # threads of a worker: they wait for the file system
HEAD, TAIL = 4096, 12  # bytes that are looked at: most headers say the size there
SHORTEST = 20  # bytes of an image


class Checker:
    """Looks at images; one in each worker process."""

    def __init__(self, splits: dict[str, Split], full: bool, max_pixels: int) -> None:
        self.splits, self.full, self.max_pixels = splits, full, max_pixels
        self.decoder = Decoder()
        self.pool = ThreadPoolExecutor(READERS)

    def check(self, name: str, first: int, end: int) -> list[tuple[int, str]]:
        """Ids of bad images among `first` to `end`, with reasons."""
        split, bad = self.splits[name], []
        looked = self.pool.map(
            lambda i: read(split, i) if self.full else suspicious(split, i, self.max_pixels),
            range(first, end),
        )
        for i, encoded in zip(range(first, end), looked, strict=True):
            if encoded is None:
                continue
            reason = encoded if isinstance(encoded, str) else too_large(encoded, self.max_pixels)
            if reason is None and not isinstance(encoded, str):
                found = self.decoder.usable(encoded)
                reason = found if isinstance(found, str) else None
            if reason is not None:
                bad.append((i, reason))
        return bad


def read(split: Split, i: int) -> Bytes | str:
    """An image, or why it cannot be read."""
    try:
        return split.read(i)
    except OSError as error:
        return first_line(error)


def suspicious(split: Split, i: int, max_pixels: int) -> Bytes | str | None:
    """An image if it does not begin and end as it should; only then is all of it read.

    A reason if its header says that it is too large.
    """
    try:
        if split.shards is not None:
            size = int(split.shards.size[i])
            if size < SHORTEST:
                return split.read(i)
            ends = (
                split.shards.piece(i, 0, min(HEAD, size)),
                split.shards.piece(i, size - TAIL, TAIL),
            )
        else:
            file = os.open(split.path(i), os.O_RDONLY)
            try:
                size = os.fstat(file).st_size
                parts = os.pread(file, HEAD, 0), os.pread(file, TAIL, max(0, size - TAIL))
            finally:
                os.close(file)
            if size < SHORTEST:
                return split.read(i)
            ends = np.frombuffer(parts[0], np.uint8), np.frombuffer(parts[1], np.uint8)
        if not looks_whole(np.concatenate(ends)):
            return split.read(i)
        # The size may stand behind long EXIF data.
        return too_large(ends[0] if pixels(ends[0]) else split.read(i), max_pixels)
    except OSError as error:
        return first_line(error)


_checker: Checker | None = None


def _start(splits: dict[str, Split], full: bool, max_pixels: int) -> None:
    global _checker
    _checker = Checker(splits, full, max_pixels)


def _work(name: str, first: int, end: int) -> tuple[str, int, list[tuple[int, str]]]:
    assert _checker is not None
    return name, end - first, _checker.check(name, first, end)


def check(
    splits: dict[str, Split], *, full: bool, workers: int, max_pixels: int
) -> dict[str, dict[int, str]]:
    """The bad images of each split, by id, with reasons."""
    encoded = {name: split for name, split in splits.items() if split.images is None}
    total = sum(map(len, encoded.values()))
    bad: dict[str, dict[int, str]] = {name: {} for name in splits}
    progress = Progress("", total)
    # Forked before anything here has threads, so that workers share the arrays of names. A store's
    # client has threads already.
    far = any(s.shards is not None and s.shards.is_far for s in encoded.values())
    context = multiprocessing.get_context("spawn" if far else "fork")
    with (
        ProcessPoolExecutor(workers, context, _start, (encoded, full, max_pixels)) as pool,
        _ended_on_error(),
    ):
        # Ctrl-C is for this process: workers are forked here, and keep it blocked.
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            futures = [
                pool.submit(_work, name, first, min(first + PART, len(split)))
                for name, split in encoded.items()
                for first in range(0, len(split), PART)
            ]
        finally:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
        for future in as_completed(futures):
            name, count, found = future.result()
            bad[name] |= found
            progress.add(count, f"{sum(map(len, bad.values())):,} bad, ")
    return bad


@contextlib.contextmanager
def _ended_on_error() -> Iterator[None]:
    """An error ends the workers at once: they may have hours of work, or hang on a disk."""
    before = set(multiprocessing.active_children())
    try:
        yield
    except BaseException:
        for worker in set(multiprocessing.active_children()) - before:
            worker.terminate()
        raise


def part_of(out: Path) -> Path:
    return out.with_name(f".part-{out.name}")


@contextlib.contextmanager
def writing(out: Path) -> Iterator[None]:
    """Raise `ValueError` where `out` cannot be written."""
    try:
        yield
    except OSError as error:
        raise ValueError(f"--out: {out} cannot be written: {error.strerror}") from None


def try_out(out: Path) -> None:
    """Make the file that becomes `out`, so that no scan is lost to a mistyped folder."""
    with writing(out):
        if out.exists() and not out.is_file():
            what = "a folder" if out.is_dir() else "no regular file"
            raise ValueError(f"--out: {out} is {what}; accepted: a file to write")
        part_of(out).open("ab").close()


def write(out: Path, splits: dict[str, Split], bad: dict[str, dict[int, str]]) -> None:
    """The list that `data.skip` takes."""
    lines = [
        os.fsencode(split.where(i)) + b"\t" + reason.encode("utf-8", "replace") + b"\n"
        for name, split in splits.items()
        for i, reason in sorted(bad[name].items())
    ]
    if lines:
        part_of(out).write_bytes(b"".join(lines))
        part_of(out).rename(out)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = common.Parser("ddp-ssl check-data", __doc__)
    parser.add_argument("config", nargs="*", help="[CONFIG.yaml] [key=value ...]")
    parser.add_argument("--full", action="store_true", help="decode every image")
    parser.add_argument("--out", type=path_of, default=Path("bad_images.txt"))
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)))
    return common.exit_code(lambda: run(parser.parse_intermixed_args(arguments)))


def run(options: argparse.Namespace) -> int:
    """Check what the command line says and print what is found; returns the exit code."""
    if options.workers < 1:
        raise ConfigError(f"--workers: expected 1 or more, got {options.workers}")
    data = load(options.config).config.data
    registry.find(data)
    try_out(options.out)
    try:
        dataset = registry.definition_of(data).load(data)
        splits = {"train": dataset.train} | ({"val": dataset.val} if dataset.val else {})
        start = time.monotonic()
        bad = check(splits, full=options.full, workers=options.workers, max_pixels=data.max_pixels)
        with writing(options.out):
            write(options.out, splits, bad)
    finally:
        with contextlib.suppress(OSError):
            part_of(options.out).unlink()
    seconds = time.monotonic() - start
    for name, split in splits.items():
        if split.images is not None:
            tell(f"{name}: {len(split):,} images in memory: nothing to decode")
        else:
            how = "decoded" if options.full else "looked at"
            tell(f"{name}: {len(split):,} images {how}, {len(bad[name]):,} bad")
    reasons: dict[str, int] = {}
    for found in bad.values():
        for reason in found.values():
            reasons[reason] = reasons.get(reason, 0) + 1
    for reason, count in sorted(reasons.items(), key=lambda item: -item[1])[:10]:
        tell(f"  {count:,} x {reason}")
    if not reasons:
        tell(f"{seconds:.1f} s; all good")
        return 0
    tell(f"{seconds:.1f} s; listed in {options.out}")
    tell(f"data.skip={shlex.quote(str(options.out))} leaves them out")
    return 1
