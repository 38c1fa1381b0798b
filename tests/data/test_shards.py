"""Shards: packed by the tool, read by offset, by tar and by DALI; resumed, staged, refused."""

from __future__ import annotations

import fcntl
import hashlib
import io
import json
import os
import shutil
import tarfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ddp_ssl.commands import pack_shards, shard_writer
from ddp_ssl.config import Data
from ddp_ssl.data.datasets import registry, shards, staging
from ddp_ssl.data.datasets.base import Dataset, Definition
from ddp_ssl.data.datasets.shards import open_shards
from ddp_ssl.data.datasets.split import Split
from tests.data.images import pack, picture


@pytest.fixture(autouse=True)
def _cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DDP_SSL_CACHE", str(tmp_path_factory.mktemp("cache")))
    monkeypatch.setattr(shard_writer, "RETRIES", ())


def source(root: Path) -> Dataset:
    data = Data(name="folder", root=str(root))
    return registry.definition_of(data).load(data)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name[0] != "."}


def refused(capsys: pytest.CaptureFixture[str]) -> str:
    """The error that was printed: one line."""
    (line,) = [x for x in capsys.readouterr().err.splitlines() if "error" in x]
    return line


# --- what is in them -----------------------------------------------------------------------------


def test_the_same_ids_names_labels_bytes_and_digests(files: Path, packed: Path) -> None:
    original, found = source(files), open_shards(packed)
    assert found.class_names == original.class_names == ("c0", "c1", "c2")
    assert shards.describe(packed)["extensions"] == ["jpg", "png"]
    assert original.val is not None
    assert found.val is not None
    for mine, other in ((found.train, original.train), (found.val, original.val)):
        assert len(mine) == len(other)
        assert mine.labels.tolist() == other.labels.tolist()
        fresh = Split(mine.labels, "", mine.names, mine.spans)
        assert mine.digest == fresh.digest == other.digest
        for i in range(len(mine)):
            assert mine.name(i) == other.name(i)
            assert mine.read(i).tobytes() == Path(os.fsdecode(other.path(i))).read_bytes()
    some = found.train.subset(np.array([5, 2]))
    assert some.digest == original.train.subset(np.array([5, 2])).digest
    assert some.read(0).tobytes() == original.train.read(5).tobytes()


def test_the_standard_library_reads_them(files: Path, packed: Path) -> None:
    original, seen = source(files).train, []
    for tar in sorted(packed.glob("train-*.tar")):
        with tarfile.open(tar) as file:
            members = file.getmembers()
            assert {(m.mtime, m.uid, m.gid, m.uname) for m in members} == {(0, 0, 0, "")}
            for image, label, number in zip(*(members[i::3] for i in range(3)), strict=True):
                assert [m.name.split(".")[0] for m in (image, label, number)] == [
                    f"{len(seen):09d}"
                ] * 3
                content = [file.extractfile(m).read() for m in (image, label, number)]  # type: ignore[union-attr]
                i = int(content[2])
                assert content[0] == original.read(i).tobytes()
                assert int(content[1]) == original.labels[i]
                seen.append(i)
    assert sorted(seen) == list(range(30))
    assert seen != sorted(seen)
    # In random order: a shard has more than one class.
    assert len(set(original.labels[seen[:6]].tolist())) > 1


def test_dali_reads_them_by_their_index(files: Path, packed: Path) -> None:
    from nvidia.dali import fn, pipeline_def

    original, tars = source(files).train, sorted(packed.glob("train-*.tar"))
    assert len(tars) > 3

    @pipeline_def(batch_size=10, num_threads=1, device_id=None)
    def streamed():  # type: ignore[no-untyped-def]
        extensions = ";".join(shards.describe(packed)["extensions"])
        image, label, number = fn.readers.webdataset(
            paths=[str(tar) for tar in tars],
            ext=[extensions, "cls", "id"],
            missing_component_behavior="error",
        )
        return image, label, number

    pipe, seen = streamed(), []
    pipe.build()
    for _ in range(3):
        image, label, number = pipe.run()
        for k in range(10):
            i = int(np.array(number[k]).tobytes())
            assert np.array(image[k]).tobytes() == original.read(i).tobytes()
            assert int(np.array(label[k]).tobytes()) == original.labels[i]
            seen.append(i)
    assert sorted(seen) == list(range(30))


