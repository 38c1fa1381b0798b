"""Write tar shards: the tar files, a journal to continue from, the arrays.

A shard that is there and whole is kept. A new one is read back and compared before it gets its
name.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import shlex
import shutil
import tarfile
import threading
import time
import zlib
from collections.abc import Iterator
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ddp_ssl.data.datasets import shards
from ddp_ssl.data.datasets.scan import EXTENSIONS
from ddp_ssl.data.datasets.shards import file_size
from ddp_ssl.data.datasets.split import Split
from ddp_ssl.data.loading.decodable import is_for_pil, rewritten, too_large
from ddp_ssl.utils.files import if_readable, sync_folder
from ddp_ssl.utils.progress import Progress
from ddp_ssl.utils.sealed import checksum, sha256_at
from ddp_ssl.utils.streams import tell

BLOCK, RECORD = 512, 10240  # tar's
BESIDE = 128  # bytes that an image takes in the index and the arrays, about
JOURNAL = "packing.jsonl"  # the shards that are done, for the next call
UNREADABLE = "unreadable.txt"
RETRIES = (0.5, 5.0)  # seconds

Ids = NDArray[np.int64]


@dataclass(frozen=True)
class Shard:
    """A tar file and its images, in order."""

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


@dataclass
class Unreadable:
    """Images that cannot be read, with reasons; for several threads."""

    found: dict[str, str] = field(default_factory=dict)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def add(self, path: str, reason: str) -> None:
        with self.lock:
            self.found[path] = reason


def extension(split: Split, i: int) -> str:
    """The extension in the tar file: a known one, or `jpg`."""
    if split.images is not None:
        return "png"
    extension = os.path.splitext(split.name(i))[1].lower()
    # Decoders look at the content, not at the extension.
    return extension[1:].decode() if extension in EXTENSIONS else "jpg"


def refuse(bad: Unreadable, out: Path, remedy: str = "") -> None:
    """List the images that cannot be read, if there are any, and raise."""
    if not bad.found:
        return
    listed = sorted(bad.found.items())
    text = "".join(f"{path}\t{why}\n" for path, why in listed)
    write_file(out / UNREADABLE, os.fsencode(text))
    raise ValueError(
        f"data.root: {len(listed)} images cannot be read, such as {listed[0][0]} ({listed[0][1]}); "
        f"{out / UNREADABLE} lists them, and data.skip={shlex.quote(str(out / UNREADABLE))} leaves "
        f"them out{remedy}"
    )


# --- shards --------------------------------------------------------------------------------------


def write_shards(
    splits: dict[str, Split],
    plan: dict[str, list[Shard]],
    out: Path,
    stamp: str,
    workers: int,
    max_pixels: int,
) -> dict[str, Any]:
    """Write the shards that are not there and whole; returns the journal's entry of each."""
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
        if known is not None and {"crc", "places"} <= known.keys() and _is_whole(out, known):
            progress.keep(len(shard.ids))
            return
        with _part_of(out / shard.tar) as part:
            split = splits[shard.split]
            made = _write_shard(split, shard, out, bad, progress, stop, part, max_pixels)
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
    refuse(bad, out, ", in another --out")
    return done


def _check_room(
    splits: dict[str, Split], todo: list[Shard], done: dict[str, Any], out: Path
) -> None:
    """Refuse what does not fit, not counting shards that are there."""
    needed = 0
    for shard in todo:
        expected = if_readable(lambda shard=shard: done[shard.tar]["tar"]["bytes"])  # type: ignore[misc]
        there = expected == file_size(out / shard.tar)
        # The size of images in memory as PNGs is not known.
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
    write_file(found, b"".join(lines[:number]) or json.dumps({"stamp": stamp}).encode() + b"\n")
    return done


def _note(out: Path, entry: dict[str, Any]) -> None:
    with (out / JOURNAL).open("ab") as file:
        file.write(json.dumps(entry).encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())


