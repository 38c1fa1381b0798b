"""Pack a data set into tar shards: ddp-ssl pack-shards --out DIR [CONFIG] ...

For network and object storage, where a million small files are slow. The
config is the training run's: `data.name=imagenet data.root=/data/imagenet`.
All images of the data set are packed, in a seeded random order, and keep their
ids. So a run with `data.root=DIR` is the same as on the files, with any
`data.val_fraction`, `data.fraction` and `data.skip`. Images that `data.skip`
lists during packing stay out of the shards; they keep their ids and read as
empty.

After an interruption the same command continues: shards that are there and
whole are kept. The same seed and size give the same bytes. Each shard is read
back and compared before it gets its name.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import fcntl
import functools
import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from ddp_ssl.commands import common
from ddp_ssl.commands.shard_writer import (
    BLOCK,
    RECORD,
    UNREADABLE,
    Ids,
    Shard,
    Unreadable,
    extension,
    refuse,
    write_arrays,
    write_file,
    write_shards,
)
from ddp_ssl.data.datasets import registry, selection, shards
from ddp_ssl.data.datasets.base import absolute, place_of
from ddp_ssl.data.datasets.split import Split
from ddp_ssl.run.configure import load
from ddp_ssl.utils.files import path_of
from ddp_ssl.utils.progress import Progress
from ddp_ssl.utils.sealed import sealed
from ddp_ssl.utils.seeds import generator
from ddp_ssl.utils.streams import tell

OVERHEAD = 3 * BLOCK + 2 * BLOCK + BLOCK  # headers, class and id, padding at most
HOPELESS = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EISDIR)


class Unfinished(Exception):
    """Packing stopped where another call goes on; the message is one line."""


def main(arguments: Sequence[str] | None = None) -> int:
    parser = common.Parser("ddp-ssl pack-shards", __doc__)
    parser.add_argument("config", nargs="*", help="[CONFIG.yaml] [key=value ...]")
    parser.add_argument("--out", type=path_of, required=True, help="folder for the shards")
    parser.add_argument("--shard-size", type=float, default=1e9, help="bytes (default 1e9)")
    parser.add_argument("--seed", type=int, default=0, help="of the order (default 0)")
    parser.add_argument("--workers", type=int, default=16, help="shards at a time (default 16)")
    return common.exit_code(lambda: run(parser.parse_intermixed_args(arguments)))


def run(options: argparse.Namespace) -> int:
    """Pack what the command line says; returns the exit code."""
    again = "call again to go on"
    try:
        pack(
            load(options.config).config.data,
            options.out,
            shard_size=int(options.shard_size),
            seed=options.seed,
            workers=options.workers,
        )
    except Unfinished as error:
        return common.refuse(f"{error}; {again}", 1)
    except OSError as error:
        return common.refuse(_why(error, options.out), 1)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(again) from None
    return 0


def pack(data: Any, out: Path, *, shard_size: int, seed: int, workers: int) -> None:
    """The data set named by a config's `data` as shards in `out`.

    Raises `ValueError`, one line, for what cannot be packed, and `Unfinished` if a disk fails.
    """
    if shard_size < 1 or workers < 1:
        raise ValueError("--shard-size and --workers: expected a positive number")
    registry.find(data)
    _keep_apart(data, out)
    with _alone(out):  # before the data is looked through, which may take long
        total, tars = _pack(data, out, shard_size, seed, workers)
    shards.open_shards(out)
    tell(f"{total:,} images in {tars:,} shards in {out}")


def _pack(data: Any, out: Path, shard_size: int, seed: int, workers: int) -> tuple[int, int]:
    """Numbers of images and of shards."""
    dataset = registry.definition_of(data).load(data)
    splits = {"train": dataset.train} | ({"val": dataset.val} if dataset.val else {})
    packed = {name: _to_pack(split, data) for name, split in splits.items()}
    if not len(packed["train"]):
        raise ValueError(
            f"data.skip: {data.skip} lists all {len(dataset.train):,} training images; accepted: a "
            "list that leaves some"
        )
    sizes = _sizes(splits, packed, out, workers)
    plan = {
        name: _plan(name, split, packed[name], sizes[name], shard_size, seed)
        for name, split in splits.items()
    }
    about: dict[str, Any] = {
        "format": shards.FORMAT,
        "name": dataset.name,
        "class_names": list(dataset.class_names),
        "extensions": sorted({extension(s, int(i)) for n, s in splits.items() for i in packed[n]}),
        "seed": seed,
        "shard_size": shard_size,
        "splits": {
            name: {"count": len(split), "digest": split.digest}
            | ({} if split.named else {"named": False})
            for name, split in splits.items()
        },
    }
    stamp = hashlib.sha256(json.dumps(about).encode())
    for name in splits:
        stamp.update(packed[name].data)
        stamp.update(sizes[name].data)
    try:
        written = write_shards(splits, plan, out, stamp.hexdigest(), workers, data.max_pixels)
        for name, split in splits.items():
            about["splits"][name]["tars"] = [written[shard.tar]["tar"] for shard in plan[name]]
            sums = write_arrays(name, split, plan[name], written, out)
            about["splits"][name]["checksums"] = sums
        write_file(out / shards.ABOUT, sealed(about).encode())
        (out / UNREADABLE).unlink(missing_ok=True)
    except OSError as error:
        if error.errno in HOPELESS:
            raise
        raise Unfinished(_why(error, out)) from None
    return sum(len(ids) for ids in packed.values()), sum(map(len, plan.values()))


# --- what goes where -----------------------------------------------------------------------------


def _to_pack(split: Split, data: Any) -> Ids:
    """The ids of a split that `data.skip` does not list."""
    if not data.skip:
        return np.arange(len(split))
    root = place_of(data.root) if data.root else os.getcwd()
    skip = selection.Skip.of_file(absolute(data.skip), root)
    return np.flatnonzero(skip.keep(split))


def _sizes(
    splits: dict[str, Split], packed: dict[str, Ids], out: Path, workers: int
) -> dict[str, Ids]:
    """Bytes of each image to pack, by opening all files: what is missing is known at once."""
    bad = Unreadable()
    progress = Progress("opening: ", sum(len(ids) for ids in packed.values()))
    sizes = {}
    with ThreadPoolExecutor(max(workers, 32)) as pool:
        for name, split in splits.items():
            parts = np.array_split(packed[name], len(packed[name]) // 1000 + 1)
            measure = functools.partial(_sizes_of, split, bad=bad, progress=progress)
            sizes[name] = np.concatenate(list(pool.map(measure, parts)))
    refuse(bad, out)
    return sizes


def _sizes_of(split: Split, ids: Ids, bad: Unreadable, progress: Progress) -> Ids:
    sizes = np.zeros(len(ids), np.int64)
    for place, i in enumerate(ids.tolist()):
        if split.images is not None:
            sizes[place] = split.images[0].nbytes  # as a PNG it is about that
        elif split.shards is not None:
            sizes[place] = split.shards.size[i]
        else:
            try:
                file = os.open(split.path(i), os.O_RDONLY)
                try:
                    sizes[place] = os.fstat(file).st_size
                finally:
                    os.close(file)
            except OSError as error:
                bad.add(split.where(i), error.strerror or str(error))
                continue
        if sizes[place] == 0:
            bad.add(split.where(i), "empty")
    progress.add(len(ids))
    return sizes


def _plan(name: str, split: Split, ids: Ids, sizes: Ids, shard_size: int, seed: int) -> list[Shard]:
    """Consecutive parts of the shuffled order, each as large as fits."""
    order = generator(seed, "pack", name).permutation(len(ids))
    ends = np.cumsum(sizes[order] + OVERHEAD)
    exact = -(-sizes[order] // BLOCK) * BLOCK + 5 * BLOCK  # two more members of a block each
    plan: list[Shard] = []
    first = 0
    while first < len(order):
        before = ends[first - 1] if first else 0
        end = max(int(np.searchsorted(ends, before + shard_size, "right")), first + 1)
        size = -(-(int(exact[first:end].sum()) + 2 * BLOCK) // RECORD) * RECORD
        plan.append(Shard(name, len(plan), first, ids[order[first:end]], size))
        first = end
    return plan


def _keep_apart(data: Any, out: Path) -> None:
    """Raw data with shards in its folder would be read as shards from then on."""
    if data.name == "array":
        raise ValueError("data.name: an array is read as it is; shards are made of image files")
    for place in data.roots:
        root, to = (Path(os.path.realpath(path)) for path in (absolute(place), out))
        # A list's root is only what its paths are relative to, maybe `/`.
        if to == root or (root in to.parents and data.name != "list"):
            where = "is" if to == root else "is inside"
            raise ValueError(
                f"--out: {out} {where} data.root; accepted: a folder apart from the data"
            )


def _why(error: OSError, out: Path) -> str:
    """An error of a disk as one line with a path."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"--out: {out} is full ({error.strerror}): make room"
    if error.strerror is None:
        return str(error)
    return f"{error.filename if isinstance(error.filename, str) else out}: {error.strerror}"


@contextlib.contextmanager
def _alone(out: Path) -> Iterator[None]:
    """Hold a lock on `out`, so that no second process packs into it.

    Raises `ValueError` if another process holds it or if `out` cannot be written.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
        opened = (out / ".lock").open("w")
    except OSError as error:
        raise ValueError(
            f"--out: {out} cannot be written: {error.strerror}; accepted: a folder, made if missing"
        ) from None
    with opened as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"--out: another process is packing into {out}") from None
        except OSError:
            pass  # a file system without locks
        yield
