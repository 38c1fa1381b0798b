"""The doctor: all well on a healthy setting, and each failing condition found."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.metadata
import io
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch

from ddp_ssl import cli, distributed, doctor
from ddp_ssl.checks import examination, images, machine, network, software, storage
from ddp_ssl.checks.base import Check, Context, Finding, file_system, ok
from ddp_ssl.data.datasets.split import Split
from ddp_ssl.distributed import Exchange, World, bandwidth
from ddp_ssl.run import environment
from ddp_ssl.run.configure import DIGITS
from tests.helpers import config_of
from tests.ranks import Ranks
from tests.runs import arguments, train

CPU = torch.device("cpu")
NAMES = (
    "run folder", "versions", "variables", "loggers", "gpus", "cores", "/dev/shm", "open files",
    "speed", "all-reduce", "clocks", "shared folder", "data", "reading", "decoding", "checkpoints",
    "slurm",
)  # fmt: skip


# --- faults, each on the ranks that a test says ----------------------------------------------


def other_torch() -> Any:
    """Another version of torch."""
    here = environment.environment()
    here["packages"] |= {"torch": "1.13.0"}
    return mock.patch.object(environment, "environment", return_value=here)


def full_disk() -> Any:
    """20 MB are free."""
    real = os.statvfs

    def statvfs(place: Any) -> Any:
        disk = real(place)
        names = [name for name in dir(disk) if name.startswith("f_")]
        fields = {name: getattr(disk, name) for name in names}
        return SimpleNamespace(**fields | {"f_bavail": 20_000_000 // disk.f_frsize})

    return mock.patch.object(os, "statvfs", statvfs)


def odd_file_clock() -> Any:
    """The file system is an hour ahead."""
    return mock.patch.object(network, "modified", lambda path: os.stat(path).st_mtime + 3600)


def odd_host_clock() -> Any:
    """This host is a minute late; its files carry the same clock."""
    late = SimpleNamespace(time=lambda: time.time() - 60, sleep=time.sleep)
    stack = contextlib.ExitStack()
    stack.enter_context(mock.patch.object(network, "time", late))
    modified = mock.patch.object(network, "modified", lambda path: os.stat(path).st_mtime - 60)
    stack.enter_context(modified)
    return stack


def other_host() -> Any:
    """This rank is on another host."""
    return mock.patch.object(examination.socket, "gethostname", return_value="n2")


def local_disk() -> Any:
    """This rank does not see what rank 0 writes."""

    def missing(*args: Any) -> Any:
        raise FileNotFoundError(2, "No such file or directory")

    stack = contextlib.ExitStack()
    stack.enter_context(mock.patch.object(network, "PAUSES", ()))
    stack.enter_context(mock.patch.object(network, "open", missing, create=True))
    return stack


def no_threads() -> Any:
    """OMP_NUM_THREADS is unset."""
    without = {k: v for k, v in os.environ.items() if k != "OMP_NUM_THREADS"}
    return mock.patch.dict(os.environ, without, clear=True)


def other_variable() -> Any:
    """A variable that the other ranks do not have."""
    return mock.patch.dict(os.environ, {"NCCL_ALGO": "Tree"})


def no_address() -> Any:
    """The address of rank 0 is unset."""
    without = {k: v for k, v in os.environ.items() if k != "MASTER_ADDR"}
    return mock.patch.dict(os.environ, without, clear=True)


def other_images() -> Any:
    """This rank sees one image less."""
    real = images._load

    def fewer(ctx: Context) -> Any:
        data = real(ctx)
        some = data.train.subset(torch.arange(1, len(data.train)).numpy())
        return dataclasses.replace(data, train=some)

    return mock.patch.object(images, "_load", fewer)


def slow_files() -> Any:
    """This rank waits for each file."""
    read = Split.read

    def slowly(split: Split, i: int) -> bytes:
        time.sleep(2 * images.SLOW_READ_S)
        return read(split, i)

    return mock.patch.object(Split, "read", slowly)


def slow_scan() -> Any:
    """This rank finds its images late."""
    real = images._load

    def late(ctx: Context) -> Any:
        time.sleep(10)
        return real(ctx)

    return mock.patch.object(images, "_load", late)


def broken() -> Any:
    """A check raises an error."""

    def look(ctx: Context, before: list[Any]) -> None:
        raise KeyError("cores")

    return replaced(machine, "cores", look)


def asleep() -> Any:
    """A check does not end."""

    def look(ctx: Context, before: list[Any]) -> None:
        time.sleep(12)

    return replaced(machine, "cores", look)


def replaced(module: Any, name: str, look: Any) -> Any:
    checks = tuple(c._replace(stages=(look,)) if c.name == name else c for c in module.CHECKS)
    return mock.patch.object(module, "CHECKS", checks)


def no_exchange() -> Any:
    """This rank fails before the all-reduce that the others begin."""

    def fails(*args: Any) -> None:
        raise RuntimeError("NCCL error: unhandled system error")

    return mock.patch.object(distributed, "measure_bandwidth", fails)


FAULTS = {
    f.__name__: f
    for f in (
        other_torch, full_disk, odd_file_clock, odd_host_clock, other_host, local_disk, no_threads,
        other_variable, no_address, other_images, slow_files, slow_scan, broken, asleep,
        no_exchange,
    )
}  # fmt: skip


def look(
    args: Sequence[str], only: Sequence[str] = (), faults: dict[str, list[int]] | None = None
) -> tuple[int, str]:
    """The doctor in this process, with short limits; its exit code and its output."""
    rank = int(os.environ.get("RANK", "0"))
    printed = io.StringIO()
    checks = examination.all_checks
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.dict(os.environ, {"OMP_NUM_THREADS": "1"}))
        for name, ranks in (faults or {}).items():
            if rank in ranks:
                stack.enter_context(FAULTS[name]())
        for module, name, value in (
            (images, "PIPELINE_S", 0.1), (images, "READ_S", 0.5), (network, "NBYTES", 1 << 20),
        ):  # fmt: skip
            stack.enter_context(mock.patch.object(module, name, value))
        if only:
            some = lambda: [check for check in checks() if check.name in only]  # noqa: E731
            stack.enter_context(mock.patch.object(examination, "all_checks", some))
        stack.enter_context(contextlib.redirect_stdout(printed))
        code = doctor.main(args)
    return code, printed.getvalue()


def examined(
    ranks: Ranks, size: int, args: Sequence[str], *only: str, **faults: list[int]
) -> tuple[int, list[str]]:
    """The doctor on `size` ranks: rank 0's exit code and the lines that are not ok."""
    results = ranks.launch(look, size, list(args), only, faults)
    assert all(text == "" for _, text in results[1:])
    code, text = results[0]
    lines = text.splitlines()
    assert lines[-1].endswith(" fail")
    return code, [line for line in lines[1:-1] if not line.startswith("ok ")]


