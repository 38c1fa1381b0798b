"""Killed and stopped processes: the run goes on from its last checkpoint, to the last bit."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from ddp_ssl.checkpoint import store
from tests.faults.launched import (
    TRAIN,
    Launched,
    arguments_of,
    last_step,
    ranks_alone,
    torchrun,
    until,
)
from tests.ranks import Ranks
from tests.runs import arguments, rows, status, train

pytestmark = pytest.mark.faults

STEPS = 120


def long_run(photos: Path, folder: Path, **changes: object) -> list[str]:
    """40 epochs of 3 steps, a row and a checkpoint every few steps."""
    return arguments_of(
        arguments(photos, folder), **{
            "optim__epochs": STEPS // 3, "eval__every": 20, "measure__every": 0,
            "log__every_steps": 1, "checkpoint__every_steps": 2, "method__alpha_every": 10,
            **changes,
        },
    )  # fmt: skip


@pytest.fixture(scope="module")
def whole(ranks: Ranks, photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same run of two processes, uninterrupted."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    assert ranks.launch(train, 2, long_run(photos, folder)) == [0, 0]
    return folder


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.mark.long
def test_ten_kills_of_any_rank_at_any_step(photos: Path, whole: Path, tmp_path: Path) -> None:
    """kill -9, ten times in one run, seeded; torchrun restarts, and no number changes."""
    folder, draw = tmp_path / "run", random.Random(0)
    options = ("--max-restarts", "10", "--monitor-interval", "0.5")
    with torchrun(2, long_run(photos, folder), tmp_path / "out", *options) as run:
        for kill in range(10):
            target = kill * STEPS // 11 + draw.randrange(1, STEPS // 11)
            until(lambda target=target: last_step(folder) >= target and run.going())
            before = run.workers()
            os.kill(before[draw.randrange(2)], signal.SIGKILL)
            until(
                lambda before=before: len(set(run.workers().values()) - set(before.values())) == 2
            )
        assert run.wait() == 0, run.text()[-5000:]
    assert rows(folder) == rows(whole)
    assert (folder / "train.log").read_text().count("resumed from") == 10
    assert run.text().count("died or was stopped") >= 5  # the others said who was missing


@pytest.mark.long
def test_ten_kills_of_rank_0_while_it_saves(photos: Path, tmp_path: Path) -> None:
    """The newest good checkpoint is never older than the newest that was committed."""
    folder, draw = tmp_path / "run", random.Random(1)
    # 2.4 M parameters: a save takes long enough to be hit.
    args = long_run(
        photos, folder, model__projector="[1024, 1024, 1024]", checkpoint__every_steps=1,
        eval__every=0, method__alpha_every=100,
    )  # fmt: skip
    options = ("--max-restarts", "10", "--monitor-interval", "0.5")
    unfinished = 0
    with torchrun(2, args, tmp_path / "out", *options) as run:
        for kill in range(10):
            start = last_step(folder)
            until(lambda start=start: last_step(folder) > start + 1 and run.going())
            until(lambda: store.find(folder))
            before = run.workers()
            until(lambda: list((folder / "checkpoints").glob("*.tmp")), 60)
            time.sleep(draw.uniform(0, 0.05))
            os.kill(before[0], signal.SIGKILL)
            committed = store.find(folder)[0].step
            unfinished += bool(list((folder / "checkpoints").glob("*.tmp")))
            newest = store.newest_good(folder)
            assert newest is not None
            assert newest.step >= committed, kill
            until(
                lambda before=before: len(set(run.workers().values()) - set(before.values())) == 2
            )
            resumed = kill + 1
            log = folder / "train.log"
            until(lambda n=resumed, log=log: log.read_text().count("resumed from") >= n)
        until(lambda: status(folder)["state"] == "running" and run.going())
        os.kill(run.process.pid, signal.SIGTERM)  # after ten kills: stop in order
        run.wait()
    assert unfinished >= 3  # the kills did hit saves
    assert status(folder)["state"] in ("preempted", "done")
    losses = [row["step"] for row in rows(folder) if "train/loss" in row]
    assert losses == list(range(1, len(losses) + 1))
    assert not list((folder / "checkpoints").glob("*.tmp"))


@pytest.mark.long
def test_a_killed_agent_takes_its_workers_along_and_loses_no_step(
    photos: Path, whole: Path, tmp_path: Path
) -> None:
    """Workers that went on alone would write into the folder of the run that follows."""
    folder = tmp_path / "run"
    with torchrun(2, long_run(photos, folder), tmp_path / "out") as run:
        until(lambda: last_step(folder) >= 30 and run.going())
        workers = run.workers()
        os.kill(run.process.pid, signal.SIGKILL)
        until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in workers.values()), 60)
    assert status(folder)["state"] == "preempted"
    assert status(folder)["step"] == last_step(folder)
    with torchrun(2, [*long_run(photos, folder), "run.resume=auto"], tmp_path / "out") as run:
        assert run.wait() == 0
    assert rows(folder) == rows(whole)


def test_a_stopped_rank_ends_the_run_which_goes_on(
    photos: Path, whole: Path, tmp_path: Path
) -> None:
    """SIGSTOP is a hang: the others say who, torchrun kills and restarts."""
    folder = tmp_path / "run"
    args = long_run(photos, folder, run__timeout_s=8)
    options = ("--max-restarts", "1", "--monitor-interval", "0.5")
    with torchrun(2, args, tmp_path / "out", *options, TORCH_ELASTIC_SHUTDOWN_TIMEOUT="3") as run:
        until(lambda: last_step(folder) >= 30 and run.going())
        started = time.monotonic()
        os.kill(run.workers()[1], signal.SIGSTOP)
        until(lambda: "died or was stopped" in run.text(), 90)
        took = time.monotonic() - started
        assert run.wait() == 0, run.text()[-5000:]
    assert took < 60
    line = next(x for x in run.text().splitlines() if "died or was stopped" in x)
    assert f"rank 1 ({socket.gethostname()})" in line
    # A heartbeat may be a second old: many steps on a fast machine, few on a slow one.
    assert 1 <= int(line.split("after step ")[1].split()[0]) < STEPS
    assert rows(folder) == rows(whole)


@pytest.mark.parametrize("stopped", [0, 1])
def test_without_a_launcher_the_others_end_themselves(
    photos: Path, tmp_path: Path, stopped: int
) -> None:
    """Rank 0 holds the rendezvous as well: its silence is noticed all the same."""
    folder = tmp_path / "run"
    args = long_run(photos, folder, run__timeout_s=8, optim__epochs=2000)
    with ranks_alone(2, free_port(), args, tmp_path) as runs:
        until(lambda: last_step(folder) >= 10 and all(run.going() for run in runs))
        runs[stopped].process.send_signal(signal.SIGSTOP)
        other = runs[1 - stopped]
        assert other.wait(90) == 1
        assert ("rank 1" if stopped else "cannot be reached") in other.text()
        assert "after step" in other.text()
    assert status(folder)["state"] == "failed"
    assert status(folder)["retry"] is True
    assert "after step" in status(folder)["error"]


def test_a_rank_that_hangs_alive_is_named_by_all(photos: Path, tmp_path: Path) -> None:
    """Its heartbeats go on, but its count of collectives stays behind."""
    folder = tmp_path / "run"
    args = long_run(photos, folder, run__timeout_s=8, optim__epochs=2000, data__prefetch=1)
    module = ("-m", "tests.faults.hanging", "2", "20")
    with ranks_alone(3, free_port(), args, tmp_path, module=module) as runs:
        codes = [run.wait() for run in runs]
    assert codes == [1, 1, 1]
    host = socket.gethostname()
    said = f"rank 2 ({host}) hangs after step 19, in: waiting for data"
    texts = [run.text() for run in runs]
    assert sum(said in text for text in texts) == 1, texts
    assert said in status(folder)["error"]
    assert status(folder)["retry"] is True


def test_a_pause_of_the_process_that_holds_the_notes_ends_nothing(
    photos: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    args = long_run(photos, folder, run__timeout_s=10, optim__epochs=2000)
    with ranks_alone(2, free_port(), args, tmp_path) as runs:
        until(lambda: last_step(folder) >= 10 and all(run.going() for run in runs))
        runs[0].process.send_signal(signal.SIGSTOP)
        time.sleep(7)
        runs[0].process.send_signal(signal.SIGCONT)
        paused = last_step(folder)
        time.sleep(20)
        assert all(run.going() for run in runs)
        assert last_step(folder) > paused
        runs[1].process.send_signal(signal.SIGTERM)
        assert [run.wait(60) for run in runs] == [0, 0]
    assert status(folder)["state"] == "preempted"


@pytest.fixture
def two_machines() -> Iterator[list[str]]:
    """Two network namespaces joined by a cable."""
    names = [f"faults{os.getpid()}a", f"faults{os.getpid()}b"]

    def ip(*command: str) -> None:
        subprocess.run(["ip", *command], check=True, capture_output=True)

    try:
        for name in names:
            ip("netns", "add", name)
        a, b = "fltA", "fltB"
        ip(*f"link add {a} netns {names[0]} type veth peer name {b} netns {names[1]}".split())
        for number, (name, end) in enumerate(zip(names, (a, b), strict=True), 1):
            ip("-n", name, "addr", "add", f"10.77.0.{number}/24", "dev", end)
            ip("-n", name, "link", "set", end, "up")
            ip("-n", name, "link", "set", "lo", "up")
        yield names
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"network namespaces cannot be made here: {error}")
    finally:
        with contextlib.suppress(OSError):
            for name in names:
                subprocess.run(["ip", "netns", "del", name], capture_output=True)


def test_a_cut_link_ends_both_sides(photos: Path, tmp_path: Path, two_machines: list[str]) -> None:
    folder = tmp_path / "run"
    args = long_run(photos, folder, run__timeout_s=8, optim__epochs=2000)

    def prefix(rank: int) -> list[str]:
        end = ("fltA", "fltB")[rank]
        return ["ip", "netns", "exec", two_machines[rank], "env", f"GLOO_SOCKET_IFNAME={end}"]

    with ranks_alone(2, 29777, args, tmp_path, prefix, MASTER_ADDR="10.77.0.1") as runs:
        until(lambda: last_step(folder) >= 10 and all(run.going() for run in runs))
        subprocess.run(["ip", "-n", two_machines[0], "link", "set", "fltA", "down"], check=True)
        codes = [run.wait(90) for run in runs]
    assert codes == [1, 1]
    assert "rank 1" in runs[0].text()
    assert "after step" in runs[0].text()
    assert "after step" in runs[1].text()
    newest = store.newest_good(folder)
    assert newest is not None
    assert newest.step >= 8


@pytest.mark.long
@pytest.mark.parametrize("size", [1, 2])
def test_the_printed_command_goes_on(
    photos: Path, ranks: Ranks, whole: Path, tmp_path: Path, size: int
) -> None:
    """What the last line of a stopped run says, typed into a shell."""
    folder, other = tmp_path / "a run", tmp_path / "one"
    args = long_run(photos, folder)
    if size == 2:
        with torchrun(2, args, tmp_path / "out") as run:
            until(lambda: last_step(folder) >= 10 and run.going())
            (folder / "STOP").touch()
            assert run.wait(90) == 0
    else:
        alone = Launched([sys.executable, *TRAIN, *args], tmp_path / "out")
        try:
            until(lambda: last_step(folder) >= 10 and alone.going())
            alone.process.send_signal(signal.SIGTERM)
            assert alone.wait(90) == 0
        finally:
            alone.process.kill()
        assert ranks.launch(train, 1, long_run(photos, other)) == [0]
    assert status(folder)["state"] == "preempted"
    *_, last = (folder / "train.log").read_text().splitlines()
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    again = Launched(["bash", "-c", last.partition("to go on: ")[2]], tmp_path / "again", PATH=path)
    assert again.wait() == 0, again.text()
    assert "resumed from" in (folder / "train.log").read_text()
    assert rows(folder) == rows(whole if size == 2 else other)


def test_ctrl_c_saves_and_a_second_one_ends_at_once(photos: Path, tmp_path: Path) -> None:
    """As a terminal does it: SIGINT to torchrun, which passes it on to its workers."""
    folder = tmp_path / "run"
    args = long_run(photos, folder, optim__epochs=2000)
    with torchrun(2, args, tmp_path / "out") as run:
        until(lambda: last_step(folder) >= 10 and run.going())
        run.process.send_signal(signal.SIGINT)
        run.wait(90)
    assert status(folder)["state"] == "preempted"
    assert status(folder)["step"] == last_step(folder)

    alone = Launched([sys.executable, *TRAIN, *args, "run.resume=auto"], tmp_path / "alone")
    try:
        before = last_step(folder)
        until(lambda: last_step(folder) > before and alone.going())
        alone.process.send_signal(signal.SIGSTOP)  # so that it cannot leave in between
        alone.process.send_signal(signal.SIGINT)
        alone.process.send_signal(signal.SIGCONT)
        time.sleep(1.5)
        if alone.process.poll() is None:
            alone.process.send_signal(signal.SIGINT)
        assert alone.wait(60) in (0, 130, -signal.SIGINT)  # at the end Python handles it
    finally:
        alone.process.kill()
