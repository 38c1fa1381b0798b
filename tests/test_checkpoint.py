from __future__ import annotations

import errno
import itertools
import json
import logging
import os
import random
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ddp_ssl.checkpoint import store
from ddp_ssl.config import ConfigError
from ddp_ssl.config.views import views_of
from ddp_ssl.errors import CheckpointError
from ddp_ssl.run.configure import load
from ddp_ssl.run.identity import (
    GONE,
    check_identity,
    compare_identity,
    free_on_resume,
    identity,
)
from ddp_ssl.training.state import state_of_rank
from ddp_ssl.utils import files

IDENTITY = {"optim.lr": "0.4", "run.seed": "0"}


def state_of(step: int) -> dict[str, Any]:
    return {
        "step": step,
        "model": {"weight": torch.full((50, 50), float(step)), "bias": torch.arange(3)},
        "rng": random.getstate(),
        "name": "x",
        "none": None,
        "blob": torch.zeros(4, dtype=torch.uint8),
    }


def save(folder: Path, step: int, keep: int = 2, permanent: bool = False, **more: Any) -> Path:
    return store.save(
        folder,
        {**state_of(step), **more},
        step=step,
        epoch=step // 5,
        identity=IDENTITY,
        world_size=2,
        keep=keep,
        permanent=permanent,
    )


def names(folder: Path) -> list[str]:
    return sorted(p.name for p in (folder / "checkpoints").iterdir())


def steps(folder: Path) -> list[int]:
    return [found.step for found in store.find(folder)]


def step_of_newest(folder: Path) -> int:
    newest = store.load_newest(folder)
    assert newest is not None
    found, state = newest
    assert state["step"] == found.step
    assert torch.equal(state["model"]["weight"], torch.full((50, 50), float(found.step)))
    return found.step


def test_a_checkpoint_comes_back_as_it_was(tmp_path: Path) -> None:
    path = save(tmp_path, 7)
    assert path == tmp_path / "checkpoints" / "step_00000007.pt"
    state = store.load(path)
    expected = state_of(7)
    assert state.keys() == expected.keys()
    assert torch.equal(state["model"]["weight"], expected["model"]["weight"])
    assert state["rng"] == expected["rng"]
    random.setstate(state["rng"])
    assert store.load(tmp_path)["step"] == 7


def test_the_manifest_says_what_is_in_the_file(tmp_path: Path) -> None:
    path = save(tmp_path, 7, permanent=True)
    manifest = json.loads(path.with_suffix(".json").read_text())
    assert manifest.pop("time") > 1.6e9
    assert len(manifest.pop("sha256")) == 64
    del manifest["checksum"]
    assert manifest == {
        "file": "step_00000007.pt",
        "bytes": path.stat().st_size,
        "step": 7,
        "epoch": 1,
        "identity": IDENTITY,
        "world_size": 2,
        "permanent": True,
        "serial": 1,
    }


