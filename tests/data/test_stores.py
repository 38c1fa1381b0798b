"""Shards in an object store, which this process serves: read, staged, and with a store that fails.

Whole runs on a store are in `tests/test_containers.py`.
"""

from __future__ import annotations

import errno
import json
import os
import pickle
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from ddp_ssl.commands import check_data
from ddp_ssl.config import ConfigError, Data
from ddp_ssl.data.datasets import registry, remote, shards, staging
from ddp_ssl.data.datasets.remote import StoreError
from ddp_ssl.data.datasets.split import Split
from ddp_ssl.data.datasets.tar import Shards
from ddp_ssl.data.loading.reader import UnreadableError
from ddp_ssl.run.configure import load
from ddp_ssl.utils.waits import limits
from tests.data.images import loader_of
from tests.data.opened import encoded, loaded
from tests.data.tables import as_parquet
from tests.data.tars import as_tars
from tests.store import Store, serving


@pytest.fixture(scope="module")
def served(packed: Path) -> Iterator[Store]:
    """A store whose bucket, the parent of `packed`, holds the shards in `out`."""
    with serving(packed.parent.parent) as made:
        yield made


@pytest.fixture
def store(served: Store, monkeypatch: pytest.MonkeyPatch) -> Iterator[Store]:
    served.reset()
    remote.leaving.clear()
    monkeypatch.setattr(remote, "PATIENCE_S", 0.3)
    monkeypatch.setattr(remote, "FIRST_PAUSE_S", 0.01)
    yield served
    remote.leaving.set()  # for threads that wait still


@pytest.fixture
def url(store: Store, packed: Path) -> str:
    return f"{store.url}/{packed.parent.name}/out"


def fresh(split: Split) -> Split:
    """The same, with no file open."""
    made: Split = pickle.loads(pickle.dumps(split))
    return made


def far_and_near(split: Split) -> list[bool]:
    assert split.shards is not None
    return ["://" in path for path in split.shards.paths]


# --- what is read --------------------------------------------------------------------------------


def test_shards_in_a_store_are_those_in_a_folder(store: Store, url: str, packed: Path) -> None:
    here, there = loaded(packed), loaded(url + "/")
    assert (there.train.digest, there.class_names) == (here.train.digest, here.class_names)
    assert there.train.where(3) == f"{url}/train/{os.fsdecode(here.train.name(3))}"
    store.reset()
    assert encoded(there.train) == encoded(here.train)
    # A request for an image, and not a byte more.
    assert [method for method, _, _ in store.asked] == ["GET"] * 30
    assert store.sent == sum(map(len, encoded(here.train)))
    assert there.val is not None
    assert here.val is not None
    assert encoded(there.val) == encoded(here.val)


