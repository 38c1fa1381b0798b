"""Tar files that others packed: the same images as in folders, named, kept, damaged, refused."""

from __future__ import annotations

import gzip
import io
import json
import logging
import os
import random
import shutil
import tarfile
import zlib
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from ddp_ssl.commands import check_data
from ddp_ssl.config import Data
from ddp_ssl.data.datasets import files as file_system
from ddp_ssl.data.datasets import imagenet, registry, staging, webdataset
from ddp_ssl.data.datasets.files import matching, split_of
from ddp_ssl.data.datasets.members import DamagedError, members
from ddp_ssl.data.datasets.split import Split
from ddp_ssl.data.recognise import look_at
from tests.data import opened
from tests.data.images import pack, picture
from tests.data.opened import encoded
from tests.data.tables import write_table
from tests.data.tars import FORMATS, Items, as_tars, write_tar

pytestmark = pytest.mark.usefixtures("cache")

loaded = partial(opened.loaded, name="webdataset")
refused = partial(opened.refused, name="webdataset")
PICTURE = b"\xff\xd8 of another size \xff\xd9"


@pytest.fixture(scope="module")
def tars(files: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return as_tars(files, tmp_path_factory.mktemp("tars"))


def jpeg(i: int) -> bytes:
    content = io.BytesIO()
    Image.fromarray(picture(i)).save(content, "JPEG")
    return content.getvalue()


def of(root: Path, train: Items, val: Items | None = None) -> Path:
    """One file to train on, and the same or another one for validation."""
    train = list(train)
    write_tar(root / "train-0.tar", train)
    write_tar(root / "val-0.tar", train if val is None else val)
    return root


# --- the same images -----------------------------------------------------------------------------


@pytest.mark.parametrize("form", [None, *FORMATS])
def test_the_same_ids_names_labels_bytes_and_digests(
    files: Path, tars: Path, tmp_path: Path, form: int | None
) -> None:
    root = tars if form is None else as_tars(files, tmp_path, form=form)
    original, found = (
        loaded(files, name="folder"),
        loaded(root, name="folder" if form else "webdataset"),
    )
    assert found.name == "folder"
    assert found.class_names == original.class_names == ("c0", "c1", "c2")
    for mine, other in ((found.train, original.train), (found.val, original.val)):
        assert mine is not None
        assert other is not None
        assert mine.named
        assert mine.digest == Split(mine.labels, "", mine.names, mine.spans).digest == other.digest
        assert encoded(mine) == encoded(other)


@pytest.mark.parametrize("form", FORMATS)
def test_members_are_those_that_tarfile_finds(tmp_path: Path, form: int) -> None:
    """Long names, names that are not UTF-8, folders, links, sizes that fill a block or not."""
    draw = random.Random(form)
    longest = {tarfile.USTAR_FORMAT: 150}.get(form, 400)
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w", format=form, pax_headers={"comment": "x" * 600}) as tar:
        for i in range(60):
            folder = "/".join(
                "d" * draw.randint(1, 40) for _ in range(draw.randint(0, longest // 50))
            )
            about = tarfile.TarInfo(f"{folder}/{i}-é\udcff.jpg".lstrip("/"))
            about.size = draw.choice([0, 1, 511, 512, 513, 5000])
            about.mtime = 1.5 if form == tarfile.PAX_FORMAT else 1  # makes a PAX header
            if i % 10 == 3:
                about.type, about.size = tarfile.DIRTYPE, 0
            if i % 10 == 7:
                about.type, about.size, about.linkname = (
                    tarfile.SYMTYPE,
                    0,
                    "x" * draw.randint(1, 99),
                )
            tar.addfile(about, io.BytesIO(bytes(about.size)))
    with tarfile.open(path) as tar:
        expected = [(os.fsencode(m.name), m.offset_data, m.size, m.isreg(), m.issym()) for m in tar]
    with path.open("rb") as file:
        found = [tuple(member) for member in members(file)]
    assert [(name.rstrip(b"/"), *rest) for name, *rest in found] == expected


def test_large_members(tmp_path: Path) -> None:
    """9 GB, in a file with holes: their size does not fit into the field."""
    for form in (tarfile.PAX_FORMAT, tarfile.GNU_FORMAT):
        path, size = tmp_path / "a.tar", 9 << 30
        about = tarfile.TarInfo("a.bin")
        about.size = size
        head = about.tobuf(form)
        with path.open("wb") as file:
            file.write(head)
            file.seek(len(head) + size)
            file.write(tarfile.TarInfo("b.jpg").tobuf(form))
        with path.open("rb") as file:
            first, second = members(file)
        assert (first.at, first.size, second.name) == (len(head), size, b"b.jpg")


def test_every_byte_is_read_once(tmp_path: Path) -> None:
    noise = np.random.default_rng(0)
    some = [(f"{i:03d}.{kind}", content) for i in range(40)
            for kind, content in (("jpg", noise.bytes(200_000)), ("cls", b"0"))]  # fmt: skip
    root = of(tmp_path / "root", some, some[:2])
    path, size = Path("/proc/self/io"), (root / "train-0.tar").stat().st_size

    def count() -> int:
        return int(path.read_text().split()[1])

    before = count()
    split = loaded(root).train
    assert count() - before < 1.2 * size  # the first members are looked at before
    before = count()
    assert len(encoded(split)) == 40
    assert count() - before < 1.01 * size


# --- which files ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("names", "split"),
    [
        ("train-000.tar train_0.tar imagenet1k-train-0000.tar train/0.tar x/train/1.tar", "train"),
        ("train-000001-of-000009.tar train-shard-0001.tar cc3m-train-1.tar Training.tar", "train"),
        ("val-0.tar validation-00.tar imagenet1k-validation-00.tar valid/0.tar", "val"),
        ("00000.tar data-0001.tar shard_000017.tar pretrained-0.tar x/00001.tar", ""),
        ("train2017-00.tar train2017/00.tar coco_train2017-0.tar", "train"),
        ("val2017-00.tar", "val"),
        ("test-0.tar", "test"),
        ("test2017-0.tar", "test2017"),
        ("train_mini-0.tar", "train_mini"),
        ("train-clean-000.tar", "train-clean"),
    ],
)  # fmt: skip
def test_the_split_of_a_file(names: str, split: str) -> None:
    for name in names.split():
        assert split_of(name) == split


def test_patterns(tars: Path, tmp_path: Path) -> None:
    every = sorted(path.name for path in tars.glob("*.tar"))
    for pattern, count in (
        ("*.tar", 4), ("train-*.tar", 2), ("{train,validation}-*.tar", 4), ("**", 4),
        ("train-{000000..000001}.tar", 2), ("train-00000[1-9].tar", 1), ("{train,val}-*1.tar", 1),
    ):  # fmt: skip
        base, found = matching(f"{tars}/{pattern}")
        assert base == str(tars)
        assert found == [name for name in every if name in found]
        assert len(found) == count
    assert len(loaded(f"{tars}/{{train,validation}}-*.tar").train) == 30
    assert "/train-000002.tar does not exist" in refused(f"{tars}/train-{{000000..000002}}.tar")
    assert f"{tars.name}/train-000000.tar" in matching(f"{tars.parent}/**/train-*0.tar")[1]


def test_a_pattern_of_another_split_is_trained_on(tmp_path: Path) -> None:
    write_tar(tmp_path / "train-clean-000.tar", NAMED)
    assert "or a pattern of the files of one split" in refused(tmp_path)
    assert len(loaded(f"{tmp_path}/*.tar", val_fraction=0.4).train) == 2
    write_tar(tmp_path / "test-000.tar", NAMED)
    assert "only of test, train-clean; accepted" in refused(f"{tmp_path}/*.tar")
    write_tar(tmp_path / "val-000.tar", NAMED)
    assert "only of test, validation; accepted" in refused(f"{tmp_path}/{{test,val}}-*.tar")


def test_compressed_files_beside_others_are_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    of(tmp_path, NAMED)
    (tmp_path / "train-1.tar.gz").write_bytes(b"")
    for name in ("webdataset", "folder"):
        loaded(tmp_path, name=name)
    said = f"{tmp_path}: not read: 1 compressed file, such as train-1.tar.gz; accepted: tar files"
    assert caplog.text.count(said) == 1


def test_img2dataset_s_output(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for k in range(2):
        items: list[tuple[str, bytes]] = []
        for i in range(3):
            key = f"{k:05d}{i:04d}"
            about = {"caption": "a dog", "url": "https://x", "key": key, "status": "success"}
            items += [(f"{key}.jpg", jpeg(3 * k + i)), (f"{key}.txt", b"a dog"),
                      (f"{key}.json", json.dumps(about).encode())]  # fmt: skip
        write_tar(tmp_path / f"{k:05d}.tar", items)
        (tmp_path / f"{k:05d}_stats.json").write_text("{}")
        write_table(tmp_path / f"{k:05d}.parquet", pa.table({"url": ["https://x"] * 3}))
    caplog.set_level(logging.INFO, "ddp_ssl")
    data = Data(root=str(tmp_path))
    look = look_at(data, None)
    assert (look.name, look.what, look.images) == ("folder", "images in tar files", 5)
    found = loaded(tmp_path, name="folder")
    assert len(found.train) + len(found.val or ()) == 6
    assert found.class_names == ()
    assert found.train.name(0) == b"000000000.jpg"
    assert caplog.text.count("the texts in .txt are taken for captions, which are no labels") == 1


def test_imagenet_as_timm_packs_it(tmp_path: Path) -> None:
    for split, count in (("train", 3), ("validation", 2)):
        for k, number in enumerate((999, 0, 134)[:count]):
            wnid = list(imagenet.table())[number]
            items = [(f"{wnid}_{k}.cls", b"%d" % number), (f"{wnid}_{k}.jpg", jpeg(k)),
                     (f"{wnid}_{k}.json", json.dumps({"label": number}).encode())]  # fmt: skip
            write_tar(tmp_path / f"imagenet1k-{split}-{k:04d}.tar", items)
    found = loaded(tmp_path, name="imagenet")
    assert found.class_names == tuple(imagenet.table())
    assert found.train.labels.tolist() == [999, 0, 134]
    assert found.train.name(1) == b"n01440764/n01440764_1.jpg"


# --- images and labels ---------------------------------------------------------------------------

NAMED = [("a.jpg", b"A"), ("a.cls", b"dog\n"), ("b.jpg", b"B"), ("b.cls", b" cat"), ("c.jpg", b"C")]
NUMBERED = [
    ("a.jpg", b"A"),
    ("a.txt", b"2\n"),
    ("b.png", b"B"),
    ("b.txt", b"-1"),
    ("b.json", b"{}"),
]
IN_JSON = [("a.jpg", b"A"), ("a.json", b'{"x": {"y": "dog"}, "n": 1}'), ("a.txt", b"1"),
           ("b.jpg", b"B"), ("b.json", b'{"x": {}}'), ("b.txt", b"a dog")]  # fmt: skip
SEVERAL = [("d/a.left.png", b"A"), ("d/a.right.png", b"B"), ("d/a.cls", b"1")]
ODD = [("a.JPG", b"A"), (".hidden.jpg", b"-"), ("d/", b""), ("._a.jpg", b"-"), ("b", b"-"),
       ("a.x.y", b"-"), ("d.e/b.Jpeg", b"B")]  # fmt: skip


@pytest.mark.parametrize(
    ("items", "columns", "contents", "labels", "classes"),
    [
        (NAMED, None, "ABC", [1, 0, -1], ("cat", "dog")),
        (NAMED, ["jpg"], "ABC", [-1, -1, -1], ()),
        (NUMBERED, None, "AB", [2, -1], ("0", "1", "2")),
        (NUMBERED, ["png", "txt"], "B", [-1], ()),
        (NUMBERED, ["jpg;png", "txt"], "AB", [2, -1], ("0", "1", "2")),
        (IN_JSON, None, "AB", [-1, -1], ()),
        (IN_JSON, ["jpg", "json.x.y"], "AB", [0, -1], ("dog",)),
        (IN_JSON, ["jpg", "json.n"], "AB", [1, -1], ("0", "1")),
        (SEVERAL, ["right.png", "cls"], "B", [1], ("0", "1")),
        (ODD, None, "AB", [-1, -1], ()),
        ([("a.jpg", b"A"), ("a.my.cls", b"3")], ["jpg", "my.cls"], "A", [3], tuple("0123")),
    ],
)
def test_which_members(
    tmp_path: Path, items: list[tuple[str, bytes]], columns: list[str] | None, contents: str,
    labels: list[int], classes: tuple[str, ...],
) -> None:  # fmt: skip
    root = of(tmp_path, items)
    found = loaded(root, columns=columns)
    assert b"".join(encoded(found.train)).decode() == contents
    assert found.train.labels.tolist() == labels
    assert found.class_names == classes


@pytest.mark.parametrize(
    ("items", "columns", "message"),
    [
        (SEVERAL, None, "left.png, right.png of d/a in {} may be the image; accepted: data.col"),
        (NAMED, ["png", "cls"], "'png' is the extension of no member of {}; accepted: cls, jpg"),
        (NAMED, ["jpg", "txt"], "'txt' holds no labels in {}; accepted: cls"),
        (IN_JSON, ["jpg", "json.z"], "'json.z' holds no labels in {}; accepted: txt, json.n"),
        (IN_JSON, ["jpg", "json"], "'json' holds no labels in {}"),
        (IN_JSON, ["jpg", "json.x"], "'json.x' of a.json in {}: {{'y': 'dog'}} is neither a whole"),
        ([*NAMED, ("c.cls", b"3")], None, "'cls' has both names and numbers in {}, such as 'cat'"),
        ([("a.txt", b"x"), ("b.json", b"{}")], None, "{} has no images (.json, .txt else)"),
        ([("n01440764.tar", b"x")], None, "{} has no images (.tar else)"),
        ([], None, "{} has no images (nothing else)"),
    ],
)  # fmt: skip
def test_members_that_are_not_clear(
    tmp_path: Path, items: list[tuple[str, bytes]], columns: list[str] | None, message: str
) -> None:
    root = of(tmp_path, items)
    assert message.format(root / "train-0.tar") in refused(root, columns=columns)


def test_names_in_one_file_and_numbers_in_another(tmp_path: Path) -> None:
    said = refused(of(tmp_path, NAMED, [("a.jpg", b"A"), ("a.cls", b"0")]))
    assert "val-0.tar has numbers as labels, train-0.tar has names such as 'cat'; accepted" in said


def test_names_of_classes_beside_the_files(tmp_path: Path) -> None:
    """As in the data sets of CLIP benchmark; they are staged too."""
    for split in ("train", "val", "test"):
        write_tar(tmp_path / "set" / split / "0.tar", [("s0.webp", b"A"), ("s0.cls", b"1")])
    (tmp_path / "set" / "classnames.txt").write_text("cat\ndog\n\n")
    for keys in ({}, {"stage": str(tmp_path / "local")}):
        found = loaded(tmp_path / "set", **keys)
        assert found.class_names == ("cat", "dog")
        assert found.train.name(0) == b"dog/s0.webp"
    names = tmp_path / "set" / "classnames.txt"
    names.write_text("cat\n")
    assert "train/0.tar has the label 1; accepted: 0 to 0, one of its 1 cl" in refused(names.parent)
    names.unlink()
    names.mkdir()
    assert refused(names.parent).startswith(f"data.root: {names} cannot be read: Is a directory; ")


def test_what_is_left_out_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A label without an image, a member twice, links; and an image without a label."""
    items = [*NAMED, ("z.cls", b"dog"), ("a.jpg", b"D"), ("y.cls", b"dog")]
    write_tar(tmp_path / "val-0.tar", NAMED)
    with tarfile.open(write_tar(tmp_path / "train-0.tar", items), "a") as tar:
        for kind in (tarfile.LNKTYPE, tarfile.SYMTYPE):
            about = tarfile.TarInfo("l.jpg")
            about.type, about.linkname = kind, "b.jpg"
            tar.addfile(about)
    assert encoded(loaded(tmp_path).train) == [b"D", b"B", b"C"]
    assert (
        "not read: labels without an image (2), links (2), members that are there twice, all but "
        "the last (1)"
    ) in caplog.text


# --- damage --------------------------------------------------------------------------------------


def test_files_that_are_damaged(tmp_path: Path) -> None:
    path = of(tmp_path, [(f"{i}.jpg", b"%03d" % i * 250) for i in range(900)]) / "train-0.tar"
    whole = path.read_bytes()
    sparse = tarfile.TarInfo("a.jpg")
    sparse.pax_headers = {"GNU.sparse.major": "1"}
    at = 700 * 1536
    for content, message in (
        (whole[: at + 99], f"has no header of a member at byte {at}"),
        (whole[: at + 600], f"ends at byte {at + 600}, inside of a member that begins at"),
        (whole[:at] + b"?" * 9 + whole[at + 9 :], f"has no header of a member at byte {at}"),
        (b"", "is empty"),
        (b"no tar" * 999, "is no tar file"),
        (gzip.compress(whole), "is compressed (gzip), so that no image of it can be read without"),
        (sparse.tobuf(tarfile.PAX_FORMAT), "has a sparse member"),
    ):  # fmt: skip
        path.write_bytes(content)
        assert f"data.root: {path} {message}" in refused(tmp_path)


def header(size: bytes, kind: bytes = b"0") -> bytes:
    """A header with this text as its size and a checksum that is right."""
    block = bytearray(tarfile.TarInfo("a.jpg").tobuf(tarfile.USTAR_FORMAT))
    block[124:136], block[156:157] = size.ljust(12, b"\0"), kind
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


def with_pax(record: bytes) -> bytes:
    return header(b"%o" % len(record), b"x") + record.ljust(512, b"\0") + header(b"0")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (header(b"-0000001000"), "is no tar file"),
        (header(b"0") + header(b"-1000"), "has no header of a member at byte 512"),
        (header(b"1_0"), "is no tar file"),
        (with_pax(b"13 size=-512\n"), "has a damaged PAX header"),
        (with_pax(b"12 size=abc\n"), "has a damaged PAX header"),
        (with_pax(b"12 size=1_0\n"), "has a damaged PAX header"),
        (with_pax(b"1_1 size=1\n"), "has a damaged PAX header"),
        (with_pax(b"13 size=9999\n"), "ends at byte 2560, inside of a member that begins at 1536"),
        (with_pax(b"9" * 500 + b" a"), "has a damaged PAX header"),
        (header(b"4000001", b"L") + bytes(1 << 21), "has a header of 1048577 bytes at byte 512"),
    ],
)
def test_sizes_in_headers_that_are_no_sizes(content: bytes, message: str) -> None:
    file = io.BytesIO(content + bytes(1024))
    with pytest.raises(DamagedError, match=f"^{message}"):
        list(islice(members(file), 9))


def test_labels_are_moderate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Short ones are known by their bytes, and long ones are not kept."""
    webdataset._known_value.cache_clear()
    long = json.dumps({"n": 3, "x": "x" * 99}).encode()
    root = of(
        tmp_path, [("a.jpg", b"A"), ("a.json", long), ("b.jpg", b"B"), ("b.json", b'{"n":1}')]
    )
    keys: dict[str, Any] = {"columns": ["jpg", "json.n"]}
    assert loaded(root, **keys).train.labels.tolist() == [3, 1]
    assert webdataset._known_value.cache_info().currsize == 1
    os.utime(root / "train-0.tar", (1, 1))
    monkeypatch.setattr(webdataset, "LARGEST", len(long) - 1)
    said = f"'json.n' of a.json in {root}/train-0.tar: {len(long)} bytes; accepted: at most"
    assert said in refused(root, **keys)


def test_a_file_without_an_end_and_two_in_one(tmp_path: Path) -> None:
    path = of(tmp_path, NAMED) / "train-0.tar"
    whole = path.read_bytes()
    for size in (5 * 1024, 5 * 1024 - 511):  # without the end, without the last member's zeros
        path.write_bytes(whole[:size])
        assert encoded(loaded(tmp_path).train) == [b"A", b"B", b"C"]
    other = write_tar(tmp_path / "x" / "b.tar", [("y.jpg", b"Y")]).read_bytes()
    path.write_bytes(whole + other)
    assert encoded(loaded(tmp_path).train) == [b"A", b"B", b"C", b"Y"]


def test_a_damaged_image_is_a_bad_image(tmp_path: Path) -> None:
    root = of(tmp_path, [(f"{i}.jpg", jpeg(i)) for i in range(4)])
    split = loaded(root).train
    assert split.shards is not None
    with (root / "train-0.tar").open("r+b") as file:
        file.seek(int(split.shards.offset[2]) + 100)
        file.write(b"??")
    found = check_data.check({"train": split}, full=True, workers=1, max_pixels=10**6)["train"]
    assert list(found) == [2]
    assert "its checksum is not that" in found[2]
    assert split.where(2) == f"{root}/train/2.jpg"


# --- what is kept --------------------------------------------------------------------------------


def test_files_are_read_once(
    tars: Path, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = shutil.copytree(tars, tmp_path / "root")
    read: list[str] = []
    real = webdataset._table

    def spied(file: Any, path: str, *rest: Any) -> Any:
        read.append(os.path.basename(path))
        return real(file, path, *rest)

    monkeypatch.setattr(webdataset, "_table", spied)
    first = loaded(root)
    assert len(read) == 4
    read.clear()
    assert loaded(shutil.copytree(root, tmp_path / "moved")).train.digest == first.train.digest
    staged = loaded(root, stage=str(tmp_path / "local")).train
    assert staged.where(3) == first.train.where(3)
    assert encoded(staged) == encoded(first.train)
    assert read == []
    os.utime(root / "train-000001.tar", ns=(1, 1))
    assert encoded(loaded(root).train) == encoded(first.train)
    assert read == ["train-000001.tar"]
    assert len(loaded(root, columns=["png", "cls"]).train) == 4  # other images, other entries


@pytest.mark.parametrize("mark", [b"", b"\xff\xda"])
def test_a_copy_that_rots_before_its_images_are_found(
    tars: Path, tmp_path: Path, mark: bytes
) -> None:
    """A header or an image, with the size and the time of before: the original is read."""
    local = str(tmp_path / "local")
    copy = Path(str(registry.stage(Data(name="webdataset", root=str(tars), stage=local))))
    for path in copy.glob("*.tar"):
        content, about = bytearray(path.read_bytes()), path.stat()
        at = content.index(mark)
        content[at : at + 40] = bytes(byte ^ 1 for byte in content[at : at + 40])
        path.write_bytes(content)
        os.utime(path, ns=(about.st_atime_ns, about.st_mtime_ns))
    staged, here = loaded(tars, stage=local).train, loaded(tars).train
    assert staged.shards is not None
    assert staged.shards.path_of(0).startswith(str(copy))
    assert staged.shards.crc is not None
    assert [zlib.crc32(content) for content in encoded(here)] == staged.shards.crc.tolist()
    assert encoded(staged) == encoded(here)


@pytest.mark.parametrize("when", ["before", "after"])
def test_files_that_change_while_they_are_staged(
    tars: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    """The copy is of other images than its name says, or the original changed since."""
    root, other = shutil.copytree(tars, tmp_path / "root"), tmp_path / "other"
    write_tar(other, [("c9/x.jpg", PICTURE), ("c9/x.cls", b"c1")])
    copy = staging._copy_all

    def changes(*args: Any) -> None:
        if when == "after":
            copy(*args)
        shutil.copy(other, root / "train-000001.tar")
        if when == "before":
            copy(*args)

    monkeypatch.setattr(staging, "_copy_all", changes)
    said = refused(root, stage=str(tmp_path / "local"))
    changed = "changed while it was read" if when == "after" else "instead of"
    assert changed in said
    monkeypatch.undo()
    images = encoded(loaded(root).train)
    assert images[-1] == PICTURE
    assert encoded(loaded(root, stage=str(tmp_path / "local")).train) == images


def test_packed_they_are_the_same(tars: Path, files: Path, tmp_path: Path) -> None:
    assert pack(tars, tmp_path / "out", "data.name=webdataset") == 0
    found, original = loaded(tmp_path / "out"), loaded(files, name="folder")
    assert found.train.digest == original.train.digest
    assert encoded(found.train) == encoded(original.train)


@pytest.mark.parametrize(("number", "failures"), [(116, 1), (116, 9), (13, 1)])
def test_a_file_that_the_system_does_not_give(
    tars: Path, monkeypatch: pytest.MonkeyPatch, number: int, failures: int
) -> None:
    """A stale file is read again, and one that may not be read is refused."""
    raised = 0
    real = webdataset._table

    def failing(*arguments: Any) -> Any:
        nonlocal raised
        if raised < failures:
            raised += 1
            raise OSError(number, os.strerror(number))
        return real(*arguments)

    monkeypatch.setattr(file_system, "RETRIES", (0.0, 0.0))
    monkeypatch.setattr(webdataset, "_table", failing)
    if number == 116 and failures == 1:
        assert all(encoded(loaded(tars).train))
    else:
        assert refused(tars).endswith(f".tar cannot be read: {os.strerror(number)}")
