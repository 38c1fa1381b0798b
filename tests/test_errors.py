"""Every error that a user's input causes becomes one line."""

from __future__ import annotations

import errno
import os
import re
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from ddp_ssl.commands.common import exit_code
from ddp_ssl.errors import BuildError, ConfigError, reason, refused
from ddp_ssl.methods._registry import load_method
from ddp_ssl.training import build
from ddp_ssl.utils.programs import output_of
from ddp_ssl.utils.waits import limits
from tests.runs import BIN, ROOT, arguments, call, complaint

CAUSES = [
    KeyError("a"), TypeError("no\nsuch\tthing"), AssertionError(), RecursionError("deep"),
    OverflowError(34, "too large"), UnicodeDecodeError("utf-8", b"\xff", 0, 1, "bad"),
    OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "a\x1b[31mb"), StopIteration(),
]  # fmt: skip


@pytest.mark.parametrize("cause", CAUSES, ids=lambda cause: type(cause).__name__)
def test_whatever_input_causes_is_one_line(cause: Exception) -> None:
    with pytest.raises(ConfigError) as raised, refused("data.x: 3", "4 is accepted"):
        raise cause
    line = str(raised.value)
    assert re.fullmatch("data.x: 3: .+; 4 is accepted", line)
    assert line.isprintable()
    assert raised.value.__cause__ is cause


def test_a_lack_of_memory_is_not_the_inputs_fault() -> None:
    with pytest.raises(MemoryError), refused("data.x: 3"):
        raise MemoryError


@pytest.mark.parametrize(
    ("number", "kind"),
    [(errno.ESTALE, BuildError), (errno.EIO, BuildError), (errno.ENOENT, ConfigError)],
)
def test_a_disk_that_fails_may_be_tried_again(number: int, kind: type[ConfigError]) -> None:
    with pytest.raises(ConfigError) as raised, refused("x.npz cannot be read"):
        raise OSError(number, os.strerror(number), "x.npz")
    assert type(raised.value) is kind
    assert str(raised.value) == f"x.npz cannot be read: {os.strerror(number)}"  # named once


def test_a_line_is_not_made_twice() -> None:
    with pytest.raises(ConfigError, match=r"^inner$"), refused("outer"):
        raise ConfigError("inner")
    with refused("outer"):
        pass


def test_the_line_names_what_its_text_does_not_say() -> None:
    assert reason(OSError(errno.ENOENT, "No such file", "x.yaml")) == "x.yaml: No such file"
    assert reason(ValueError("two\nlines")) == "two lines"
    with pytest.raises(KeyError) as raised:
        {}["views"]
    assert re.fullmatch(r"KeyError: 'views' \(test_errors.py, line \d+\)", reason(raised.value))


