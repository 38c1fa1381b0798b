"""Checkpoints: atomic save, verified load, retention.

A checkpoint is `checkpoints/step_00001234.pt` and its manifest `step_00001234.json`, which is
renamed into place last: what has no manifest was never committed. Loading verifies size and SHA-256
(one flipped bit loads silently in `torch.load`) and executes nothing (`weights_only=True`).

Single-process: one rank saves, any rank may load.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import io
import json
import logging
import os
import pickle
import re
import shutil
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from ddp_ssl.files import sync_folder

log = logging.getLogger(__name__)

TEMPORARY = ".tmp"
DAMAGED = ".damaged"


class CheckpointError(RuntimeError):
    """A checkpoint could not be written; the older ones are intact. The message is one line."""


class SaveError(RuntimeError):
    """Too many saves in a row failed."""


@dataclasses.dataclass(frozen=True)
class Found:
    """A committed checkpoint: its file and what its manifest says."""

    path: Path
    bytes: int
    sha256: str
    step: int
    epoch: int
    identity: dict[str, str]
    world_size: int
    permanent: bool
    time: float
    """Seconds since 1970 at which it was saved."""
    serial: int
    """Order of saving in this folder. The newest is the last one *saved*: a run that went back to
    an older step must not take up the later ones that it left."""

    @property
    def manifest(self) -> Path:
        """The manifest's path."""
        return self.path.with_suffix(".json")

    def to_json(self) -> str:
        """The manifest's text."""
        fields = {k: v for k, v in vars(self).items() if k != "path"}
        return json.dumps({"file": self.path.name, **fields}, indent=1) + "\n"

    @staticmethod
    def read(manifest: Path) -> Found:
        """Read a manifest. Raises `OSError` or `ValueError` if that cannot be done."""
        fields = json.loads(manifest.read_text())
        try:
            return Found(path=manifest.with_name(fields.pop("file")), **fields)
        except (AttributeError, KeyError, TypeError) as error:
            raise ValueError(f"not a manifest: {error}") from None


# --- saving ----------------------------------------------------------------------------------


def save(
    folder: Path,
    state: Mapping[str, Any],
    *,
    step: int,
    epoch: int,
    identity: dict[str, str],
    world_size: int,
    keep: int,
    permanent: bool = False,
) -> Path:
    """Save `state` in the run folder and return the file's path; then prune.

    The `keep` newest (at least two), the permanent ones and `best.pt` are kept.

    Raises `CheckpointError` if it cannot be written (`torch.save` reports a full disk as a
    `RuntimeError`), with the older checkpoints intact and no temporary left; `TypeError` if
    `state` holds what `weights_only=True` would refuse to load, such as NumPy arrays.
    """
    home = folder / "checkpoints"
    with _writing(home):
        present, _ = _scan(home)
        path = _free_name(home, step)
    temporary = path.with_name(path.name + TEMPORARY)
    with _writing(path, temporary):
        home.mkdir(parents=True, exist_ok=True)
        size, sha256 = _write(temporary, state)
        found = Found(
            path=path,
            bytes=size,
            sha256=sha256,
            step=step,
            epoch=epoch,
            identity=identity,
            world_size=world_size,
            permanent=permanent,
            time=time.time(),
            serial=1 + max((f.serial for f in present), default=0),
        )
        os.replace(temporary, path)
    with _writing(path, found.manifest, path):  # one without the other is worth nothing
        _write_text(found.manifest, found.to_json())
        sync_folder(home)
    _prune([found, *present], keep)
    return path


def save_best(folder: Path, newest_path: Path) -> Path:
    """Make `best.pt` (and `best.json`) a hard link to a checkpoint, or a copy of it.

    Never pruned. Raises `CheckpointError` like `save`.
    """
    home = folder / "checkpoints"
    best = home / "best.pt"
    temporary = home / ("best.pt" + TEMPORARY)
    with _writing(best, temporary):
        source = Found.read(newest_path.with_suffix(".json"))
        temporary.unlink(missing_ok=True)
        try:
            os.link(newest_path, temporary)
        except OSError:  # a file system without hard links
            shutil.copyfile(newest_path, temporary)
            _sync(temporary)
        # The new manifest waits beside the old one until the file is there, so that `sweep` can
        # finish the exchange if the process dies in the middle of it.
        manifest = best.with_suffix(".json")
        waiting = manifest.with_name(manifest.name + TEMPORARY)
        _write_synced(waiting, dataclasses.replace(source, path=best).to_json())
        os.replace(temporary, best)
        temporary.unlink(missing_ok=True)  # renaming onto a link to the same file does nothing
        os.replace(waiting, manifest)
        sync_folder(home)
    return best