def test_s3_with_credentials_of_the_environment(
    store: Store, packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """Found, recognised, listed and checked by processes of the command; no secret is printed."""
    store.environment(monkeypatch)
    bucket = packed.parent.name
    assert encoded(loaded(f"s3://{bucket}/out").train) == encoded(loaded(packed).train)
    found = [name for name, is_folder in remote.entries(f"s3://{bucket}/out") if not is_folder]
    assert found == sorted(path.name for path in packed.iterdir())
    assert load([f"s3://{bucket}/out", "run.device=cpu"]).config.data.name == "folder"
    arguments = ["data.name=folder", f"data.root=s3://{bucket}/out", "--workers", "1"]
    assert check_data.main([*arguments, "--out", str(tmp_path / "bad.txt")]) == 0
    assert remote.leaving.is_set()  # no thread waits for the store once a command is done
    assert "train: 30 images looked at, 0 bad" in capfd.readouterr().err
    store.fault = lambda path, count: 403
    assert check_data.main(arguments) == 2
    said = capfd.readouterr().err
    assert f"data.root: s3://{bucket}/out/shards.json: 403 Forbidden; accepted: creden" in said
    assert "TheSecret" not in said
    assert "Signature" not in said


def test_a_store_of_google(
    store: Store, files: Path, packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    account = {"gcs_base_url": store.url, "disable_oauth": True}
    blank = dict.fromkeys(("client_email", "private_key", "private_key_id"), "")
    (tmp_path / "account.json").write_text(json.dumps({**account, **blank}))
    monkeypatch.setenv("GOOGLE_SERVICE_ACCOUNT", str(tmp_path / "account.json"))
    monkeypatch.setenv("GOOGLE_ALLOW_HTTP", "true")
    monkeypatch.setenv("DDP_SSL_CACHE", str(tmp_path))
    bucket = packed.parent.name
    assert encoded(loaded(f"gs://{bucket}/out").train) == encoded(loaded(packed).train)
    here = loaded(as_tars(files, packed.parent / "google"))
    assert encoded(loaded(f"gs://{bucket}/google").train) == encoded(here.train)


@pytest.mark.parametrize("written", [as_parquet, as_tars])
def test_files_of_others_are_found_and_read_once(
    store: Store, files: Path, packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    written: Callable[..., Path],
) -> None:  # fmt: skip
    """By S3's listing and by a pattern; each byte is asked for once until the images are read."""
    store.environment(monkeypatch)
    monkeypatch.setenv("DDP_SSL_CACHE", str(tmp_path))
    monkeypatch.setattr(remote, "BLOCK", 4096)
    monkeypatch.setattr(remote, "CHUNK", 16384)
    root = written(files, packed.parent / written.__name__.replace("_", "-"))
    paths = [path for path in root.rglob("*") if path.is_file()]
    size = sum(path.stat().st_size for path in paths)
    here = loaded(root)
    store.reset()
    there = loaded(f"s3://{packed.parent.name}/{root.name}")
    assert store.sent == size
    assert not remote._blocks
    assert there.train.digest == here.train.digest
    assert there.val is not None
    assert encoded(there.train) == encoded(here.train)
    store.reset()
    loaded(f"s3://{packed.parent.name}/{root.name}")  # what was found is kept
    assert store.sent < size / 2  # one file's beginning or end, for its columns
    for path in paths:
        os.utime(path, (1, 1))
    store.reset()
    loaded(f"s3://{packed.parent.name}/{root.name}")
    assert store.sent == size


def test_a_store_that_does_not_say_what_is_not_there(
    store: Store, files: Path, packed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """S3 answers 403 for such a file to those who may not list the bucket."""
    store.environment(monkeypatch)
    root = as_tars(files, packed.parent / "unlisted")
    store.fault = lambda path, count: None if (store.root / path).is_file() else 403
    url = f"s3://{packed.parent.name}/unlisted"
    names = "{train,validation}-{000000..000001}.tar"
    data = load([f"{url}/{names}", "run.device=cpu"]).config.data
    assert encoded(registry.load(data, 0).train) == encoded(loaded(root).train)
    assert sorted({path.rpartition("/")[2] for _, path, _ in store.asked}) == sorted(
        ["classnames.txt", *(path.name for path in root.iterdir())]
    )
    shards_there = loaded(f"s3://{packed.parent.name}/out").train
    assert encoded(shards_there) == encoded(loaded(packed).train)
    with pytest.raises(StoreError, match=r"shards\.json: 403 Forbidden; accepted: credentials"):
        loaded(url)


def test_what_is_no_shards_is_one_line(store: Store, url: str) -> None:
    with pytest.raises(
        ValueError, match=r"^data\.root: s3://b-\{0,1\}/x\.tar has a wildcard in its"
    ):
        registry.load(Data(name="webdataset", root="s3://b-{0,1}/x.tar"), 0)
    with pytest.raises(ValueError, match=r"^data\.root: .*/nothing holds no shards.json, and no"):
        loaded(f"{store.url}/nothing")
    with pytest.raises(ValueError, match=r"a web server lists no files: https://HOST/train-\{000"):
        registry.load(Data(name="parquet", root=f"{store.url}/nothing"), 0)
    with pytest.raises(ValueError, match=r"^data\.root: .* has \d+ bytes instead of 1; copy"):
        shards._tars(url, ["train-00000.tar", "shards.json"], [1, 1])


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["https://me:TheSecret@host/x"], "data.root: an address with a password or a query"),
        (["s3://bucket/x?X-Amz-Signature=TheSecret"], "data.root: an address with a password or"),
        (["data.root=https://host/x?token=TheSecret"], "data.root: an address with a password or"),
        (["https://h/train-?.tar"], r"data.root: .*query .* in a pattern \* or \[0-9\] in place"),
        (["s4://bucket/x"], "data.root: an address that is not read; accepted: s3://BUCKET/"),
        (["data.stage=s3://bucket/x"], "data.stage: an address; accepted: a path of this machine"),
        (["data.reader=streamed"], "data.reader: was removed .* data.root=s3://BUCKET/FOLDER"),
        (["data.url=s3://me:TheSecret@bucket"], "data.url: was removed .* data.root=s3://BUCKET/"),
    ],
)
def test_what_is_not_accepted(words: list[str], said: str) -> None:
    with pytest.raises(ConfigError, match=f"^{said}") as caught:
        load(words)
    assert "TheSecret" not in str(caught.value)
    assert "\n" not in str(caught.value)


