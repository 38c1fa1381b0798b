"""What is read back is checked: kept scans, shards, each image of them; and names and sizes."""

from __future__ import annotations

import io
import json
import logging
import os
import random
import shutil
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ddp_ssl.commands import check_data
from ddp_ssl.config import Data
from ddp_ssl.data.datasets import registry, scan, shards
from ddp_ssl.data.datasets.scan import images_below
from ddp_ssl.data.datasets.selection import Skip
from ddp_ssl.data.datasets.shards import open_shards
from ddp_ssl.data.datasets.split import Split
from ddp_ssl.data.loading.decodable import pixels, too_large
from tests.data.images import pack, write

OLD = 1_600_000_000


def flips(path: Path, draw: random.Random, count: int) -> Iterator[str]:
    """Single bits of a file, flipped one after the other and put back."""
    content = bytearray(path.read_bytes())
    for _ in range(count):
        at, bit = draw.randrange(len(content)), draw.randrange(8)
        content[at] ^= 1 << bit
        path.write_bytes(content)
        yield f"{path.name} byte {at} bit {bit}"
        content[at] ^= 1 << bit
        path.write_bytes(content)


# --- kept scans ----------------------------------------------------------------------------------


def test_no_flipped_bit_of_a_kept_scan_gives_other_images(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("DDP_SSL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(scan, "WORTH_KEEPING", 1)
    root = tmp_path / "data"
    for name in ("a/1.jpg", "a/2.PNG", "b/x/3.jpg", "b/m.jpg", "c/5.jpg", "c/notes.txt"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    for folder, _, _ in os.walk(root):
        os.utime(folder, (OLD, OLD))
    before, classes = images_below(root)
    (place,) = (tmp_path / "cache" / "manifests").iterdir()
    kept = shutil.copytree(place, tmp_path / "kept")
    draw, said = random.Random(0), 0
    for file in sorted(kept.iterdir()):
        for what in flips(file, draw, 12):
            shutil.rmtree(place, ignore_errors=True)
            shutil.copytree(kept, place)
            caplog.clear()
            split, found = images_below(root)
            assert (split.digest, found) == (before.digest, classes), what
            assert [split.name(i) for i in range(5)] == [before.name(i) for i in range(5)], what
            said += f"{place} is damaged" in caplog.text
    assert said > 70  # but for white space in the JSON


# --- shards --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("files")
    for i in range(14):
        write(root / ("train" if i < 10 else "val") / f"c{i % 2}" / f"{i:02d}.jpg", i)
    return root


def everything(root: Path) -> list[object]:
    data = open_shards(root)
    assert data.val is not None
    found: list[object] = [data.name, data.class_names]
    for split in (data.train, data.val):
        found += [split.digest, split.labels.tolist()]
        found += [(split.name(i), split.read(i).tobytes()) for i in range(len(split))]
    return found


def test_no_flipped_bit_of_an_index_of_shards_is_read(copy: Path) -> None:
    draw, whole, refused = random.Random(1), everything(copy), 0
    for file in (*sorted(copy.glob("*.npy")), copy / shards.ABOUT):
        for what in flips(file, draw, 15):
            try:
                assert everything(copy) == whole, what
            except ValueError as error:
                refused += 1
                assert str(error).startswith(f"data.root: {copy}")  # noqa: PT017
                assert file.name in str(error)  # noqa: PT017
    assert refused > 200  # but for white space in the JSON


def test_a_flipped_bit_of_an_image_in_a_shard_is_noticed_as_it_is_read(copy: Path) -> None:
    train = open_shards(copy).train
    where = train.shards
    assert where is not None
    part = train.subset(np.array([7, 3]))
    path = Path(where.path_of(3))
    content = bytearray(path.read_bytes())
    content[int(where.offset[3]) + int(where.size[3]) // 2] ^= 4
    path.write_bytes(content)
    with pytest.raises(OSError, match="its checksum is not that of the image that was packed"):
        train.read(3)
    with pytest.raises(OSError, match="its checksum"):
        part.read(1)
    assert len(part.read(0)) == len(train.read(7))


def test_shards_of_earlier_versions_are_read_unchecked_and_that_is_said_once(
    copy: Path, caplog: pytest.LogCaptureFixture
) -> None:
    whole = everything(copy)
    about = json.loads((copy / shards.ABOUT).read_text())
    del about["checksum"]
    about["format"] = 1
    for name, split in about["splits"].items():
        del split["checksums"]
        (copy / f"{name}-crc.npy").unlink()
    (copy / shards.ABOUT).write_text(json.dumps(about))
    assert everything(copy) == whole == everything(copy)
    assert [r.levelname for r in caplog.records] == ["WARNING"]
    assert "packed by an earlier version, without checksums" in caplog.text


def test_packing_again_adds_checksums_to_shards_of_an_earlier_version(
    files: Path, copy: Path
) -> None:
    whole = everything(copy)
    journal = copy / "packing.jsonl"
    entries = [json.loads(line) for line in journal.read_text().splitlines()]
    for entry in entries:
        entry.pop("crc", None)
    journal.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    (copy / "train-crc.npy").unlink()
    (copy / shards.ABOUT).unlink()
    assert pack(files, copy) == 0
    assert everything(copy) == whole
    assert open_shards(copy).train.shards.crc is not None  # type: ignore[union-attr]


# --- pixels and names ----------------------------------------------------------------------------


def encoded(form: str, width: int = 37, height: int = 21, **options: object) -> np.ndarray:  # type: ignore[type-arg]
    buffer = io.BytesIO()
    mode, form = ("1", "PPM") if form == "PBM" else ("RGB", form)
    Image.new(mode, (width, height)).save(buffer, form, **options)
    return np.frombuffer(buffer.getvalue(), np.uint8)


@pytest.mark.parametrize(
    ("form", "options"),
    [("JPEG", {}), ("JPEG", {"progressive": True}), ("JPEG", {"exif": b"Exif\0\0" + b"x" * 9000}),
     ("PNG", {}), ("WEBP", {}), ("WEBP", {"lossless": True}), ("BMP", {}), ("TIFF", {}),
     ("PPM", {}), ("JPEG2000", {}), ("PBM", {})],
)  # fmt: skip
def test_a_header_says_how_many_pixels_there_are(form: str, options: dict[str, object]) -> None:
    image = encoded(form, **options)
    assert pixels(image) == 37 * 21
    assert too_large(image, 37 * 21) is None
    assert too_large(image, 700) == "777 pixels, more than data.max_pixels"
    for end in range(0, len(image), max(1, len(image) // 40)):
        assert pixels(image[:end]) in (0, 37 * 21)


def test_a_size_beyond_what_pil_opens_is_known() -> None:
    image = encoded("BMP").copy()
    image[18:26] = np.frombuffer(struct.pack("<ii", 20_000, 30_000), np.uint8)
    assert pixels(image) == 600_000_000
    assert too_large(image, 500_000_000) == "600,000,000 pixels, more than data.max_pixels"


def test_a_size_behind_long_exif_data_is_seen_without_full(tmp_path: Path) -> None:
    exif = encoded("JPEG", 40, 30, exif=b"Exif\0\0" + b"x" * 9000)
    (tmp_path / "1.jpg").write_bytes(exif.tobytes())
    split = Split.of_files(str(tmp_path), [b"1.jpg"], np.zeros(1))
    for most, found in ((1199, {0: "1,200 pixels, more than data.max_pixels"}), (1200, {})):
        assert dict(check_data.Checker({"train": split}, False, most).check("train", 0, 1)) == found


def test_a_large_header_is_a_bad_image_before_anything_is_decoded(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for i in range(4):
        write(tmp_path / "data" / f"{i}.jpg", i)
    content = bytearray((tmp_path / "data/2.jpg").read_bytes())
    at = content.index(b"\xff\xc0")
    content[at + 5 : at + 9] = struct.pack(">HH", 20_000, 20_000)
    (tmp_path / "data/2.jpg").write_bytes(content)
    png = bytearray(encoded("PNG").tobytes())
    png[16:24] = struct.pack(">II", 50_000, 50_000)
    png[29:33] = struct.pack(">I", zlib.crc32(png[12:29]))
    (tmp_path / "data/3.png").write_bytes(png)
    out = tmp_path / "bad.txt"
    for more in ([], ["--full"]):
        words = [*more, "--out", str(out), "--workers", "1", "data.name=folder"]
        assert check_data.main([*words, f"data.root={tmp_path / 'data'}"]) == 1
        listed = dict(line.split("\t") for line in out.read_text().splitlines())
        assert listed == {
            f"{tmp_path}/data/2.jpg": "400,000,000 pixels, more than data.max_pixels",
            f"{tmp_path}/data/3.png": "2,500,000,000 pixels, more than data.max_pixels",
        }
    capsys.readouterr()


NAMES = ["a\nb.jpg", "a\tb.jpg", "\x1b[31m.jpg", "a\\nb.jpg", "\u2028.jpg", "\udcff\x07.jpg",
         "\u00e9 b.jpg", "a\\x41.jpg", "\r.jpg", "\u202e.jpg"]  # fmt: skip


def test_odd_names_are_written_in_one_line_and_found_again(tmp_path: Path) -> None:
    names = [os.fsencode(name) for name in NAMES]
    split = Split.of_files(str(tmp_path), names, np.zeros(len(names)))
    listing = tmp_path / "bad.txt"
    for i, name in enumerate(NAMES):
        where = split.where(i)
        assert all(c.isprintable() or "\udc80" <= c <= "\udcff" for c in where)
        listing.write_bytes(os.fsencode(where) + b"\tits reason\n")
        left = ~Skip.of_file(listing, str(tmp_path)).keep(split)
        assert left[i], name
        # A line that stands for two names, with a backslash and with a line break, means both.
        assert left.sum() == (2 if name in ("a\nb.jpg", "a\\nb.jpg") else 1)


@pytest.mark.parametrize("line", [rb"a\ud83d.jpg", rb"a\udcff.jpg", rb"a\xzz.jpg"])
def test_an_escape_that_no_list_has_is_a_name_as_it_stands(tmp_path: Path, line: bytes) -> None:
    split = Split.of_files(str(tmp_path), [line, b"a\xff.jpg"], np.zeros(2))
    (tmp_path / "skip.txt").write_bytes(line + b"\n")
    assert Skip.of_file(tmp_path / "skip.txt", str(tmp_path)).keep(split).tolist() == [False, True]


def test_check_data_lists_odd_names_and_data_skip_leaves_them_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    for i in range(3):
        write(tmp_path / "data" / f"{i}.jpg", i)
    (tmp_path / "data" / "odd\n\x1b[2J.jpg").write_bytes(b"no image")
    out = tmp_path / "bad.txt"
    words = ["--out", str(out), "--workers", "1", "data.name=folder"]
    assert check_data.main([*words, f"data.root={tmp_path / 'data'}"]) == 1
    assert out.read_text().count("\n") == 1
    assert "\x1b" not in out.read_text() + capsys.readouterr().err
    data = Data(name="folder", root=str(tmp_path / "data"), skip=str(out))
    with caplog.at_level(logging.WARNING, "ddp_ssl"):
        found = registry.load(data, 0)
    assert found.val is not None
    assert len(found.train) + len(found.val) == 3
    assert not any("data.skip" in message for message in caplog.messages)
