"""Pack a data set into tar shards: python tools/pack_shards.py --out DIR [CONFIG.yaml] [key=value].

For network and object storage, where a million small files are slow. The config is the training
run's: `data.name=imagenet data.root=/data/imagenet`. All images of the data set are packed, in a
seeded random order, and keep their ids: a run with `data.root=DIR` sees what it would see on the
files, `data.val_fraction`, `data.fraction` and `data.skip` included. Images that `data.skip` lists
now stay out of the shards; they keep their ids and read as empty.

Called again after an interruption it goes on: shards that are there and whole are kept. The same
seed and size give the same bytes. Each shard is read back and compared before it gets its name.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import fcntl
import functools
import hashlib
import io
import json
import os
import shlex
import shutil
import sys
import tarfile
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ddp_ssl.data.datasets import registry, selection, shards
from ddp_ssl.data.datasets.base import absolute
from ddp_ssl.data.datasets.scan import EXTENSIONS
from ddp_ssl.data.datasets.split import Split
from ddp_ssl.run.configure import load
from ddp_ssl.utils.files import sync_folder
from ddp_ssl.utils.progress import Progress, tell
from ddp_ssl.utils.seeds import generator

BLOCK, RECORD = 512, 10240  # tar's
OVERHEAD = 3 * BLOCK + 2 * BLOCK + BLOCK  # headers, class and id, padding at most
BESIDE = 128  # bytes that an image takes in the index and the arrays, about
JOURNAL = "packing.jsonl"  # what is done, for the next call
UNREADABLE = "unreadable.txt"
HOPELESS = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EISDIR)
RETRIES = (0.5, 5.0)  # seconds

Ids = NDArray[np.int64]


@dataclass(frozen=True)
class Shard:
    """Which images go into a tar file, in order."""

    split: str
    number: int
    first: int
    """Place of the first image in the split's shuffled order."""
    ids: Ids
    size: int
    """Bytes of the tar file; about that for images in memory."""

    @property
    def tar(self) -> str:
        return f"{self.split}-{self.number:05d}.tar"

    @property
    def index(self) -> str:
        return f"{self.split}-{self.number:05d}.idx"


class Unfinished(Exception):
    """Packing stopped where another call goes on; the message is one line."""


@dataclass
class Unreadable:
    """Images that cannot be read, with reasons; for several threads."""

    found: dict[str, str] = field(default_factory=dict)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def add(self, path: str, reason: str) -> None:
        with self.lock:
            self.found[path] = reason


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("config", nargs="*", help="[CONFIG.yaml] [key=value ...]")
    parser.add_argument("--out", type=Path, required=True, help="folder for the shards")
    parser.add_argument("--shard-size", type=float, default=1e9, help="bytes (default 1e9)")
    parser.add_argument("--seed", type=int, default=0, help="of the order (default 0)")
    parser.add_argument("--workers", type=int, default=16, help="shards at a time (default 16)")
    options = parser.parse_intermixed_args(arguments)
    try:
        pack(
            load(options.config).config.data,
            options.out,
            shard_size=int(options.shard_size),
            seed=options.seed,
            workers=options.workers,
        )
    except ValueError as error:
        tell(f"pack_shards: error: {error}")
        return 2
    except Unfinished as error:
        tell(f"pack_shards: error: {error}; call again to go on")
        return 1
    except OSError as error:
        tell(f"pack_shards: error: {_why(error, options.out)}")
        return 1
    except KeyboardInterrupt:
        tell("pack_shards: interrupted; call again to go on")
        return 130
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
        "extensions": sorted({_extension(s, int(i)) for n, s in splits.items() for i in packed[n]}),
        "seed": seed,
        "shard_size": shard_size,
        "splits": {
            name: {"count": len(split), "digest": split.digest} for name, split in splits.items()
        },
    }
    stamp = hashlib.sha256(json.dumps(about).encode())
    for name in splits:
        stamp.update(packed[name].data)
        stamp.update(sizes[name].data)
    try:
        written = _write_shards(splits, plan, out, stamp.hexdigest(), workers)
        for name, split in splits.items():
            about["splits"][name]["tars"] = [written[shard.tar]["tar"] for shard in plan[name]]
            _write_arrays(name, split, plan[name], out)
        _write(out / shards.ABOUT, (json.dumps(about, indent=1) + "\n").encode())
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
    root = absolute(data.root) if data.root else Path.cwd()
    skip = selection.Skip.of_file(absolute(data.skip), str(root))
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
    _refuse(bad, out)
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
                bad.add(_path(split, i), error.strerror)
                continue
        if sizes[place] == 0:
            bad.add(_path(split, i), "empty")
    progress.add(len(ids))
    return sizes