@pytest.fixture
def args(photos: Path, tmp_path: Path) -> list[str]:
    (tmp_path / "here").mkdir()
    return arguments(photos, tmp_path / "here" / "runs" / "one")


# --- all is well -------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 3])
def test_a_healthy_setting(ranks: Ranks, args: list[str], tmp_path: Path, size: int) -> None:
    results = ranks.launch(look, size, args)
    assert [code for code, _ in results] == [0] * size, results[0][1]
    assert all(text == "" for _, text in results[1:])
    title, *lines, end = results[0][1].splitlines()
    given = f"{size} process(es) on 1 host(s), {DIGITS / 'default.yaml'} data.name=folder "
    assert title.startswith(f"ddp-ssl doctor: {given}")
    names = [line[6:20].strip() for line in lines]
    for name in NAMES:
        assert name in names, name
    assert {line[:6].strip() for line in lines} <= {"ok", "warn"}
    assert end == f"{sum(x[:2] == 'ok' for x in lines)} ok, {sum(x[:4] == 'warn' for x in lines)} warn, 0 fail"  # noqa: E501  # fmt: skip
    # These warnings may be right on a small machine: few cores, other processes, a busy disk.
    minded = {line[6:20].strip() for line in lines if line[:4] == "warn"}
    assert minded <= {"cores", "speed", "reading"}
    assert any("20 images decode; the pipeline makes 2 views" in line for line in lines) or any(
        "images decode; the pipeline makes 2 views" in line for line in lines
    )
    if size == 3:
        assert any("gloo, 3 processes on 1 host(s): 1 MiB in" in line for line in lines)
        assert any("all 3 ranks see what rank 0 writes" in line for line in lines)
    assert [p.name for p in (tmp_path / "here").iterdir()] == []  # nothing is left, nothing made


