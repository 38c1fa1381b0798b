"""ddp-ssl prepare-data: what is there, what is missing, and downloads from this machine."""

from __future__ import annotations

import functools
import hashlib
import threading
import zipfile
from collections.abc import Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.error import URLError

import numpy as np
import pytest

from ddp_ssl.commands import prepare_data
from ddp_ssl.commands.prepare_data import Counts, main
from tests.data.images import write


@pytest.fixture
def cinic(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for split in ("train", "test"):
        for name in ("bird", "cat"):
            write(tmp_path / "data" / split / name / "1.png", height=4, width=4)
    monkeypatch.setitem(prepare_data.EXPECTED, "cinic10", (Counts(2, 2, 2),))
    return tmp_path / "data"


def test_a_complete_data_set(cinic: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["cinic10", str(cinic)]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "cinic10 train: 2 images in 2 classes",
        "cinic10 val: 2 images in 2 classes",
        "cinic10: complete",
    ]


def test_what_is_missing(cinic: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (cinic / "test/cat/1.png").unlink()
    (cinic / "train/cat/1.png").write_bytes(b"")
    assert main(["cinic10", str(cinic)]) == 1
    bad = cinic / "train/cat/1.png"
    assert capsys.readouterr().err.splitlines() == [
        f"ddp_ssl: error: train: 1 of 2 files looked at are empty, first {bad}",
        "ddp_ssl: error: val has images of 1 of 2 classes",
        "ddp_ssl: error: found 2 training and 1 validation images, 2 classes, expected 2 "
        "training and 2 validation images, 2 classes",
    ]


def test_imagenet_cannot_be_fetched(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["imagenet", str(tmp_path), "--download"]) == 1
    assert "ImageNet needs a login" in capsys.readouterr().err
    for name, told in (
        ("imagenet", "ImageNet needs a login"),
        ("imagenet100", "ImageNet-100 is a part of ImageNet"),
    ):
        assert main([name, str(tmp_path)]) == 1
        said = capsys.readouterr().err
        assert f"has no train/; data.name={name} looks for " in said
        assert told in said
        assert "says where from" not in said
        assert said.count("\n") == 1


@pytest.mark.parametrize("name", sorted(set(prepare_data.EXPECTED) - set(prepare_data.BY_HAND)))
@pytest.mark.parametrize("there", [True, False])
def test_what_can_be_fetched_says_so(
    name: str, there: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = tmp_path / "a folder"
    if there:
        root.mkdir()
    assert main([name, str(root)]) == 1
    said = capsys.readouterr().err
    assert said.endswith("; --download fetches it\n")
    assert said.count("--download") == said.count("\n") == 1
    assert "ddp-ssl prepare-data" not in said  # this very command


def test_digits_have_no_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["digits", str(tmp_path)]) == 1
    said = capsys.readouterr().err
    assert "is not used by data.name=digits" in said
    assert "pip install" not in said
    assert said.count("\n") == 1


@pytest.mark.parametrize("name", ["cifar10", "cifar100", "stl10", "inat21", "inat21_mini"])
def test_a_failed_download_says_from_where(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails(*_: object, **__: object) -> None:
        raise URLError("no network")

    for module in ("cifar", "stl10", "inaturalist"):
        monkeypatch.setattr(f"torchvision.datasets.{module}.download_and_extract_archive", fails)
    assert main([name, str(tmp_path), "--download"]) == 1
    said = capsys.readouterr().err
    address = {"c": "www.cs.toronto.edu", "s": "ai.stanford.edu", "i": "ml-inat-competition"}
    assert "no network" in said
    assert said.startswith("ddp_ssl: error: --download: http")
    assert address[name[0]] in said
    assert "(MD5 " in said
    assert said.count("\n") == 1


@pytest.fixture
def published(tmp_path: Path) -> Iterator[tuple[Path, str]]:
    """A folder and its address on this machine."""
    folder = tmp_path / "published"
    folder.mkdir()

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

    handler = functools.partial(Quiet, directory=str(folder))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield folder, f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_an_archive_is_fetched_checked_and_unpacked(
    cinic: Path,
    tmp_path: Path,
    published: tuple[Path, str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder, address = published
    with zipfile.ZipFile(folder / "C.zip", "w") as packed:
        for file in cinic.rglob("*.png"):
            packed.write(file, file.relative_to(cinic))
    md5 = hashlib.md5((folder / "C.zip").read_bytes()).hexdigest()
    monkeypatch.setitem(prepare_data.FILES, "cinic10", (f"{address}/C.zip", "0" * 32))
    assert main(["cinic10", str(tmp_path / "bad"), "--download"]) == 1
    assert f"{address}/C.zip cannot be fetched (MD5 {'0' * 32}): " in capsys.readouterr().err
    monkeypatch.setitem(prepare_data.FILES, "cinic10", (f"{address}/C.zip", md5))
    assert main(["cinic10", str(tmp_path / "new"), "--download"]) == 0


def test_a_file_is_fetched(
    tmp_path: Path, published: tuple[Path, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, address = published
    arrays = {}
    for split in ("train", "test"):
        arrays[f"{split}_labels"] = np.arange(8, dtype=np.uint8)[:, None]
        arrays[f"{split}_images"] = np.zeros((8, 28, 28, 3), np.uint8)
    np.savez(folder / "bloodmnist.npz", **arrays)
    md5 = hashlib.md5((folder / "bloodmnist.npz").read_bytes()).hexdigest()
    url = f"{address}/bloodmnist.npz?download=1"  # as Zenodo's
    monkeypatch.setitem(prepare_data.FILES, "blood", (url, md5))
    monkeypatch.setitem(prepare_data.EXPECTED, "blood", (Counts(8, 8, 8),))
    assert main(["blood", str(tmp_path / "new"), "--download"]) == 0