def test_keys_of_the_reader_that_was_removed_load_with_their_defaults(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("data: {name: digits, reader: indexed, url: null}\n")
    words = [str(tmp_path / "config.yaml"), "data.reader=indexed", "data.url=null"]
    assert "reader" not in load(words).config.model_dump()["data"]
    (tmp_path / "config.yaml").write_text("data: {name: digits, reader: streamed}\n")
    with pytest.raises(ConfigError, match=r"^data\.reader: was removed"):
        load(words[:1])


def test_a_missing_obstore_is_one_line(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    remote._obstore.cache_clear()
    monkeypatch.setitem(__import__("sys").modules, "obstore", None)
    with pytest.raises(ValueError, match=r"^data\.root: .*pip install 'ddp_ssl\[remote\]'"):
        loaded(url)
    remote._obstore.cache_clear()


# --- a store that fails --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        (403, "403 Forbidden; accepted: credentials in the environment that may read it"),
        (404, "404 Not Found; accepted: the address of a folder that holds it"),
        (503, r"no answer for \d s \(503 Service Unavailable\)"),
        (429, r"no answer for \d s \(429 Too Many Requests\)"),
        ("short", r"no answer for \d s \(Requested \d+..\d+, got \d+..\d+\)"),
        ("moved", r"no answer for \d s \(Requested \d+..\d+, got \d+..\d+\)"),
        ("cut", r"no answer for \d s \("),
    ],
)
def test_an_answer_that_cannot_be_used_is_tried_again_or_named(
    store: Store, url: str, packed: Path, fault: int | str, said: str
) -> None:
    split, expected = loaded(url).train, loaded(packed).train.read(0).tobytes()
    first = len(store.asked) + 1
    store.fault = lambda path, count: fault if count < first + 3 else None
    if fault in (403, 404):
        with pytest.raises(StoreError, match=rf"^data\.root: {url}/train-\d+\.tar: {said}"):
            split.read(0)
        assert len(store.asked) == first
    else:
        assert split.read(0).tobytes() == expected
        assert len(store.asked) == first + 3
        store.fault = lambda path, count: fault
        with pytest.raises(StoreError, match=rf"^data\.root: {url}/train-\d+\.tar: {said}") as why:
            split.read(0)
        assert "TheSecret" not in str(why.value)


def test_a_store_that_comes_back_changes_nothing(
    store: Store, url: str, packed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote, "PATIENCE_S", 30.0)
    ours, theirs = loader_of(loaded(url).train), loader_of(loaded(packed).train)
    for step in range(8):
        if step == 2:
            store.die()
            threading.Timer(0.5, store.live).start()
        a, b = next(ours), next(theirs)
        assert torch.equal(a.ids, b.ids)
        assert all(torch.equal(x, y) for x, y in zip(a.views, b.views, strict=True))