def _is_whole(out: Path, known: dict[str, Any]) -> bool:
    path = out / known["tar"]["file"]
    try:
        if path.stat().st_size != known["tar"]["bytes"]:
            return False
        content = sha256_at(path)
    except OSError:
        return False
    if content != known["tar"]["sha256"]:
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
    max_pixels: int,
) -> dict[str, Any] | None:
    """Write, read back and name one shard; None if an image of it cannot be read."""
    written, at = hashlib.sha256(), 0
    sums: list[int] = []
    places: list[tuple[int, int]] = []  # offset and size of each image
    members: list[tuple[str, int, bytes]] = []  # name, offset, checksum
    complete = True
    with part.open("wb", buffering=1 << 20) as file:

        def add(name: str, content: Any) -> None:
            nonlocal at
            header = tarfile.TarInfo(name)
            header.size, header.mode, header.mtime = len(content), 0o644, 0
            pad = b"\0" * (-len(content) % BLOCK)
            for piece in (header.tobuf(tarfile.USTAR_FORMAT), content, pad):
                file.write(piece)
                written.update(piece)
            members.append((name, at + BLOCK, hashlib.sha256(content).digest()))
            at += BLOCK + len(content) + len(pad)

        for place, i in enumerate(shard.ids.tolist()):
            if stop.is_set():
                return None
            content = _read(split, i, bad, max_pixels)
            if content is None:
                complete = False
            if complete:
                sums.append(zlib.crc32(content))
                key = f"{shard.first + place:09d}"
                places.append((at + BLOCK, len(content)))
                add(f"{key}.{extension(split, i)}", content)
                add(f"{key}.cls", str(int(split.labels[i])).encode())
                add(f"{key}.id", str(i).encode())
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
    size = part.stat().st_size
    part.rename(out / shard.tar)
    sync_folder(out)
    return {
        "tar": {
            "file": shard.tar,
            "bytes": size,
            "samples": len(places),
            "sha256": written.hexdigest(),
        },
        "crc": sums,
        "places": places,
    }


def _read(split: Split, i: int, bad: Unreadable, max_pixels: int) -> Any:
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
                bad.add(split.where(i), error.strerror or str(error))
                return None
            time.sleep(pause)
        else:
            # What DALI does not decode is packed as a PNG, since PIL is slow.
            packed: Any = content
            if is_for_pil(content):
                packed = too_large(content, max_pixels) or rewritten(content)
            if isinstance(packed, str) or not len(packed):
                bad.add(split.where(i), packed if isinstance(packed, str) else "empty")
                return None
            return packed.data
    return None


def _read_back(part: Path, members: list[tuple[str, int, bytes]], checksum: bytes) -> None:
    """Compare a tar file on disk, as the standard library reads it, with what was to be in it."""
    found = []
    same = sha256_at(part) == checksum.hex()
    with part.open("rb", buffering=0) as content, tarfile.open(part, "r:") as tar:
        for member in tar:
            held = os.pread(content.fileno(), member.size, member.offset_data)
            found.append((member.name, member.offset_data, hashlib.sha256(held).digest()))
    if not same or found != members:
        raise OSError(f"{part} does not read back as it was written: is the disk failing?")


def write_arrays(
    name: str, split: Split, plan: list[Shard], written: dict[str, Any], out: Path
) -> dict[str, int]:
    """Write place, name and label of each image, in the order of the ids.

    `written` is the journal's entry of each shard. Returns the checksums of the arrays.
    """
    shard = np.zeros(len(split), np.int32)
    offset, size = np.zeros(len(split), np.int64), np.zeros(len(split), np.int64)
    crc = np.zeros(len(split), np.uint32)  # 0 for an image that was left out: no bytes
    for part in plan:
        shard[part.ids] = part.number
        offset[part.ids], size[part.ids] = np.array(written[part.tar]["places"], np.int64).T
        crc[part.ids] = written[part.tar]["crc"]
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
        "crc": crc,
    }
    assert arrays.keys() == shards.ARRAYS.keys()
    for key, content in arrays.items():
        buffer = io.BytesIO()
        np.save(buffer, np.asarray(content))
        write_file(out / f"{name}-{key}.npy", buffer.getbuffer())
    return {file: checksum(out / file) for key in arrays if (file := f"{name}-{key}.npy")}


@contextlib.contextmanager
def _part_of(path: Path) -> Iterator[Path]:
    """A temporary path, to be renamed to `path`; removed if it is not."""
    part = path.with_name(f".part-{path.name}")
    try:
        yield part
    finally:
        part.unlink(missing_ok=True)


def write_file(path: Path, content: Any) -> None:
    """A small file, whole or not at all."""
    with _part_of(path) as part:
        with part.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        part.rename(path)
