"""Checkpoints: atomic save, verified load, retention.

A checkpoint is `checkpoints/step_00001234.pt` and its manifest `step_00001234.json`, which is
renamed into place last: a file without a manifest was never committed. Loading verifies size and
SHA-256 (`torch.load` misses a flipped bit) and executes nothing (`weights_only=True`).

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

from ddp_ssl.errors import CheckpointError, refused
from ddp_ssl.utils.files import (
    TEMPORARY,
    if_readable,
    removed_on_error,
    replace_text,
    sync,
    sync_folder,
    write_synced,
)
from ddp_ssl.utils.sealed import CHECKSUM, sealed, sha256_of, unsealed
from ddp_ssl.utils.text import one_line

logger = logging.getLogger("ddp_ssl")

DAMAGED = ".damaged"


@dataclasses.dataclass(frozen=True)
class CheckpointInfo:
    """A committed checkpoint: its file and the fields of its manifest."""

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
    """Order of saving in this folder. The newest checkpoint is the last one *saved*: a run that
    went back to an older step must not continue from the later steps that it left."""

    @property
    def manifest(self) -> Path:
        """The manifest's path."""
        return self.path.with_suffix(".json")

    def to_json(self) -> str:
        """The manifest's text."""
        fields = {k: v for k, v in vars(self).items() if k != "path"}
        return sealed({"file": self.path.name, **fields})

    @staticmethod
    def read(manifest: Path) -> CheckpointInfo:
        """Read a manifest. Raises `OSError` or `ValueError` if that cannot be done."""
        return CheckpointInfo.parse(manifest, manifest.read_text())

    @staticmethod
    def parse(manifest: Path, text: str) -> CheckpointInfo:
        """The manifest of this path and text. Raises `ValueError`."""
        with refused("not a manifest"):
            fields = json.loads(text)
            if CHECKSUM in fields:  # earlier versions wrote none
                fields = unsealed(text)
            return CheckpointInfo(path=manifest.with_name(fields.pop("file")), **fields)


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
    `RuntimeError`), with the older checkpoints intact and no temporary left. Raises `TypeError` if
    `state` holds values that `weights_only=True` refuses to load, such as NumPy arrays.
    """
    home = folder / "checkpoints"
    with _writing(home):
        present, _ = _scan(home)
        path = _free_name(home, step)
    temporary = path.with_name(path.name + TEMPORARY)
    with _writing(path, temporary):
        home.mkdir(parents=True, exist_ok=True)
        size, sha256 = _write(temporary, state)
        found = CheckpointInfo(
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
    with _writing(path, found.manifest, path):  # one is useless without the other
        replace_text(found.manifest, found.to_json())
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
        source = CheckpointInfo.read(newest_path.with_suffix(".json"))
        temporary.unlink(missing_ok=True)
        try:
            os.link(newest_path, temporary)
        except OSError:  # a file system without hard links
            shutil.copyfile(newest_path, temporary)
            sync(temporary)
        # The new manifest waits beside the old one until the file is there, so that `clean_up` can
        # finish the exchange if the process dies in the middle of it.
        manifest = best.with_suffix(".json")
        waiting = _waiting(manifest)
        write_synced(waiting, dataclasses.replace(source, path=best).to_json())
        os.replace(temporary, best)
        temporary.unlink(missing_ok=True)  # renaming onto a link to the same file does nothing
        os.replace(waiting, manifest)
        sync_folder(home)
    return best


def clean_up(folder: Path) -> None:
    """Clean up after a process that died. Call it at start, before the first `save`.

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
            logger.info("removing %s, which was not completely saved", path)
            path.unlink(missing_ok=True)
    readable, unreadable = _scan(home)
    for manifest in unreadable:
        _set_aside(manifest)
    for found in readable:
        try:
            problem = _problem(found)
        except OSError:  # a file system that fails for a moment is no reason to move anything
            break
        if problem is None:
            break
        _set_aside(found.manifest)


def _waiting(manifest: Path) -> Path:
    """The manifest of a file that is about to be exchanged."""
    return manifest.with_name(manifest.name + TEMPORARY)


def _finish_best(home: Path) -> None:
    waiting = _waiting(home / "best.json")
    if if_readable(lambda: _problem(CheckpointInfo.read(waiting)) is None):
        os.replace(waiting, home / "best.json")


def _set_aside(manifest: Path) -> None:
    for path in (manifest, manifest.with_suffix(".pt")):
        if path.exists():
            os.replace(path, path.with_name(path.name + DAMAGED))
    logger.warning("damaged checkpoint kept as %s%s", manifest.with_suffix(".pt"), DAMAGED)