def sweep(folder: Path) -> None:
    """Tidy up after a process that died: call it at start, before the first `save`.

    Removes temporaries and files that were never committed, finishes an interrupted `save_best`,
    and renames damaged checkpoints newer than the newest good one to `*.damaged`, so that they do
    not count as kept.
    """
    home = folder / "checkpoints"
    if not home.is_dir():
        return
    _finish_best(home)
    for path in home.glob("*" + TEMPORARY):
        path.unlink(missing_ok=True)
    for path in home.glob("step_*.pt"):
        if not path.with_suffix(".json").exists():
            log.info("removing %s, which was not completely saved", path)
            path.unlink(missing_ok=True)
    readable, unreadable = _scan(home)
    for manifest in unreadable:
        _set_aside(manifest)
    for found in readable:
        try:
            problem = _mismatch(found)
        except OSError:  # a file system that fails for a moment is no reason to move anything
            break
        if problem is None:
            break
        _set_aside(found.manifest)


def _finish_best(home: Path) -> None:
    waiting = home / ("best.json" + TEMPORARY)
    try:
        found = Found.read(waiting)
    except (OSError, ValueError):
        return
    if _problem(found) is None:
        os.replace(waiting, home / "best.json")


def _set_aside(manifest: Path) -> None:
    for path in (manifest, manifest.with_suffix(".pt")):
        if path.exists():
            os.replace(path, path.with_name(path.name + DAMAGED))
    log.warning("damaged checkpoint kept as %s%s", manifest.with_suffix(".pt"), DAMAGED)


def _free_name(home: Path, step: int) -> Path:
    """`step_00001234.pt`; a second checkpoint of a step never overwrites the first."""
    path, count = home / f"step_{step:08d}.pt", 1
    while path.exists() or path.with_suffix(".json").exists():
        count += 1
        path = home / f"step_{step:08d}_{count}.pt"
    return path


def _prune(newest_first: list[Found], keep: int) -> None:
    """Remove what is neither new nor permanent; the manifest first, so that none is left alone."""
    for found in newest_first[max(keep, 2) :]:
        if not found.permanent:
            try:
                found.manifest.unlink(missing_ok=True)
                found.path.unlink(missing_ok=True)
            except OSError as error:
                log.warning("cannot remove %s: %s", found.path, error.strerror)


class _HashingFile:
    """A file for `torch.save`, which writes strictly forward, that hashes what passes through."""

    def __init__(self, file: io.BufferedWriter) -> None:
        self.file, self.sha256, self.bytes = file, hashlib.sha256(), 0
        self.error: OSError | None = None

    def write(self, data: bytes) -> int:
        try:
            self.file.write(data)
        except OSError as error:  # torch.save turns it into a RuntimeError about positions
            self.error = error
            raise
        self.sha256.update(data)
        self.bytes += len(data)
        return len(data)

    def flush(self) -> None:
        self.file.flush()


def _write(path: Path, state: Mapping[str, Any]) -> tuple[int, str]:
    """Write `state` and wait until it is on disk; returns its size and SHA-256."""
    with open(path, "wb") as file:
        hashing = _HashingFile(file)
        try:
            torch.save(dict(state), hashing)  # type: ignore[arg-type]
        except (OSError, RuntimeError) as error:
            raise (hashing.error or error) from None
        file.flush()
        os.fsync(file.fileno())
    # Reads the structure and not the tensors: who cannot resume should learn it at the first
    # checkpoint and not after a week.
    with _loadable():
        torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    return hashing.bytes, hashing.sha256.hexdigest()


@contextlib.contextmanager
def _loadable() -> Iterator[None]:
    try:
        yield
    except pickle.UnpicklingError as error:
        raise TypeError(
            f"the state to save cannot be loaded safely: {_reason(error)}; accepted are tensors, "
            "numbers, strings, and lists, tuples and dicts of them"
        ) from None


def _write_text(path: Path, text: str) -> None:
    """Replace a small file atomically, on disk when this returns."""
    temporary = path.with_name(path.name + TEMPORARY)
    with _removing(temporary):
        _write_synced(temporary, text)
        os.replace(temporary, path)