def test_the_embedded_default_alone(tmp_path: Path) -> None:
    """As a user starts it, through the console script."""
    done = subprocess.run(
        [str(Path(sys.executable).parent / "ddp-ssl"), "doctor"],
        cwd=tmp_path, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    title, *_, end = done.stdout.splitlines()
    assert title == "ddp-ssl doctor: 1 process(es) on 1 host(s), the embedded default"
    assert end.endswith(" 0 fail")
    assert list(tmp_path.iterdir()) == []


# --- the commands ------------------------------------------------------------------------------


def test_a_config_that_cannot_be_used(capsys: pytest.CaptureFixture[str]) -> None:
    assert doctor.main(["optim.epoch=1"]) == 2
    captured = capsys.readouterr()
    assert captured.err == "ddp_ssl: error: optim.epoch: unknown key; did you mean optim.epochs?\n"
    assert captured.out == ""


def test_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert doctor.main(["--help"]) == 0
    assert capsys.readouterr().out == doctor.USAGE


@pytest.mark.parametrize("command", list(cli.COMMANDS))
def test_every_command_is_a_module_with_help(
    command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {n: signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)}
    monkeypatch.setattr(sys, "argv", ["ddp-ssl", command, "--help"])
    try:
        code = cli.main()
    except SystemExit as end:  # argparse's way
        code = end.code
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    assert code == 0
    assert "usage:" in capsys.readouterr().out


# --- what fails on all or some ranks -----------------------------------------------------------


def test_a_rank_with_another_version(ranks: Ranks, args: list[str]) -> None:
    code, (line,) = examined(ranks, 3, args, "versions", other_torch=[2])
    assert code == 1
    host, ours = examination.socket.gethostname(), importlib.metadata.version("torch")
    assert f"torch differs: {ours} on ranks 0, 1 ({host}); 1.13.0 on rank 2 ({host})" in line


def test_a_full_disk(ranks: Ranks, args: list[str], tmp_path: Path) -> None:
    wide = [*args, "model.projector=[2048, 2048, 2048]"]
    code, (line,) = examined(ranks, 1, wide, "checkpoints", full_disk=[0])
    assert code == 1
    assert "need" in line
    assert f"19.1 MiB are free in {tmp_path / 'here'}" in line
    assert "fewer of checkpoint.keep" in line


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of a megabyte."""
    place = tmp_path / "small"
    place.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=1m", "none", str(place)]
    mounted = shutil.which("mount") and subprocess.run(command, capture_output=True).returncode == 0
    if not mounted:
        pytest.skip("this user cannot mount a tmpfs")
    yield place
    subprocess.run(["umount", str(place)], check=True)


def test_a_disk_that_fills_up_while_it_is_tried(args: list[str], small_disk: Path) -> None:
    code, text = look([*args, f"run.dir={small_disk / 'run'}"], ["checkpoints"])
    assert code == 1
    assert "fail  checkpoints   No space left on device" in text or "No space left" in text
    assert list(small_disk.iterdir()) == []


def test_a_folder_that_cannot_be_written(args: list[str]) -> None:
    code, text = look([*args, "run.dir=/proc/self/run"], ["run folder", "checkpoints"])
    assert code == 1
    (line,) = [line for line in text.splitlines() if line.startswith("fail")]
    assert line.startswith("fail  checkpoints   /proc/")
    assert "No such file or directory" in line


def test_a_run_folder_in_use(args: list[str], tmp_path: Path) -> None:
    (tmp_path / "here" / "runs" / "one").mkdir(parents=True)
    (tmp_path / "here" / "runs" / "one" / "train.log").touch()
    code, text = look(args, ["run folder"])
    assert code == 1
    assert "is not empty (train.log); run.resume=auto continues it" in text


def test_missing_data(ranks: Ranks, args: list[str], tmp_path: Path) -> None:
    args = [*args, f"data.root={tmp_path / 'nowhere'}"]
    code, lines = examined(ranks, 3, args, "data", "reading", "decoding", "checkpoints")
    assert code == 1
    assert len(lines) == 1, lines
    assert lines[0].startswith(f"fail  data          data.root: {tmp_path / 'nowhere'} does not")


def test_images_that_cannot_be_used(ranks: Ranks, args: list[str], photos: Path,
                                    tmp_path: Path) -> None:  # fmt: skip
    shutil.copytree(photos, tmp_path / "photos")
    files = sorted((tmp_path / "photos").rglob("*.jpg"))
    for path in files[1::2]:
        path.write_bytes(path.read_bytes()[:200])
    args = [*args, f"data.root={tmp_path / 'photos'}"]
    code, (line,) = examined(ranks, 3, args, "data", "decoding")
    assert code == 1
    assert line.startswith("fail  decoding")
    assert "bad image(s): " in line
    assert any(f"{path}: " in line for path in files[1::2])
    assert not any(f"{path}: " in line for path in files[::2])
    assert f"data.root={tmp_path / 'photos'} finds all; data.skip leaves them out" in line
    assert "run.dir" not in line


def test_a_file_that_cannot_be_read(args: list[str], photos: Path, tmp_path: Path) -> None:
    shutil.copytree(photos, tmp_path / "photos")
    lost: list[str] = []

    def lost_meanwhile(split: Any, i: int) -> None:
        if not lost:
            lost.append(os.fsdecode(split.path(i)))
            os.unlink(lost[0])

    args = [*args, f"data.root={tmp_path / 'photos'}"]
    with mock.patch.object(images, "forget", lost_meanwhile):
        code, text = look(args, ["data", "reading"])
    assert code == 1
    assert f"the one process cannot read {lost[0]}: No such file or directory" in text


def test_files_that_come_slowly(ranks: Ranks, args: list[str]) -> None:
    code, (line,) = examined(ranks, 3, args, "data", "reading", slow_files=[2])
    assert code == 0
    assert line.startswith("warn  reading")
    assert "ms a file" in line
    assert "ddp-ssl pack-shards, data.stage, or more data.read_threads" in line


def test_ranks_that_see_other_images(ranks: Ranks, args: list[str]) -> None:
    code, (line,) = examined(ranks, 3, args, "data", other_images=[1, 2])
    assert code == 1
    assert "ranks 1, 2 (" in line
    assert "see other images than rank 0" in line


def test_a_large_folder_takes_its_time(ranks: Ranks, args: list[str]) -> None:
    args = [*args, "run.start_timeout_s=5"]  # for everything else
    code, lines = examined(ranks, 3, args, "data", slow_scan=[1])
    assert (code, lines) == (0, [])


def test_clocks(ranks: Ranks, args: list[str]) -> None:
    code, (line,) = examined(ranks, 3, args, "clocks", odd_file_clock=[0])
    assert code == 0
    assert line.startswith("warn  clocks")
    assert "is +3600.0 s from the clock of" in line
    code, (line,) = examined(ranks, 3, args, "clocks", odd_host_clock=[2], other_host=[2])
    assert code == 0
    assert "the clock of n2 is -60.0 s from rank 0's" in line


def test_a_folder_of_one_host_alone(ranks: Ranks, args: list[str], tmp_path: Path) -> None:
    code, (line,) = examined(
        ranks, 3, args, "run folder", "shared folder", other_host=[2], local_disk=[2]
    )
    assert code == 1
    assert f"rank 2 (n2) do not see what rank 0 wrote in {tmp_path / 'here'}: No such file" in line
    assert list((tmp_path / "here").iterdir()) == []


def test_threads_and_variables(ranks: Ranks, args: list[str]) -> None:
    code, lines = examined(
        ranks, 3, args, "cores", "variables", no_threads=[0, 1, 2], other_variable=[1]
    )
    assert code == 0
    assert any("warn  cores" in x and "OMP_NUM_THREADS is unset" in x for x in lines)
    assert any("NCCL_ALGO differs: unset on ranks 0, 2" in x and "Tree on rank 1" in x
               for x in lines)  # fmt: skip


# --- checks that break, ranks that hang --------------------------------------------------------


def test_a_check_that_breaks_on_one_rank(ranks: Ranks, args: list[str]) -> None:
    results = ranks.launch(look, 3, args, ("cores", "/dev/shm", "shared folder"), {"broken": [1]})
    assert [code for code, _ in results] == [1] * 3
    lines = results[0][1].splitlines()[2:-1]
    assert [line[:6].strip() for line in lines] == ["fail", "ok", "ok"]
    assert lines[0].startswith("fail  cores         KeyError: 'cores' (test_doctor.py, line ")
    assert ") [rank 1 (" in lines[0]


def test_a_judgement_that_breaks() -> None:
    def judge(ctx: Context, facts: list[Any]) -> list[Finding]:
        raise ZeroDivisionError("division by zero\nand more")

    (finding,) = examination.examine(Check("odd", (lambda ctx, before: 1,), judge), ctx_of(1))
    assert finding.level == "fail"
    start = "cannot be judged: ZeroDivisionError: division by zero and more (test_doctor.py, line "
    assert finding.text.startswith(start)


@pytest.mark.faults
def test_a_rank_that_hangs_ends_it_by_name(ranks: Ranks, args: list[str]) -> None:
    args = [*args, "run.start_timeout_s=5"]
    start = time.monotonic()
    results = ranks.launch(look, 3, args, ("cores", "/dev/shm"), {"asleep": [1]})
    assert time.monotonic() - start < 60
    assert [code for code, _ in results] == [1] * 3
    _, _, line, end = results[0][1].splitlines()
    assert line.startswith("fail  processes     no answer: Ranks 1 failed")
    assert end == "1 ok, 0 warn, 1 fail"


@pytest.mark.faults
def test_an_all_reduce_that_fails_on_one_rank(ranks: Ranks, args: list[str]) -> None:
    """The others give it up in time, and the checks after it are made."""
    args = [*args, "run.start_timeout_s=12"]
    start = time.monotonic()
    code, lines = examined(ranks, 3, args, "all-reduce", "clocks", no_exchange=[1])
    assert time.monotonic() - start < 60
    assert code == 1
    assert any("NCCL error: unhandled system error [rank 1" in line for line in lines)
    assert all(line.startswith("fail  all-reduce") for line in lines)


def test_processes_that_do_not_find_each_other(ranks: Ranks, args: list[str]) -> None:
    results = ranks.launch(look, 2, args, ("versions",), {"no_address": [0, 1]})
    assert [code for code, _ in results] == [1, 0]
    _, line, versions, _ = results[0][1].splitlines()
    assert line.startswith("fail  processes     they do not find each other: MASTER_ADDR")
    assert versions.startswith("ok    versions")


def test_sigterm_leaves_nothing_behind(args: list[str], tmp_path: Path) -> None:
    def ended(path: Any) -> float:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(5)
        return 0.0

    handler = signal.getsignal(signal.SIGTERM)
    with mock.patch.object(network, "modified", ended), pytest.raises(SystemExit) as end:
        look(args, ["clocks"])
    assert end.value.code == 143
    assert signal.getsignal(signal.SIGTERM) == handler
    assert list((tmp_path / "here").iterdir()) == []


# --- judgements ----------------------------------------------------------------------------------


def ctx_of(size: int, *overrides: str, hosts: Sequence[str] = ()) -> Context:
    """As rank 0 has it."""
    world = World(0, 1, 0, 1, CPU)
    ctx = Context(config_of(*overrides), overrides, world, list(hosts) or ["n1"] * size, CPU, 10)
    ctx.world = dataclasses.replace(world, size=size)
    return ctx


def gpu(number: int, **fields: Any) -> dict[str, Any]:
    return {
        "id": f"n1 GPU-{number}", "name": "H100", "free": 79 << 30, "total": 80 << 30,
        "others": [], "bf16": True, "far": None, **fields,
    }  # fmt: skip


def test_gpus() -> None:
    def judged(facts: list[Any], *overrides: str) -> list[Finding]:
        return list(machine.judge_gpus(ctx_of(len(facts), "run.device=auto", *overrides), facts))

    (found,) = judged([gpu(0), gpu(1)])
    assert found == ok("2 x H100, each rank one, 79 GiB free or more")
    (found,) = judged([gpu(0), gpu(0), gpu(1)])
    assert (found.level, found.text) == ("fail", "ranks 0, 1 (n1) share one GPU")
    (found,) = judged([gpu(0), None])
    assert (found.level, found.text) == ("fail", "rank 1 (n1) found no GPU")
    (found,) = judged(["/dev/nvidia0 exists, but", None])
    assert (found.level, found.text) == ("fail", "all 2 ranks found no GPU")
    assert found.remedy.startswith("/dev/nvidia0 exists")
    (found,) = judged([None, None])
    assert found == ok("no GPU: the run would use the CPU")
    (found,) = judged([None, None], "run.device=cuda")
    assert (found.level, found.text) == ("fail", "all 2 ranks found no GPU")
    (found,) = judged([gpu(0), gpu(1, bf16=False)], "optim.precision=bf16")
    assert (found.level, found.text) == ("fail", "rank 1 (n1): the GPU has no bf16")
    (found,) = judged([gpu(0), gpu(1, bf16=False)], "optim.precision=fp16")
    assert found.level == "ok"
    (found,) = judged([gpu(0), gpu(1, free=50 << 30, others=["77 python 30000 MiB"])])
    assert found.level == "warn"
    assert "30 GiB of the GPU are in use already (77 python 30000 MiB)" in found.text
    (found,) = judged([gpu(0), gpu(1, name="A100")])
    assert (found.level, found.text) == ("warn", "different GPUs (H100, A100)")


def test_the_driver_and_cuda() -> None:
    mine = {"driver": "12.4", "cuda": "13.0", "torch": "2.14.1", "nvidia-dali-cuda120": "2.4"}
    (found,) = software._cuda_matches(ctx_of(1, "run.device=auto"), mine)
    assert found.level == "fail"
    assert found.text == "the driver supports CUDA 12.4, torch is built for 13"
    mine |= {"driver": "13.1"}
    assert not list(software._cuda_matches(ctx_of(1, "run.device=auto"), mine))


def test_what_is_not_installed() -> None:
    facts = [{"torch": "2", "torchvision": "1", "timm": "1", "driver": "none", "commit": "none"}]
    (found,) = software.judge_versions(ctx_of(1), facts)
    assert (found.level, found.text) == ("fail", "nvidia-dali not installed")


def variables(**values: str) -> dict[str, Any]:
    return {"variables": values, "interfaces": ["lo", "eth0", "ib0"]}


def test_variables_that_bite() -> None:
    def judged(*facts: Any) -> list[Finding]:
        return list(software.judge_variables(ctx_of(len(facts), "run.device=auto"), list(facts)))

    (found,) = judged(variables(NCCL_P2P_DISABLE="1"))
    assert found.level == "warn"
    assert found.text.startswith("NCCL_P2P_DISABLE=1 on the one process")
    (found,) = judged(variables(CUDA_VISIBLE_DEVICES=""))
    assert "it hides all GPUs" in found.text
    (found,) = judged(variables(NCCL_SOCKET_IFNAME="ens"))
    assert found.level == "fail"
    assert found.text == "NCCL_SOCKET_IFNAME=ens is no interface of the one process"
    for right in ("eth", "=ib0", "^docker", "ens,ib"):
        (found,) = judged(variables(NCCL_SOCKET_IFNAME=right))
        assert found == ok(f"NCCL_SOCKET_IFNAME={right}")
    (found,) = judged(variables(NCCL_SOCKET_IFNAME="=ib"))
    assert found.level == "fail"
    found, *_ = judged(variables(OMP_PROC_BIND="true"), variables(OMP_PROC_BIND="true"))
    assert "may be bound to the same cores" in found.text
    # Each task sees its own GPU as number 0, or the node's all: no difference that matters.
    found, *more = judged(variables(CUDA_VISIBLE_DEVICES="0"), variables(CUDA_VISIBLE_DEVICES="1"))
    assert found.level == "ok"
    assert not more


def exchanged(rank: int, **fields: Any) -> Exchange:
    values = {"backend": "nccl", "nbytes": 64 << 20, "seconds": 1e-3, "latency": 2e-5}
    return Exchange(**(values | {"correct": True, "link": 1e-3} | fields))


def test_all_reduce() -> None:
    hosts = ["n1", "n1", "n2", "n2"]

    def judged(slow: dict[int, Exchange], hosts: list[str] = hosts) -> list[Finding]:
        facts = [slow.get(rank) or exchanged(rank) for rank in range(4)]
        return list(network.judge_exchange(ctx_of(4, hosts=hosts), facts))

    (found,) = judged({})
    assert found.level == "ok"
    assert "67.1 GB/s (bus 101 GB/s), latency 20 us, sums right" in found.text
    (found,) = judged({3: exchanged(3, correct=False)})
    assert (found.level, found.text) == ("fail", "rank 3 (n2) got a wrong sum")
    found, *_ = judged({r: exchanged(r, seconds=0.2) for r in range(4)})
    assert found.level == "warn"
    assert found.text.endswith(": slow")
    # Links within a host are compared with each other, and so are those between hosts.
    _, found = judged({3: exchanged(3, link=0.01)})
    assert found.level == "warn"
    assert found.text.startswith("the slowest link is from rank 2 (n2) to rank 3 (n2): 6.71 GB/s")
    (found,) = judged({r: exchanged(r, link=0.01) for r in (0, 2)})
    assert found.level == "ok"
    _, found = judged({0: exchanged(0, link=0.1), 2: exchanged(2, link=0.01)})
    assert "from rank 3 (n2) to rank 0 (n1)" in found.text


def test_a_collective_that_never_ends_on_a_gpu() -> None:
    event, cuda = mock.Mock(), torch.device("cuda", 0)
    event.return_value.query.side_effect = [False, True]
    with mock.patch.object(torch.cuda, "Event", event):
        bandwidth.wait_for_gpu(cuda, 5)
        event.return_value.query.side_effect = lambda: False
        with pytest.raises(RuntimeError, match=r"not finished talking after 0.05 s"):
            bandwidth.wait_for_gpu(cuda, 0.05)


def test_a_slow_rank() -> None:
    (found,) = machine.judge_speed(ctx_of(3, hosts=["n1", "n1", "n2"]), [1.0, 1.1, 2.2])
    assert found.level == "warn"
    assert found.text.startswith("rank 2 (n2) need up to 2.0 times as long")


def cores(**fields: Any) -> dict[str, Any]:
    fact = {"cores": (0, 1, 2, 3), "share": 4, "omp": "4", "threads": 4, "quota": None, "numa": 1}
    return fact | fields


def test_cores() -> None:
    def judged(*facts: Any, **fields: Any) -> list[Finding]:
        return list(machine.judge_cores(ctx_of(len(facts), **fields), list(facts)))

    (found,) = judged(cores(), cores())
    assert found.level == "ok"
    (found,) = judged(cores(quota=1.5))
    assert found.text == "the container on n1 may use 1.5 cores' time, but sees 4"
    (found,) = judged(cores(cores=(2,)), cores(cores=(2,)))
    assert found.text == "2 processes on n1 share 1 core(s)"
    (found,) = judged(cores(omp=None), cores(omp=None))
    assert found.remedy == "export OMP_NUM_THREADS=4"
    (found,) = judged(cores(omp=None), cores(omp=None), hosts=["n1", "n2"])
    assert found.level == "ok"  # one process each: torch takes the cores there are


def test_cores_of_a_container(tmp_path: Path) -> None:
    path = tmp_path / "cpu.max"
    path.write_text("150000 100000\n")
    assert machine.cpu_quota(path) == 1.5
    path.write_text("max 100000\n")
    assert machine.cpu_quota(path) is None
    assert machine.cpu_quota(tmp_path / "missing") is None


def test_limits() -> None:
    fact = {"shm": 64 << 20, "shm_free": 60 << 20, "files": 256}
    (found,) = machine.judge_shm(ctx_of(1), [fact])
    assert found.level == "warn"
    assert "60 MiB of 64 MiB are free on n1" in found.text
    (found,) = machine.judge_files(ctx_of(1), [fact])
    assert (found.level, found.remedy) == ("warn", "ulimit -n 65536 in the job script")


def test_file_systems(tmp_path: Path) -> None:
    mounts = tmp_path / "mounts"
    mounts.write_text("/dev/a / ext4 rw 0 0\nserver:/x /data\\040set nfs4 rw 0 0\n")
    assert file_system(Path("/data set/images"), mounts) == "nfs4"
    assert file_system(Path("/data"), mounts) == "ext4"


# --- checkpoints ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["lars", "adamw"])
def test_the_estimate_is_what_a_checkpoint_takes(photos: Path, tmp_path: Path, name: str) -> None:
    args = arguments(
        photos, tmp_path / "run", f"optim.name={name}", "optim.epochs=1",
        "model.backbone_args={channels: [32, 64, 128, 256]}", "optim.lr=0.001",
    )  # fmt: skip
    assert train(args) == 0
    actual = max(path.stat().st_size for path in (tmp_path / "run" / "checkpoints").glob("*.pt"))
    config = doctor.load(args).config
    assert storage.checkpoint_bytes(config, 4, 1) == pytest.approx(actual, rel=0.1)


def test_how_many_checkpoints_there_can_be() -> None:
    config = config_of(
        "checkpoint.keep=3", "checkpoint.keep_every=10", "optim.epochs=100", "checkpoint.best=null"
    )
    assert storage.checkpoint_count(config) == 3 + 10 + 0 + 1
    assert storage.checkpoint_count(config_of("checkpoint.keep=2")) == 2 + 0 + 1 + 1


# --- Slurm ---------------------------------------------------------------------------------------

SCONTROL = """#!/bin/sh
case "$1 $2" in
"show config") cat {0}/config ;;
"show job") cat {0}/job ;;
"show partition") cat {0}/partition ;;
"write batch_script") cat {0}/script ;;
esac
"""


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder whose files are the output of scontrol; at first all is well."""
    folder = tmp_path / "slurm"
    folder.mkdir()
    (folder / "scontrol").write_text(SCONTROL.format(folder))
    (folder / "scontrol").chmod(0o755)
    (folder / "config").write_text(
        "Configuration data as of 2026-11-21T16:00:00\n"
        "JobRequeue              = 1\nKillWait                = 300 sec\n"
        "PreemptMode             = REQUEUE\nPreemptType             = preempt/partition_prio\n"
        "ProctrackType           = proctrack/cgroup\n"
    )
    (folder / "job").write_text(
        "JobId=7 JobName=a b UserId=me(1) Requeue=1 TimeLimit=1-00:00:00 Partition=gpu Comment=x=\n"
    )
    (folder / "partition").write_text("PartitionName=gpu PreemptMode=REQUEUE\n")
    (folder / "script").write_text("#!/bin/bash\n#SBATCH --signal=USR2@300\n")
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    return folder