def test_a_process_that_ends_waits_for_no_store(
    store: Store, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    reader = loader_of(loaded(url).train)._source.reader
    monkeypatch.setattr(remote, "PATIENCE_S", 100.0)
    store.reset()
    store.fault = lambda path, count: 503
    waiting = reader._pool.submit(reader.load, [0])
    while len(store.asked) < 3:
        time.sleep(0.01)
    remote.leaving.set()
    with pytest.raises(StoreError, match="no answer for 0 s"):
        waiting.result(10)


def test_a_file_that_fails_waits_for_no_other(
    store: Store, files: Path, packed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The images of one may not be read, and meanwhile those of another are asked for again."""
    root = as_tars(files, packed.parent / "two")
    monkeypatch.setattr(remote, "PATIENCE_S", 100.0)
    asked = threading.Event()

    def fault(path: str, count: int) -> int | None:
        method, name, _ = store.asked[count - 1]
        if method == "HEAD" or name.endswith("n-000000.tar"):  # the first is looked at
            return None
        if "train" in name:
            return 403 if asked.wait(10) else None
        asked.set()
        return 503

    store.fault = fault
    pattern = f"{store.url}/{packed.parent.name}/two/{{train-000000,train-000001,val}}.tar"
    (root / "validation-000000.tar").rename(root / "val.tar")
    with pytest.raises(StoreError, match=r"train-000001\.tar: 403 Forbidden"):
        registry.load(Data(name="webdataset", root=pattern), 0)
    answers = [name for method, name, _ in store.asked if method == "GET" and "val" in name]
    assert 1 <= len(answers) < 9  # of about 30 in 100 seconds


def test_how_long_a_store_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "PATIENCE_S", 180.0)
    monkeypatch.setattr(remote, "FIRST_PAUSE_S", 0.01)
    monkeypatch.setattr(limits, "timeout_s", 100)
    monkeypatch.setattr(limits, "asked", False)
    remote.leaving.clear()
    assert remote._patience() == 60
    monkeypatch.setattr(limits, "asked", True)
    assert remote._patience() == remote.ASKED_S < 20
    remote.leaving.set()
    assert remote._patience() == 0
    remote.leaving.clear()


def test_credentials_that_are_not_given_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """At first there are none; later who gives them may be away for a moment."""
    answers: list[Exception | int] = [OSError("GET http://169.254.169.254/latest - timed out"), 7]
    monkeypatch.setattr(remote, "FIRST_PAUSE_S", 0.01)
    remote.leaving.clear()

    def ask() -> int:
        answer = answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    with pytest.raises(
        StoreError, match=r"^data\.root: s3://new/a: no credentials were found; acc"
    ):
        remote._patiently("s3://new/a", ask)
    assert remote._patiently("s3://new/b", ask) == 7
    answers[:] = [OSError("GET http://169.254.169.254/latest - timed out"), 8]
    assert remote._patiently("s3://new/a", ask) == 8


def test_an_address_of_the_web_is_no_bucket() -> None:
    for address in ("https://bucket.s3.amazonaws.com", "https://s3.us-east-1.amazonaws.com"):
        assert type(remote._client(address)).__name__ == "HTTPStore"
    assert type(remote._client("gs://bucket")).__name__ == "GCSStore"


def test_a_shorter_file_under_the_same_name_is_another(tmp_path: Path) -> None:
    remote.leaving.clear()
    (tmp_path / "a").write_bytes(bytes(100))
    with serving(tmp_path) as other:
        place = f"{other.url}/a"
        ((_, tag),) = filter(None, remote.stamps([place]))
        (tmp_path / "a").write_bytes(bytes(50))
        for at in (40, 60):  # beyond its end in part, and wholly
            with pytest.raises(StoreError, match=r"/a has changed since the start"):
                remote.read(place, at, 20, tag)


def test_changed_content_is_not_trained_on(store: Store, copy: Path, tmp_path: Path) -> None:
    """Other images under the same names, all of them sound: the loader stops and names the file."""
    shutil.copytree(copy, tmp_path / "bucket" / "out")
    with serving(tmp_path) as other:
        train = loaded(f"{other.url}/bucket/out").train
        loader = loader_of(train)
        before = next(loader)
        for tar in (tmp_path / "bucket/out").glob("*.tar"):
            os.utime(tar, (1, 1))
        known = []  # before there is no batch
        with pytest.raises(UnreadableError, match=r"train-\d+\.tar has changed since the start"):
            known.extend(loader.failing for _ in zip(range(30), loader, strict=False))
        assert len(known) > 1
        assert known[-1] is not None
        assert not loader._source.reader.problems  # none is a bad image
        assert len(before.ids) == 6
        staged = loaded(f"{other.url}/bucket/out", stage=str(tmp_path / "local")).train
        for tar in (tmp_path / "bucket/out").glob("*.tar"):
            os.utime(tar, (2, 2))
        assert len(encoded(staged)) == 30
        shutil.rmtree(tmp_path / "local")
        with pytest.raises(StoreError, match=r"train-\d+\.tar has changed since the start"):
            fresh(staged).read(0)


# --- staged --------------------------------------------------------------------------------------


def test_a_part_is_staged_and_the_rest_read_from_afar(
    store: Store, url: str, packed: Path, tmp_path: Path
) -> None:
    expected = encoded(loaded(packed).train)
    for root in (url, str(packed)):
        local = tmp_path / root.partition(":")[0].strip("/").replace("/", "-")
        part = loaded(root, stage=str(local), stage_gb=45e-6).train
        assert part.shards is not None
        near = [path.startswith(str(local)) for path in part.shards.paths]
        assert near == [True, True] + [False] * (len(near) - 2)
        assert encoded(part) == expected
        again = loaded(root, stage=str(local), stage_gb=45e-6).train
        assert again.shards is not None
        assert again.shards.paths == part.shards.paths
        whole = loaded(root, stage=str(local)).train
        store.reset()
        assert encoded(whole) == expected
        assert store.asked == []
        assert whole.root == loaded(root).train.root
    with pytest.raises(ValueError, match=r"^data\.stage_gb: is how much data\.stage takes"):
        loaded(url, stage_gb=1)


def test_copies_of_files_of_others(
    store: Store, files: Path, packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Made again once they are overwritten; not made of files that change meanwhile."""
    monkeypatch.setenv("DDP_SSL_CACHE", str(tmp_path / "cache"))
    store.environment(monkeypatch)
    root = as_tars(files, packed.parent / "others")
    data = Data(
        name="webdataset", root=f"s3://{packed.parent.name}/others", stage=str(tmp_path / "local")
    )
    expected = encoded(registry.load(data, 0).train)
    copies = sorted(tmp_path.glob("local/*/*.tar"))
    for path in copies:
        path.write_bytes(bytes(path.stat().st_size))
    store.reset()
    assert encoded(registry.load(data, 0).train) == expected
    assert [path.read_bytes() for path in copies] == [
        (root / path.name).read_bytes() for path in copies
    ]
    asked = [name for method, name, _ in store.asked if method == "HEAD"]
    assert asked.count(f"{packed.parent.name}/others/validation-000000.tar") == 1  # one stamping

    copy = staging._copy_all

    def late(*args: Any) -> None:
        os.utime(root / "train-000001.tar", (1, 1))
        copy(*args)

    monkeypatch.setattr(staging, "_copy_all", late)
    for path in copies:
        path.unlink()
    with pytest.raises(StoreError, match=r"train-000001\.tar has changed since the start"):
        registry.load(data, 0)


def test_a_lack_of_files_or_memory_is_no_damage_of_a_copy(
    packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    where = loaded(packed, stage=str(tmp_path)).train.shards
    assert where is not None

    def full(self: Shards, path: str) -> tuple[int, bool]:
        raise OSError(errno.EMFILE if str(tmp_path) in path else errno.ENOENT, "too many")

    monkeypatch.setattr(Shards, "_open", full)
    with pytest.raises(OSError, match="too many") as caught:
        where.read(0)
    assert caught.value.errno == errno.EMFILE


@pytest.mark.parametrize("damage", ["deleted", "overwritten", "cut"])
def test_a_stage_that_is_lost_under_a_run_costs_nothing_but_time(
    store: Store, url: str, packed: Path, tmp_path: Path, damage: str,
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr("ddp_ssl.data.datasets.tar._most_open", lambda: 0)
    monkeypatch.setattr(remote, "PATIENCE_S", 5.0)
    expected = encoded(loaded(packed).train)
    staged = loaded(url, stage=str(tmp_path / damage)).train
    (folder,) = (tmp_path / damage).iterdir()
    if damage == "deleted":
        shutil.rmtree(folder)
    else:
        for file in [*folder.glob("*.tar"), *folder.glob("*.npy")]:
            size = file.stat().st_size
            file.write_bytes(b"\xff" * (size if damage == "overwritten" else size // 3))
    with caplog.at_level("WARNING", "ddp_ssl"):
        assert encoded(staged) == expected
    said = [record.message for record in caplog.records]
    assert said == [
        f"data.stage: files in {folder} are damaged or gone: their images are read from {url}"
    ]
    assert encoded(loaded(url, stage=str(tmp_path / damage)).train) == expected  # made again
