"""ddp-ssl check-data and the decoder behind it: what is found, and what is let through."""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from ddp_ssl.commands import check_data, pack_shards
from ddp_ssl.config import Data
from ddp_ssl.data.datasets import registry, shards
from ddp_ssl.data.datasets.split import Split
from ddp_ssl.data.loading.decodable import Decoder, looks_whole
from tests.data.images import picture, write


@pytest.fixture(autouse=True)
def _cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DDP_SSL_CACHE", str(tmp_path_factory.mktemp("cache")))


def encoded(kind: str, mode: str = "RGB", size: tuple[int, int] | None = None, **how: Any) -> bytes:
    image = Image.fromarray(picture(0, 90, 120)).convert(mode)
    buffer = io.BytesIO()
    (image.resize(size) if size else image).save(buffer, kind, **how)
    return buffer.getvalue()


def deep() -> bytes:
    """A PNG of 16-bit gray."""
    gray = np.asarray(Image.fromarray(picture(0)).convert("L")).astype(np.uint16) * 257
    buffer = io.BytesIO()
    Image.fromarray(gray).save(buffer, "PNG")
    return buffer.getvalue()


def broken_tables() -> bytes:
    content = bytearray(JPEG)
    content[150:400] = np.random.default_rng(0).integers(0, 256, 250, np.uint8).tobytes()
    return bytes(content)