def edit(path: Path, before: str, after: str) -> None:
    text = path.read_text()
    assert before in text
    path.write_text(text.replace(before, after))


def of_slurm(args: list[str]) -> tuple[int, list[str]]:
    code, text = look(args, ["slurm"])
    return code, [line for line in text.splitlines() if line[6:11] == "slurm"]


def test_slurm_where_nothing_bites(
    cluster: Path, args: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for job in (None, "7"):
        if job:
            monkeypatch.setenv("SLURM_JOB_ID", job)
        code, (line,) = of_slurm(args)
        assert code == 0
        assert line.startswith("ok    slurm         ProctrackType proctrack/cgroup, PreemptMode R")
        assert ("time limit 1-00:00:00" in line) == (job is not None)


@pytest.mark.parametrize(
    ("file", "before", "after", "said"),
    [
        ("config", "proctrack/cgroup", "proctrack/linuxproc", "signals reach all processes here"),
        ("config", "300 sec", "5 sec", "KillWait is 5 s"),
        ("config", "= REQUEUE", "= SUSPEND,GANG", "suspended, while its timeouts go on"),
        ("config", "= REQUEUE", "= CANCEL", "cancelled and not queued again"),
        ("job", "Requeue=1", "Requeue=0", "not queued again after a preemption"),
        ("job", "1-00:00:00", "00:10:00", "the time limit is 00:10:00"),
        ("partition", "REQUEUE", "CANCEL", "jobs in partition gpu are cancelled"),
        ("script", "--signal=USR2@300", "--mem=0", "asks for no signal before the time limit"),
    ],
)
def test_slurm_settings_that_bite(
    cluster: Path, args: list[str], monkeypatch: pytest.MonkeyPatch,
    file: str, before: str, after: str, said: str,
) -> None:  # fmt: skip
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    edit(cluster / file, before, after)
    code, (line,) = of_slurm(args)
    assert code == 0
    assert line.startswith("warn  slurm")
    assert said in line
    assert " -> " in line


@pytest.mark.parametrize(
    ("variables", "said"),
    [
        ({"TORCHELASTIC_RUN_ID": "7"}, "only srun's own children get signals"),
        ({"SLURM_CPUS_PER_TASK": "8"}, "SRUN_CPUS_PER_TASK is unset"),
        ({"SLURM_GPUS_PER_TASK": "1"}, "--gpus-per-task shows each task one GPU"),
        ({"SLURM_NTASKS": "16"}, "one process of a job with 16 tasks was looked at"),
    ],
)
def test_variables_of_slurm_that_bite(
    cluster: Path, args: list[str], monkeypatch: pytest.MonkeyPatch, variables: dict[str, str],
    said: str,
) -> None:  # fmt: skip
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    _, (line,) = of_slurm([*args, "run.device=auto"])
    assert line.startswith("warn  slurm")
    assert said in line


def test_slurm_outside_of_a_job(cluster: Path, args: list[str]) -> None:
    edit(cluster / "config", "JobRequeue              = 1", "JobRequeue              = 0")
    code, (line,) = of_slurm(args)
    assert code == 0
    assert "JobRequeue is 0" in line


def test_scontrol_that_does_not_answer(
    cluster: Path, args: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (cluster / "scontrol").write_text("#!/bin/sh\necho scontrol: error: no route >&2; exit 1\n")
    code, (line,) = of_slurm(args)
    assert (code, line) == (0, "ok    slurm         not in use here")
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    code, (line,) = of_slurm(args)
    assert code == 1
    assert line.startswith("fail  slurm         scontrol: scontrol: error: no route")


def test_the_memory_that_dali_takes_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Training's pipeline holds 900 bytes, others 300, 500 and, with `measure.views`, 700."""
    held = 1900  # 1000 of CUDA, before

    class Pipeline:
        def __init__(self, nbytes: int) -> None:
            self.nbytes, self.open = nbytes, False

        def __iter__(self) -> Iterator[int]:
            nonlocal held
            held += self.nbytes
            self.open = True
            try:
                yield from range(100)
            finally:
                self.close()

        def close(self) -> None:
            nonlocal held
            held -= self.nbytes * self.open
            self.open = False

    monkeypatch.setattr(images, "train_loader", lambda *rest: Pipeline(300))
    monkeypatch.setattr(images, "central_crops", lambda *rest: Pipeline(500))
    monkeypatch.setattr(images, "held_by_others", lambda device: held)
    world, data = World(0, 1, 0, 1, CPU), SimpleNamespace(val=range(5))
    ctx = Context(config_of(), (), world, ["here"], torch.device("cuda", 0), 1.0)
    ctx.data, ctx.bad, ctx.gpu_bytes = data, images.BadImages(), 1000  # type: ignore[assignment]
    assert images.memory_of_pipelines(ctx) == (900, 1400)
    drawn = mock.Mock(**{"return_value.view_loader.return_value": (Pipeline(700), 3)})
    monkeypatch.setattr(images, "Validation", drawn)
    ctx.config = config_of("measure.views=2")
    assert images.memory_of_pipelines(ctx) == (900, 1600)
    assert held == 1900
    numbers = ((900 << 20, 980 << 20), (950 << 20, 960 << 20))
    facts = [images.Decoded(0, (), 10.0, both) for both in numbers]
    *_, finding = images.judge_decoded(ctx, facts)
    assert finding == ok(
        "DALI takes 950 MiB of a GPU in training, and up to 980 MiB while a validation or a "
        "measurement runs"
    )