@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("class Mine(:", r"SyntaxError: .*\(written_badly.py, line 1\)"),
        ("\n\nsize = widht", r"NameError: .*'widht'.*\(written_badly.py, line 3\)"),
        ("raise SystemExit(3)", None),
        ("import no_such_module", "No module named 'no_such_module'"),
        ("Mine = 3", "'written_badly:Mine' is not a subclass"),
    ],
)
def test_a_method_that_cannot_be_imported_is_one_line(
    code: str, said: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "written_badly.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(__import__("sys").modules, "written_badly", raising=False)
    if said is None:  # a module that ends the process does what it says
        with pytest.raises(SystemExit):
            load_method("written_badly:Mine")
        return
    with pytest.raises(ConfigError, match=f"^method.name: .*{said}"):
        load_method("written_badly:Mine")


def test_the_log_keeps_the_traceback_of_a_line(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: Any) -> None:
        with refused("run.dir: its files", "another folder is accepted"):
            _ = {}["planted"]

    monkeypatch.setattr(build, "open_folder", fails)
    code, said = complaint(arguments(photos, tmp_path / "run"))
    assert code == 2
    assert "Traceback" not in said
    (line,) = [line for line in said.splitlines() if "error" in line]
    assert line.startswith(
        "ddp_ssl: error: run.dir: its files: KeyError: 'planted' (test_errors.py"
    )
    log = (tmp_path / "run" / "train.log").read_text()
    assert "Traceback" in log
    assert '_ = {}["planted"]' in log


@pytest.mark.parametrize(
    ("rank", "together", "asked", "said"),
    [
        ("0", False, False, "ddp_ssl: error: too few\n"),
        ("0", True, False, "ddp_ssl: error: too few\n"),
        ("0", False, True, "ddp_ssl: error: too few\n"),
        ("3", False, False, "ddp_ssl: error: rank 3: too few\n"),
        ("3", True, False, ""),
        ("3", False, True, ""),  # the launcher has sent SIGTERM before: rank 0 is gone
    ],
)
def test_an_error_of_one_rank_alone_is_seen(
    rank: str, together: bool, asked: bool, said: str,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    waits: list[float] = []
    # So that the launcher, which rank 0's end stops, can end the wait too.
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    monkeypatch.setattr(time, "sleep", waits.append)
    monkeypatch.setattr(limits, "asked", asked)
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setenv("WORLD_SIZE", "4")

    def fails() -> int:
        error = ConfigError("too few")
        error.together = together
        raise error

    try:
        assert exit_code(fails) == 2
        assert capsys.readouterr().err == said
        assert len(waits) == (rank != "0" and not asked)
        assert signal.getsignal(signal.SIGTERM) == (signal.SIG_DFL if waits else signal.SIG_IGN)
    finally:
        signal.signal(signal.SIGTERM, before)


@pytest.mark.faults
@pytest.mark.parametrize(
    ("wrong", "late_s"), [({0, 1}, 0), ({0, 1}, 2), ({1}, 0)], ids=["both ranks", "late", "rank 1"]
)
def test_under_torchrun_it_is_said_once(
    photos: Path, tmp_path: Path, wrong: set[int], late_s: int
) -> None:
    """Images that are there on one node and not on the other, before the processes meet.

    A late rank 1 gets SIGTERM before it has found the error, when it catches signals already.
    """
    script = tmp_path / "start.py"
    script.write_text(
        "import os, sys, time\nfrom ddp_ssl.train import main\n"
        "from ddp_ssl.run.signals import StopRequest\n"
        "install = StopRequest.install\n"
        f"late_s = {late_s} * int(os.environ['RANK'])\n"
        "StopRequest.install = lambda self: (install(self), time.sleep(late_s))[0]\n"
        f"root = '/nowhere' if int(os.environ['RANK']) in {wrong} else {str(photos)!r}\n"
        f"sys.exit(main(['data.root=' + root, 'run.device=cpu', 'run.dir={tmp_path}/run']))\n"
    )
    launcher = (str(BIN / "torchrun"), "--standalone", "--nproc_per_node", "2")
    done = call(*launcher, str(script), PYTHONPATH=str(ROOT), OMP_NUM_THREADS="1")
    assert done.returncode != 0
    lines = [line for line in done.stderr.splitlines() if "ddp_ssl: error: " in line]
    who = "" if 0 in wrong else "rank 1: "
    assert len(lines) == 1, done.stderr
    assert f"ddp_ssl: error: {who}data.root: /nowhere does not" in lines[0]


@pytest.mark.parametrize(
    ("command", "said"),
    [
        (["no-such-program"], "no-such-program: No such file or directory"),
        (["sh", "-c", "echo one >&2; echo two >&2; exit 3"], "sh: two"),
        (["sh", "-c", "exit 3"], "sh: exit code 3"),
        (["sh", "-c", r"printf '\377' >&2; exit 1"], "sh: \ufffd"),
        (["sleep", "5"], "sleep: no answer within 0.1 s"),
    ],
)
def test_a_program_that_fails_is_one_line(command: list[str], said: str) -> None:
    with pytest.raises(OSError, match=command[0]) as raised:
        output_of(command, timeout_s=0.1 if command[0] == "sleep" else 60)
    assert reason(raised.value) == said


def test_the_text_of_a_program() -> None:
    assert output_of(["echo", "a b"]) == "a b\n"


def test_no_list_of_types_is_added() -> None:
    """`refused` and `if_readable` take whatever input causes; a list of types forgets some."""
    package = Path(build.__file__).parents[1]
    lists = {
        f"{path.relative_to(package)}: {line.strip()}"
        for path in package.rglob("*.py")
        for line in path.read_text().splitlines()
        if line.strip().startswith("except (")
    }
    assert len(lists) == 11, sorted(lists)
