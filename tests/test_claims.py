"""The claim of a run folder: one holder at a time, and no longer than it lives."""

from __future__ import annotations

import dataclasses
import json
import logging
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ddp_ssl.config import ConfigError, Run
from ddp_ssl.run import claims, folder
from ddp_ssl.run.claims import FolderInUseError, Holder, take
from tests.helpers import config_of

FORK = multiprocessing.get_context("fork")
LIMITS = Run()
HERE = claims.this_process(300)
ELSEWHERE = dataclasses.replace(HERE, host="n7", machine="another")


def write(folder: Path, holder: Holder, silent_s: float = 0, number: int = 1) -> Path:
    """The claim of a holder that was last heard of so long ago."""
    folder.mkdir(exist_ok=True)
    path = folder / f"claim-{number}.json"
    claims._write(path, holder)
    os.utime(path, (time.time() - silent_s,) * 2)
    return path


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_held_folder_is_refused_in_one_line_that_names_the_holder(tmp_path: Path) -> None:
    claim = take(tmp_path / "run", LIMITS)
    with pytest.raises(
        FolderInUseError, match=rf"run\.dir: .* process {os.getpid()} on "
    ) as refused:
        take(tmp_path / "run", LIMITS)
    assert "\n" not in str(refused.value)
    claim.release()
    take(tmp_path / "run", LIMITS).release()