def _free_name(home: Path, step: int) -> Path:
    """`step_00001234.pt`; a second checkpoint of a step never overwrites the first."""
    path, count = home / f"step_{step:08d}.pt", 1
    while path.exists() or path.with_suffix(".json").exists():
        count += 1
        path = home / f"step_{step:08d}_{count}.pt"
    return path


def _prune(newest_first: list[CheckpointInfo], keep: int) -> None:
    """Remove checkpoints that are neither new nor permanent, each manifest before its file."""
    for found in newest_first[max(keep, 2) :]:
        if not found.permanent:
            try:
                found.manifest.unlink(missing_ok=True)
                found.path.unlink(missing_ok=True)
            except OSError as error:
                logger.warning("cannot remove %s: %s", found.path, error.strerror)


class _HashingFile:
    """A file for `torch.save` that hashes the bytes on their way; they are written in order."""

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
    # This reads the structure and not the tensors. A state that cannot be resumed is found at the
    # first checkpoint and not after a week.
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


@contextlib.contextmanager
def _writing(target: Path, *unfinished: Path) -> Iterator[None]:
    """Turn the error of a failing write into a `CheckpointError`; remove unfinished files."""
    with removed_on_error(*unfinished):
        try:
            yield
        except (OSError, RuntimeError, ValueError) as error:
            reason = getattr(error, "strerror", None) or error
            raise CheckpointError(f"{target}: {one_line(reason)}") from error


def to_bytes(state: Mapping[str, Any]) -> bytes:
    """A small state as bytes, so that hundreds of them hardly slow a checkpoint.

    Raises `TypeError` as `save` does.
    """
    buffer = io.BytesIO()
    torch.save(dict(state), buffer)
    with _loadable():
        from_bytes(buffer.getbuffer())
    return buffer.getvalue()


def from_bytes(packed: bytes | memoryview) -> dict[str, Any]:
    """The state of `to_bytes`; executes nothing."""
    state: dict[str, Any] = torch.load(io.BytesIO(packed), map_location="cpu", weights_only=True)
    return state


# --- finding and loading ---------------------------------------------------------------------


def find(folder: Path) -> list[CheckpointInfo]:
    """The run folder's checkpoints, the last saved first, as far as manifests can be read."""
    return _scan(folder / "checkpoints")[0]


def newest_good(folder: Path) -> CheckpointInfo | None:
    """The newest checkpoint with the right size and SHA-256, or None.

    Logs a warning naming each damaged one that it passes over.
    """
    return next((found for found, _ in _good(folder)), None)


def load_newest(
    folder: Path, map_location: torch.device | str = "cpu"
) -> tuple[CheckpointInfo, dict[str, Any]] | None:
    """The newest checkpoint that is good and its state, or None.

    The file that was checked is the one that is loaded, even if the run prunes it meanwhile. Logs a
    warning naming each damaged one that it passes over.
    """
    for found, file in _good(folder):
        try:
            return found, _read(file, found.path, map_location)
        except ValueError as error:
            logger.warning("%s; trying the one before", error)
    return None


def load(
    path: Path, map_location: torch.device | str = "cpu", *, sha256: str | None = None
) -> dict[str, Any]:
    """The state of a given checkpoint file, or of a run folder's newest good one.

    Raises `ValueError`, in one line, for a file that is missing, damaged or no checkpoint, or whose
    bytes are not those of `sha256`.
    """
    if path.is_dir():
        newest = load_newest(path, map_location)
        if newest is None:
            raise ValueError(f"no good checkpoint in {path / 'checkpoints'}")
        return newest[1]
    return load_file(path, map_location, sha256=sha256)[1]


def load_file(
    path: Path, map_location: torch.device | str = "cpu", *, sha256: str | None = None
) -> tuple[str, dict[str, Any]]:
    """The SHA-256 and the state of a checkpoint file; raises `ValueError` as `load` does.

    A file that the run prunes or exchanges meanwhile is read as it was.
    """
    manifest = path.with_suffix(".json")
    if path == manifest:
        raise ValueError(
            f"{path} cannot be loaded as a checkpoint; {path.stem}.pt beside it would be accepted"
        )

    def manifests() -> tuple[str | None, str | None]:
        """`save_best` exchanges the file and then its manifest, which waits until then."""
        return _text(manifest), _text(_waiting(manifest))

    try:
        while True:
            before, waiting = manifests()
            with open(path, "rb") as file:
                digest, problem = _verify(file, manifest, before, sha256)
                if problem is not None and waiting is not None:
                    digest, other = _verify(file, manifest, waiting, sha256)
                    problem = problem if other else None
                if problem is None:
                    file.seek(0)
                    state = _read(file, path, map_location)
                    if before is None and "step" in state:  # not weights alone
                        logger.warning("%s has no manifest beside it: not verified", path)
                    return digest, state
            if (before, waiting) == manifests():
                raise ValueError(f"checkpoint {path} is damaged: {problem}")
    except FileNotFoundError:
        raise ValueError(
            f"{path} does not exist; expected a checkpoint (.pt) or a run folder"
        ) from None
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from None