def test_the_seed_decides_every_byte(files: Path, packed: Path, tmp_path: Path) -> None:
    assert pack(files, tmp_path / "same") == 0
    assert pack(files, tmp_path / "other", seed=1) == 0
    same, other, first = (contents(p) for p in (tmp_path / "same", tmp_path / "other", packed))
    for name in first:
        if name != shard_writer.JOURNAL:  # whose lines are in the order of the threads
            assert same[name] == first[name], name
    assert other["train-00000.tar"] != first["train-00000.tar"]
    assert open_shards(tmp_path / "other").train.digest == open_shards(packed).train.digest


def test_arrays_become_pngs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train = Split.of_array(np.stack([picture(i, 16, 16) for i in range(9)]), np.arange(9) % 3)
    made = Dataset("digits", train, None, ("x", "y", "z"))
    monkeypatch.setattr(registry, "find", lambda _: None)
    monkeypatch.setattr(
        registry, "definition_of", lambda _: Definition(lambda _: None, lambda _: made)
    )
    assert pack_shards.main(["--out", str(tmp_path / "out"), "--shard-size", "5e3"]) == 0
    found = open_shards(tmp_path / "out")
    assert found.val is None
    assert found.train.digest == train.digest
    assert found.train.labels.tolist() == train.labels.tolist()
    for i in range(9):
        image = Image.open(io.BytesIO(found.train.read(i).tobytes()))
        assert image.format == "PNG"
        assert (np.asarray(image) == train.images[i]).all()  # type: ignore[index]