def _plan(name: str, split: Split, ids: Ids, sizes: Ids, shard_size: int, seed: int) -> list[Shard]:
    """Consecutive parts of the shuffled order, each as large as fits."""
    order = generator(seed, "pack", name).permutation(len(ids))
    ends = np.cumsum(sizes[order] + OVERHEAD)
    exact = -(-sizes[order] // BLOCK) * BLOCK + 5 * BLOCK  # two more members of a block each
    plan, first = [], 0
    while first < len(order):
        before = ends[first - 1] if first else 0
        end = max(int(np.searchsorted(ends, before + shard_size, "right")), first + 1)
        size = -(-(int(exact[first:end].sum()) + 2 * BLOCK) // RECORD) * RECORD
        plan.append(Shard(name, len(plan), first, ids[order[first:end]], size))
        first = end
    return plan


def _path(split: Split, i: int) -> str:
    """What `data.skip` takes."""
    return os.path.join(split.root, os.fsdecode(split.name(i)))


def _extension(split: Split, i: int) -> str:
    """Of all that a name could say, one of a few known words gets into the tar."""
    if split.images is not None:
        return "png"
    extension = os.path.splitext(split.name(i))[1].lower()
    # What decodes an image goes by its content, not by this.
    return extension[1:].decode() if extension in EXTENSIONS else "jpg"


def _refuse(bad: Unreadable, out: Path, remedy: str = "") -> None:
    """List the images that cannot be read, if there are any, and raise."""
    if not bad.found:
        return
    listed = sorted(bad.found.items())
    text = "".join(f"{path}\t{why}\n" for path, why in listed if "\n" not in path)
    _write(out / UNREADABLE, os.fsencode(text))
    first = listed[0][0].replace("\n", "?")
    raise ValueError(
        f"data.root: {len(listed)} images cannot be read, such as {first} ({listed[0][1]}); "
        f"{out / UNREADABLE} lists them, and data.skip={shlex.quote(str(out / UNREADABLE))} leaves "
        f"them out{remedy}"
    )


def _keep_apart(data: Any, out: Path) -> None:
    """Raw data with shards in its folder would be read as shards from then on."""
    if not data.root:
        return
    root, to = (Path(os.path.realpath(path)) for path in (absolute(data.root), out))
    # A list's root is only what its paths are relative to, maybe `/`.
    if to == root or (root in to.parents and data.name != "list"):
        where = "is" if to == root else "is inside"
        raise ValueError(f"--out: {out} {where} data.root; accepted: a folder apart from the data")


def _why(error: OSError, out: Path) -> str:
    """An error of a disk as one line with a path."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"--out: {out} is full ({error.strerror}): make room"
    if error.strerror is None:
        return str(error)
    return f"{error.filename if isinstance(error.filename, str) else out}: {error.strerror}"


@contextlib.contextmanager
def _alone(out: Path) -> Iterator[None]:
    """Two that write the same files would undo each other's work.

    Raises `ValueError` if there is another or if `out` cannot be written.
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


# --- writing -------------------------------------------------------------------------------------


def _write_shards(
    splits: dict[str, Split], plan: dict[str, list[Shard]], out: Path, stamp: str, workers: int
) -> dict[str, Any]:
    """What is known of each shard, by its name; those that are there and whole are kept."""
    done = _resume(out, stamp)
    for left in out.glob(".part-*"):
        left.unlink()
    todo = [shard for parts in plan.values() for shard in parts]
    _check_room(splits, todo, done, out)
    progress = Progress("packing: ", sum(len(shard.ids) for shard in todo))
    bad, lock, stop = Unreadable(), threading.Lock(), threading.Event()

    def work(shard: Shard) -> None:
        if stop.is_set():
            return
        known = done.get(shard.tar)
        if known is not None and _is_whole(out, known):
            progress.keep(len(shard.ids))
            return
        with _part_of(out / shard.tar) as part:
            made = _write_shard(splits[shard.split], shard, out, bad, progress, stop, part)
        if made is not None:
            with lock:
                done[shard.tar] = made
                _note(out, made)

    with ThreadPoolExecutor(workers) as pool:
        futures = [pool.submit(work, shard) for shard in todo]
        try:
            wait(futures, return_when=FIRST_EXCEPTION)
        finally:
            stop.set()  # also when interrupted: what is under way is given up
    for future in futures:
        future.result()
    _refuse(bad, out, ", in another --out")
    return done


def _check_room(
    splits: dict[str, Split], todo: list[Shard], done: dict[str, Any], out: Path
) -> None:
    """Refuse what does not fit, not counting shards that are there."""
    needed = 0
    for shard in todo:
        try:
            there = (out / shard.tar).stat().st_size == done[shard.tar]["tar"]["bytes"]
        except (OSError, KeyError):
            there = False
        # How small images in memory become as PNGs is not known.
        if not there and splits[shard.split].images is None:
            needed += shard.size + BESIDE * len(shard.ids)
    usage = shutil.disk_usage(out)
    if needed > usage.free and usage.total:  # 0 is what some network file systems say
        raise ValueError(
            f"--out: {out} has {usage.free / 1e9:.3f} GB free, the shards need "
            f"{needed / 1e9:.3f} GB; accepted: a folder with that much room"
        )


def _resume(out: Path, stamp: str) -> dict[str, Any]:
    """The journal of an earlier call, or of a complete folder; it must be of the same packing."""
    done: dict[str, Any] = {}
    found = out / JOURNAL
    if not found.exists():
        if any(out.glob("[!.]*.tar")):
            raise ValueError(f"--out: {out} holds other tar files; accepted: an empty folder")
        _note(out, {"stamp": stamp})
        return done
    lines = found.read_bytes().splitlines(keepends=True)
    for number, line in enumerate(lines):
        try:
            entry = json.loads(line)
            if not line.endswith(b"\n"):
                raise ValueError
        except ValueError:
            break  # the last one, torn
        if number == 0 and entry.get("stamp") != stamp:
            raise ValueError(
                f"--out: {out} was begun with other data, another seed or another shard size; "
                "accepted: the same ones to go on, or an empty folder"
            )
        if number:
            done[entry["tar"]["file"]] = entry
    else:
        return done
    _write(found, b"".join(lines[:number]) or json.dumps({"stamp": stamp}).encode() + b"\n")
    return done


def _note(out: Path, entry: dict[str, Any]) -> None:
    with (out / JOURNAL).open("ab") as file:
        file.write(json.dumps(entry).encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())


def _is_whole(out: Path, known: dict[str, Any]) -> bool:
    for kind in ("tar", "idx"):
        path = out / known[kind]["file"]
        try:
            if path.stat().st_size != known[kind]["bytes"]:
                return False
            content = _checksum(path).hexdigest()
        except OSError:
            return False
        if content != known[kind]["sha256"]:
            tell(f"{path} is damaged: packing it again")
            return False
    return True


def _write_shard(
    split: Split,
    shard: Shard,
    out: Path,
    bad: Unreadable,
    progress: Progress,
    stop: threading.Event,
    part: Path,
) -> dict[str, Any] | None:
    """Write, read back and name one shard; None if an image of it cannot be read."""
    written, at, lines = hashlib.sha256(), 0, []
    members: list[tuple[str, int, bytes]] = []  # name, offset, checksum
    complete = True
    with part.open("wb", buffering=1 << 20) as file:

        def add(name: str, content: Any) -> str:
            nonlocal at
            header = tarfile.TarInfo(name)
            header.size, header.mode, header.mtime = len(content), 0o644, 0
            pad = b"\0" * (-len(content) % BLOCK)
            for piece in (header.tobuf(tarfile.USTAR_FORMAT), content, pad):
                file.write(piece)
                written.update(piece)
            members.append((name, at + BLOCK, hashlib.sha256(content).digest()))
            line = f"{name.partition('.')[2]} {at + BLOCK} {len(content)} {name}"
            at += BLOCK + len(content) + len(pad)
            return line

        for place, i in enumerate(shard.ids.tolist()):
            if stop.is_set():
                return None
            content = _read(split, i, bad)
            if content is None:
                complete = False
            if complete:
                key = f"{shard.first + place:09d}"
                lines.append(
                    " ".join(
                        (
                            add(f"{key}.{_extension(split, i)}", content),
                            add(f"{key}.cls", str(int(split.labels[i])).encode()),
                            add(f"{key}.id", str(i).encode()),
                        )
                    )
                )
            progress.add()
        end = b"\0" * (2 * BLOCK)
        end += b"\0" * (-(at + len(end)) % RECORD)
        file.write(end)
        written.update(end)
        file.flush()
        os.fsync(file.fileno())
        # So that the check below reads the disk, not memory.
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    if not complete:
        return None
    _read_back(part, members, written.digest())
    # DALI's index, as its wds2idx writes it: what makes the tar readable in any order.
    index = f"v1.2 {len(lines)}\n{''.join(line + chr(10) for line in lines)}".encode()
    _write(out / shard.index, index)
    size = part.stat().st_size
    part.rename(out / shard.tar)
    sync_folder(out)
    return {
        "tar": {
            "file": shard.tar,
            "bytes": size,
            "samples": len(lines),
            "sha256": written.hexdigest(),
        },
        "idx": {
            "file": shard.index,
            "bytes": len(index),
            "sha256": hashlib.sha256(index).hexdigest(),
        },
    }


def _read(split: Split, i: int, bad: Unreadable) -> Any:
    """The encoded image, noted as unreadable if there is none; an array's as a PNG."""
    if split.images is not None:
        from PIL import Image

        buffer = io.BytesIO()
        Image.fromarray(split.images[i]).save(buffer, "PNG")
        return buffer.getvalue()
    for pause in (*RETRIES, None):
        try:
            content = split.read(i)
        except OSError as error:
            if pause is None:
                bad.add(_path(split, i), error.strerror or str(error))
                return None
            time.sleep(pause)
        else:
            if not len(content):
                bad.add(_path(split, i), "empty")
                return None
            return content.data
    return None


def _read_back(part: Path, members: list[tuple[str, int, bytes]], checksum: bytes) -> None:
    """Compare a tar file on disk, as the standard library reads it, with what was to be in it."""
    found = []
    same = _checksum(part).digest() == checksum
    with part.open("rb", buffering=0) as content, tarfile.open(part, "r:") as tar:
        for member in tar:
            held = os.pread(content.fileno(), member.size, member.offset_data)
            found.append((member.name, member.offset_data, hashlib.sha256(held).digest()))
    if not same or found != members:
        raise OSError(f"{part} does not read back as it was written: is the disk failing?")


def _checksum(path: Path) -> Any:
    content = hashlib.sha256()
    with path.open("rb", buffering=0) as file:
        while chunk := file.read(8 << 20):
            content.update(chunk)
    return content


def _write_arrays(name: str, split: Split, plan: list[Shard], out: Path) -> None:
    """Where each image lies, in the order of the ids, from the index files; names and labels."""
    shard = np.zeros(len(split), np.int32)
    offset, size = np.zeros(len(split), np.int64), np.zeros(len(split), np.int64)
    for part in plan:
        lines = (out / part.index).read_text().splitlines()[1:]
        rows = np.array([line.split(" ")[1:3] for line in lines], np.int64)
        shard[part.ids] = part.number
        offset[part.ids], size[part.ids] = rows[:, 0], rows[:, 1]
    names, spans = split.names, split.spans
    if names is None or spans is None:
        made = Split.of_files("", [b"%08d.png" % i for i in range(len(split))], split.labels)
        names, spans = made.names, made.spans
    arrays = {
        "labels": split.labels,
        "names": names,
        "spans": spans,
        "shard": shard,
        "offset": offset,
        "size": size,
    }
    assert arrays.keys() == shards.ARRAYS.keys()
    for key, content in arrays.items():
        buffer = io.BytesIO()
        np.save(buffer, np.asarray(content))
        _write(out / f"{name}-{key}.npy", buffer.getbuffer())


@contextlib.contextmanager
def _part_of(path: Path) -> Iterator[Path]:
    """Where to write what is then renamed to `path`; removed if it is not."""
    part = path.with_name(f".part-{path.name}")
    try:
        yield part
    finally:
        part.unlink(missing_ok=True)


def _write(path: Path, content: Any) -> None:
    """A small file, whole or not at all."""
    with _part_of(path) as part:
        with part.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        part.rename(path)


if __name__ == "__main__":
    sys.exit(main())
