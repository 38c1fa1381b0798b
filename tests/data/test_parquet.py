"""Parquet files: the same images as in folders and shards, kept, staged, damaged, refused."""

from __future__ import annotations

import errno
import io
import json
import logging
import os
import pickle
import shutil
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from ddp_ssl.commands import check_data
from ddp_ssl.config import ConfigError, Data
from ddp_ssl.data.datasets import imagenet, index, pages, parquet, registry
from ddp_ssl.data.datasets.split import Split
from ddp_ssl.data.loading.bad_images import BadImages
from ddp_ssl.run import configure
from ddp_ssl.run.identity import check_identity, whole_identity
from tests.data import opened
from tests.data.images import eval_of, loader_of, pack, picture, same, through_a_file, write
from tests.data.opened import encoded, loaded
from tests.data.tables import IMAGE, Cell, as_parquet, table_of, write_table

pytestmark = pytest.mark.usefixtures("cache")

refused = partial(opened.refused, name="parquet")


@pytest.fixture(scope="module")
def tables(files: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return as_parquet(files, tmp_path_factory.mktemp("tables"))


def cells_of(count: int) -> list[Cell]:
    """Images as a table has them, with the names that the images of folders have."""
    made: list[Cell] = []
    for i in range(count):
        content = io.BytesIO()
        Image.fromarray(picture(i)).save(content, "JPEG")
        made.append({"bytes": content.getvalue(), "path": f"{i:02d}.jpg"})
    return made


# --- the same images -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["folder", "parquet"])
def test_the_same_ids_names_labels_bytes_and_digests(files: Path, tables: Path, name: str) -> None:
    original, found = loaded(files), loaded(tables, name)
    assert found.name == "folder"
    assert found.class_names == original.class_names == ("c0", "c1", "c2")
    for mine, other in ((found.train, original.train), (found.val, original.val)):
        assert mine is not None
        assert other is not None
        assert mine.labels.tolist() == other.labels.tolist()
        assert [mine.name(i) for i in range(len(mine))] == [
            other.name(i) for i in range(len(other))
        ]
        assert mine.digest == Split(mine.labels, "", mine.names, mine.spans).digest == other.digest
        assert encoded(mine) == encoded(other)
        some = mine.subset(np.array([5, 2]))
        assert encoded(some) == [other.read(i).tobytes() for i in (5, 2)]


FORMS: list[dict[str, Any]] = [
    {"compression": codec, "data_page_version": version, "use_dictionary": coded}
    for codec in ("snappy", "none", "zstd", "gzip", "lz4", "brotli")
    for version in ("1.0", "2.0")
    for coded in (True, False)
]


@pytest.mark.parametrize("form", FORMS, ids=lambda form: "-".join(map(str, form.values())))
def test_a_value_is_where_its_place_says(tmp_path: Path, form: dict[str, Any]) -> None:
    """Repeated values, empty ones, none, values that begin alike, longer than snappy's blocks."""
    rng = np.random.default_rng(0)
    head = bytes(range(200)) * 2
    values: list[bytes | None] = [None, b"", head, b"\0" * 100_000, b"x"]
    for length in (3, 70, 500, 3_000, 65_536, 150_000):
        noise = rng.bytes(length)
        values += [noise, head + noise, head + noise + head, noise[:2000], None]
    values += values[::-1]
    column = pa.array([None if v is None else {"bytes": v} for v in values],
                      pa.struct([("bytes", pa.binary())]))  # fmt: skip
    path = write_table(tmp_path / "t.parquet", pa.table({"x": column}), row_group_size=40, **form)
    split = loaded(path.parent, "parquet", columns=["x"], val_fraction=0.01).train
    assert split.shards is not None
    whole = pq.read_table(path)["x"].to_pylist()
    assert len(whole) == len(values)
    for i in range(len(split)):
        file, row = os.fsdecode(split.name(i)).split("/")
        value = values[int(row)]
        assert file == "t.parquet"
        if value is None:
            with pytest.raises(FileNotFoundError, match="its cell is empty"):
                split.read(i)
        else:
            assert split.read(i).tobytes() == value
            if len(value) > 2:
                assert split.shards.piece(i, 1, 2).tobytes() == value[1:3]


def test_little_more_is_read_than_the_image(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of photographs in snappy's pages, which are as long as their row groups."""
    rng, cells = np.random.default_rng(0), cells_of(20)
    for cell in cells:
        assert cell is not None
        cell["bytes"] = cell["bytes"] + rng.bytes(100_000)
    write_table(tmp_path / "train.parquet", table_of(cells, [0] * 20, ["a"]), row_group_size=20)
    split = loaded(tmp_path).train
    assert split.shards is not None
    read: list[int] = []
    stored = type(split.shards)._stored

    def counted(shards: Any, path: str, at: int, count: int) -> Any:
        read.append(count)
        return stored(shards, path, at, count)

    monkeypatch.setattr(type(split.shards), "_stored", counted)
    wanted = sum(map(len, encoded(split)))
    assert wanted < sum(read) < 1.01 * wanted


@pytest.mark.parametrize("processes", [1, 2])
def test_the_same_pixels_and_a_resume_on_another_container(
    files: Path, packed: Path, tables: Path, tmp_path: Path, processes: int
) -> None:
    """In a folder, in shards, in parquet files with names and without."""
    unnamed = as_parquet(files, tmp_path / "unnamed", named=False)
    splits = [loaded(root).train for root in (files, packed, tables, unnamed)]
    assert [split.named for split in splits] == [True, True, True, False]
    for shard in range(processes):
        share = {"shard": shard, "num_shards": processes, "salt": shard}
        loaders = [loader_of(split, **share) for split in splits]
        for _ in range(6):
            first, *others = [next(loader) for loader in loaders]
            assert all(same(first, other) for other in others)
            assert all(torch.equal(first.labels, other.labels) for other in others)
        states = [through_a_file(loader.state()) for loader in loaders]
        after = next(loaders[0])
        for loader in loaders:
            loader.close()
        for saved, going_on in ((0, 2), (2, 1), (3, 0), (0, 3)) if shard == 0 else ():
            loader = loader_of(splits[going_on], **share)
            assert loader.load_state(states[saved], 6) is None
            assert same(next(loader), after)
            loader.close()


def test_packed_without_names_they_stay_without(
    files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    unnamed = as_parquet(files, tmp_path / "unnamed", named=False)
    assert pack(unnamed, tmp_path / "out", "data.name=parquet") == 0
    original, found = loaded(unnamed).train, loaded(tmp_path / "out", "parquet").train
    assert found.identity == original.identity
    assert encoded(found) == encoded(original)


def test_a_state_of_other_labels_is_of_another_set_up(files: Path, tmp_path: Path) -> None:
    unnamed = loaded(as_parquet(files, tmp_path / "unnamed", named=False)).train
    loader, other = loader_of(loaded(files).train), loader_of(unnamed.subset(np.arange(30)[::-1]))
    next(loader)
    said = other.load_state(through_a_file(loader.state()), 1)
    assert said is not None
    assert "labels" in said
    loader.close()
    other.close()


def test_a_split_is_read_by_forked_and_by_spawned_processes(tables: Path) -> None:
    """A forked one shares open files, which are read at offsets; a spawned one opens its own."""
    split = loaded(tables).train
    contents = encoded(split)
    copy = pickle.loads(pickle.dumps(split))
    assert copy.shards._files == {}
    assert encoded(copy) == contents
    assert check_data.check({"train": split}, full=True, workers=2, max_pixels=10**6) == {
        "train": {}
    }


# --- files and splits ----------------------------------------------------------------------------

PARTS = ["train-00000-of-00002.parquet", "train-00001-of-00002.parquet"]


@pytest.mark.parametrize(
    ("names", "train", "val", "unused"),
    [
        (["train.parquet"], 1, 0, []),
        ([*PARTS, "validation-00000-of-00001-b21e5e1e4b6f2a1e.parquet"], 2, 1, []),
        ([f"data/{name}" for name in PARTS] + ["data/test-0.parquet"], 2, 0, ["test"]),
        (["train/0000.parquet", "train/0001.parquet", "val/0000.parquet"], 2, 1, []),
        (["plain_text/Train_0.parquet", "plain_text/valid_0.parquet"], 1, 1, []),
        (["0.parquet", "1.parquet", "metadata.parquet", ".hidden.parquet"], 2, 0, []),
        (["part.parquet", "val-0.parquet"], 1, 1, []),
        (["train-0.parquet", "extra.parquet"], 1, 0, ["1 files of no split"]),
    ],
)
def test_which_files_are_of_which_split(
    tmp_path: Path, names: list[str], train: int, val: int, unused: list[str],
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    for i, name in enumerate(names):
        write_table(
            tmp_path / name, table_of([{"bytes": b"%d" % i, "path": None}] * 2, [0, 0], ["a"])
        )
        os.utime(tmp_path / name, ns=(1, 1))  # as an archive may unpack them, of one size too
    files = parquet.CONTAINER.files_of(Data(name="parquet", root=str(tmp_path)))
    assert (len(files.train), len(files.val), list(files.unused)) == (train, val, unused)
    caplog.set_level(logging.INFO, "ddp_ssl")
    found = loaded(tmp_path)
    assert len(found.train) == 2 * train - (not val)
    assert found.val is not None
    seen = {found.train.read(i).tobytes() for i in range(len(found.train))}
    assert not val or not seen & {found.val.read(i).tobytes() for i in range(len(found.val))}
    assert len(seen) == train
    assert ("not used: " + ", ".join(unused) in caplog.text) == bool(unused)


def test_a_pattern(files: Path, tables: Path) -> None:
    found = loaded(f"{tables}/data/train-*.parquet", "parquet")
    assert len(found.train) + len(found.val or ()) == 30
    assert f"{tables}/*.parquet has no parquet files" in refused(f"{tables}/*.parquet")


def test_images_in_folders_come_first(files: Path, tmp_path: Path) -> None:
    root = shutil.copytree(files, tmp_path / "root")
    for name in ("annotations.parquet", "train/c0/a.parquet", "train/c1/a.parquet"):
        write_table(root / name, table_of([None], [0], None))
    assert loaded(root).train.digest == loaded(files).train.digest


def test_a_picture_beside_a_published_data_set_is_no_class(tmp_path: Path) -> None:
    root = imagenet_of(tmp_path, None, [0, 999])
    write(root / "assets" / "figure.png")
    assert len(loaded(root, "imagenet").train) == 2


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ([], "has no parquet files; accepted: train-"),
        (["test-0.parquet", "val-0.parquet"], "to train on, only of test, validation; accepted"),
        (["a/train-0.parquet", "b/train-0.parquet"], "has parquet files in a, b; accepted: one of"),
    ],
)
def test_files_that_are_not_there(tmp_path: Path, names: list[str], message: str) -> None:
    for name in names:
        write_table(tmp_path / name, table_of([None], [0], None))
    assert message in refused(tmp_path)
    assert "does not exist" in refused(tmp_path / "none")


# --- columns -------------------------------------------------------------------------------------


def test_columns_are_found_or_named(tmp_path: Path) -> None:
    """CIFAR-100's form: two columns of labels, images without names."""
    cells = [cell and {"bytes": cell["bytes"], "path": None} for cell in cells_of(6)]
    features = {
        "img": {"_type": "Image"},
        "fine": {"_type": "ClassLabel", "names": ["x", "y", "z"]},
        "coarse": {"_type": "ClassLabel", "names": ["p", "q"]},
    }
    table = pa.table(
        {
            "img": pa.array(cells, pa.struct([("bytes", pa.binary()), ("path", pa.string())])),
            "fine": pa.array([0, 1, 2, 0, None, -1], pa.int32()),
            "coarse": pa.array([0, 1, 0, 1, 0, 1], pa.uint8()),
            "raw": pa.array([cell["bytes"] if cell else None for cell in cells], pa.large_binary()),
        }
    ).replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    write_table(tmp_path / "train.parquet", table)
    write_table(tmp_path / "val.parquet", table)
    assert refused(tmp_path).startswith(
        f"data.columns: unset, and img, raw of {tmp_path}/train.parquet may hold the images; "
        "accepted: data.columns=[img,fine], or [img] for no labels"
    )
    fine = loaded(tmp_path, "parquet", columns=["img", "fine"])
    assert fine.train.labels.tolist() == [0, 1, 2, 0, -1, -1]
    assert fine.class_names == ("x", "y", "z")
    coarse = loaded(tmp_path, columns=["raw", "coarse"])
    assert coarse.train.labels.tolist() == [0, 1, 0, 1, 0, 1]
    assert encoded(coarse.train) == encoded(fine.train)
    none = loaded(tmp_path, columns=["img"])
    assert set(none.train.labels.tolist()) == {-1}
    assert none.class_names == ()
    assert "'fine' is no column of images in" in refused(tmp_path, columns=["fine", "img"])
    assert "accepted: img, raw" in refused(tmp_path, columns=["fine"])


def test_labels_without_names_of_classes(tmp_path: Path) -> None:
    write_table(tmp_path / "train.parquet", table_of(cells_of(4), [2, 0, 2, 1], None))
    found = loaded(tmp_path)
    assert found.class_names == ("0", "1", "2")
    assert found.train.name(0).startswith(b"2/")
    write_table(tmp_path / "train.parquet", table_of(cells_of(2), [10**9, 0], None))
    assert "data.columns: 'label' has numbers up to 1000000000 and no" in refused(tmp_path)
    write_table(tmp_path / "train.parquet", table_of(cells_of(2), [0, 5], ["a", "b"]))
    assert "has the label 5; accepted: 0 to 1, one of its 2 classes" in refused(tmp_path)


def test_names_that_are_not_unique_are_no_names(tmp_path: Path) -> None:
    cells = [cell and cell | {"path": "image.jpg"} for cell in cells_of(4)]
    write_table(tmp_path / "train.parquet", table_of(cells, [0, 0, 0, 0], ["a"]))
    train = loaded(tmp_path).train
    assert not train.named
    assert train.name(0).startswith(b"train.parquet/")


def test_other_files_have_other_columns(tmp_path: Path) -> None:
    write_table(tmp_path / "train-0.parquet", table_of(cells_of(2), [0, 1], ["a", "b"]))
    write_table(tmp_path / "train-1.parquet", table_of(cells_of(2), [0, 1], ["b", "a"]))
    assert "train-1.parquet has other classes than the first file" in refused(tmp_path)
    write_table(tmp_path / "train-1.parquet", pa.table({"image": [1, 2]}))
    assert "'image' is no column of images in" in refused(tmp_path)
    write_table(tmp_path / "train-0.parquet", pa.table({"text": ["a"]}))
    assert "has no column of images; it has text; accepted: a column of" in refused(tmp_path)


def test_numbers_that_are_no_labels(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A column of indices is no column of classes, unless the config says so."""
    images = [cell and cell["bytes"] for cell in cells_of(2)]
    for split in ("train", "val"):
        table = pa.table({"image": images, "id": [7, 8]})
        write_table(tmp_path / f"{split}.parquet", table)
    assert loaded(tmp_path).train.labels.tolist() == [-1, -1]
    assert "so the images have no labels: id of the parquet files may be no" in caplog.text
    assert loaded(tmp_path, columns=["image", "id"]).train.labels.tolist() == [7, 8]
    for split in ("train", "val"):
        table = pa.table({"image": images, "id": [7, 8], "labels": [0, 1]})
        write_table(tmp_path / f"{split}.parquet", table)
    assert loaded(tmp_path).train.labels.tolist() == [0, 1]


def test_columns_that_are_not_supported(tmp_path: Path) -> None:
    def of(**columns: Any) -> str:
        write_table(tmp_path / "train.parquet", pa.table(columns))
        said = refused(tmp_path)
        assert "fetch it again" not in said
        return said

    deep = pa.struct([("bytes", pa.struct([("bytes", pa.binary())]))])
    said = of(image=pa.array([{"bytes": {"bytes": b"x"}}], deep))
    assert "has no column of images; it has image" in said
    said = of(image=[b"x", b"y"], label=pa.array([0, 2**64 - 1], pa.uint64()))
    assert said.startswith("data.columns: 'label' of ")
    assert "has numbers that are not supported as labels" in said
    said = of(**{"image": pa.array([{"bytes": b"x"}]), "image.bytes": [7], "label": [0]})
    assert "has both a column 'image.bytes' and a field of this name" in said


def test_files_of_paths_alone_are_refused(tmp_path: Path) -> None:
    cells: list[Cell] = [{"bytes": None, "path": f"{i}.jpg"} for i in range(3)]
    write_table(tmp_path / "train.parquet", table_of(cells, [0, 0, 0], ["a"]))
    for _ in range(2):  # found, and kept
        said = refused(tmp_path)
        assert "all 3 images to train on have no bytes in 'image', only paths; accepted: " in said


def test_keys_that_are_for_other_data(files: Path, tables: Path) -> None:
    assert refused(files, name="folder", columns=["image"]).startswith(
        "data.columns: is for parquet"
    )


def test_a_missing_pyarrow_is_one_line(tables: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pages.arrow.cache_clear()
    for name in ("pyarrow", "pyarrow.parquet"):
        monkeypatch.setitem(sys.modules, name, None)
    assert "pyarrow, which is not installed: pip install 'ddp_ssl[parquet]'" in refused(tables)
    pages.arrow.cache_clear()


# --- ImageNet ------------------------------------------------------------------------------------


def imagenet_of(root: Path, names: list[str] | None, labels: list[int]) -> Path:
    cells = cells_of(len(labels))
    for split in ("train", "validation"):
        write_table(root / f"{split}-00000-of-00001.parquet", table_of(cells, labels, names))
    return root


def test_imagenet_by_number_and_by_words(tmp_path: Path) -> None:
    table = imagenet.table()
    wnids = list(table)
    words = list(table.values())
    words[517] = "crane2"
    for names in (words, wnids, None, [f"{w.split(',')[0]} " for w in words]):
        root = imagenet_of(tmp_path / str(names)[:9], names, [0, 134, 517, 999])
        found = loaded(root, "imagenet")
        assert found.class_names == tuple(wnids)
        assert [wnids[i] for i in found.train.labels] == [
            "n01440764", "n02012849", "n03126707", "n15075141",
        ]  # fmt: skip
        hundred = loaded(imagenet_of(root, names, [15, 0, 999, 457]), "imagenet100")
        assert hundred.class_names == imagenet.imagenet100()
        assert [hundred.class_names[i] for i in hundred.train.labels] == ["n01558993"]
        assert hundred.train.name(0) == b"n01558993/00.jpg"


def test_imagenet100_in_an_order_of_its_own(tmp_path: Path) -> None:
    names = [imagenet.table()[wnid] for wnid in imagenet.imagenet100()][::-1]
    assert "bonnet, poke bonnet" in names
    root = imagenet_of(tmp_path, names, [names.index("bonnet, poke bonnet"), 99, 0])
    found = loaded(root, "imagenet100")
    hundred = imagenet.imagenet100()
    assert found.class_names == hundred
    assert found.train.labels.tolist() == [hundred.index("n02869837"), 0, 99]


def test_a_wnid_is_its_class_in_any_order(tmp_path: Path) -> None:
    """Also where most of the others are in ImageNet's own order."""
    wnids = list(imagenet.table())
    names = [*wnids[1:4], wnids[0], *wnids[4:]]
    found = loaded(imagenet_of(tmp_path, names, [0, 3, 9]), "imagenet")
    assert found.train.labels.tolist() == [1, 0, 9]


@pytest.mark.parametrize("largest", [99, 998, 1000])
def test_other_numbers_than_imagenet_s_need_names(tmp_path: Path, largest: int) -> None:
    root = imagenet_of(tmp_path, None, [0, largest])
    for name in ("imagenet", "imagenet100"):
        assert f"has labels up to {largest} without names of the classes" in refused(
            root, name=name
        )


def test_an_imagenet100_of_other_classes_is_refused(tmp_path: Path) -> None:
    names = [imagenet.table()[wnid] for wnid in imagenet.imagenet100()]
    names[3], names[7] = "tench, Tinca tinca", "goldfish, Carassius auratus"
    said = refused(imagenet_of(tmp_path, names, [0, 1]), name="imagenet100")
    lacking = [imagenet.imagenet100()[i] for i in (3, 7)]
    assert f"lacks 2 of the 100 classes of ImageNet-100, {lacking[0]} (" in said
    assert "and has others instead, n01440764 (tench, Tinca tinca), n01443537 (" in said
    names[3] = "a class of nobody's"
    said = refused(imagenet_of(tmp_path, names, [0, 1]), name="imagenet100")
    assert (
        "1 of its 100 classes are not known as one of ImageNet's, \"a class of nobody's\"" in said
    )
    names[3] = names[4]
    assert "as two of its classes" in refused(
        imagenet_of(tmp_path, names, [0, 1]), name="imagenet100"
    )


def test_the_hub_s_names_are_those_of_the_folders(tmp_path: Path) -> None:
    cells = [cell and cell | {"path": f"n01440764_{i}_n01440764.JPEG"}
             for i, cell in enumerate(cells_of(2))]  # fmt: skip
    for split in ("train", "val"):
        table = table_of(cells, [0, 0], list(imagenet.table().values()))
        write_table(tmp_path / "data" / f"{split}-0.parquet", table)
    train = loaded(tmp_path, "imagenet").train
    assert [train.name(i) for i in range(2)] == [
        b"n01440764/n01440764_0.JPEG", b"n01440764/n01440764_1.JPEG",
    ]  # fmt: skip
    assert train.where(1) == f"{tmp_path}/train/n01440764/n01440764_1.JPEG"


def test_a_published_data_set_has_images_for_validation(tmp_path: Path) -> None:
    write_table(tmp_path / "train-0.parquet", table_of(cells_of(2), [0, 1], None))
    assert "has no parquet files of a validation split" in refused(tmp_path, name="imagenet")


# --- damage --------------------------------------------------------------------------------------


def test_cells_without_an_image_are_bad_images(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """An empty struct, an empty field, no bytes, no image, and one whose bytes change later."""
    cells = cells_of(12)
    spoiled: dict[int, Cell] = {
        1: None,
        4: {"bytes": None, "path": "x.jpg"},
        6: {"bytes": b"", "path": "y"},
        8: {"bytes": b"no image", "path": "z"},
    }
    for i, value in spoiled.items():
        cells[i] = value
    path = write_table(
        tmp_path / "train.parquet",
        table_of(cells, [0] * 12, ["a"]),
        use_dictionary=False,
        compression="none",
    )
    write_table(tmp_path / "val.parquet", table_of(cells[:1], [0], ["a"]))
    before = path.stat()
    split = loaded(tmp_path).train
    assert split.shards is not None
    content = bytearray(path.read_bytes())
    content[int(split.shards.offset[10]) + 100] ^= 1
    path.write_bytes(content)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))

    bad = BadImages()
    loader = eval_of(split, np.arange(12), bad=bad)
    ids = [int(i) for batch in loader for i in batch.ids]
    assert [i for i in ids if i >= 0] == [0, 2, 3, 5, 7, 9, 11]
    reasons = dict(bad.of(split))
    assert "its checksum is not that" in reasons.pop(10)
    assert reasons == {
        1: "its cell is empty",
        4: "its cell is empty",
        6: "empty",
        8: "not an image",
    }
    found = check_data.check({"train": split}, full=False, workers=1, max_pixels=10**6)["train"]
    assert {1, 4, 6, 8} <= set(found)
    with_train = loader_of(split, global_batch=4)
    trained = [next(with_train) for _ in range(6)]
    assert not {1, 4, 6, 8, 10} & {int(i) for batch in trained for i in batch.ids}
    with_train.close()


def test_a_damaged_part_of_a_file_costs_its_images(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A page's header in the second of three row groups is overwritten before it is read first."""
    cells = cells_of(12)
    table = table_of(cells, [0] * 12, ["a"])
    path = write_table(tmp_path / "train.parquet", table, row_group_size=4, use_dictionary=False)
    write_table(tmp_path / "val.parquet", table)
    at = pq.ParquetFile(path).metadata.row_group(1).column(0).data_page_offset
    content = bytearray(path.read_bytes())
    content[at : at + 40] = b"\xff" * 40
    path.write_bytes(content)
    split = loaded(tmp_path).train
    assert "train.parquet: 4 images in row group 1 are damaged" in caplog.text
    for i in range(12):
        if i in range(4, 8):
            with pytest.raises(FileNotFoundError, match="its part of the file is damaged"):
                split.read(i)
        else:
            cell = cells[i]
            assert cell is not None
            assert split.read(i).tobytes() == cell["bytes"]

    # It is not kept: the file is looked at again, and an undamaged one of the same time is read.
    caplog.clear()
    loaded(tmp_path)
    assert "4 images in row group 1 are damaged" in caplog.text
    before = path.stat()
    write_table(path, table, row_group_size=4, use_dictionary=False)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert len(encoded(loaded(tmp_path).train)) == 12


@pytest.mark.parametrize("failures", [1, 9])
def test_an_error_of_the_file_system_is_no_damage(
    tables: Path, monkeypatch: pytest.MonkeyPatch, failures: int
) -> None:
    """A stale file is opened again; where it stays so, nothing is kept."""
    real, raised = pages.pages, 0

    def stale(*arguments: Any) -> Any:
        nonlocal raised
        for number, page in enumerate(real(*arguments)):
            if number and raised < failures:
                raised += 1
                raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))
            yield page

    monkeypatch.setattr(index, "RETRIES", (0.0, 0.0))
    with monkeypatch.context() as patch:
        patch.setattr(index, "pages", stale)
        if failures > 1:
            said = refused(tables)
            assert said.startswith("data.root: ")
            assert said.endswith(".parquet cannot be read: [Errno 116] Stale file handle")
        else:
            assert all(encoded(loaded(tables).train))
    assert raised
    assert all(encoded(loaded(tables).train))


def test_files_that_are_not_whole(tables: Path, tmp_path: Path) -> None:
    root = shutil.copytree(tables, tmp_path / "root")
    second = root / "data" / PARTS[1]
    whole = second.read_bytes()
    second.write_bytes(whole[:1000])
    assert f"{second} is damaged or cannot be read: " in refused(root)
    (root / "data" / PARTS[0]).write_bytes(b"")
    assert "fetch it again" in refused(root)


@pytest.mark.parametrize("encoding", ["DELTA_LENGTH_BYTE_ARRAY", "DELTA_BYTE_ARRAY"])
def test_encodings_that_are_not_read(tmp_path: Path, encoding: str) -> None:
    write_table(
        tmp_path / "train.parquet", table_of(cells_of(2), [0, 0], ["a"]), use_dictionary=False,
        column_encoding={"image.bytes": encoding},
    )  # fmt: skip
    assert f"its images have the encoding {encoding}, which is not read" in refused(tmp_path)


def test_an_offset_of_zero_is_no_dictionary(tmp_path: Path) -> None:
    """Some writers write 0 where there is no dictionary."""
    path = write_table(
        tmp_path / "t.parquet", pa.table({"x": [b"one", b"two"]}), use_dictionary=False
    )
    chunk = pq.ParquetFile(path).metadata.row_group(0).column(0)
    fields = ("compression", "data_page_offset", "total_compressed_size", "num_values")
    about = {name: getattr(chunk, name) for name in fields}
    zero = SimpleNamespace(**about, has_dictionary_page=True, dictionary_page_offset=0)
    with path.open("rb") as file:
        (page,) = pages.pages(file, zero, 1)
    assert [bytes(value) for value, _ in page.places()] == [b"one", b"two"]


# --- what is kept --------------------------------------------------------------------------------


def test_files_are_read_through_once(
    tables: Path, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = shutil.copytree(tables, tmp_path / "root")
    read: list[str] = []
    real = index.read_table

    def spied(path: str, *rest: Any) -> Any:
        read.append(os.path.basename(path))
        return real(path, *rest)

    monkeypatch.setattr(index, "read_table", spied)
    first = loaded(root)
    assert len(read) == 4
    read.clear()
    assert loaded(root).train.digest == first.train.digest
    assert loaded(shutil.copytree(root, tmp_path / "moved")).train.digest == first.train.digest
    assert read == []
    # A file that changed is read again, the others are not; so it is after an interruption.
    os.utime(root / "data" / PARTS[0], ns=(1, 1))
    assert encoded(loaded(root).train) == encoded(first.train)
    assert read == [PARTS[0]]
    read.clear()
    for kept in (cache / "parquet").glob("*.npz"):  # under a run, too
        kept.write_bytes(kept.read_bytes()[:500])
    assert encoded(loaded(root).train) == encoded(first.train)
    assert len(read) == 4


def test_a_cache_that_cannot_be_written_costs_time_only(
    tables: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    expected = encoded(loaded(tables).train)
    monkeypatch.setenv("DDP_SSL_CACHE", str(tmp_path / "file"))
    assert encoded(loaded(tables).train) == expected
    assert "DDP_SSL_CACHE: " in caplog.text
    assert "read through again at every start" in caplog.text


def test_a_staged_copy_is_read_and_named_as_the_original(
    tables: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = loaded(tables)
    monkeypatch.setattr(index, "read_table", None)  # what is kept fits the copy
    data = Data(name="folder", root=str(tables), stage=str(tmp_path / "local"))
    copy = str(registry.stage(data))
    assert copy.startswith(f"{tmp_path}/local/folder-")
    found = registry.load(data, 0)
    assert found.train.shards is not None
    assert found.train.shards.path_of(0).startswith(copy)
    assert found.train.where(3) == original.train.where(3)
    assert encoded(found.train) == encoded(original.train)
    staged = Path(found.train.shards.path_of(0))
    staged.write_bytes(b"cut")  # by a crash
    assert registry.stage(data) == copy
    assert encoded(registry.load(data, 0).train) == encoded(original.train)
    pattern = data.model_copy(update={"root": f"{tables}/data/*.parquet", "name": "parquet"})
    monkeypatch.undo()
    assert registry.load(pattern, 0).val is not None


def test_a_copy_that_the_disk_changes_is_not_kept(
    tables: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = Data(name="folder", root=str(tables), stage=str(tmp_path / "local"))
    sync = os.fsync

    def changed(file: int) -> None:
        sync(file)
        os.pwrite(file, b"?", 100)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", changed)
        with pytest.raises(ValueError, match=r"^data.stage: the copy of .* does not read back as"):
            registry.stage(data)
    copy = Path(str(registry.stage(data)))
    for path in copy.rglob("*.parquet"):
        assert path.read_bytes() == (tables / "data" / path.name).read_bytes()


def test_copies_whose_names_are_alike_are_kept_apart(tmp_path: Path) -> None:
    for i, name in enumerate(("train-0.parquet", "train/0.parquet", "val.parquet")):
        cells: list[Cell] = [{"bytes": b"%d" % i, "path": None}]
        write_table(tmp_path / "from" / name, table_of(cells, [0], ["a"]))
    data = Data(name="parquet", root=str(tmp_path / "from"), stage=str(tmp_path / "local"))
    assert encoded(registry.load(data, 0).train) == [b"1", b"0"]


def test_what_images_contain_is_part_of_the_identity(tmp_path: Path) -> None:
    """Of two columns with the same names; not in another container, nor in older checkpoints."""
    first, second = cells_of(4), cells_of(8)[4:]
    renamed = [
        {"bytes": b["bytes"], "path": a["path"]}
        for a, b in zip(first, second, strict=True)
        if a and b
    ]
    for split in ("train", "val"):
        table = table_of(first, [0, 1, 0, 1], ["a", "b"], other=pa.array(renamed, IMAGE))
        write_table(tmp_path / "two" / f"{split}.parquet", table)

    def identity_of(root: Path, *changes: str) -> dict[str, str]:
        words = ["method.name=simclr", "data.name=parquet", f"data.root={root}", *changes]
        config = configure.load(words).config
        return whole_identity(config, registry.load(config.data, 0))

    columns = [f"data.columns=[{name},label]" for name in ("image", "other")]
    mine, other = (identity_of(tmp_path / "two", change) for change in columns)
    check_identity(mine, dict(mine), tmp_path)
    with pytest.raises(ConfigError, match=r"another experiment: train contents in parquet: "):
        check_identity(other, mine, tmp_path)
    earlier = {key: value for key, value in mine.items() if " contents " not in key}
    check_identity(other, earlier, tmp_path)
    check_identity(earlier, other, tmp_path)
    assert pack(tmp_path / "two", tmp_path / "out", "data.name=parquet", columns[0]) == 0
    packed = identity_of(tmp_path / "out")
    check_identity(packed, other, tmp_path)
    with pytest.raises(ConfigError, match=r"another experiment: train contents in shards: "):
        check_identity(packed | {"train contents in shards": "0"}, packed, tmp_path)