def test_a_claim_that_is_given_up_leaves_nothing_of_its_own(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/kept").mkdir()
    for place in ("a/b/run", "mine/run", "mine/kept"):
        take(tmp_path / place, LIMITS).release()
    assert names(tmp_path) == ["mine"]
    assert names(tmp_path / "mine") == ["kept"]
    claim = take(tmp_path / "a/run", LIMITS)
    (tmp_path / "a/run/config.yaml").touch()
    claim.release()
    assert names(tmp_path / "a/run") == ["config.yaml"]


def compete(place: str, together: Any, results: Any) -> None:
    """Try to take twenty folders at the same moments as others, and keep them meanwhile."""
    for number in range(20):
        together.wait()
        try:
            claim = take(Path(place) / f"{number}", LIMITS)
        except FolderInUseError:
            claim = None
        together.wait()  # all have tried
        held = len(claims.find(Path(place) / f"{number}"))
        results.put((number, claim is not None, held))
        together.wait()
        if claim is not None:
            claim.release()


@pytest.mark.parametrize("over", [False, True])
def test_of_many_at_the_same_moment_one_wins(tmp_path: Path, over: bool) -> None:
    """New folders, and folders whose holder has died."""
    if over:
        for number in range(20):
            write(tmp_path / f"{number}", dataclasses.replace(HERE, started=1), number=3)
    together, results = FORK.Barrier(6), FORK.SimpleQueue()
    processes = [
        FORK.Process(target=compete, args=(str(tmp_path), together, results)) for _ in range(6)
    ]
    for process in processes:
        process.start()
    tried = [results.get() for _ in range(6 * 20)]
    for process in processes:
        process.join()
    for number in range(20):
        assert sum(won for n, won, _ in tried if n == number) == 1
        assert {held for n, _, held in tried if n == number} == {1}


def ended() -> Holder:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return dataclasses.replace(HERE, pid=process.pid)


JOB = dataclasses.replace(ELSEWHERE, job="77", restart=1)
TASK = dataclasses.replace(ELSEWHERE, job="70_2")
LAUNCH = dataclasses.replace(ELSEWHERE, launch="mine")


@pytest.mark.parametrize(
    ("holder", "silent_s", "me", "over"),
    [
        (ended, 0, {}, True),
        (dataclasses.replace(HERE, started=HERE.started - 1), 0, {}, True),  # another's pid now
        (HERE, 10_000, {}, False),  # stopped, and alive
        (ELSEWHERE, 290, {}, False),
        (ELSEWHERE, 310, {}, True),
        (dataclasses.replace(ELSEWHERE, timeout_s=1000), 310, {}, False),
        (JOB, 0, {"SLURM_JOB_ID": "77", "SLURM_RESTART_COUNT": "2"}, True),
        (JOB, 290, {"SLURM_JOB_ID": "77", "SLURM_RESTART_COUNT": "1"}, False),
        (JOB, 290, {"SLURM_JOB_ID": "78", "SLURM_RESTART_COUNT": "2"}, False),
        (TASK, 16, {"SLURM_ARRAY_JOB_ID": "70", "SLURM_ARRAY_TASK_ID": "10"}, True),
        (TASK, 9, {"SLURM_ARRAY_JOB_ID": "70", "SLURM_ARRAY_TASK_ID": "10"}, False),
        (TASK, 290, {"SLURM_ARRAY_JOB_ID": "70", "SLURM_ARRAY_TASK_ID": "1"}, False),
        (TASK, 290, {"SLURM_ARRAY_JOB_ID": "71", "SLURM_ARRAY_TASK_ID": "10"}, False),
        (LAUNCH, 16, {"TORCHELASTIC_RUN_ID": "mine"}, True),
        (LAUNCH, 290, {"TORCHELASTIC_RUN_ID": "other"}, False),
        (ELSEWHERE, 290, {"TORCHELASTIC_RUN_ID": "none"}, False),
    ],
)
def test_when_a_claim_is_over(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    holder: Holder | Callable[[], Holder],
    silent_s: float,
    me: dict[str, str],
    over: bool,
) -> None:
    """Decided by its process on this machine, its heartbeat elsewhere, the job of a restart."""
    for name, value in me.items():
        monkeypatch.setenv(name, value)
    path = write(tmp_path / "run", holder if isinstance(holder, Holder) else holder(), silent_s)
    found = claims.find(tmp_path / "run")
    now = claims._clock(tmp_path / "run")
    assert claims._is_over(found[0], claims.this_process(300), now) == over
    if over:
        claim = take(tmp_path / "run", LIMITS)
        assert not path.exists()
        assert names(tmp_path / "run") == ["claim-2.json"]
        claim.release()


def test_a_process_that_waits_to_be_reaped_is_dead() -> None:
    process = subprocess.Popen([sys.executable, "-c", ""])
    started = claims.start_of(process.pid)
    deadline = time.monotonic() + 60
    while claims.alive(process.pid, started) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert process.returncode is None  # nobody has asked for its exit code
    assert not claims.alive(process.pid, started)
    process.wait()


def test_a_claim_that_was_never_finished_is_waited_for_and_then_over(tmp_path: Path) -> None:
    (tmp_path / "claim-4.json").touch()
    os.utime(tmp_path / "claim-4.json", (time.time() - 100,) * 2)
    with pytest.raises(FolderInUseError, match=r"in use by claim-4\.json, heard of 100 s ago"):
        take(tmp_path, LIMITS)
    os.utime(tmp_path / "claim-4.json", (time.time() - 301,) * 2)
    take(tmp_path, LIMITS).release()
    assert names(tmp_path) == []


def test_a_foreign_holder_is_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Until it ends, until it must be dead, up to a limit, or until a request to stop."""
    monkeypatch.setattr(claims, "PERIOD_S", 0.05)
    caplog.set_level(logging.INFO, "ddp_ssl")
    held = take(tmp_path, LIMITS)
    threading.Timer(0.2, held.release).start()
    take(tmp_path, LIMITS, wait=True).release()
    assert re.search(r"in use by .*; waiting for its end until \d\d:\d\d:\d\d", caplog.text)

    short = dataclasses.replace(ELSEWHERE, timeout_s=0.3)
    write(tmp_path, short)
    take(tmp_path, LIMITS, wait=True).release()
    assert "was held by process" in caplog.text

    path = write(tmp_path, short)
    beating = threading.Event()

    def beat() -> None:
        while not beating.wait(0.02):
            os.utime(path)

    thread = threading.Thread(target=beat)
    thread.start()
    began = time.monotonic()
    with pytest.raises(FolderInUseError, match="on n7"):
        take(tmp_path, LIMITS, wait=True)
    assert 0.4 < time.monotonic() - began < 5
    with pytest.raises(FolderInUseError, match="on n7"):
        take(tmp_path, LIMITS, wait=True, stopped=lambda: True)
    beating.set()
    thread.join()


HOLD = """
import logging, sys, time
from pathlib import Path
from ddp_ssl.config import Run
from ddp_ssl.run import claims
logging.basicConfig()
claims.PERIOD_S = 0.05
claim = claims.take(Path(sys.argv[1]), Run())
print(claim.path.name, flush=True)
time.sleep(60)
"""


def holder(folder: Path) -> tuple[subprocess.Popen[str], Path]:
    """A process that holds the folder, and its claim."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(folder)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout is not None
    return process, folder / process.stdout.readline().strip()


@pytest.mark.parametrize("place", ["next", "same name", "gone"])
def test_a_holder_that_was_replaced_ends_at_once(tmp_path: Path, place: str) -> None:
    """As after a suspension that was longer than its limit; a claim alone that goes comes back."""
    process, path = holder(tmp_path)
    first = path.stat().st_mtime
    deadline = time.monotonic() + 30
    while path.stat().st_mtime == first and time.monotonic() < deadline:
        time.sleep(0.02)
    assert path.stat().st_mtime > first  # the heartbeat
    path.unlink()
    while not path.exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    assert path.exists()
    process.send_signal(signal.SIGSTOP)
    path.unlink()
    if place == "gone":  # the other run has ended meanwhile
        time.sleep(0.3)
    else:
        write(tmp_path, ELSEWHERE, number=2 if place == "next" else int(path.stem[6:]))
    process.send_signal(signal.SIGCONT)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 1
    by = "" if place == "gone" else f" by process {os.getpid()} on n7, since"
    assert f"{tmp_path} was taken over{by}" in errors
    assert [p.name for p in tmp_path.iterdir()] == {
        "next": ["claim-2.json"], "same name": [path.name], "gone": [],
    }[place]  # fmt: skip


def test_an_own_claim_that_cannot_be_read_is_written_again(tmp_path: Path) -> None:
    """As after a crash of the file server; and the newest of ten claims is the last."""
    process, path = holder(tmp_path)
    text, deadline = path.read_text(), time.monotonic() + 30
    path.write_text("")
    while path.read_text() != text and time.monotonic() < deadline:
        time.sleep(0.02)
    assert path.read_text() == text
    assert process.poll() is None
    process.kill()
    process.communicate()
    write(tmp_path, ELSEWHERE, number=10)
    assert [claim.number for claim in claims.find(tmp_path)] == [1, 10]


# --- the choice of a folder ----------------------------------------------------------------------


def test_starts_without_a_name_get_folders_of_their_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(folder, "default_name", lambda config: "one-second")
    taken = [folder.claim(config_of()) for _ in range(3)]
    assert [str(start.folder) for start, _ in taken] == [
        "runs/one-second", "runs/one-second-2", "runs/one-second-3",
    ]  # fmt: skip
    for _, claim in reversed(taken):
        claim.release()
    assert names(tmp_path) == []


def test_a_refused_start_leaves_the_folder_as_it_was(tmp_path: Path) -> None:
    (tmp_path / "photo.jpg").touch()
    with pytest.raises(ConfigError, match=r"not empty \(photo\.jpg\)"):
        folder.claim(config_of(f"run.dir={tmp_path}"))
    assert names(tmp_path) == ["photo.jpg"]
    write(tmp_path, ELSEWHERE)
    with pytest.raises(ConfigError, match="in use by process"):
        folder.claim(config_of(f"run.dir={tmp_path}"))
    with pytest.raises(ConfigError, match="no good checkpoint"):
        folder.claim(config_of(f"run.dir={tmp_path}/new", f"run.resume={tmp_path}"))
    assert names(tmp_path) == ["claim-1.json", "photo.jpg"]


def test_torchruns_of_one_second_have_different_names(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "0")
    monkeypatch.setattr(folder, "_started", lambda pid: 0.0)
    agents = iter([11, 12, 11])
    monkeypatch.setattr(os, "getppid", lambda: next(agents))
    first, second, again = (folder.default_name(config_of()) for _ in range(3))
    assert first == again
    assert first != second


@pytest.mark.parametrize(
    ("state", "kept"), [("running", True), ("failed", True), ("preempted", False), ("done", False)]
)
def test_a_stop_that_no_start_obeyed_counts(tmp_path: Path, state: str, kept: bool) -> None:
    """A run that dies after it was asked to stop has a status that is newer than the STOP."""
    (tmp_path / "STOP").touch()
    os.utime(tmp_path / "STOP", (1, 1))
    (tmp_path / "status.json").write_text(json.dumps({"state": state}))
    folder._remove_old_stop(tmp_path)
    assert (tmp_path / "STOP").exists() == kept