def _write_synced(path: Path, text: str) -> None:
    with open(path, "w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


@contextlib.contextmanager
def _writing(target: Path, *unfinished: Path) -> Iterator[None]:
    """Turn what a failing write raises into a `CheckpointError`; remove what is unfinished."""
    with _removing(*unfinished):
        try:
            yield
        except (OSError, RuntimeError, ValueError) as error:
            reason = getattr(error, "strerror", None) or error
            raise CheckpointError(f"{target}: {' '.join(str(reason).split())}") from error


@contextlib.contextmanager
def _removing(*unfinished: Path) -> Iterator[None]:
    try:
        yield
    except BaseException:
        for path in unfinished:
            with contextlib.suppress(OSError):
                path.unlink(missing_ok=True)
        raise


def _sync(path: Path) -> None:
    with open(path, "rb") as file:
        os.fsync(file.fileno())


def pack(state: Mapping[str, Any]) -> bytes:
    """A small state as bytes, so that hundreds of them cost a checkpoint next to nothing.

    Raises `TypeError` as `save` does.
    """
    buffer = io.BytesIO()
    torch.save(dict(state), buffer)
    with _loadable():
        unpack(buffer.getbuffer())
    return buffer.getvalue()


def unpack(packed: bytes | memoryview) -> dict[str, Any]:
    """What `pack` packed; executes nothing."""
    state: dict[str, Any] = torch.load(io.BytesIO(packed), map_location="cpu", weights_only=True)
    return state


# --- finding and loading ---------------------------------------------------------------------


def find(folder: Path) -> list[Found]:
    """The run folder's checkpoints, the last saved first, as far as manifests can be read."""
    return _scan(folder / "checkpoints")[0]


def newest_good(folder: Path) -> Found | None:
    """The newest checkpoint with the right size and SHA-256, or None.

    Logs a warning naming each damaged one that it passes over.
    """
    return next(_good(folder), None)


def load_newest(
    folder: Path, map_location: torch.device | str = "cpu"
) -> tuple[Found, dict[str, Any]] | None:
    """The newest checkpoint that is good and its state, or None.

    Logs a warning naming each damaged one that it passes over.
    """
    for found in _good(folder):
        try:
            return found, _read(found.path, map_location)
        except ValueError as error:
            log.warning("%s; trying the one before", error)
    return None


def load(
    path: Path, map_location: torch.device | str = "cpu", *, sha256: str | None = None
) -> dict[str, Any]:
    """The state of a given checkpoint file, or of a run folder's newest good one.

    Raises `ValueError`, in one line, for what is not there, damaged, no checkpoint, or other bytes
    than those of `sha256`.
    """
    if path.is_dir():
        newest = load_newest(path, map_location)
        if newest is None:
            raise ValueError(f"no good checkpoint in {path / 'checkpoints'}")
        return newest[1]
    if not path.is_file():
        raise ValueError(f"{path} does not exist; expected a checkpoint (.pt) or a run folder")
    manifest = path.with_suffix(".json")
    if manifest.exists():
        try:
            found = Found.read(manifest)
            problem = _problem(found)
            if sha256 not in (None, found.sha256):
                problem = f"its SHA-256 is {found.sha256[:12]}, rank 0 reads {(sha256 or '')[:12]}"
        except (OSError, ValueError) as error:
            problem = f"its manifest {manifest.name} cannot be read: {error}"
        if problem is not None:
            raise ValueError(f"checkpoint {path} is damaged: {problem}")
    else:
        log.warning("%s has no manifest %s beside it: not verified", path, manifest.name)
    return _read(path, map_location)


def _scan(home: Path) -> tuple[list[Found], list[Path]]:
    """Readable manifests, the last saved first, and unreadable ones."""
    found: list[Found] = []
    unreadable: list[Path] = []
    for manifest in sorted(home.glob("step_*.json")):
        try:
            found.append(Found.read(manifest))
        except FileNotFoundError:  # pruned meanwhile by the run that we look at
            continue
        except (OSError, ValueError):
            unreadable.append(manifest)
    return sorted(found, key=lambda f: (f.serial, f.step), reverse=True), unreadable


def _good(folder: Path) -> Iterator[Found]:
    found, unreadable = _scan(folder / "checkpoints")
    for manifest in unreadable:
        log.warning("checkpoint manifest %s cannot be read: passed over", manifest)
    for candidate in found:
        problem = _problem(candidate)
        if problem is None:
            yield candidate
        else:
            log.warning(
                "checkpoint %s is damaged (%s); trying the one before", candidate.path, problem
            )


def _problem(found: Found) -> str | None:
    """What is wrong with a checkpoint's file, or None."""
    try:
        return _mismatch(found)
    except OSError as error:
        return error.strerror or str(error)


def _mismatch(found: Found) -> str | None:
    """How a checkpoint's file differs from its manifest, or None; raises `OSError`."""
    try:
        size = found.path.stat().st_size
    except FileNotFoundError:
        return "its file is missing"
    if size != found.bytes:
        return f"{size} bytes, its manifest says {found.bytes}"
    with open(found.path, "rb") as file:
        digest = _sha256(file)
    return None if digest == found.sha256 else "its SHA-256 is not the manifest's"


def _sha256(file: io.BufferedReader) -> str:
    digest = hashlib.sha256()
    while block := file.read(1 << 22):
        digest.update(block)
    return digest.hexdigest()


def _read(path: Path, map_location: torch.device | str) -> dict[str, Any]:
    try:
        state = torch.load(path, map_location=map_location, weights_only=True)
    except Exception as error:  # bytes that are no checkpoint make the unpickler raise anything
        raise ValueError(f"{path} cannot be loaded as a checkpoint: {_reason(error)}") from error
    if not isinstance(state, dict):
        raise ValueError(f"{path} is not a checkpoint: it holds a {type(state).__name__}")
    return state


def _reason(error: Exception) -> str:
    """What torch found, in one line, without its advice to turn `weights_only` off."""
    text = str(error)
    if forbidden := re.search(r"GLOBAL (\S+)", text):
        return f"{forbidden[1]} in it could execute code"
    text = text.partition("WeightsUnpickler error: ")[2] or text
    line = " ".join(text.strip().partition("\n")[0].split())
    known = isinstance(error, OSError | RuntimeError | pickle.UnpicklingError)
    return line if known else f"{type(error).__name__} {line}"