JPEG, PNG = encoded("JPEG"), encoded("PNG")
NOISE = np.random.default_rng(0).integers(0, 256, 5000, np.uint8).tobytes()
BAD: dict[str, bytes] = {
    "random": NOISE,
    "empty": b"",
    "one byte": b"\xff",
    "start and zeros": b"\xff\xd8\xff\xe0" + bytes(2000),
    "html": b"<html><body>404 not found</body></html>" * 20,
    "cut in the header": JPEG[:300],
    "cut to 10%": JPEG[: len(JPEG) // 10],
    "cut to 50%": JPEG[: len(JPEG) // 2],
    "cut at the end": JPEG[:-200],
    "PNG cut": PNG[: len(PNG) // 2],
    "GIF": encoded("GIF"),
}
GOOD: dict[str, bytes] = {
    "JPEG": JPEG,
    "trailing bytes": JPEG + b"garbage" * 100,
    "PNG": PNG,
    "RGBA": encoded("PNG", "RGBA"),
    "palette": encoded("PNG", "P"),
    "16 bit": deep(),
    "gray": encoded("JPEG", "L"),
    "CMYK": encoded("JPEG", "CMYK"),
    "progressive": encoded("JPEG", progressive=True),
    "WebP": encoded("WEBP"),
    "BMP": encoded("BMP"),
    "TIFF": encoded("TIFF"),
    "1 x 1": encoded("JPEG", size=(1, 1)),
    "2000 x 3": encoded("JPEG", size=(2000, 3)),
}


def of(content: bytes) -> np.ndarray:  # type: ignore[type-arg]
    return np.frombuffer(content, np.uint8)


@pytest.fixture(scope="module")
def decoder() -> Decoder:
    return Decoder()


@pytest.mark.parametrize("kind", BAD)
def test_bad_images_are_found(kind: str, decoder: Decoder) -> None:
    assert not looks_whole(of(BAD[kind]))
    reason = decoder.problem(of(BAD[kind]))
    assert reason
    assert "\n" not in reason
    assert len(reason) < 200
    assert decoder.problem(of(JPEG)) is None  # it goes on after an error


@pytest.mark.parametrize("kind", GOOD)
def test_good_images_are_let_through(kind: str, decoder: Decoder) -> None:
    assert decoder.problem(of(GOOD[kind])) is None


def test_damage_in_the_middle_is_found_by_decoding_alone(decoder: Decoder) -> None:
    content = of(broken_tables())
    assert looks_whole(content)
    assert decoder.problem(content)


def test_avif_is_refused(decoder: Decoder) -> None:
    try:
        content = encoded("AVIF")
    except KeyError:
        pytest.skip("this PIL writes no AVIF")
    reason = decoder.problem(of(content))
    assert reason is not None
    assert "AVIF" in reason


# --- the tool ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Good images of all kinds in both splits, and bad ones of all kinds in train/b."""
    root = tmp_path_factory.mktemp("files")
    for name, content in GOOD.items():
        for folder in ("train/a", "val/a"):
            write(root / folder / "plain.jpg")
            (root / folder / f"{name}.jpg").write_bytes(content)
    (root / "train" / "b").mkdir()
    for name, content in BAD.items():
        (root / "train" / "b" / f"{name}.jpg").write_bytes(content)
    (root / "train" / "b" / "tables.jpg").write_bytes(broken_tables())
    (root / "val" / "a" / "plain.jpg").write_bytes(b"")
    return root


@pytest.fixture(scope="module", params=["quick", "full"])
def checked(
    files: Path, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest
) -> tuple[bool, Path, int, str]:
    """Whether all were decoded, the list, the exit code and what was said.

    In a process of its own: the tool forks, which one with DALI's threads should not.
    """
    out = tmp_path_factory.mktemp("checked") / "bad.txt"
    done = subprocess.run(
        [sys.executable, "-m", "ddp_ssl.cli", "check-data",
         *(["--full"] if request.param == "full" else []), "--out", str(out), "--workers", "2",
         "data.name=folder", f"data.root={files}"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    return request.param == "full", out, done.returncode, done.stderr


def listed(out: Path) -> dict[str, str]:
    return dict(line.split("\t") for line in out.read_text().splitlines())


def test_bad_images_are_listed_and_no_others(
    files: Path, checked: tuple[bool, Path, int, str]
) -> None:
    full, out, code, said = checked
    assert code == 1
    expected = {str(files / "train" / "b" / f"{name}.jpg") for name in BAD}
    expected |= {str(files / "val" / "a" / "plain.jpg")}
    if full:
        expected |= {str(files / "train" / "b" / "tables.jpg")}
    found = listed(out)
    assert set(found) == expected
    assert found[str(files / "train" / "b" / "GIF.jpg")] == "GIF is not supported"
    assert all(found.values())
    assert f"train: 27 images {'decoded' if full else 'looked at'}, {len(found) - 1} bad" in said
    assert "val: 15 images" in said
    assert f"data.skip={out} leaves them out" in said


def test_the_list_is_what_data_skip_takes(
    files: Path, checked: tuple[bool, Path, int, str]
) -> None:
    full, out, _, _ = checked
    made = registry.load(Data(name="folder", root=str(files), skip=str(out)), seed=0)
    assert made.val is not None
    assert (len(made.train), len(made.val)) == (15 if full else 16, 14)
    splits = {"train": made.train, "val": made.val}
    checker = check_data.Checker(splits, full, 10**6)
    assert [checker.check(name, 0, len(split)) for name, split in splits.items()] == [[], []]


@pytest.mark.parametrize("full", [False, True])
def test_shards_are_checked_by_the_names_of_the_files(tmp_path: Path, full: bool) -> None:
    for name in ("1.jpg", "2.jpg", "3.jpg"):
        write(tmp_path / "data" / "train" / "a" / name)
    (tmp_path / "data" / "train" / "a" / "2.jpg").write_bytes(JPEG[:500])
    (tmp_path / "data" / "train" / "a" / "tiny.jpg").write_bytes(b"x")
    write(tmp_path / "data" / "val" / "a" / "2.jpg")
    out = tmp_path / "out"
    pack_shards.main(["--out", str(out), "data.name=folder", f"data.root={tmp_path / 'data'}"])
    found = shards.open_shards(out)
    assert found.val is not None
    splits = {"train": found.train, "val": found.val}
    checker = check_data.Checker(splits, full, 10**6)
    bad = {name: dict(checker.check(name, 0, len(split))) for name, split in splits.items()}
    assert list(bad["train"]) == [1, 3]
    check_data.write(tmp_path / "bad.txt", splits, bad)
    assert list(listed(tmp_path / "bad.txt")) == [
        f"{out}/train/a/2.jpg", f"{out}/train/a/tiny.jpg"
    ]  # fmt: skip


def test_missing_files_and_odd_names(tmp_path: Path) -> None:
    names = [b"gone.jpg", b"new\nline.jpg", b"\xff.jpg"]
    split = Split.of_files(str(tmp_path), names, np.zeros(3, np.int64))
    bad = dict(
        check_data.Checker({"train": split}, full=False, max_pixels=10**6).check("train", 0, 3)
    )
    assert bad == dict.fromkeys(range(3), "No such file or directory")
    check_data.write(tmp_path / "bad.txt", {"train": split}, {"train": bad})
    lines = (tmp_path / "bad.txt").read_bytes().splitlines()
    assert [line.split(b"\t")[0] for line in lines] == [
        os.fsencode(tmp_path) + name for name in (b"/gone.jpg", b"/new\\nline.jpg", b"/\xff.jpg")
    ]  # fmt: skip


def test_a_look_reads_a_few_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "1.jpg", height=300, width=300)
    split = Split.of_files(str(tmp_path), [b"1.jpg"], np.zeros(1, np.int64))
    read: list[int] = []
    pread: Callable[..., bytes] = os.pread

    def counted(*arguments: Any) -> bytes:
        content = pread(*arguments)
        read.append(len(content))
        return content

    monkeypatch.setattr(os, "pread", counted)
    assert check_data.suspicious(split, 0, 10**6) is None
    assert sum(read) == check_data.HEAD + check_data.TAIL


@pytest.mark.parametrize("wrong", ["data.root={}/none", "data.nam=folder", "--workers=0"])
def test_what_is_wrong_is_one_line(
    tmp_path: Path, wrong: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty").mkdir()
    arguments = ["data.name=folder", f"data.root={tmp_path / 'empty'}", wrong.format(tmp_path)]
    assert check_data.main([*arguments, "--out", str(tmp_path / "bad.txt")]) == 2
    said = capsys.readouterr().err
    assert said.startswith("ddp_ssl: error: ")
    assert said.count("\n") == 1


def folder(root: Path, *bad: str) -> Path:
    for name in ("1", "2", "3"):
        write(root / "train" / "a" / f"{name}.jpg")
        write(root / "val" / "a" / f"{name}.jpg")
    for name in bad:
        (root / "train" / "a" / f"{name}.jpg").write_bytes(b"")
    return root


def run(root: Path, out: Path, *more: str) -> int:
    return check_data.main(["--out", str(out), "data.name=folder", f"data.root={root}", *more])


@pytest.mark.parametrize("out", ["none/bad.txt", "folder", "/proc/bad.txt"])
def test_out_is_tried_before_the_scan(
    tmp_path: Path, out: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "folder").mkdir()
    monkeypatch.setattr(check_data, "check", lambda *_, **__: pytest.fail("scanned"))
    assert run(folder(tmp_path / "data"), tmp_path / out) == 2
    line = capsys.readouterr().err
    assert line.startswith(f"ddp_ssl: error: --out: {tmp_path / out} ")
    assert line.count("\n") == 1


@pytest.mark.parametrize("late", [False, True])
def test_only_what_is_not_written_is_said_to_be(
    tmp_path: Path, late: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails(*_: object, **__: object) -> None:
        raise OSError(5, "Input/output error", "/somewhere")

    monkeypatch.setattr(check_data, "write" if late else "check", fails)
    monkeypatch.setattr(check_data, "check", (lambda *_, **__: {}) if late else fails)
    out = tmp_path / "bad.txt"
    assert run(folder(tmp_path / "data"), out) == 2
    line = capsys.readouterr().err
    if late:
        assert line == f"ddp_ssl: error: --out: {out} cannot be written: Input/output error\n"
    else:
        assert "/somewhere: Input/output error" in line
        assert "written" not in line
    assert not list(tmp_path.glob("*bad.txt"))  # nor the part file


def in_process(root: Path, out: Path, *more: str, code: str = "") -> subprocess.Popen[str]:
    """In a process group of its own: the tool forks."""
    begin = "import sys, time; from ddp_ssl.commands import check_data as c"
    code = f"{begin}\n{code}\nsys.exit(c.main())"
    arguments = ["--out", str(out), "--workers", "3", "data.name=folder", f"data.root={root}"]
    return subprocess.Popen(
        [sys.executable, "-c", code, *arguments, *more],
        stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip


def test_nothing_is_written_when_all_are_good(tmp_path: Path) -> None:
    out = tmp_path / "bad.txt"
    process = in_process(folder(tmp_path / "data"), out)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 0
    assert said.endswith(" s; all good\n")
    assert "listed" not in said
    assert not list(tmp_path.glob("*bad.txt"))


def test_a_suggested_key_is_quoted(tmp_path: Path) -> None:
    out = tmp_path / "my bad.txt"
    process = in_process(folder(tmp_path / "data", "2"), out)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 1
    assert f"data.skip='{out}' leaves them out" in said
    assert list(listed(out)) == [f"{tmp_path}/data/train/a/2.jpg"]


def test_ctrl_c_is_one_line_and_ends_the_workers(tmp_path: Path) -> None:
    out, begun = tmp_path / "bad.txt", tmp_path / "begun"
    code = f"c.suspicious = lambda *_: (open({str(begun)!r}, 'w').close(), time.sleep(50))[1]"
    process = in_process(folder(tmp_path / "data"), out, code=code)
    until = time.monotonic() + 60
    while not begun.exists() and time.monotonic() < until and process.poll() is None:
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGINT)
    _, said = process.communicate(timeout=20)  # the workers hold the pipe too
    assert said == "ddp_ssl: interrupted\n"
    assert process.returncode == 130
    with pytest.raises(ProcessLookupError):
        os.killpg(process.pid, 0)
    assert not list(tmp_path.glob("*bad.txt"))