def test_no_flipped_bit_of_a_manifest_is_believed(tmp_path: Path) -> None:
    """Of the step, say, or of the serial number, by which an older checkpoint would be newest."""
    for step in (1, 2):
        save(tmp_path, step)
    whole, draw = store.find(tmp_path), random.Random(0)
    manifest = whole[0].manifest
    content = bytearray(manifest.read_bytes())
    refused = 0
    for at in draw.sample(range(8 * len(content)), 150):
        content[at // 8] ^= 1 << at % 8
        manifest.write_bytes(content)
        found = store.find(tmp_path)
        assert found in (whole, whole[1:]), at
        refused += found == whole[1:]
        content[at // 8] ^= 1 << at % 8
    assert refused > 120  # but for white space


def test_a_manifest_of_an_earlier_version_has_no_checksum(tmp_path: Path) -> None:
    manifest = save(tmp_path, 1).with_suffix(".json")
    before = store.find(tmp_path)
    fields = json.loads(manifest.read_text())
    del fields["checksum"]
    manifest.write_text(json.dumps(fields, indent=1))
    assert store.find(tmp_path) == before
    assert store.load(tmp_path)["step"] == 1


def test_nothing_is_found_where_nothing_is(tmp_path: Path) -> None:
    assert store.find(tmp_path) == []
    assert store.newest_good(tmp_path) is None
    assert store.load_newest(tmp_path) is None
    store.clean_up(tmp_path)


# --- retention -------------------------------------------------------------------------------


def test_the_newest_and_the_permanent_ones_are_kept(tmp_path: Path) -> None:
    for step in range(1, 8):
        save(tmp_path, step, permanent=step % 3 == 0)
    assert steps(tmp_path) == [7, 6, 3]
    assert len(names(tmp_path)) == 6


def test_two_are_kept_at_least(tmp_path: Path) -> None:
    for step in range(1, 5):
        save(tmp_path, step, keep=0)
    assert steps(tmp_path) == [4, 3]


def test_going_back_to_an_older_step_continues_from_there(tmp_path: Path) -> None:
    for step in (10, 20, 30):
        save(tmp_path, step, permanent=True)
    save(tmp_path, 15)
    save(tmp_path, 25)
    save(tmp_path, 26)
    assert steps(tmp_path)[:2] == [26, 25]
    assert step_of_newest(tmp_path) == 26


def test_a_step_saved_twice_overwrites_nothing(tmp_path: Path) -> None:
    first, second = save(tmp_path, 5, extra="a"), save(tmp_path, 5, extra="b")
    assert first != second
    assert store.load(first)["extra"] == "a"
    assert store.load(tmp_path)["extra"] == "b"


def test_the_best_one_is_never_pruned(tmp_path: Path) -> None:
    for step in range(1, 6):
        path = save(tmp_path, step)
        if step in (1, 2):
            best = store.save_best(tmp_path, path)
            store.save_best(tmp_path, path)  # once more: nothing is left behind
    assert steps(tmp_path) == [5, 4]
    assert store.load(best)["step"] == 2
    assert json.loads(best.with_suffix(".json").read_text())["file"] == "best.pt"
    assert not [name for name in names(tmp_path) if "tmp" in name]
    store.clean_up(tmp_path)
    assert {"best.pt", "best.json"} <= set(names(tmp_path))
    # A link and not a second copy while the original is there.
    assert store.save_best(tmp_path, path).samefile(path)


def test_the_best_one_is_copied_where_links_are_not_possible(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    path = save(tmp_path, 1)
    best = store.save_best(tmp_path, path)
    assert not best.samefile(path)
    assert store.load(best)["step"] == 1


# --- damage ----------------------------------------------------------------------------------


def flip_a_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[data.index(torch.tensor(2.0).numpy().tobytes() * 9) + 1] ^= 1  # in a weight
    path.write_bytes(data)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def halve_the_manifest(path: Path) -> None:
    manifest = path.with_suffix(".json")
    manifest.write_text(manifest.read_text()[:50])


def lose(path: Path) -> None:
    path.unlink()


@pytest.mark.parametrize("damage", [flip_a_bit, truncate, halve_the_manifest, lose])
def test_a_damaged_one_is_passed_over_and_named(
    damage: Callable[[Path], None], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    save(tmp_path, 1)
    path = save(tmp_path, 2)
    damage(path)
    with caplog.at_level(logging.WARNING):
        assert step_of_newest(tmp_path) == 1
    assert path.stem in caplog.text
    good = store.newest_good(tmp_path)
    assert good is not None
    assert good.step == 1
    with pytest.raises(ValueError, match=r"is damaged|does not exist"):
        store.load(path)

    # Out of the way, it does not push the good ones out.
    store.clean_up(tmp_path)
    save(tmp_path, 2)
    assert steps(tmp_path) == [2, 1]
    caplog.clear()
    assert step_of_newest(tmp_path) == 2
    assert not caplog.text


def test_a_flipped_bit_loads_silently_in_torch(tmp_path: Path) -> None:
    """Why the checksum is there; if torch ever notices, the file need not be read twice."""
    path = save(tmp_path, 2)
    flip_a_bit(path)
    weight = torch.load(path, weights_only=True)["model"]["weight"]
    assert (weight != 2).sum() == 1


def test_one_problem_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no good checkpoint in .*checkpoints$"):
        store.load(tmp_path)
    with pytest.raises(ValueError, match=r"expected a checkpoint \(\.pt\) or a run folder$"):
        store.load(tmp_path / "nowhere")
    (tmp_path / "x.pt").write_text("hello")
    with pytest.raises(ValueError, match=r"x\.pt cannot be loaded as a checkpoint: .*") as error:
        store.load(tmp_path / "x.pt")
    assert "\n" not in str(error.value)
    torch.save([1, 2], tmp_path / "y.pt")
    with pytest.raises(ValueError, match="it holds a list"):
        store.load(tmp_path / "y.pt")


def test_a_file_without_its_manifest_loads_unverified(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    moved = tmp_path / "moved.pt"
    save(tmp_path, 1).rename(moved)
    assert store.load(moved)["step"] == 1
    assert "not verified" in caplog.text


class Malice:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("echo executed",)


def test_loading_executes_nothing(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    torch.save({"x": Malice()}, tmp_path / "x.pt")
    with pytest.raises(ValueError, match=r"as a checkpoint: \w+\.system in it could"):
        store.load(tmp_path / "x.pt")
    assert "executed" not in capfd.readouterr().out


def test_what_could_not_be_loaded_is_not_saved(tmp_path: Path) -> None:
    save(tmp_path, 1)
    with pytest.raises(TypeError, match=r"numpy.*accepted are tensors") as error:
        save(tmp_path, 2, rng=np.random.default_rng(0).normal(size=3))
    assert "\n" not in str(error.value)
    assert names(tmp_path) == ["step_00000001.json", "step_00000001.pt"]


# --- failing writes --------------------------------------------------------------------------


class FullDisk:
    """Stands for an open file on a disk that is full after some bytes."""

    def __init__(self, file: Any, room: int) -> None:
        self.file, self.room = file, room

    def write(self, data: Any) -> int:
        self.room -= len(data)
        if self.room < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return int(self.file.write(data))

    def __getattr__(self, name: str) -> Any:
        return getattr(self.file, name)

    def __enter__(self) -> FullDisk:
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()


@pytest.mark.parametrize("room", [0, 1000, 9000, "manifest"])
def test_a_full_disk_leaves_the_older_one(
    room: int | str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tmp_path, 1)
    before = names(tmp_path)

    def full(path: Path, mode: str = "r", **how: Any) -> Any:
        file = open(path, mode, **how)  # noqa: SIM115
        if mode == "wb" and isinstance(room, int):
            return FullDisk(file, room)
        return FullDisk(file, 10) if mode == "w" else file

    with monkeypatch.context() as patch:
        patch.setattr(store, "open", full, raising=False)
        patch.setattr(files, "open", full, raising=False)
        with pytest.raises(CheckpointError, match=r"step_00000002\.pt: No space left") as error:
            save(tmp_path, 2)
    assert "\n" not in str(error.value)
    assert names(tmp_path) == before
    assert step_of_newest(tmp_path) == 1
    save(tmp_path, 2)
    assert step_of_newest(tmp_path) == 2


def test_what_torch_says_of_a_full_disk_becomes_a_checkpoint_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 64 vs 0\nx")

    monkeypatch.setattr(torch, "save", fail)
    with pytest.raises(CheckpointError, match="unexpected pos 64 vs 0 x"):
        save(tmp_path, 1)
    assert names(tmp_path) == []


def test_a_folder_that_cannot_be_made_is_a_checkpoint_error(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").write_text("in the way")
    with pytest.raises(CheckpointError, match=r"File exists|Not a directory"):
        save(tmp_path, 1)


# --- kill -9 ---------------------------------------------------------------------------------


def die_at(countdown: itertools.count[int], last: int) -> None:
    if next(countdown) == last:
        os.kill(os.getpid(), signal.SIGKILL)


def save_and_die(folder: Path, last: int) -> bool:
    """Save step 3 in a child and make it the best one; returns whether it got through.

    It is killed just before the `last`-th time that it touches the disk.
    """
    child = os.fork()
    if child == 0:
        counter = itertools.count()

        def deadly(function: Any) -> Any:
            def wrapped(*args: Any, **kwargs: Any) -> Any:
                die_at(counter, last)
                return function(*args, **kwargs)

            return wrapped

        try:
            for name in ("fsync", "replace", "link"):
                setattr(os, name, deadly(getattr(os, name)))
            Path.unlink = deadly(Path.unlink)  # type: ignore[method-assign]
            write = store._HashingFile.write
            writes = itertools.count()

            def sometimes(file: Any, data: bytes) -> int:
                if next(writes) % 20 == 10:
                    file.flush()
                    die_at(counter, last)
                return write(file, data)

            store._HashingFile.write = sometimes  # type: ignore[method-assign]
            store.save_best(folder, save(folder, 3))
            os._exit(0)
        except BaseException as error:
            print(repr(error), flush=True)
            os._exit(3)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) in (0, -signal.SIGKILL)
    return status == 0


def test_kill_at_any_point_of_a_save_leaves_a_good_one(tmp_path: Path) -> None:
    newest: list[int] = []
    best: list[int] = []
    for last in range(100):
        folder = tmp_path / str(last)
        save(folder, 1)
        store.save_best(folder, save(folder, 2))
        finished = save_and_die(folder, last)
        newest.append(step_of_newest(folder))

        store.clean_up(folder)
        assert step_of_newest(folder) == newest[-1]
        assert not [name for name in names(folder) if "tmp" in name or "damaged" in name]
        best.append(store.load(folder / "checkpoints" / "best.pt")["step"])
        save(folder, 4)
        assert step_of_newest(folder) == 4
        assert len(steps(folder)) == 2
        if finished:
            break
    assert finished
    assert last > 12
    # Nothing of 3 before its commit, and nothing of 2 after it.
    assert newest == sorted(newest)
    assert best == sorted(best)
    assert (newest[0], newest[-1]) == (2, 3)
    assert (best[0], best[-1]) == (2, 3)


# The settings in checkpoints that exist: of every run, and of each method.
IN_OLD_CHECKPOINTS: dict[str, list[str]] = json.loads(
    (Path(__file__).parent / "golden" / "settings.json").read_text()
)

# --- identity --------------------------------------------------------------------------------


def test_identities_are_compared_line_by_line() -> None:
    saved = {"optim.lr": "0.4", "run.seed": "0", "old.key": "1"}
    now = {"optim.lr": "0.1", "run.seed": "0", "new.key": "2"}
    assert compare_identity(saved, now) == [
        "optim.lr: 0.4 in the checkpoint, 0.1 now",
        "old.key: 1 in the checkpoint, not set now",
        "new.key: not set in the checkpoint, 2 now",
    ]
    assert compare_identity(saved, dict(reversed(saved.items()))) == []


def test_a_setting_that_did_not_exist_was_off(tmp_path: Path) -> None:
    saved = {"optim.lr": "0.4", "optim.grad_clip": "1.0"}
    check_identity({**saved, "optim.new": "null"}, saved, tmp_path)
    for other in ({"optim.new": "bf16"}, {"optim.grad_clip": "null"}):
        with pytest.raises(ConfigError, match="is another experiment"):
            check_identity({**saved, **other}, saved, tmp_path)


@pytest.mark.parametrize("name", sorted(IN_OLD_CHECKPOINTS.keys() - {""}))
def test_a_new_setting_is_off_by_default_or_free_on_resume(name: str) -> None:
    """Else no older checkpoint could be resumed. New settings do not go into the file."""
    old = {*IN_OLD_CHECKPOINTS[""], *(f"method.{key}" for key in IN_OLD_CHECKPOINTS[name])}
    mine = identity(load([f"method.name={name}"]).config)
    assert {key: value for key, value in mine.items() if key not in old and value != "null"} == {}
    assert {key for key in old - mine.keys() if not free_on_resume(key)} <= GONE.keys()


def test_a_setting_that_is_gone(tmp_path: Path) -> None:
    """A checkpoint with the value that is what happens now goes on; one with another does not."""
    mine = identity(load([]).config)
    check_identity(mine, {**mine, "data.reader": "indexed", "data.url": "null"}, tmp_path)
    with pytest.raises(ConfigError, match=r"data\.reader: streamed in the checkpoint, not set now"):
        check_identity(mine, {**mine, "data.reader": "streamed"}, tmp_path)


def test_views_are_written_as_in_old_checkpoints() -> None:
    """A later key of a view counts only where it is set."""
    plain, turned = (
        load([f"data.views=[{{size: 8{more}}}]"]).config.data.views[0]
        for more in ("", ", rotate: 90")
    )
    unset = ("scale", "ratio", "jitter_p", "brightness", "contrast", "saturation", "hue", "gray_p",
             "blur_p", "blur_sigma", "solarize_p", "flip_p")  # fmt: skip
    old = {"count": 2, "size": 8, "recipe": "asym", **dict.fromkeys(unset)}
    assert plain.model_dump() == old
    assert turned.model_dump() == {**old, "rotate": 90}
    assert repr(views_of([plain])[0]) == (
        "View(size=8, scale=(0.08, 1.0), ratio=(0.75, 1.3333333333333333), jitter_p=0.8, "
        "brightness=0.4, contrast=0.4, saturation=0.2, hue=0.1, gray_p=0.2, blur_p=1.0, "
        "blur_sigma=(0.1, 2.0), solarize_p=0.0, flip_p=0.5)"
    )
    assert "rotate=90" in repr(views_of([turned])[0])


def test_packed_states(tmp_path: Path) -> None:
    """Every process adds bytes that it alone reads again."""
    state = {"rng": torch.get_rng_state(), "python": random.getstate(), "blob": b"\0\1"}
    again = store.from_bytes(store.to_bytes(state))
    assert torch.equal(again.pop("rng"), state.pop("rng"))  # type: ignore[arg-type]
    assert again == state
    with pytest.raises(TypeError, match="cannot be loaded safely"):
        store.to_bytes({"rng": np.random.default_rng(0)})


def test_states_that_an_earlier_version_did_not_pack() -> None:
    packed = [
        torch.frombuffer(bytearray(store.to_bytes({"n": n})), dtype=torch.uint8) for n in (0, 1)
    ]
    for states in (packed, [{"n": 0}, {"n": 1}]):
        assert [state_of_rank(states, rank)["n"] for rank in (0, 1, 2)] == [0, 1, 0]


# --- readers beside a run that saves -------------------------------------------------------------


def test_a_reader_beside_a_run_that_prunes_gets_one_whole_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The newest is pruned while it is read, and before it is opened."""
    save(tmp_path, 1)
    original, saved = store._mismatch, [1]

    def busy(found: store.CheckpointInfo, file: Any) -> str | None:
        for _ in range(3):
            saved.append(saved[-1] + 1)
            save(tmp_path, saved[-1])
        return original(found, file)

    monkeypatch.setattr(store, "_mismatch", busy)
    newest = store.load_newest(tmp_path)
    assert newest is not None
    assert not newest[0].path.exists()  # it was read all the same
    assert newest[1]["step"] == newest[0].step == 1

    monkeypatch.setattr(store, "_mismatch", original)
    scan = store._scan
    stale = [scan(tmp_path / "checkpoints")]
    for step in range(10, 13):
        save(tmp_path, step)
    monkeypatch.setattr(store, "_scan", lambda home: stale.pop() if stale else scan(home))
    assert step_of_newest(tmp_path) == 12
    assert "damaged" not in caplog.text


def test_the_best_one_is_read_whole_while_it_is_exchanged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.save_best(tmp_path, save(tmp_path, 1))
    newer, replace = save(tmp_path, 2), os.replace
    read: list[int] = []

    def watched(source: Path, target: Path) -> None:
        replace(source, target)
        if Path(target).name == "best.pt":  # its manifest comes next
            thread.start()
            time.sleep(0.05)

    thread = threading.Thread(target=lambda: read.append(store.load(best)["step"]))
    best = tmp_path / "checkpoints/best.pt"
    monkeypatch.setattr(os, "replace", watched)
    store.save_best(tmp_path, newer)
    thread.join()
    assert read == [2]
