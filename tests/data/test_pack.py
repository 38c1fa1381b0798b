"""ddp-ssl pack-shards where it must stop: no room, a wrong `--out`, nothing to pack, Ctrl-C."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from PIL import Image

from ddp_ssl.commands import pack_shards, shard_writer
from ddp_ssl.data.datasets.shards import open_shards
from tests.data.images import write


@pytest.fixture(autouse=True)
def _cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DDP_SSL_CACHE", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture
def files(tmp_path: Path) -> Path:
    for i in range(12):
        write(tmp_path / "files" / ("train" if i < 9 else "val") / f"c{i % 3}" / f"{i}.jpg", i)
    return tmp_path / "files"


def pack(root: Path, out: Path, *more: str) -> int:
    options = ["--out", str(out), "--shard-size", "8e3", "--workers", "3"]
    return pack_shards.main([*options, "data.name=folder", f"data.root={root}", *more])


def said(capsys: pytest.CaptureFixture[str]) -> str:
    (line,) = capsys.readouterr().err.splitlines()
    return str(line)


def left(out: Path) -> list[str]:
    return [path.name for path in out.glob(".part-*")]


def has_free(monkeypatch: pytest.MonkeyPatch, free: int) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=free, total=10**9))


def test_an_image_too_large_for_the_config_is_not_decoded(
    files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Of those that PIL would write anew: its header is enough."""
    Image.new("RGB", (40, 30)).save(files / "train" / "c0" / "large.jp2", "JPEG2000")
    with monkeypatch.context() as patch:
        patch.setattr(shard_writer, "rewritten", None)
        assert pack(files, tmp_path / "out", "data.max_pixels=1199") == 2
    assert "large.jp2 (1,200 pixels, more than data.max_pixels)" in said(capsys)
    assert pack(files, tmp_path / "other", "data.max_pixels=1200") == 0


def test_a_small_disk_is_known_at_once(
    files: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "out"
    with pytest.MonkeyPatch.context() as patch:
        has_free(patch, 1000)
        assert pack(files, out) == 2
    line = said(capsys)
    assert f"--out: {out} has 0.000 GB free, the shards need 0.0" in line
    assert "call again" not in line
    assert not list(out.glob("*.tar"))
    assert pack(files, out) == 0
    # What is packed already needs no room, and less than one shard is missing.
    (out / "train-00000.tar").unlink()
    has_free(monkeypatch, 15_000)
    assert pack(files, out) == 0


def test_the_room_that_is_asked_for_is_what_is_taken(
    files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plans: list[shard_writer.Shard] = []
    plan = pack_shards._plan

    def spied(*arguments: Any) -> list[shard_writer.Shard]:
        made = plan(*arguments)
        plans.extend(made)
        return made

    monkeypatch.setattr(pack_shards, "_plan", spied)
    assert pack(files, tmp_path / "out") == 0
    assert len(plans) > 2
    for shard in plans:
        assert (tmp_path / "out" / shard.tar).stat().st_size == shard.size


def test_a_disk_that_becomes_full(
    files: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    out = tmp_path / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "posix_fadvise", full)
        assert pack(files, out) == 1
    assert said(capsys) == (
        f"ddp_ssl: error: --out: {out} is full (No space left on device): make room; "
        "call again to go on"
    )
    assert left(out) == []
    assert pack(files, out) == 0


def a_file(tmp_path: Path) -> Path:
    (tmp_path / "file").write_text("mine")
    return tmp_path / "file"


def in_proc(_: Path) -> Path:
    return Path("/proc/shards")


def in_a_file(tmp_path: Path) -> Path:
    return a_file(tmp_path) / "out"


@pytest.mark.parametrize("where", [a_file, in_proc, in_a_file])
def test_an_out_that_cannot_be(
    files: Path,
    tmp_path: Path,
    where: Callable[[Path], Path],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """It is said before the images are looked at, and calling again is not advised."""
    out = where(tmp_path)
    monkeypatch.setattr(pack_shards, "_sizes", lambda *_: pytest.fail("looked at images"))
    assert pack(files, out) == 2
    line = said(capsys)
    assert line.startswith(f"ddp_ssl: error: --out: {out} cannot be written: ")
    assert "call again" not in line


def test_a_disk_that_becomes_read_only(
    files: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def fails(*_: object) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(tmp_path / "out" / "x"))

    monkeypatch.setattr(shard_writer, "_note", fails)
    assert pack(files, tmp_path / "out") == 1
    assert said(capsys) == f"ddp_ssl: error: {tmp_path}/out/x: Read-only file system"


@pytest.mark.parametrize("inside", ["", "train/c0", "new/shards"])
def test_the_data_s_own_folder_is_refused(
    files: Path, tmp_path: Path, inside: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "link").symlink_to(files)
    before = sorted(files.rglob("*"))
    assert pack(files, tmp_path / "link" / inside) == 2
    where = "is inside" if inside else "is"
    assert f"{where} data.root; accepted: a folder apart from the data" in said(capsys)
    assert sorted(files.rglob("*")) == before


def test_nothing_to_train_on_is_refused(
    files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    skip = tmp_path / "skip.txt"
    skip.write_text("".join(f"{path}\n" for path in (files / "train").rglob("*.jpg")))
    assert pack(files, tmp_path / "out", f"data.skip={skip}") == 2
    assert f"data.skip: {skip} lists all 9 training images" in said(capsys)
    assert not list((tmp_path / "out").glob("*"))[1:]  # but the lock


def test_a_suggested_key_is_quoted(
    files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (files / "train" / "c0" / "0.jpg").write_bytes(b"")
    assert pack(files, tmp_path / "a b") == 2
    assert f"data.skip='{tmp_path}/a b/unreadable.txt' leaves" in said(capsys)


def test_ctrl_c_is_one_line(files: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    code = (
        "import sys, time; from ddp_ssl.commands import pack_shards as p, shard_writer as w\n"
        "read = w._read\n"
        "w._read = lambda *a: (time.sleep(0.2), read(*a))[1]\n"
        "sys.exit(p.main(sys.argv[1:]))"
    )
    arguments = ["--out", str(out), "--shard-size", "8e3", "data.name=folder", f"data.root={files}"]
    process = subprocess.Popen(
        [sys.executable, "-c", code, *arguments],
        stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip
    until = time.monotonic() + 60
    while not left(out) and time.monotonic() < until and process.poll() is None:
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGINT)
    _, err = process.communicate(timeout=30)
    assert err == "ddp_ssl: interrupted; call again to go on\n"
    assert process.returncode == 130
    assert left(out) == []
    assert pack(files, out) == 0
    assert len(open_shards(out).train) == 9