def _verify(
    file: io.BufferedReader, manifest: Path, text: str | None, sha256: str | None
) -> tuple[str, str | None]:
    """The SHA-256 of an open file, and how it differs from its manifest's text, or None."""
    file.seek(0)
    if text is None:
        digest = sha256_of(file)
        other = sha256 not in (None, digest)
        return digest, f"its SHA-256 is not {(sha256 or '')[:12]}, rank 0's" if other else None
    try:
        found = CheckpointInfo.parse(manifest, text)
    except ValueError as error:
        return "", f"its manifest {manifest.name} cannot be read: {error}"
    if sha256 not in (None, found.sha256):
        return "", f"its SHA-256 is {found.sha256[:12]}, rank 0 reads {(sha256 or '')[:12]}"
    return found.sha256, _mismatch(found, file)


def _text(manifest: Path) -> str | None:
    """A manifest's text; None if there is no manifest."""
    try:
        return manifest.read_text(errors="replace")
    except FileNotFoundError:
        return None


def _scan(home: Path) -> tuple[list[CheckpointInfo], list[Path]]:
    """Readable manifests, the last saved first, and unreadable ones."""
    found: list[CheckpointInfo] = []
    unreadable: list[Path] = []
    for manifest in sorted(home.glob("step_*.json")):
        try:
            found.append(CheckpointInfo.read(manifest))
        except FileNotFoundError:  # pruned meanwhile by the run that we look at
            continue
        except (OSError, ValueError):
            unreadable.append(manifest)
    return sorted(found, key=lambda f: (f.serial, f.step), reverse=True), unreadable


def _good(folder: Path) -> Iterator[tuple[CheckpointInfo, io.BufferedReader]]:
    """The good checkpoints, the last saved first, each with its file, open at the beginning."""
    passed: set[Path] = set()
    while True:
        found, unreadable = _scan(folder / "checkpoints")
        for manifest in set(unreadable) - passed:
            logger.warning("checkpoint manifest %s cannot be read: passed over", manifest)
        passed |= set(unreadable)
        for candidate in found:
            if candidate.path in passed:
                continue
            try:
                with open(candidate.path, "rb") as file:
                    problem = _mismatch(candidate, file)
                    if problem is None:
                        file.seek(0)
                        yield candidate, file
            except OSError as error:
                if not candidate.manifest.exists():
                    break  # pruned meanwhile by the run that we look at: there are newer ones
                missing = isinstance(error, FileNotFoundError)
                problem = "its file is missing" if missing else error.strerror or str(error)
            passed.add(candidate.path)
            if problem is not None:
                logger.warning(
                    "checkpoint %s is damaged (%s); trying the one before", candidate.path, problem
                )
        else:
            return


def _problem(found: CheckpointInfo) -> str | None:
    """How a checkpoint's file differs from its manifest, or None; raises `OSError`."""
    try:
        with open(found.path, "rb") as file:
            return _mismatch(found, file)
    except FileNotFoundError:
        return "its file is missing"


def _mismatch(found: CheckpointInfo, file: io.BufferedReader) -> str | None:
    """How an open file differs from its manifest, or None."""
    size = os.fstat(file.fileno()).st_size
    if size != found.bytes:
        return f"{size} bytes, its manifest says {found.bytes}"
    return None if sha256_of(file) == found.sha256 else "its SHA-256 is not the manifest's"


def _read(file: io.BufferedReader, path: Path, map_location: torch.device | str) -> dict[str, Any]:
    try:
        state = torch.load(file, map_location=map_location, weights_only=True)
    except Exception as error:  # bytes that are no checkpoint make the unpickler raise anything
        raise ValueError(f"{path} cannot be loaded as a checkpoint: {_reason(error)}") from error
    if not isinstance(state, dict):
        raise ValueError(f"{path} is not a checkpoint: it holds a {type(state).__name__}")
    return state


def _reason(error: Exception) -> str:
    """Torch's reason in one line, without its advice to turn `weights_only` off."""
    text = str(error)
    if forbidden := re.search(r"GLOBAL (\S+)", text):
        return f"{forbidden[1]} in it could execute code"
    text = text.partition("WeightsUnpickler error: ")[2] or text
    line = one_line(text.strip().partition("\n")[0])
    known = isinstance(error, OSError | RuntimeError | pickle.UnpicklingError)
    return line if known else f"{type(error).__name__} {line}"