def test_hostile_names_are_only_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They reach neither a path that is opened nor a member of the tar."""
    hostile = [b"../../etc/passwd.jpg", b"/etc/passwd.png", b"new\nline.jpg", b"\xff.j/../pg"]
    content = [picture(i).tobytes()[:700] for i in range(4)]
    for i in range(4):
        (tmp_path / f"{i}.bin").write_bytes(content[i])
    named = Split.of_files("/data", hostile, np.arange(4))
    made = Dataset("x", named, None, ())
    monkeypatch.setattr(Split, "path", lambda _, i: os.fsencode(tmp_path / f"{i}.bin"))
    monkeypatch.setattr(registry, "find", lambda _: None)
    monkeypatch.setattr(
        registry, "definition_of", lambda _: Definition(lambda _: None, lambda _: made)
    )
    assert pack_shards.main(["--out", str(tmp_path / "out")]) == 0
    with tarfile.open(tmp_path / "out" / "train-00000.tar") as file:
        names = sorted(member.name for member in file)
    assert [n.split(".")[0] for n in names] == [f"{i // 3:09d}" for i in range(12)]
    assert {n.split(".")[1] for n in names} == {"jpg", "png", "cls", "id"}
    opened: list[object] = []
    real_open = os.open

    def spied(path: object, *rest: object) -> int:
        opened.append(path)
        return real_open(path, *rest)  # type: ignore[arg-type]

    found = open_shards(tmp_path / "out").train
    monkeypatch.setattr(os, "open", spied)
    for i in range(4):
        assert found.name(i) == hostile[i]
        assert found.read(i).tobytes() == content[i]
    assert opened == [str(tmp_path / "out" / "train-00000.tar")]


def test_what_data_skip_lists_keeps_its_id(files: Path, tmp_path: Path) -> None:
    original = source(files).train
    listed = tmp_path / "skip.txt"
    listed.write_bytes(original.path(4) + b"\tbroken\n" + original.path(9) + b"\n")
    assert pack(files, tmp_path / "out", f"data.skip={listed}") == 0
    found = open_shards(tmp_path / "out").train
    assert found.digest == original.digest
    assert [i for i in range(30) if not len(found.read(i))] == [4, 9]
    assert found.read(5).tobytes() == original.read(5).tobytes()
    samples = json.loads((tmp_path / "out" / shards.ABOUT).read_text())["splits"]["train"]["tars"]
    assert sum(tar["samples"] for tar in samples) == 28


# --- packing again -------------------------------------------------------------------------------


def truncate(out: Path) -> None:
    os.truncate(out / "train-00001.tar", 1000)


def delete(out: Path) -> None:
    (out / "train-00001.tar").unlink()


def flip(out: Path) -> None:
    content = bytearray((out / "train-00001.tar").read_bytes())
    content[600] ^= 1
    (out / "train-00001.tar").write_bytes(content)


def forget(out: Path) -> None:
    """Killed while it wrote the journal: the last line is torn."""
    journal = out / shard_writer.JOURNAL
    journal.write_bytes(journal.read_bytes()[:-20])


@pytest.mark.parametrize("damage", [truncate, delete, flip, forget])
def test_packing_goes_on(
    files: Path,
    packed: Path,
    copy: Path,
    damage: Callable[[Path], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As if killed before the end: only what is not whole is written, and all is as before."""
    (copy / shards.ABOUT).unlink()
    (copy / ".part-train-00009.tar").write_bytes(b"half")
    damage(copy)
    written, write_shard = [], shard_writer._write_shard

    def spied(split: Split, shard: shard_writer.Shard, *rest: object) -> object:
        written.append(shard.tar)
        return write_shard(split, shard, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(shard_writer, "_write_shard", spied)
    assert pack(files, copy) == 0
    assert len(written) == 1
    again, first = contents(copy), contents(packed)
    for name in first:
        assert again[name] == first[name] or name == shard_writer.JOURNAL, name
    assert not list(copy.glob(".part-*"))
    written.clear()
    assert pack(files, copy) == 0
    assert written == []


def test_a_killed_process_leaves_nothing_that_looks_whole(files: Path, tmp_path: Path) -> None:
    """An error in the middle, as far as the disk is concerned, is a kill."""
    out = tmp_path / "out"
    with pytest.MonkeyPatch.context() as patch:
        calls: list[Path] = []
        read_back = shard_writer._read_back

        def dies(part: Path, *rest: object) -> None:
            calls.append(part)
            if len(calls) > 3:
                raise OSError(5, "Input/output error")
            read_back(part, *rest)  # type: ignore[arg-type]

        patch.setattr(shard_writer, "_read_back", dies)
        assert pack(files, out) == 1
    assert not shards.is_shards(out)
    assert 0 < len(list(out.glob("[!.]*.tar"))) <= 3
    assert pack(files, out) == 0
    assert open_shards(out).train.digest == source(files).train.digest


@pytest.mark.parametrize("change", ["seed", "size", "data"])
def test_other_shards_are_not_mixed_in(
    files: Path, copy: Path, tmp_path: Path, change: str, capsys: pytest.CaptureFixture[str]
) -> None:
    before = contents(copy)
    root = files
    if change == "data":
        root = shutil.copytree(files, tmp_path / "files")
        next((root / "train" / "c1").iterdir()).unlink()
    size, seed = 20_000 + (change == "size"), int(change == "seed")
    assert pack(root, copy, size=size, seed=seed) == 2
    assert "was begun with other data, another seed or another shard size" in refused(capsys)
    assert contents(copy) == before


def test_foreign_tar_files_are_left_alone(
    files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mine.tar").write_bytes(b"precious")
    assert pack(files, tmp_path) == 2
    assert "holds other tar files; accepted: an empty folder" in refused(capsys)


def test_two_do_not_pack_into_one_folder(
    files: Path, copy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with (copy / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert pack(files, copy) == 2
    assert "another process is packing into" in refused(capsys)


def test_unreadable_images_are_all_listed(
    files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = shutil.copytree(files, tmp_path / "files")
    (root / "train" / "c0" / "03.jpg").write_bytes(b"")
    (root / "val" / "c1" / "31.jpg").unlink()
    (root / "val" / "c1" / "31.jpg").mkdir()  # not an image any more: the scan leaves it out
    (root / "train" / "c1" / "01.jpg").write_bytes(b"")
    out = tmp_path / "out"
    assert pack(root, out) == 2
    line = refused(capsys)
    assert "2 images cannot be read" in line
    listed = out / "unreadable.txt"
    assert f"data.skip={listed} leaves them out" in line
    assert listed.read_text() == "".join(
        f"{root}/train/{name}\tempty\n" for name in ("c0/03.jpg", "c1/01.jpg")
    )
    assert pack(root, out, f"data.skip={listed}") == 0
    assert [len(open_shards(out).train.read(i)) > 0 for i in range(30)].count(False) == 2


def test_an_image_that_fails_late_is_listed_too(
    files: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    read = Split.read

    def fails(split: Split, i: int) -> object:
        if split.name(i).endswith((b"05.jpg", b"17.jpg")):
            raise OSError(5, "Input/output error")
        return read(split, i)

    monkeypatch.setattr(Split, "read", fails)
    assert pack(files, tmp_path / "out") == 2
    line = refused(capsys)
    assert "2 images cannot be read" in line
    assert line.endswith("leaves them out, in another --out")  # since the others' places change
    assert (tmp_path / "out" / "unreadable.txt").read_text().count("Input/output error\n") == 2
    assert not shards.is_shards(tmp_path / "out")


# --- opening -------------------------------------------------------------------------------------


def newer(out: Path) -> None:
    about = json.loads((out / shards.ABOUT).read_text())
    (out / shards.ABOUT).write_text(json.dumps(about | {"format": 4}))


def half_json(out: Path) -> None:
    os.truncate(out / shards.ABOUT, 100)


def leads_out(out: Path) -> None:
    text = (out / shards.ABOUT).read_text()
    (out / shards.ABOUT).write_text(text.replace('"train-00000.tar"', '"../train-00000.tar"'))


def cut_array(out: Path) -> None:
    os.truncate(out / "val-offset.npy", 140)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (truncate, r"train-00001\.tar has 1000 bytes instead of \d+; copy it again"),
        (delete, r"train-00001\.tar is missing; copy it again"),
        (newer, "holds shards of format 4; accepted: 1 to 3"),
        (half_json, r"shards\.json is damaged or cannot be read"),
        (leads_out, r"shards\.json is damaged or cannot be read"),
        (cut_array, r"val-offset\.npy is missing or damaged"),
    ],
)
def test_what_cannot_be_opened(copy: Path, damage: Callable[[Path], None], message: str) -> None:
    damage(copy)
    with pytest.raises(ValueError, match=f"^data.root: .*{message}") as caught:
        open_shards(copy)
    assert "\n" not in str(caught.value)


def test_a_shard_that_ends_early_while_running(copy: Path) -> None:
    train = open_shards(copy).train
    truncate(copy)
    inside = [i for i in range(30) if train.shards.shard[i] == 1]  # type: ignore[union-attr]
    with pytest.raises(OSError, match="shard ends before byte"):
        train.read(inside[-1])


# --- staging -------------------------------------------------------------------------------------


def test_staged_copies_are_the_same(packed: Path, tmp_path: Path) -> None:
    copy = staging.stage(packed, tmp_path / "disk" / "deep", lambda _: None)
    stamp = hashlib.sha256((packed / shards.ABOUT).read_bytes()).hexdigest()[:12]
    assert copy == tmp_path / "disk" / "deep" / f"folder-{stamp}-user{os.geteuid()}"
    assert copy.stat().st_mode & 0o777 == 0o700
    mine, other = contents(copy), contents(packed)
    del other[shard_writer.JOURNAL]
    assert mine == other
    split, moved = open_shards(packed).train, open_shards(copy).train
    # A list for `data.skip` made of the one names the images of the other.
    assert (moved.root, moved.digest) == (split.root, split.digest)
    assert moved.read(3).tobytes() == split.read(3).tobytes()
    assert moved.shards is not None
    assert moved.shards.path_of(3).startswith(str(copy))


def test_staging_in_a_folder_that_others_write_to(
    packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another user's copy is refused, and a link in place of a file is not followed."""
    copy = staging.stage(packed, tmp_path, lambda _: None)
    precious = tmp_path / "precious"
    precious.write_text("precious")
    (copy / shards.ABOUT).unlink()  # so that it is copied again
    (copy / ".lock").unlink()
    (copy / ".lock").symlink_to(precious)
    with pytest.raises(ValueError, match=r"^data.stage: .* cannot be copied to .*symbolic links"):
        staging.stage(packed, tmp_path, lambda _: None)
    assert precious.read_text() == "precious"
    (copy / ".lock").unlink()
    copy.chmod(0o770)
    refusal = r"^data.stage: .* is no folder of this user alone"
    with pytest.raises(ValueError, match=refusal):
        staging.stage(packed, tmp_path, lambda _: None)
    copy.chmod(0o700)
    assert staging.stage(packed, tmp_path, lambda _: None) == copy
    copy.rename(tmp_path / "theirs")
    copy.symlink_to(tmp_path / "theirs")
    with pytest.raises(ValueError, match=refusal):
        staging.stage(packed, tmp_path, lambda _: None)
    copy.unlink()
    (tmp_path / "theirs").rename(copy)
    mine = os.geteuid()
    copy.rename(tmp_path / copy.name.replace(f"user{mine}", f"user{mine + 1}"))
    monkeypatch.setattr(os, "geteuid", lambda: mine + 1)
    with pytest.raises(ValueError, match=refusal):
        staging.stage(packed, tmp_path, lambda _: None)


def test_staging_resumes(packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copied: list[str] = []
    real = staging._copy

    def spied(source: str, *rest: object) -> None:
        copied.append(os.path.basename(source))
        real(source, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(staging, "_copy", spied)
    copy = staging.stage(packed, tmp_path, lambda _: None)
    everything = sorted(copied)
    copied.clear()
    assert staging.stage(packed, tmp_path, lambda _: None) == copy
    assert copied == []
    # Killed: no shards.json yet, a file half copied, one not begun, one cut by a crash.
    (copy / shards.ABOUT).unlink()
    (copy / "train-00000.tar").rename(copy / ".part-train-00000.tar")
    (copy / "train-labels.npy").unlink()
    truncate(copy)
    staging.stage(packed, tmp_path, lambda _: None)
    assert sorted(copied) == sorted(
        ["train-00000.tar", "train-00001.tar", "train-labels.npy", shards.ABOUT]
    )
    assert sorted(contents(copy)) == everything
    delete(copy)  # by someone who cleaned up
    staging.stage(packed, tmp_path, lambda _: None)
    assert open_shards(copy).train.read(0).tobytes()


def test_staging_tells_how_far_it_is(
    packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(staging, "EVERY_S", 0.0)
    told: list[str] = []
    staging.stage(packed, tmp_path, told.append)
    assert told
    assert told[0].startswith(f"copying {packed} to {tmp_path}/folder-")


def test_a_damaged_source_is_found_while_staging(copy: Path, tmp_path: Path) -> None:
    flip(copy)
    with pytest.raises(ValueError, match=r"^data.root: .*train-00001.tar is damaged"):
        staging.stage(copy, tmp_path / "disk", lambda _: None)
    (staged,) = (tmp_path / "disk").iterdir()
    assert not shards.is_shards(staged)
    assert not (staged / "train-00001.tar").exists()


def test_a_disk_without_room(packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    message = r"^data.stage: .* has 0.0 GB free, .* needs 0.0 GB; accepted: a folder with"
    with pytest.raises(ValueError, match=message):
        staging.stage(packed, tmp_path, lambda _: None)


def test_a_place_that_is_no_folder(packed: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"^data.stage: .*cannot be copied to .*File exists"):
        staging.stage(packed, tmp_path / "file", lambda _: None)


def test_one_copies_and_the_others_wait(packed: Path, tmp_path: Path) -> None:
    copy = staging.stage(packed, tmp_path, lambda _: None)
    (copy / "train-00000.tar").unlink()  # a complete copy waits for nobody
    told: list[str] = []
    with (copy / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        other = threading.Thread(target=staging.stage, args=(packed, tmp_path, told.append))
        other.start()
        time.sleep(0.3)
        assert other.is_alive()
    other.join(10)
    assert not other.is_alive()
    assert told[0] == f"waiting for another process that copies to {copy}"
    assert (copy / "train-00000.tar").exists()


def test_what_is_wrong_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With options and keys in any order."""
    arguments = ["data.name=folder", "--out", str(tmp_path), "data.root=/none"]
    assert pack_shards.main(arguments) == 2
    said = capsys.readouterr().err
    assert said.startswith("ddp_ssl: error: data.root: /none does not exist")
    assert said.count("\n") == 1


def test_more_shards_than_files_may_be_open(packed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ddp_ssl.data.datasets.tar._most_open", lambda: 2)
    split = open_shards(packed).train
    assert split.shards is not None
    assert len(split.shards.paths) > 3
    before = len(os.listdir("/proc/self/fd"))
    first = [split.read(i).tobytes() for i in range(len(split))]
    assert len(os.listdir("/proc/self/fd")) <= before + 2
    monkeypatch.undo()
    again = open_shards(packed).train
    assert [again.read(i).tobytes() for i in range(len(again))] == first
    assert len(os.listdir("/proc/self/fd")) > before + 2


def test_a_complete_copy_is_only_read(
    packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = staging.stage(packed, tmp_path / "local", lambda text: None)

    def refuse(*_: object) -> None:
        raise PermissionError(13, "not yours")

    monkeypatch.setattr(fcntl, "flock", refuse)
    assert staging.stage(packed, tmp_path / "local", lambda text: None) == copy
